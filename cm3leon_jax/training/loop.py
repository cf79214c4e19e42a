"""The training loop, the only one: decoder and image tokenizer both run in it.

It knows nothing of models. A state is any pytree with a `.step`; a step is a pure
function `(state, batch) -> (state, metrics)` that it compiles once; batch t is a pure
function of t, so that resuming needs no more than the number of batches consumed. A
batch with which the loss goes bad is skipped: training goes on from the last checkpoint
(`watch.py`). A run that is told to stop saves first (`preemption.py`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cm3leon_jax.parallel.rules import Rules, batch_sharding, shardings
from cm3leon_jax.training.checkpoint import Checkpoints
from cm3leon_jax.training.metrics import Work
from cm3leon_jax.training.preemption import Notice, Preempted
from cm3leon_jax.training.prefetch import Prefetch
from cm3leon_jax.training.recorder import HOST_ONLY, Recorder
from cm3leon_jax.training.watch import Bad, BadBatches, Watch

State = TypeVar("State")
HostBatch = dict[str, Any]
Evaluation = tuple[int, Callable[[Any], Mapping[str, float]]]

PREFETCHED = 2


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Updates in all, and how often (in updates) to log and to save.

    `keep` checkpoints are kept; `seed` makes the initial state. A batch whose loss or
    gradient is no number, or whose loss is more than `spike` nats (0: any) above the
    median of the last hundred, is skipped, up to `recoveries` between two checkpoints.
    """

    steps: int
    log_every: int
    checkpoint_every: int
    keep: int = 2
    seed: int = 0
    spike: float = 0.0
    recoveries: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"loop.{name}={getattr(self, name)} must be positive")
        for name in ("spike", "recoveries"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"loop.{name}={getattr(self, name)} must not be negative"
                )


def run(
    *,
    config: LoopConfig,
    step_fn: Callable[[State, dict[str, jax.Array]], tuple[State, dict]],
    init_fn: Callable[[jax.Array], State],
    load_fn: Callable[[Any, jax.Array], State] | None = None,
    batches: Callable[[int], Iterator[HostBatch]],
    batch_size: int,
    directory: str | Path,
    mesh: Mesh,
    rules: Rules,
    settings: Mapping[str, Any],
    work: Work,
    evaluations: Mapping[str, Evaluation] | None = None,
    batch_ids: Callable[[HostBatch], list[str]] | None = None,
    name: str = "train",
) -> State:
    """Trains from the newest checkpoint in `directory`, or from `init_fn(key)`.

    `load_fn(placement, key)`, if given, makes the first state in place of `init_fn`: of
    the same form, with the shardings `placement`, its arrays read from somewhere.

    `batches(t)` yields this process's share (`row_share`) of batches t, t+1, …: dicts
    of arrays with a leading batch axis, in all `batch_size` long. `settings` is what a
    checkpoint must agree with (see `Checkpoints`). `evaluations` maps a name to (every,
    function of the state). `batch_ids` names the records of a batch. Metrics must hold
    `loss`.

    Returns the state after `config.steps` updates, which is also saved. Raises
    FloatingPointError, leaving `bad_batches.jsonl` and every checkpoint, when the loss
    or a gradient norm is bad once too often; Preempted after a SIGTERM, all saved;
    OSError when a checkpoint cannot be written; ValueError when one cannot be resumed,
    the batches end early or do not divide among the devices.
    """
    directory, evaluations = Path(directory), evaluations or {}
    key = jax.random.key(config.seed)
    abstract = jax.eval_shape(init_fn, key)
    placement = shardings(abstract, mesh, rules)
    structure = jax.tree.structure(abstract)
    step_jit = _compiled(step_fn, structure, placement, mesh)
    wanted = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=where
        ),
        abstract,
        placement,
    )
    bad_batches = BadBatches(directory)
    send = sender(batch_sharding(mesh, rules), batch_size)

    def numbered(position: int) -> Iterator[tuple[int, HostBatch]]:
        for t, batch in enumerate(batches(position), position):
            if t not in bad_batches.skipped:
                yield t, batch

    def train() -> State:
        """From the newest checkpoint to the end, or to a bad batch."""
        restored = checkpoints.restore_latest(wanted)
        start, position, recent = 0, 0, []
        if restored is not None:
            state, position, start, recent = restored
        elif load_fn is not None:
            state = load_fn(placement, key)
        else:  # made where it stays: no device ever holds all of it
            state = jax.jit(init_fn, out_shardings=placement)(key)
        if start > config.steps:
            raise ValueError(
                f"{directory} is already at step {start}, loop.steps={config.steps}: "
                "a run cannot be shortened"
            )
        watch = Watch(config.spike, recent)
        make = functools.partial(numbered, position)
        with (
            Prefetch(make, lambda item: (item, send(item[1])), PREFETCHED) as feed,
            Recorder(directory, start, config.steps, work, watch, name) as recorder,
        ):
            leaves = jax.tree.leaves(state)
            del state
            for n in range(start + 1, config.steps + 1):
                with recorder.spend("data"):
                    (t, host), batch = _next(feed, n, config.steps)
                with jax.transfer_guard("disallow"):  # all data comes by the feed
                    leaves, metrics = step_jit(leaves, batch)
                recorder.settle()  # step n-1, while the devices work on step n
                last = n == config.steps
                log = last or n % config.log_every == 0
                recorder.defer(n, t, metrics, host, log)
                due = [
                    (label, evaluate)
                    for label, (every, evaluate) in evaluations.items()
                    if last or n % every == 0
                ]
                stop = notice.reached() and not last
                save = last or stop or n % config.checkpoint_every == 0
                if due or save:
                    recorder.settle()  # never save a state that has gone bad
                    state = structure.unflatten(leaves)
                    for label, evaluate in due:
                        with recorder.spend("evaluation"):
                            scores = evaluate(state)
                        recorder.evaluation(n, label, scores)
                    if save:
                        with recorder.spend("checkpoint"):
                            checkpoints.save(n, state, t + 1, watch.recent)
                    del state
                if stop:
                    checkpoints.wait()
                    raise Preempted(name, n)
        return structure.unflatten(leaves)

    with (
        Checkpoints(directory, settings=settings, keep=config.keep) as checkpoints,
        Notice() as notice,
    ):
        while True:
            try:
                return train()
            except Bad as bad:
                position = checkpoints.position()
                again = bad_batches.since(position) < config.recoveries
                records = [] if batch_ids is None else batch_ids(bad.host)
                bad_batches.add(bad.report(again, records))
                if not again:
                    raise FloatingPointError(
                        f"step {bad.step}: {bad.reason}; the batch's records are in "
                        f"{bad_batches.path}, and the last checkpoint is from before it"
                    ) from None
                logging.warning(
                    "%s: step %d: %s; batch %d is skipped, training goes back to the "
                    "last checkpoint",
                    *(name, bad.step, bad.reason, bad.batch),
                )


