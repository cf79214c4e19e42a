"""The stages of a system, each a function of (system, workdir) that runs once.

A stage reads the folders of the stages before it, owns one folder itself and leaves
`DONE.json` there; what it depends on (`System.stage_inputs`) is hashed, so a stage that
is rerun does nothing and one whose settings have changed refuses (`workdir.py`).

In a job of several processes, which share the work directory, all of them train; what
needs no devices is done by the first while the others wait.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from flax import nnx

from cm3leon_jax import config as configs
from cm3leon_jax import workdir
from cm3leon_jax.data import records
from cm3leon_jax.data.mixing import Neighbours
from cm3leon_jax.data.pipeline import Rows, batches
from cm3leon_jax.evaluation import entities, pairs, shapes
from cm3leon_jax.evaluation.protocol import Protocol, run_protocol
from cm3leon_jax.memory import build_bank, train_dual_encoder
from cm3leon_jax.models.attention import xla_attention
from cm3leon_jax.models.decoder import Decoder
from cm3leon_jax.parallel.distributed import together
from cm3leon_jax.parallel.mesh import make_mesh
from cm3leon_jax.parallel.rules import batch_sharding, shard_fn
from cm3leon_jax.preparation import (
    Results,
    need,
    prepare_data,
    run_stage,
    tokenize_data,
    train_image_tokenizer,
    train_text_tokenizer,
)
from cm3leon_jax.retrieval.neighbours import file_of
from cm3leon_jax.system import System
from cm3leon_jax.training import loop, state, step, validation
from cm3leon_jax.training.flops import train_flops_per_token
from cm3leon_jax.training.metrics import Work, peak_flops
from cm3leon_jax.training.optimizer import make_optimizer

_NAMED = 20  # records that results name, where there are more


def pretrain(system: System, directory: Path, overwrite: bool = False) -> Results:
    """`tokens/` -> `pretrain/`: the decoder, by `training/step.py` in the loop."""
    folder = directory / "pretrain"
    settings = system.pretrain
    need(directory, "tokens", *(["bank"] if system.retrieval else []))

    def work() -> Results:
        mesh = make_mesh(system.mesh)
        rows = open_rows(system, directory, "train")
        tx = make_optimizer(settings.optimizer)
        model_config = system.decoder_config
        sums_options = {
            "layout": system.layout,
            "config": step.StepConfig(
                segmented=settings.packing.kind == "first_fit",
                microbatches=settings.microbatches,
                loss_blocks=settings.loss_blocks,
                z_loss=settings.z_loss,
                retrieved_weight=1.0
                if system.retrieval is None
                else system.retrieval.weight,
            ),
            "shard": shard_fn(mesh, system.rules),
            "attention": xla_attention,
        }

        def init(key: jax.Array) -> state.TrainState:
            return state.create(Decoder(model_config, nnx.Rngs(key)), tx)

        tokens = settings.batch_size * settings.packing.row_length
        per_token = train_flops_per_token(model_config, settings.packing.row_length)
        peak = peak_flops(jax.devices()[0])
        validate = validation.validator(
            functools.partial(step.loss_sums, **sums_options),
            _validation_batches(system, directory, batch_sharding(mesh, system.rules)),
        )
        final = loop.run(
            config=loop.LoopConfig(
                steps=settings.optimizer.steps,
                log_every=settings.log_every,
                checkpoint_every=settings.checkpoint_every,
                keep=settings.keep,
                seed=system.pretrain_seed,
            ),
            step_fn=functools.partial(step.train_step, tx=tx, **sums_options),
            init_fn=init,
            batches=lambda start: _process_batches(system, rows, start),
            directory=folder,
            mesh=mesh,
            rules=system.rules,
            settings=system.stage_inputs["pretrain"],
            work=Work(
                unit="tokens",
                per_step=tokens,
                flops_per_step=per_token * tokens,
                peak_flops=None if peak is None else peak * mesh.size,
            ),
            evaluations={"validation": (settings.validate_every, validate)},
            batch_ids=lambda batch: [
                name for row in batch["row"] for name in rows.record_ids(int(row))
            ],
            name="pretrain",
        )
        # The loss of a group without tokens is not a number.
        held_out = {k: x for k, x in validate(final).items() if math.isfinite(x)}
        made = {"steps": settings.optimizer.steps, **_overlong(rows), **held_out}
        if system.retrieval is not None:
            made["retrieved"] = rows.retrieved(0)
        return made

    return run_stage(system, folder, work, overwrite, everyone=True)


def _overlong(rows: Rows) -> Results:
    """How many records were too long for a row, and which (the first of them)."""
    names: list[str] = []
    if rows.skipped:
        capacity = rows.packing.capacity
        numbers = np.flatnonzero(rows.records.index["length"] + 2 > capacity)
        names = [record.id for record in rows.records.read(numbers[:_NAMED])]
        logging.warning(
            "%d of %d training records were left out, too long for pretrain.packing."
            "row_length=%d: %s%s",
            *(rows.skipped, len(rows.records), rows.packing.row_length),
            *(", ".join(names), ", …" if rows.skipped > _NAMED else ""),
        )
    return {"overlong": rows.skipped, "overlong_ids": names}


def evaluate(directory: Path, protocol: Protocol, checkpoint: str) -> Results:
    """Any finished checkpoint -> `eval/` and `samples/`, by one protocol."""
    check_protocol(protocol)
    return run_protocol(directory, checkpoint, protocol, EVALUATORS[protocol.world])


def check_protocol(protocol: Protocol) -> None:
    """Raises ValueError where a protocol asks for what nobody measures."""
    if protocol.world not in EVALUATORS:
        known = ", ".join(EVALUATORS)
        raise ValueError(f"protocol.world={protocol.world!r}: choose from {known}")
    for task in protocol.tasks:
        if task not in EVALUATORS[protocol.world]:
            raise ValueError(
                f"protocol.tasks: no {task!r} in world {protocol.world!r}, choose from "
                f"{', '.join(EVALUATORS[protocol.world])}"
            )


EVALUATORS = {
    "shapes": shapes.TASKS,
    "pairs": pairs.TASKS,
    "entities": entities.TASKS,
}
STAGES: dict[str, Callable[..., Results]] = {
    "prepare_data": prepare_data,
    "train_text_tokenizer": train_text_tokenizer,
    "train_image_tokenizer": train_image_tokenizer,
    "tokenize_data": tokenize_data,
    "train_dual_encoder": train_dual_encoder,
    "build_bank": build_bank,
    "pretrain": pretrain,
}
FOLDERS = {
    "prepare_data": "documents",
    "train_text_tokenizer": "text_tokenizer",
    "train_image_tokenizer": "image_tokenizer",
    "tokenize_data": "tokens",
    "train_dual_encoder": "dual_encoder",
    "build_bank": "bank",
    "pretrain": "pretrain",
}


def stages_of(system: System) -> list[str]:
    """The names of a system's stages in order: without `retrieval` it has no bank."""
    return [name for name in STAGES if FOLDERS[name] in system.stage_inputs]


