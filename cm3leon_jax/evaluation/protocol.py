"""A protocol: what is measured, on which documents, with which seed; and its result.

eval/NAME.CHECKPOINT.json    scores with 95 % intervals, and all that made them
samples/TASK/                pictures and an index, for the report
"""

import dataclasses
import json
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image as Pillow

from cm3leon_jax import config as configs
from cm3leon_jax.api import CM3Leon
from cm3leon_jax.data.documents import Document
from cm3leon_jax.data.sources import read_documents
from cm3leon_jax.training.checkpoint import latest_step

Score = dict[str, float | int]
_RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """`world` says which evaluator reads the documents, `tasks` what is measured; the
    first `documents` of `split` are used and the first `shown` of a task's samples
    kept for the report."""

    name: str
    world: str
    split: str
    documents: int
    tasks: tuple[str, ...]
    shown: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A line of a task's index: a text, its pictures, whether it is right."""

    text: str
    pictures: dict[str, Pillow.Image]
    ok: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a task's evaluator found: scores by name of the measure, and samples."""

    scores: dict[str, Score] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)


Evaluator = Callable[[CM3Leon, Sequence[Document], int], Outcome]


def interval(
    values: np.ndarray, statistic: Callable[[np.ndarray], float], n: int
) -> Score:
    """`statistic` of `values` [M, …] with its 95 % bootstrap interval over the rows.

    `n` is the number of things counted (objects, pictures), for the reader.
    """
    rng = np.random.default_rng(0)
    draws = [
        statistic(values[rng.integers(len(values), size=len(values))])
        for _ in range(_RESAMPLES)
    ]
    low, high = np.quantile(draws, (0.025, 0.975))
    return {
        "value": round(float(statistic(values)), 5),
        "low": round(float(low), 5),
        "high": round(float(high), 5),
        "n": int(n),
    }


def run_protocol(
    workdir: Path,
    checkpoint: str,
    protocol: Protocol,
    evaluators: dict[str, Evaluator],
) -> dict[str, Any]:
    """Measures a checkpoint by a protocol; returns and writes the result.

    Nothing is written before all tasks are done. Raises ValueError for a task that the
    world does not have or a split with too few documents.
    """
    start = time.monotonic()
    unknown = set(protocol.tasks) - set(evaluators)
    if unknown:
        raise ValueError(
            f"protocol {protocol.name}: no task {sorted(unknown)[0]!r} in this world, "
            f"only {', '.join(evaluators)}"
        )
    documents = read_documents(workdir / "documents", protocol.split)
    if len(documents) < protocol.documents:
        raise ValueError(
            f"protocol {protocol.name} needs {protocol.documents} {protocol.split} "
            f"documents, but {workdir / 'documents'} has {len(documents)}"
        )
    model = CM3Leon.load(workdir, checkpoint)
    chosen = documents[: protocol.documents]
    outcomes = {
        task: evaluators[task](model, chosen, protocol.seed) for task in protocol.tasks
    }
    folder, _, step = checkpoint.partition("@")
    result = {
        "protocol": protocol.name,
        "protocol_hash": configs.config_hash(dataclasses.asdict(protocol)),
        "config": model.system.name,
        "config_hash": configs.config_hash(configs.read(workdir)),
        "checkpoint": checkpoint,
        "step": int(step) if step else latest_step(workdir / folder),
        "seed": protocol.seed,
        "hardware": hardware(),
        "seconds": round(time.monotonic() - start, 1),
        "scores": {
            f"{task}/{measure}": score
            for task, outcome in outcomes.items()
            for measure, score in outcome.scores.items()
        },
    }
    for task, outcome in outcomes.items():
        write_samples(workdir / "samples" / task, outcome.samples[: protocol.shown])
    path = result_file(workdir, protocol, checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1))
    return result


def result_file(workdir: Path, protocol: Protocol, checkpoint: str) -> Path:
    """Where the result of a protocol lies."""
    name = f"{protocol.name.replace(':', '-')}.{checkpoint.replace('/', '-')}.json"
    return workdir / "eval" / name


def write_samples(directory: Path, samples: Sequence[Sample]) -> None:
    """PNG files and `index.jsonl`, in place of what was there."""
    if not samples:
        return
    shutil.rmtree(directory, ignore_errors=True)
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


def hardware() -> str:
    """The devices in use, in words."""
    devices = jax.devices()
    name = devices[0].device_kind
    if name == "cpu":
        name = f"{platform.machine()} CPU"
    return f"{len(devices)} x {name}, jax {jax.__version__}"
