"""A protocol: what is measured, on which documents, with which seed; and its result.

eval/NAME-HASH.CHECKPOINT.json         scores with 95 % intervals, all that made them
eval/NAME-HASH.CHECKPOINT.npz          the bootstrap's draws, for `compare.py`
samples/NAME-HASH.CHECKPOINT/TASK/     pictures and an index, for the report; sheet.png
samples/…/TASK_failures/               what else went wrong
samples/NAME-HASH.CHECKPOINT.parts/    answers of a run that is not finished

HASH is the beginning of the protocol's: a changed protocol overwrites nothing. A result
is written when all tasks are done; the same command goes on where a run was interrupted
(`kept.py`). In a job of several processes each asks a model on its own devices for its
share, and all read what all have written.
"""

import dataclasses
import json
import math
import platform
import re
import shutil
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image as Pillow

from cm3leon_jax import config as configs
from cm3leon_jax.api import CM3Leon
from cm3leon_jax.codec import load_image_tokenizer
from cm3leon_jax.data.documents import Document
from cm3leon_jax.data.sources import ENOUGH, read_documents
from cm3leon_jax.evaluation import contact_sheet, public_sets
from cm3leon_jax.evaluation.kept import Kept, Parts, digest, write_result
from cm3leon_jax.evaluation.page import FAILURES, stage_hash
from cm3leon_jax.evaluation.public_sets import PublicConfig
from cm3leon_jax.models.decoder import Decoder
from cm3leon_jax.parallel.distributed import together
from cm3leon_jax.parallel.mesh import MeshConfig, make_mesh
from cm3leon_jax.retrieval.embed import Embedder
from cm3leon_jax.sampling.engine import Precision
from cm3leon_jax.system import System
from cm3leon_jax.training.checkpoint import latest_step

Score = dict[str, float | int]
TOKENIZER = "image_tokenizer"  # a checkpoint that public pictures can be measured by
_RESAMPLES = 1000
# Settings that came after the first results: they count where they are given.
_LATER = {"data_hash": None, "public": None, "version": 1}


