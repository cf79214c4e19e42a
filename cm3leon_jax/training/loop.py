"""The training loop, the only one: decoder and image tokenizer both run in it.

It knows nothing of models. A state is any pytree with a `.step`; a step is a pure
function `(state, batch) -> (state, metrics)` that it compiles once; batch t is a pure
function of t, so that resuming needs no more than the number of batches consumed.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cm3leon_jax.parallel.rules import Rules, batch_sharding, shardings
from cm3leon_jax.training.checkpoint import Checkpoints
from cm3leon_jax.training.metrics import MetricWriter, Progress, Work
from cm3leon_jax.training.prefetch import Prefetch

State = TypeVar("State")
HostBatch = dict[str, Any]
Evaluation = tuple[int, Callable[[Any], Mapping[str, float]]]

# Stays on the host: the global row numbers, for naming a bad batch's records.
HOST_ONLY = "row"
PREFETCHED = 2


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Updates in all, and how often (in updates) to log and to save.

    `keep` checkpoints are kept; `seed` makes the initial state.
    """

    steps: int
    log_every: int
    checkpoint_every: int
    keep: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"loop.{name}={getattr(self, name)} must be positive")


def run(
    *,
    config: LoopConfig,
    step_fn: Callable[[State, dict[str, jax.Array]], tuple[State, dict]],
    init_fn: Callable[[jax.Array], State],
    load_fn: Callable[[Any, jax.Array], State] | None = None,
    batches: Callable[[int], Iterator[HostBatch]],
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

    `batches(t)` yields this process's part of batches t, t+1, …: dicts of arrays with
    a leading batch axis. `settings` is what a checkpoint must agree with (see
    `Checkpoints`). `evaluations` maps a name to (every, function of the state).
    `batch_ids` names the records of a batch. Metrics must hold `loss`.

    Returns the state after `config.steps` updates, which is also saved. Raises
    FloatingPointError, leaving `bad_batch.json` and every checkpoint, when the loss or
    a gradient norm is not finite; OSError when a checkpoint cannot be written;
    ValueError when one cannot be resumed, the batches end early or do not divide among
    the devices.
    """
    directory, evaluations = Path(directory), evaluations or {}
    key = jax.random.key(config.seed)
    abstract = jax.eval_shape(init_fn, key)
    placement = shardings(abstract, mesh, rules)
    structure = jax.tree.structure(abstract)
    step_jit = _compiled(step_fn, structure, placement, mesh)

    with Checkpoints(directory, settings=settings, keep=config.keep) as checkpoints:
        restored = checkpoints.restore_latest(
            jax.tree.map(
                lambda leaf, where: jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=where
                ),
                abstract,
                placement,
            )
        )
        start = 0 if restored is None else restored[1]
        if start > config.steps:
            raise ValueError(
                f"{directory} is already at step {start}, loop.steps={config.steps}: "
                "a run cannot be shortened"
            )
        with (
            Prefetch(lambda: batches(start), _sender(mesh, rules), PREFETCHED) as feed,
            _Recorder(config, directory, start, work, batch_ids, name) as recorder,
        ):
            if restored is not None:
                state = restored[0]
            elif load_fn is not None:
                state = load_fn(placement, key)
            else:  # made where it stays: no device ever holds all of it
                state = jax.jit(init_fn, out_shardings=placement)(key)
            leaves = jax.tree.leaves(state)
            for n in range(start + 1, config.steps + 1):
                host, batch = _next(feed, n, config.steps)
                with jax.transfer_guard("disallow"):  # all data comes by the feed
                    leaves, metrics = step_jit(leaves, batch)
                recorder.settle()  # step n-1, while the devices work on step n
                recorder.defer(n, metrics, host)
                last = n == config.steps
                due = [
                    (label, evaluate)
                    for label, (every, evaluate) in evaluations.items()
                    if last or n % every == 0
                ]
                save = last or n % config.checkpoint_every == 0
                if due or save:
                    recorder.settle()  # never save a state that has gone bad
                    state = structure.unflatten(leaves)
                    with recorder.pause():
                        for label, evaluate in due:
                            recorder.evaluation(n, label, evaluate(state))
                        if save:
                            checkpoints.save(n, state, position=n)
    return structure.unflatten(leaves)


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


def _check_rows(host: HostBatch, sharding: NamedSharding) -> None:
    """ValueError where the batch cannot be spread over the mesh."""
    axes = sharding.spec[0] if len(sharding.spec) else None
    names = (axes,) if isinstance(axes, str) else axes or ()
    parts = math.prod(sharding.mesh.shape[name] for name in names)
    for key, value in host.items():
        if isinstance(value, np.ndarray) and key != HOST_ONLY:
            rows = len(value) * jax.process_count()
            if rows % parts:
                raise ValueError(
                    f"a batch of {rows} rows does not divide among the {parts} devices "
                    f"of the mesh axes {', '.join(names)}: change batch_size or mesh"
                )


def _sender(
    mesh: Mesh, rules: Rules
) -> Callable[[HostBatch], tuple[HostBatch, dict[str, jax.Array]]]:
    """Host batch -> (the same, its arrays as global arrays on the mesh)."""
    sharding = batch_sharding(mesh, rules)

    def send(host: HostBatch) -> tuple[HostBatch, dict[str, jax.Array]]:
        _check_rows(host, sharding)
        arrays = {
            key: value
            for key, value in host.items()
            if key != HOST_ONLY and isinstance(value, np.ndarray)
        }
        if jax.process_count() == 1:
            return host, jax.device_put(arrays, sharding)
        return host, {
            key: jax.make_array_from_process_local_data(sharding, value)
            for key, value in arrays.items()
        }

    return send


class _Recorder:
    """Fetches metrics one step late, checks them, and writes them down."""

    def __init__(
        self,
        config: LoopConfig,
        directory: Path,
        start: int,
        work: Work,
        batch_ids: Callable[[HostBatch], list[str]] | None,
        name: str,
    ) -> None:
        self.config, self.directory, self.work = config, directory, work
        self.batch_ids = batch_ids
        self._pending: tuple[int, dict, HostBatch] | None = None
        self._since: tuple[int, float] | None = None  # step and time of the last log
        first = jax.process_index() == 0
        self._writer = MetricWriter(directory, start) if first else None
        self._progress = Progress(start, config.steps, name) if first else None

    def defer(self, n: int, metrics: dict, host: HostBatch) -> None:
        self._pending = n, metrics, host

    def settle(self) -> None:
        """Waits for the deferred step; logs it where it is due."""
        if self._pending is None:
            return
        (n, metrics, host), self._pending = self._pending, None
        values = {key: float(value) for key, value in jax.device_get(metrics).items()}
        for key in values:
            bad = not math.isfinite(values[key])
            if bad and (key == "loss" or key.startswith("grad_norm")):
                self._stop(n, values, host)
        now = time.perf_counter()
        if self._progress is not None:
            self._progress.advance()
        if self._since is None:
            self._since = n, now  # from here on, so that compilation does not count
        if n % self.config.log_every and n != self.config.steps:
            return
        then, at = self._since
        if n > then:
            values |= self.work.rates(n - then, now - at)
            self._since = n, now
        if self._writer is not None and self._progress is not None:
            self._writer.write(n, values)
            self._progress.show(_summary(values, self.work.unit))

    def evaluation(self, n: int, label: str, scores: Mapping[str, float]) -> None:
        values = {f"{label}/{key}": float(value) for key, value in scores.items()}
        if self._writer is not None and self._progress is not None:
            self._writer.write(n, values)
            text = "  ".join(f"{key} {value:.4g}" for key, value in values.items())
            self._progress.show(text, always=True)

    def pause(self) -> _Pause:
        """Time spent inside does not count as training."""
        return _Pause(self)

    def _stop(self, n: int, values: dict[str, float], host: HostBatch) -> None:
        several = jax.process_count() > 1
        suffix = f".{jax.process_index()}" if several else ""
        path = self.directory / f"bad_batch{suffix}.json"
        rows = host[HOST_ONLY].tolist() if HOST_ONLY in host else []
        records = self.batch_ids(host) if self.batch_ids is not None else []
        report = {
            "step": n,
            "metrics": {key: repr(value) for key, value in values.items()},
            "rows": rows,
            "records": records,
        }
        path.write_text(json.dumps(report, indent=1))
        raise FloatingPointError(
            f"step {n}: loss {values['loss']}; the batch's records are in {path}, and "
            "the last checkpoint is from before it"
        )

    def __enter__(self) -> _Recorder:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._writer is not None and self._progress is not None:
            self._writer.close()
            self._progress.close()


class _Pause:
    def __init__(self, recorder: _Recorder) -> None:
        self._recorder = recorder

    def __enter__(self) -> None:
        self._begin = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        if self._recorder._since is not None:
            step, at = self._recorder._since
            self._recorder._since = step, at + time.perf_counter() - self._begin


def _summary(values: dict[str, float], unit: str) -> str:
    rate = values.get(f"{unit}_per_second")
    text = f"loss {values['loss']:.4f}"
    return text if rate is None else f"{text}  {rate:,.0f} {unit}/s"
