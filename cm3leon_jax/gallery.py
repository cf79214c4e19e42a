"""Pictures of a long list in a folder, resumed after an interruption.

Next to the pictures lies `samples.jsonl` with one line for each number of the list that
is finished: its prompt, a key of all that it depends on, its pictures. What is already
there with the same line is not drawn again; what has another prompt or key is.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tqdm
from PIL import Image as Pillow

from cm3leon_jax.sampling.rerank import Ranked

LINES = "samples.jsonl"
Made = Pillow.Image | Ranked[Pillow.Image]


def fill(
    directory: str | Path,
    prompts: Sequence[str],
    draw: Callable[[list[int]], Sequence[Made]],
    *,
    keys: Sequence[str],
    batch: int,
) -> list[dict[str, Any]]:
    """Draws what is missing, `batch` numbers of the list at a time: `0000.png` for the
    first, or `0000-00.png`, … for its candidates, best first.

    `draw` is given numbers, from which the noise should follow: then a picture is the
    same whenever it is drawn. `keys` name all that each depends on beside its prompt:
    weights, seed, sampler, … A picture is complete as soon as its file is there. A bar
    shows how many there are; off a terminal each batch is a line on standard error.
    Returns all pictures in order: "picture", its path, and of candidates the scores.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    pairs = enumerate(zip(prompts, keys, strict=True))
    lines = [{"number": i, "prompt": each, "key": key} for i, (each, key) in pairs]
    found = _finished(directory / LINES)
    missing = [
        i
        for i, line in enumerate(lines)
        if (known := found.get(i, {})) != known | line
        or not all((directory / x["picture"]).is_file() for x in known["pictures"])
    ]
    began = time.monotonic()
    with tqdm.tqdm(total=len(missing), unit="image", disable=None) as bar:
        for start in range(0, len(missing), batch):
            numbers = missing[start : start + batch]
            made = draw(numbers)
            with open(directory / LINES, "a") as log:
                for i, each in zip(numbers, made, strict=True):
                    found[i] = lines[i] | {"pictures": _saved(directory, i, each)}
                    log.write("\n" + json.dumps(found[i]))
            bar.update(len(numbers))
            if bar.disable:  # standard error is no terminal
                done = start + len(numbers)
                rate = f"{done / (time.monotonic() - began):.3g} images/s"
                print(f"{done}/{len(missing)} images, {rate}", file=sys.stderr)
    every = (x for i in range(len(lines)) for x in found[i]["pictures"])
    return [x | {"picture": str(directory / x["picture"])} for x in every]


def _saved(directory: Path, number: int, made: Made) -> list[dict[str, Any]]:
    """The pictures of a number, each of them whole; what is said of each."""
    if isinstance(made, Ranked):
        values = {"score": made.scores, "number": made.numbers, **made.parts}
        outputs = made.outputs
    else:
        values, outputs = {}, (made,)
    rows = []
    for rank, picture in enumerate(outputs):
        path = directory / f"{number:04d}{f'-{rank:02d}' if values else ''}.png"
        partial = path.with_suffix(".part")
        picture.save(partial, format="png")
        os.replace(partial, path)
        said = {key: each[rank] for key, each in values.items()}
        rows.append({"picture": path.name} | said)
    return rows


def _finished(path: Path) -> dict[int, dict[str, Any]]:
    """The newest line about each number; an interruption may have cut one short."""
    found = {}
    for row in path.read_text().splitlines() if path.is_file() else ():
        try:
            line = json.loads(row)
            found[line["number"]] = line
        except (ValueError, KeyError, TypeError):
            continue
    return found