class Interval(dict[str, float | int]):
    """A `Score` that knows the bootstrap's draws of its value, float64 [1000].

    Draw i is of the same clusters for everybody who has as many, so that two results of
    the same `names`, a digest of the rows', can be compared draw by draw. `rows` is
    what `statistic` is of.
    """

    draws: np.ndarray
    rows: np.ndarray
    statistic: Callable[[np.ndarray], float]
    names: str


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """`world` says which evaluator reads the documents, `tasks` what is measured.

    The first `documents` of `split` are used, all where there are fewer. The first
    `shown` of a task's samples are kept for the report, and as many failures later on.
    `data_hash`, if given, is the only data that is measured; every result has its own.
    Without it, `data` has the hashes that documents must have, by what they are made
    from (`data_key`); it is no part of the protocol's own hash. Of all other data the
    first result of a work directory decides: later ones must be of the same.
    `public`: a public set that the documents come from, and what is done with them.
    `version` is that of the scores: it is raised when one of the same samples changes.
    """

    name: str
    world: str
    split: str
    documents: int
    tasks: tuple[str, ...]
    shown: int
    seed: int
    data_hash: str | None = None
    public: PublicConfig | None = None
    data: dict[str, str] = field(default_factory=dict)
    version: int = 1

    def __post_init__(self):
        if self.documents < 1:
            raise ValueError(f"protocol.documents={self.documents} must be positive")

    @property
    def hash(self) -> str:
        values = dataclasses.asdict(self)
        del values["data"]
        public = values["public"] or {}
        for section, later in ((values, _LATER), (public, public_sets.LATER)):
            for name in [x for x in section if section[x] == later.get(x, section)]:
                del section[name]
        return configs.config_hash(values)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A line of a task's index: a text, its pictures, whether it is right."""

    text: str
    pictures: dict[str, Pillow.Image]
    ok: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a task's evaluator found: scores by name of the measure, and samples. A
    name that begins with a slash names the task too: `/TASK/MEASURE`."""

    scores: dict[str, Score] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)


Evaluator = Callable[[CM3Leon, Sequence[Document], int], Outcome]


def interval(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], float],
    n: int,
    clusters: Sequence[Hashable] | None = None,
) -> Interval:
    """`statistic` of `values` [M, …] with its 95 % bootstrap interval over the rows.

    `n` is the number of things counted (objects, pictures), for the reader. Rows of
    one of the `clusters` [M] are copies of each other: they are drawn together, and
    the score says how many clusters there are; where which rows there are depends on
    the model, they must name them. Of rows that are all 0, or all 1, every draw is the
    same: the interval of their mean is Wilson's.
    """
    names = list(clusters if clusters is not None else range(len(values)))
    members: dict[Hashable, list[int]] = {}
    for row, name in enumerate(names):
        members.setdefault(name, []).append(row)
    groups = [np.array(rows) for rows in members.values()]
    if len(names) != len(values) or not groups:
        raise ValueError(f"{len(names)} clusters for {len(values)} values")
    ordered, sizes = values[np.concatenate(groups)], np.array([*map(len, groups)])
    starts = np.cumsum(sizes) - sizes
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(_RESAMPLES):
        drawn = rng.integers(len(groups), size=len(groups))
        many = sizes[drawn]
        # Of the rows of every group drawn: its first, and how far each is behind it.
        first = np.repeat(starts[drawn] - (np.cumsum(many) - many), many)
        draws.append(statistic(ordered[first + np.arange(len(first))]))
    low, high = np.quantile(draws, (0.025, 0.975))
    if statistic is np.mean and low == high and low in (0, 1):
        beyond = 1.96**2 / (len(groups) + 1.96**2)
        low, high = max(low - beyond, 0), min(high + beyond, 1)
    score = Interval(
        value=round(float(statistic(values)), 5),
        low=round(float(low), 5),
        high=round(float(high), 5),
        n=int(n),
    )
    if clusters is not None:
        score["clusters"] = len(groups)
    score.draws, score.rows, score.statistic = np.array(draws), values, statistic
    score.names = digest(names)
    return score


def run_protocol(
    workdir: Path,
    checkpoint: str,
    protocol: Protocol,
    evaluators: Mapping[str, Evaluator],
    *,
    examples: Sequence[Any] | None = None,
    decoder: Decoder | None = None,
    mesh: jax.sharding.Mesh | None = None,
    encoder: Embedder | None = None,
    precision: Precision | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Measures a checkpoint by a protocol; returns and writes the result.

    `examples` take the place of the work directory's documents; `decoder`, on `mesh`,
    that of the checkpoint, which a run may not have saved. `encoder` compares texts
    with pictures in place of the system's own. A `precision` has a result of its own.
    `overwrite`: what an interrupted run has left is thrown away. Raises ValueError for
    a task that the world does not have, a split with hardly any documents, data of
    another hash, weights or scores that are no numbers, and no scores at all.
    """
    start = time.monotonic()
    unknown = set(protocol.tasks) - set(evaluators)
    if unknown:
        raise ValueError(
            f"protocol {protocol.name}: no task {sorted(unknown)[0]!r} in this world, "
            f"only {', '.join(evaluators)}"
        )
    chosen = _chosen(workdir, protocol, examples)
    data_hash = digest(chosen)
    how = str(precision or "")
    path = result_file(workdir, protocol, checkpoint + f".{how}" * bool(how))
    known, source = _known_data(workdir, protocol, len(chosen), overwrite)
    if known not in (None, data_hash):
        raise ValueError(
            f"protocol {protocol.name} is for data of hash {known} ({source}), these "
            f"{len(chosen)} of split {protocol.split!r} have {data_hash}: they are "
            "others, or in another order. Measure the protocol's own data, or give "
            f"--config.data_hash={data_hash}, which is another protocol"
        )
    if jax.process_count() > 1 and mesh is None:
        mesh = make_mesh(MeshConfig(), jax.local_devices())
    if checkpoint.partition("@")[0] == TOKENIZER:
        model: Any = _Tokenizer(workdir)
    else:
        given: Any = {"mesh": mesh, "decoder": decoder, "precision": precision}
        model = CM3Leon.load(workdir, checkpoint, **given)
        if encoder is not None:
            model.context.encoder = encoder  # it chooses among candidates too
    _check_finite(model, f"{workdir}, checkpoint {checkpoint}")
    samples = workdir / "samples" / path.stem
    settings = dataclasses.asdict(protocol)
    del settings["data"]
    sampling, asked = dataclasses.asdict(model.system.sampling), settings["public"]
    if asked and asked["sampler"]:  # in the place of all others
        sampling = {key: sampling[key] for key in ("rerank", "text_candidates")}
    given = {key: asked[key] for key in ("sampler", "rerank")} if asked else {}
    sampling |= {key: value for key, value in given.items() if value}
    folder, _, named = checkpoint.partition("@")
    step = int(named) if named else latest_step(workdir / folder)
    result = {
        "protocol": protocol.name,
        "protocol_hash": protocol.hash,
        "config": model.system.name,
        "config_hash": configs.config_hash(configs.read(workdir)),
        "checkpoint": checkpoint,
        "step": step,
        "inputs_hash": stage_hash(workdir / folder),
        "data_hash": data_hash,
        "documents": len(chosen),
        "seed": protocol.seed,
        "sampling": sampling,
        "settings": settings,
    }
    result |= {"precision": how} if how else {}
    if encoder is not None:
        result["encoder"] = encoder.name
    if (memory := getattr(model, "memory", None)) is not None:
        result["bank"] = digest(memory.ids)
    saved = workdir / folder / "checkpoints" / str(step)
    identity = digest([result, saved.stat().st_mtime_ns if saved.is_dir() else None])
    parts = Parts(samples.with_name(f"{samples.name}.parts"))
    if overwrite and jax.process_index() == 0:
        shutil.rmtree(parts.folder, ignore_errors=True)
    together("evaluation begins")
    kept: Any = Kept(model, parts, identity, encoder)
    for _, found in [] if overwrite else _earlier(workdir, protocol):
        kept.known |= found.get("examples", {})
    outcomes = {
        task: evaluators[task](kept, chosen, protocol.seed) for task in protocol.tasks
    }
    scores = {
        measure[1:] if measure.startswith("/") else f"{task}/{measure}": score
        for task, outcome in outcomes.items()
        for measure, score in outcome.scores.items()
        if score["n"]  # a rate of nothing is neither good nor bad
    }
    if not scores:
        what = f"{', '.join(outcomes)} left no score of {len(chosen)} examples"
        raise ValueError(f"protocol {protocol.name} has measured nothing: {what}")
    for key, score in scores.items():
        if not all(math.isfinite(value) for value in score.values()):
            raise ValueError(
                f"{key} is {score['value']} ({score}): what was drawn or measured is "
                f"not finite; no result is written. {parts.folder} has the answers"
            )
    result |= {
        "examples": kept.seen,
        "hardware": hardware(),
        "seconds": round(time.monotonic() - start, 1),
        "measured": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        "scores": scores,
    }
    if jax.process_index() == 0:
        for task, outcome in outcomes.items():
            more = [s for s in outcome.samples[protocol.shown :] if s.ok is False]
            for name, some in ((task, outcome.samples), (f"{task}{FAILURES}", more)):
                shutil.rmtree(samples / name, ignore_errors=True)
                contact_sheet.write(samples / name, some[: protocol.shown])
        write_result(path, result)
        shutil.rmtree(parts.folder, ignore_errors=True)
    together("evaluation ends")
    return json.loads(path.read_text())  # as whoever reads the file finds it