def _compiled(
    step_fn: Callable, structure: Any, placement: Any, mesh: Mesh
) -> Callable[[list[jax.Array], dict], tuple[list[jax.Array], dict]]:
    """`step_fn`, jitted once, on the leaves of a state, which it consumes.

    On leaves because taking a state of NNX modules apart and together again, in
    Python, costs more than a step of a small model.
    """

    def on_leaves(leaves: list[jax.Array], batch: dict) -> tuple[list[jax.Array], dict]:
        state, metrics = step_fn(structure.unflatten(leaves), batch)
        return jax.tree.leaves(state), metrics

    everywhere = NamedSharding(mesh, PartitionSpec())
    out_shardings = jax.tree.leaves(placement), everywhere
    return jax.jit(on_leaves, donate_argnums=0, out_shardings=out_shardings)


def _next(feed: Prefetch, n: int, steps: int) -> Any:
    try:
        return next(feed)
    except StopIteration:
        raise ValueError(
            f"the batches end after {n - 1} steps, loop.steps={steps}"
        ) from None


def sender(
    sharding: NamedSharding, batch_size: int
) -> Callable[[HostBatch], dict[str, jax.Array]]:
    """This process's share of a batch -> its arrays as global arrays on the mesh.

    ValueError where batches of that size cannot be spread over the mesh, and later
    where one is of another size.
    """
    axes = sharding.spec[0] if len(sharding.spec) else None
    names = (axes,) if isinstance(axes, str) else axes or ()
    parts = math.prod(sharding.mesh.shape[name] for name in names)
    if batch_size % parts:
        raise ValueError(
            f"a batch of {batch_size} rows does not divide among the {parts} devices "
            f"of the mesh axes {', '.join(names)}: change batch_size or mesh"
        )

    def send(host: HostBatch) -> dict[str, jax.Array]:
        arrays = {
            key: value
            for key, value in host.items()
            if key != HOST_ONLY and isinstance(value, np.ndarray)
        }
        # Without them, processes that should hold the same rows could bring others.
        shapes = {key: (batch_size, *x.shape[1:]) for key, x in arrays.items()}
        return jax.make_array_from_process_local_data(sharding, arrays, shapes)

    return send
