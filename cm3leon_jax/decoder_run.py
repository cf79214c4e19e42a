"""The runs that train the decoder: pretraining and fine-tuning are one and the same.

Both are `training/step.py` in `training/loop.py` on the rows of a token cache; they
differ in their settings, their rows, and where the first weights come from.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import Mesh

from cm3leon_jax.data.pipeline import Rows, batches
from cm3leon_jax.models.decoder import Decoder
from cm3leon_jax.parallel.kernels import attention_fn
from cm3leon_jax.parallel.mesh import make_mesh
from cm3leon_jax.parallel.rules import batch_sharding, row_share, shard_fn
from cm3leon_jax.run_config import RunConfig
from cm3leon_jax.system import System
from cm3leon_jax.training import loop, state, step, validation
from cm3leon_jax.training.flops import train_flops_per_token
from cm3leon_jax.training.metrics import Work, peak_flops
from cm3leon_jax.training.optimizer import make_optimizer
from cm3leon_jax.training.parts import EVERYTHING, Parts, finished

# Scores of a decoder, which lies on a mesh, after so many updates.
Measure = Callable[[Decoder, int, Mesh], Mapping[str, float]]
_NAMED = 20  # records that results name, where there are more


@dataclass(frozen=True)
class DecoderFunctions:
    """What a run computes: `init(key)` and `begin(model, key)` make its first state,
    `step(state, batch)` is an update, `sums(model, batch)` the sums of the loss."""

    init: Callable[[jax.Array], state.TrainState]
    begin: Callable[[Decoder, jax.Array], state.TrainState]
    step: Callable[..., Any]
    sums: Callable[..., Any]


def decoder_functions(
    system: System,
    settings: RunConfig,
    mesh: Mesh,
    *,
    retrieved_weight: float = 1.0,
    tasks: tuple[str, ...] = (),
    parts: Parts = EVERYTHING,
    ema: float = 0.0,
) -> DecoderFunctions:
    """The functions of a run of the decoder over a mesh; see `train_decoder`.

    Raises ValueError where the mesh cannot split the heads or the feed-forward.
    """
    config, compute = system.decoder_config, system.rules.compute
    for name, axes in (
        ("heads", compute.heads),
        ("key_heads", compute.heads),
        ("mlp", compute.mlp),
    ):
        size, pieces = (getattr(config, name), math.prod(mesh.shape[a] for a in axes))
        if size % pieces:
            raise ValueError(
                f"decoder.{name}={size} cannot be split over {pieces} devices "
                f"(mesh axes {axes}): choose a mesh.tensor that divides it"
            )
    tx = make_optimizer(settings.optimizer)
    options: dict[str, Any] = {"parts": parts, "ema": ema}
    sums_options: dict[str, Any] = {
        "layout": system.layout,
        "config": step.StepConfig(
            segmented=settings.packing.kind == "first_fit",
            microbatches=settings.microbatches,
            loss_blocks=settings.loss_blocks,
            z_loss=settings.z_loss,
            retrieved_weight=retrieved_weight,
            tasks=tasks,
        ),
        "shard": shard_fn(mesh, system.rules),
        "attention": attention_fn(mesh, system.rules),
    }

    def begin(model: Decoder, key: jax.Array) -> state.TrainState:
        return state.create(parts.prepared(model, key), tx, **options)

    def init(key: jax.Array) -> state.TrainState:
        return begin(Decoder(system.decoder_config, nnx.Rngs(key)), key)

    return DecoderFunctions(
        init=init,
        begin=begin,
        step=functools.partial(step.train_step, tx=tx, **options, **sums_options),
        sums=functools.partial(step.loss_sums, **sums_options),
    )


def train_decoder(
    system: System,
    settings: RunConfig,
    folder: Path,
    rows: Rows,
    held_out: Rows,
    *,
    retrieved_weight: float = 1.0,
    load: Callable[[Mesh], Decoder] | None = None,
    parts: Parts = EVERYTHING,
    ema: float = 0.0,
    measures: Mapping[str, tuple[int, Measure]] | None = None,
) -> dict[str, Any]:
    """Trains into `folder`, or goes on there; the results of the stage.

    `load` gives the first weights, sharded over a mesh (None: fresh ones). `held_out`
    are the rows of the validation loss. `parts` are trained, of which the state keeps a
    running average with decay `ema` (0: none). `measures`, by name: what is measured
    after every so many updates and at the end, and written to the metrics.
    """
    mesh, seed = make_mesh(system.mesh), system.seed_of(settings)
    functions = decoder_functions(
        system,
        settings,
        mesh,
        retrieved_weight=retrieved_weight,
        tasks=rows.records.tasks,
        parts=parts,
        ema=ema,
    )

    def load_state(placement: Any, key: jax.Array) -> state.TrainState:
        assert load is not None
        begun = jax.jit(functions.begin, out_shardings=placement, donate_argnums=0)
        return begun(load(mesh), key)

    length = settings.packing.row_length
    tokens = settings.batch_size * length
    per_token = train_flops_per_token(system.decoder_config, length, parts)
    peak = peak_flops(jax.devices()[0])
    sharding = batch_sharding(mesh, system.rules)
    index, count = row_share(sharding)
    read = functools.partial(
        batches,
        batch_size=settings.batch_size,
        process_index=index,
        process_count=count,
        workers=settings.workers,
    )
    send = loop.sender(sharding, settings.batch_size)
    few = settings.validation_batches
    validate = validation.validator(
        functions.sums, lambda: map(send, read(held_out, start_step=0, steps=few))
    )

    def evaluation(measure: Measure) -> Callable[[state.TrainState], Any]:
        return lambda at: measure(finished(at.model, at.ema, parts), int(at.step), mesh)

    final = loop.run(
        config=loop.LoopConfig(
            steps=settings.optimizer.steps,
            log_every=settings.log_every,
            checkpoint_every=settings.checkpoint_every,
            keep=settings.keep,
            seed=seed,
            spike=settings.spike,
            recoveries=settings.recoveries,
        ),
        step_fn=functions.step,
        init_fn=functions.init,
        load_fn=None if load is None else load_state,
        batches=lambda start: read(rows, start_step=start),
        batch_size=settings.batch_size,
        directory=folder,
        mesh=mesh,
        rules=system.rules,
        settings=system.stage_inputs[folder.name],
        work=Work(
            unit="tokens",
            per_step=tokens,
            flops_per_step=per_token * tokens,
            peak_flops=None if peak is None else peak * mesh.size,
        ),
        evaluations={
            "validation": (settings.validate_every, validate),
            **{
                name: (every, evaluation(measure))
                for name, (every, measure) in (measures or {}).items()
            },
        },
        batch_ids=lambda batch: [
            name for row in batch["row"] for name in rows.record_ids(int(row))
        ],
        name=folder.name,
    )
    # The loss of a group without tokens is not a number.
    losses = {k: x for k, x in validate(final).items() if math.isfinite(x)}
    overlong = _overlong(rows, settings)
    return {"steps": settings.optimizer.steps, **overlong, **losses}


def _overlong(rows: Rows, settings: RunConfig) -> dict[str, Any]:
    """How many records were too long for a row, and which (the first of them)."""
    names: list[str] = []
    if rows.skipped:
        capacity = rows.packing.capacity
        numbers = np.flatnonzero(rows.records.index["length"] + 2 > capacity)
        names = [record.id for record in rows.records.read(numbers[:_NAMED])]
        logging.warning(
            "%d of %d training records were left out, too long for %s.packing."
            "row_length=%d: %s%s",
            *(rows.skipped, len(rows.records), settings.SECTION),
            rows.packing.row_length,
            *(", ".join(names), ", …" if rows.skipped > _NAMED else ""),
        )
    return {"overlong": rows.skipped, "overlong_ids": names}
