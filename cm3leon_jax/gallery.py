"""Pictures of a long list of prompts in a folder, resumed after an interruption.

Next to the pictures lies `samples.jsonl` with one line for each that is finished: file,
prompt and a hash of everything else that it depends on. What is already there with the
same line is not drawn again; what has another prompt or other settings is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image as Pillow

from cm3leon_jax.config import config_hash

LINES = "samples.jsonl"


def fill(
    directory: str | Path,
    prompts: Sequence[str],
    draw: Callable[[list[str], list[int]], Sequence[Pillow.Image]],
    *,
    settings: Mapping[str, Any],
    batch: int,
) -> list[Path]:
    """Draws what is missing, `batch` prompts at a time: `0000.png` for the first.

    `draw` is given prompts and their numbers in the list, from which the noise should
    follow: then a picture is the same whenever it is drawn. `settings` (JSON-able) are
    all that a picture depends on beside its prompt: checkpoint, seed, sampler, … A
    picture is complete as soon as its file is there. Returns all files, in order.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    key = config_hash(dict(settings))
    lines = [
        {"file": f"{i:04d}.png", "prompt": prompt, "settings": key}
        for i, prompt in enumerate(prompts)
    ]
    finished = _finished(directory / LINES)
    missing = [
        i
        for i, line in enumerate(lines)
        if finished.get(line["file"]) != line
        or not (directory / line["file"]).is_file()
    ]
    for start in range(0, len(missing), batch):
        numbers = missing[start : start + batch]
        pictures = draw([prompts[i] for i in numbers], numbers)
        with open(directory / LINES, "a") as log:
            for i, picture in zip(numbers, pictures, strict=True):
                path = directory / lines[i]["file"]
                partial = path.with_suffix(".part")
                picture.save(partial, format="png")
                os.replace(partial, path)
                log.write(json.dumps(lines[i]) + "\n")
    return [directory / line["file"] for line in lines]


def _finished(path: Path) -> dict[str, dict[str, str]]:
    """The newest line about each file; a line cut short by an interruption is ended."""
    if not path.is_file():
        return {}
    text = path.read_text()
    if text and not text.endswith("\n"):
        with open(path, "a") as log:
            log.write("\n")
    found = {}
    for row in text.splitlines():
        try:
            line = json.loads(row)
            found[line["file"]] = line
        except (ValueError, KeyError, TypeError):
            continue
    return found