def _check_finite(model: Any, place: str) -> None:
    """ValueError where a weight is not: pictures and texts would come of it as well,
    and some scores would call them perfect."""
    image = getattr(getattr(model, "codec", None), "image", None)
    for part in (getattr(model, "decoder", None), getattr(image, "model", None)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(part):
            real = jnp.issubdtype(leaf.dtype, jnp.inexact)
            if real and not jnp.isfinite(leaf).all():
                raise ValueError(
                    f"{place}: {type(part).__name__}{jax.tree_util.keystr(path)} is "
                    "not finite: nothing is measured by it"
                )


def data_key(workdir: Path, split: str, count: int) -> str | None:
    """What the first documents of a split follow from: the settings of their source
    (not where its files lie), the split and their number; None where nobody knows."""
    made = workdir / "documents" / f"{split}.json"
    if not made.is_file():
        return None
    settings = configs.read_json(made, "prepare the documents again").get("made_from")
    if not settings:
        return None
    named = {key: x for key, x in settings[0].items() if key not in ("cache", "path")}
    return f"{configs.config_hash(named)} {split}[:{count}]"


def _known_data(
    workdir: Path, protocol: Protocol, count: int, overwrite: bool
) -> tuple[str | None, str]:
    """The hash that the data must have, if any, and who says so."""
    if protocol.data_hash is not None:
        return protocol.data_hash, "data_hash"
    key = None
    if protocol.data and protocol.public is None:
        key = data_key(workdir, protocol.split, count)
    if key in protocol.data:
        return protocol.data[key], (
            "as it is made from these settings; prepare it anew if another version of "
            "this package, numpy, Pillow or resvg_py has drawn it"
        )
    for other, found in [] if overwrite else _earlier(workdir, protocol):
        if data_hash := found.get("data_hash"):
            return data_hash, f"as in {other}: delete that, or give --overwrite"
    return None, ""


def _earlier(workdir: Path, protocol: Protocol) -> list[tuple[Path, dict[str, Any]]]:
    """The protocol's results in a work directory."""
    start = result_file(workdir, protocol, "").name.removesuffix(".json")
    files = sorted((workdir / "eval").glob(f"{start}*.json"))
    return [(path, configs.read_json(path, "delete it")) for path in files]


class _Tokenizer:
    """What of a model there is before a decoder: enough to measure the tokenizer."""

    memory, classes = None, ()

    def __init__(self, workdir: Path):
        self.system = System.load(workdir)
        self.codec = SimpleNamespace(image=load_image_tokenizer(workdir), masks=None)


def _chosen(
    workdir: Path, protocol: Protocol, examples: Sequence[Any] | None
) -> Sequence[Any]:
    place = f"the {protocol.public.set} set" if protocol.public else workdir
    if examples is None:
        place = workdir / "documents"
        examples = read_documents(place, protocol.split)
    if len(examples) < min(protocol.documents, ENOUGH):
        raise ValueError(
            f"{place} has {len(examples)} documents of split {protocol.split!r}, and "
            f"fewer than {ENOUGH} score nothing: prepare more "
            f"(a folder's {protocol.split}_percent says how many are set aside)"
        )
    return examples[: protocol.documents]


def result_file(workdir: Path, protocol: Protocol, checkpoint: str) -> Path:
    """Where the result of a protocol lies; its samples lie under the same name."""
    name = f"{protocol.name}-{protocol.hash[:6]}.{checkpoint}.json"
    return workdir / "eval" / re.sub(r"[^\w.@-]", "-", name)


def hardware() -> str:
    """The devices in use, in words."""
    devices = jax.devices()
    name = devices[0].device_kind
    if name == "cpu":
        name = f"{platform.machine()} CPU"
    return f"{len(devices)} x {name}, jax {jax.__version__}"