def run(
    config: Mapping[str, Any],
    directory: Path,
    names: Iterable[str] | None = None,
    overwrite: bool = False,
) -> Results:
    """Runs stages of a config (None: all that it has) in order; results by name.

    Nothing is written, and `config.json` stays, unless every stage that is there agrees
    with the config or is made anew. Raises FileExistsError for one that does neither.
    """
    if "://" in str(directory):
        raise ValueError(
            f"--workdir {directory}: cloud folders cannot be written to directly, "
            "mount the bucket as a folder (gcsfuse, mountpoint-s3) and give that"
        )
    config = System.complete(config)
    system = System.make(config)
    known = stages_of(system)
    names = known if names is None else list(names)
    for name in set(names) - set(known):
        raise ValueError(
            f"{system.name!r} has no stage {name}: its config has no section retrieval"
        )
    stale = {}
    for stage in known:
        folder = FOLDERS[stage]
        wanted = system.stage_inputs[folder]
        changed = workdir.changes(directory / folder, wanted)
        if changed and not overwrite:
            raise workdir.refusal(directory / folder, changed)
        if changed and stage not in names:
            raise FileExistsError(
                f"{directory / folder} was made with other settings ({changed}) and "
                f"{', '.join(names)} does not make it anew: launch/run_all.py "
                "--overwrite does, or delete that folder"
            )
        if changed:
            stale[directory / folder] = changed
    together("checked")
    if jax.process_index() == 0:
        for folder, changed in stale.items():
            workdir.delete(folder, changed)
        configs.write(directory, config)
    together("configured")
    return {name: STAGES[name](system, directory) for name in names}


def open_rows(system: System, directory: Path, split: str) -> Rows:
    """The token rows of a split, as the pretraining run sees them."""
    grid = system.image_tokenizer.model.grid

    def tokens(name: str) -> records.TokenRecords:
        return records.TokenRecords(
            directory / "tokens", name, layout=system.layout, grid=(grid, grid)
        )

    neighbours = None
    if (retrieval := system.retrieval) is not None:
        neighbours = Neighbours(
            file_of(directory / "bank", split),
            tokens("train"),
            documents=retrieval.documents,
            fewest=retrieval.fewest,
            noise=retrieval.noise,
        )
    return Rows(
        tokens(split),
        system.layout,
        system.pretrain.infill,
        system.pretrain.packing,
        system.pretrain_seed,
        neighbours,
    )


def _process_batches(
    system: System, rows: Rows, start: int, steps: int | None = None
) -> Iterator[dict]:
    return batches(
        rows,
        batch_size=system.pretrain.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=system.pretrain.workers,
        start_step=start,
        steps=steps,
    )


def _validation_batches(system: System, directory: Path, sharding: Any):
    rows = open_rows(system, directory, "validation")

    def fresh() -> Iterator[dict[str, jax.Array]]:
        count = system.pretrain.validation_batches
        for batch in _process_batches(system, rows, 0, count):
            yield {
                key: jax.make_array_from_process_local_data(sharding, value)
                for key, value in batch.items()
                if key != loop.HOST_ONLY
            }

    return fresh
