"""A protocol: what is measured, on which documents, with which seed; and its result.

eval/NAME-HASH.CHECKPOINT.json         scores with 95 % intervals, all that made them
samples/NAME-HASH.CHECKPOINT/TASK/     pictures and an index, for the report
samples/…/TASK_failures/               what else went wrong

HASH is the beginning of the protocol's: a changed protocol overwrites nothing.
"""

import dataclasses
import json
import platform
import re
import shutil
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image as Pillow

from cm3leon_jax import config as configs
from cm3leon_jax.api import CM3Leon
from cm3leon_jax.data.documents import Document
from cm3leon_jax.data.sources import ENOUGH, read_documents
from cm3leon_jax.evaluation.page import FAILURES, stage_hash
from cm3leon_jax.training.checkpoint import latest_step

Score = dict[str, float | int]
_RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """`world` says which evaluator reads the documents, `tasks` what is measured.

    The first `documents` of `split` are used, all where there are fewer. The first
    `shown` of a task's samples are kept for the report, and as many failures later on.
    """

    name: str
    world: str
    split: str
    documents: int
    tasks: tuple[str, ...]
    shown: int
    seed: int

    def __post_init__(self):
        if self.documents < 1:
            raise ValueError(f"protocol.documents={self.documents} must be positive")


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
    values: np.ndarray,
    statistic: Callable[[np.ndarray], float],
    n: int,
    clusters: Sequence[Hashable] | None = None,
) -> Score:
    """`statistic` of `values` [M, …] with its 95 % bootstrap interval over the rows.

    `n` is the number of things counted (objects, pictures), for the reader. Rows of
    one of the `clusters` [M] are copies of each other: they are drawn together, and
    the score says how many clusters there are.
    """
    names = list(clusters if clusters is not None else range(len(values)))
    members: dict[Hashable, list[int]] = {}
    for row, name in enumerate(names):
        members.setdefault(name, []).append(row)
    groups = [np.array(rows) for rows in members.values()]
    if len(names) != len(values) or not groups:
        raise ValueError(f"{len(names)} clusters for {len(values)} values")
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(_RESAMPLES):
        drawn = rng.integers(len(groups), size=len(groups))
        draws.append(statistic(values[np.concatenate([groups[i] for i in drawn])]))
    low, high = np.quantile(draws, (0.025, 0.975))
    score: Score = {
        "value": round(float(statistic(values)), 5),
        "low": round(float(low), 5),
        "high": round(float(high), 5),
        "n": int(n),
    }
    return score if clusters is None else score | {"clusters": len(groups)}


def run_protocol(
    workdir: Path,
    checkpoint: str,
    protocol: Protocol,
    evaluators: dict[str, Evaluator],
) -> dict[str, Any]:
    """Measures a checkpoint by a protocol; returns and writes the result.

    Nothing is written before all tasks are done. Raises ValueError for a task that the
    world does not have or a split with hardly any documents.
    """
    start = time.monotonic()
    unknown = set(protocol.tasks) - set(evaluators)
    if unknown:
        raise ValueError(
            f"protocol {protocol.name}: no task {sorted(unknown)[0]!r} in this world, "
            f"only {', '.join(evaluators)}"
        )
    documents = read_documents(workdir / "documents", protocol.split)
    if len(documents) < min(protocol.documents, ENOUGH):
        raise ValueError(
            f"{workdir / 'documents'} has {len(documents)} documents of split "
            f"{protocol.split!r}, and fewer than {ENOUGH} score nothing: prepare more "
            f"(a folder's {protocol.split}_percent says how many are set aside)"
        )
    model = CM3Leon.load(workdir, checkpoint)
    chosen = documents[: protocol.documents]
    outcomes = {
        task: evaluators[task](model, chosen, protocol.seed) for task in protocol.tasks
    }
    folder, _, step = checkpoint.partition("@")
    result = {
        "protocol": protocol.name,
        "protocol_hash": _protocol_hash(protocol),
        "config": model.system.name,
        "config_hash": configs.config_hash(configs.read(workdir)),
        "checkpoint": checkpoint,
        "step": int(step) if step else latest_step(workdir / folder),
        "inputs_hash": stage_hash(workdir / folder),
        "documents": len(chosen),
        "seed": protocol.seed,
        "sampling": dataclasses.asdict(model.system.sampling),
        "hardware": hardware(),
        "seconds": round(time.monotonic() - start, 1),
        "measured": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        "scores": {
            f"{task}/{measure}": score
            for task, outcome in outcomes.items()
            for measure, score in outcome.scores.items()
        },
    }
    path = result_file(workdir, protocol, checkpoint)
    samples = workdir / "samples" / path.stem
    shutil.rmtree(samples, ignore_errors=True)
    for task, outcome in outcomes.items():
        write_samples(samples / task, outcome.samples[: protocol.shown])
        others = outcome.samples[protocol.shown :]
        failures = [sample for sample in others if sample.ok is False]
        write_samples(samples / f"{task}{FAILURES}", failures[: protocol.shown])
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1)
    path.write_text(text)
    return json.loads(text)  # as whoever reads the file finds it


def result_file(workdir: Path, protocol: Protocol, checkpoint: str) -> Path:
    """Where the result of a protocol lies; its samples lie under the same name."""
    digits = _protocol_hash(protocol)[:6]
    name = f"{protocol.name}-{digits}.{checkpoint}.json"
    return workdir / "eval" / re.sub(r"[^\w.@-]", "-", name)


def _protocol_hash(protocol: Protocol) -> str:
    return configs.config_hash(dataclasses.asdict(protocol))


def write_samples(directory: Path, samples: Sequence[Sample]) -> None:
    """PNG files and `index.jsonl` in a new folder; none where there is no sample."""
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


def hardware() -> str:
    """The devices in use, in words."""
    devices = jax.devices()
    name = devices[0].device_kind
    if name == "cpu":
        name = f"{platform.machine()} CPU"
    return f"{len(devices)} x {name}, jax {jax.__version__}"
