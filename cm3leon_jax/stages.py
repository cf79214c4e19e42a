"""The stages of a system, each a function of (system, workdir) that runs once.

A stage reads the folders of the stages before it, owns one folder itself and leaves
`DONE.json` there; what it depends on (`System.stage_inputs`) is hashed, so a stage that
is rerun does nothing and one whose settings have changed refuses (`workdir.py`).

In a job of several processes, which share the work directory, all of them train; what
needs no devices is done by the first while the others wait.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from cm3leon_jax import config as configs
from cm3leon_jax import encoders, workdir
from cm3leon_jax.data import records
from cm3leon_jax.data.mixing import Neighbours
from cm3leon_jax.data.pipeline import Rows
from cm3leon_jax.decoder_run import Measure, train_decoder
from cm3leon_jax.evaluation import (
    entities,
    icon_tasks,
    pairs,
    public,
    public_sets,
    shapes,
    tasks,
)
from cm3leon_jax.evaluation.protocol import Protocol, run_protocol
from cm3leon_jax.memory import build_bank, train_dual_encoder
from cm3leon_jax.models.decoder import Decoder, abstract
from cm3leon_jax.parallel.distributed import together
from cm3leon_jax.parallel.mesh import MeshConfig, make_mesh
from cm3leon_jax.parallel.rules import shardings
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
from cm3leon_jax.sft import prepare_tasks, sft, tokenize_tasks
from cm3leon_jax.system import System


def pretrain(
    system: System,
    directory: Path,
    overwrite: bool = False,
    measures: Mapping[str, tuple[int, Measure]] | None = None,
) -> Results:
    """`tokens/` -> `pretrain/`: the decoder, by the CM3 objective on documents."""
    need(directory, "tokens", *(["bank"] if system.retrieval else []))

    def work() -> Results:
        rows = open_rows(system, directory, "train")
        retrieval = system.retrieval
        made = train_decoder(
            system,
            system.pretrain,
            directory / "pretrain",
            rows,
            open_rows(system, directory, "validation"),
            retrieved_weight=1.0 if retrieval is None else retrieval.weight,
            measures=measures,
        )
        if retrieval is not None:
            made["retrieved"] = rows.retrieved(0)
        return made

    return run_stage(system, directory / "pretrain", work, overwrite, everyone=True)


def evaluate(
    directory: Path,
    protocol: Protocol,
    checkpoint: str,
    *,
    data: Path | None = None,
    encoder: Path | None = None,
    **options: Any,
) -> Results:
    """Any finished checkpoint -> `eval/` and `samples/`, by one protocol.

    `data` is the folder of a public set (None: `public/SET` of the work directory),
    `encoder` that of a CLIP or the work directory of a dual encoder; `options` are
    those of `run_protocol`.
    """
    check_protocol(protocol)
    known, examples = EVALUATORS[protocol.world], None
    if protocol.public is not None:
        folder = data or directory / "public" / protocol.public.set
        examples = public_sets.read(protocol.public.set, folder)
        known = public.evaluators(protocol.public, folder)
    return run_protocol(
        *(directory, checkpoint, protocol, known),
        examples=examples,
        encoder=None if encoder is None else encoders.either(encoder),
        **options,
    )


def measures(
    system: System,
    directory: Path,
    stage: str,
    protocols: Sequence[Protocol],
    every: int,
) -> dict[str, tuple[int, Measure]]:
    """Protocols that a stage is measured by while it trains, every so many updates.

    Each leaves the result file of `STAGE@STEP`, whether that is saved or not.
    """

    def measure(protocol: Protocol) -> Measure:
        def run(decoder: Decoder, step: int, mesh: Mesh) -> dict[str, float]:
            if jax.process_count() > 1:  # each process asks a copy of its own
                mesh = make_mesh(MeshConfig(), jax.local_devices())
                whole = multihost_utils.process_allgather(decoder, tiled=True)
                places = shardings(abstract(system.decoder_config), mesh, system.rules)
                decoder = jax.device_put(whole, places)
            result = evaluate(
                *(directory, protocol, f"{stage}@{step}"),
                overwrite=True,
                decoder=decoder,
                mesh=mesh,
            )
            return {key: score["value"] for key, score in result["scores"].items()}

        return run

    return {protocol.name: (every, measure(protocol)) for protocol in protocols}


def check_protocol(protocol: Protocol) -> None:
    """Raises ValueError where a protocol asks for what nobody measures."""
    if protocol.world not in EVALUATORS:
        known = ", ".join(EVALUATORS)
        raise ValueError(f"protocol.world={protocol.world!r}: choose from {known}")
    if (protocol.world == "public") != (protocol.public is not None):
        raise ValueError(
            f"protocol.world={protocol.world!r}: 'public' and the section `public` go "
            "together"
        )
    for task in protocol.tasks:
        if task not in EVALUATORS[protocol.world]:
            raise ValueError(
                f"protocol.tasks: no {task!r} in world {protocol.world!r}, choose from "
                f"{', '.join(EVALUATORS[protocol.world])}"
            )
    if protocol.public is not None:
        public_sets.check_metrics(protocol.public.metrics, protocol.tasks)


EVALUATORS: dict[str, Mapping[str, Any]] = {
    "shapes": shapes.TASKS,
    "shape_tasks": tasks.TASKS,
    "icon_tasks": icon_tasks.TASKS,
    "pairs": pairs.TASKS,
    "entities": entities.TASKS,
    "public": public.TASKS,
}
STAGES: dict[str, Callable[..., Results]] = {
    "prepare_data": prepare_data,
    "prepare_tasks": prepare_tasks,
    "train_text_tokenizer": train_text_tokenizer,
    "train_image_tokenizer": train_image_tokenizer,
    "tokenize_data": tokenize_data,
    "train_dual_encoder": train_dual_encoder,
    "build_bank": build_bank,
    "pretrain": pretrain,
    "tokenize_tasks": tokenize_tasks,
    "sft": sft,
}
FOLDERS = {
    "prepare_data": "documents",
    "prepare_tasks": "tasks",
    "train_text_tokenizer": "text_tokenizer",
    "train_image_tokenizer": "image_tokenizer",
    "tokenize_data": "tokens",
    "train_dual_encoder": "dual_encoder",
    "build_bank": "bank",
    "pretrain": "pretrain",
    "tokenize_tasks": "task_tokens",
    "sft": "sft",
}


_CONVERTED = ("text_tokenizer", "image_tokenizer", "pretrain")
_OF_RETRIEVAL = ("train_dual_encoder", "build_bank")


def stages_of(system: System) -> list[str]:
    """The names of a system's stages in order: without `retrieval` it has no bank,
    without `sft` no tasks, with an `origin` tokenizers and a decoder that are there."""
    there = _CONVERTED if system.origin else ()
    wanted = set(system.stage_inputs) - set(there)
    return [name for name in STAGES if FOLDERS[name] in wanted]


def run(
    config: Mapping[str, Any],
    directory: Path,
    names: Iterable[str] | None = None,
    overwrite: bool = False,
    protocols: Sequence[Protocol] = (),
    every: int = 0,
) -> Results:
    """Runs stages of a config (None: all that it has) in order; results by name.

    Those that train the decoder are measured by the `protocols` after `every` so many
    updates and at their end.

    Nothing is written, and `config.json` stays, unless every stage that is there agrees
    with the config or is made anew. Raises FileExistsError for one that does neither.
    """
    if "://" in str(directory):
        raise ValueError(
            f"{directory} is in a bucket: give the folder of a storage.Mirror, as all "
            "commands of launch/ do, or mount the bucket as a folder (gcsfuse)"
        )
    config = System.complete(config)
    system = System.make(config)
    known = stages_of(system)
    names = known if names is None else list(names)
    for name in set(names) - set(known):
        raise ValueError(
            f"{system.name!r} has no stage {name}: its config has no section "
            f"{'retrieval' if name in _OF_RETRIEVAL else 'sft'}"
        )
    for folder in _CONVERTED if system.origin else ():
        changed = workdir.changes(directory / folder, system.stage_inputs[folder])
        if changed:
            raise FileExistsError(
                f"{directory / folder} was converted with other settings ({changed}): "
                f"leave out --config, or give one that says what {directory}/"
                f"{configs.FILE} says"
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
    made = {}
    for name in names:
        options = {}
        if protocols and name in ("pretrain", "sft"):
            during = measures(system, directory, FOLDERS[name], protocols, every)
            options = {"measures": during}
        made[name] = STAGES[name](system, directory, **options)
    return made


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
