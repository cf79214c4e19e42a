"""A result's files: what was found, the bootstrap's draws, samples as pictures.

The result's own file is the last, and draws say which result they are of.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cm3leon_jax import config as configs
from cm3leon_jax.evaluation import contact_sheet
from cm3leon_jax.evaluation.contact_sheet import Card
from cm3leon_jax.evaluation.kept import digest, write_bytes
from cm3leon_jax.evaluation.page import FAILURES

if TYPE_CHECKING:
    from cm3leon_jax.evaluation.protocol import Outcome, Sample


def result(
    path: Path,
    samples: Path,
    found: dict[str, Any],
    outcomes: Mapping[str, Outcome],
    shown: int,
) -> None:
    """Leaves what was found, its bootstrap's draws, and `shown` samples of each task
    and as many failures after those."""
    for task, outcome in outcomes.items():
        failures = [s for s in outcome.samples[shown:] if s.ok is False]
        for name, some in ((task, outcome.samples), (f"{task}{FAILURES}", failures)):
            shutil.rmtree(samples / name, ignore_errors=True)
            _samples(samples / name, some[:shown])
    path.parent.mkdir(parents=True, exist_ok=True)
    draws: dict[str, Any] = {
        key: score.draws.astype(np.float32)
        for key, score in found["scores"].items()
        if hasattr(score, "draws")
    }
    # A kill before the result's own file leaves draws that are not of the old one.
    np.savez_compressed(file := io.BytesIO(), of=digest(found), **draws)
    write_bytes(path.with_suffix(".npz"), file.getvalue())
    configs.write_whole(path, json.dumps(found, indent=1))


def _samples(directory: Path, samples: Sequence[Sample]) -> None:
    """PNG files, `index.jsonl` and all on one `sheet.png` in a new folder; none where
    there is no sample."""
    if not samples:
        return
    directory.mkdir(parents=True)
    lines = []
    for i, sample in enumerate(samples):
        files = {}
        for label, picture in sample.pictures.items():
            files[label] = f"{i:03d}-{label.replace(' ', '_')}.png"
            picture.save(directory / files[label])
        line = {"prompt": sample.text, "pictures": files}
        lines.append(line | {"ok": sample.ok, "note": sample.note})
    index = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "index.jsonl").write_text(index)
    cards = [
        Card(
            str(i),
            sample.text or sample.note,
            [(k, np.asarray(x.convert("RGB"))) for k, x in sample.pictures.items()],
        )
        for i, sample in enumerate(samples)
    ]
    contact_sheet.picture(cards).save(directory / "sheet.png")
