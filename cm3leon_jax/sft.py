"""Multi-task supervised fine-tuning: examples, their tokens, the run (paper 1.12).

`tasks/documents/NAME/` holds the examples of each task, `task_tokens/` the token
records of all of them, task after task; `sft/` is the tuned decoder. Examples come
before the tokenizers, which may learn from them too.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from cm3leon_jax import workdir
from cm3leon_jax.codec import load_image_tokenizer, load_text_tokenizer
from cm3leon_jax.data import records, sources, task_sources
from cm3leon_jax.data.documents import Document, highest_label
from cm3leon_jax.data.infill import AnswerConfig
from cm3leon_jax.data.pipeline import Rows
from cm3leon_jax.data.sources import SPLITS
from cm3leon_jax.data.task_mixture import TaskMixture, ratios
from cm3leon_jax.data.tasks import known
from cm3leon_jax.data.tokenization import Encoders
from cm3leon_jax.decoder_run import Measure, train_decoder
from cm3leon_jax.models.decoder import Decoder
from cm3leon_jax.preparation import Results, job, need, run_stage, task_folders
from cm3leon_jax.sft_config import SFTConfig
from cm3leon_jax.system import System
from cm3leon_jax.tokenizers.segmentation import SegmentationTokenizer
from cm3leon_jax.training.parts import EVERYTHING, Parts, PartsConfig, load_finished

_EPOCHS = 4  # whose rows are counted, as they differ a little
_REGION_TASK = "infill"  # a region of its picture is always hidden


def section(system: System) -> SFTConfig:
    """ValueError where the system has none."""
    if system.sft is None:
        raise ValueError(f"{system.name!r} has no section sft in its config")
    return system.sft


def prepare_tasks(system: System, directory: Path, overwrite: bool = False) -> Results:
    """Task sources -> `tasks/`: documents of every task and split."""
    settings = section(system)

    def work() -> Results:
        counts = vars(settings.examples)
        folders = task_folders(directory, settings.names)
        return {
            name: sources.prepare(
                system.examples(name),
                task_sources.documents,
                folder,
                {split: counts[split] for split in SPLITS},
            )
            for name, folder in zip(settings.names, folders, strict=True)
        }

    return run_stage(system, directory / "tasks", work, overwrite)


class TaskDocuments(Sequence[Document]):
    """The examples of one split, task after task in the order of their numbers, but for
    those with masks of classes that the system does not have (yet)."""

    def __init__(self, system: System, directory: Path, split: str):
        settings, world = section(system), system.data.source
        folders = task_folders(directory, settings.names)
        self._parts: list[Sequence[Document]] = [
            sources.read_documents(folder, split) for folder in folders
        ]
        names, every = settings.class_names(world), task_sources.classes(world)
        if len(names) < len(every):
            for i, name in enumerate(settings.names):
                if known(name).masks:
                    self._parts[i] = [
                        d for d in self._parts[i] if highest_label(d) < len(names)
                    ]
        self._starts = np.cumsum([0, *map(len, self._parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._parts[part][index - int(self._starts[part])]


def tokenize_tasks(system: System, directory: Path, overwrite: bool = False) -> Results:
    """`tasks/` -> `task_tokens/`, with both tokenizers and the grid of classes."""
    settings, folder = section(system), directory / "task_tokens"
    need(directory, "tasks", "text_tokenizer", "image_tokenizer")

    def work() -> Results:
        classes = settings.class_names(system.data.source)
        side = settings.class_grid * system.image_tokenizer.model.grid
        encoders = Encoders(
            load_text_tokenizer(directory),
            load_image_tokenizer(directory),
            system.layout,
            segmentation=SegmentationTokenizer(side, classes) if classes else None,
            tasks=settings.names,
        )
        made = {}
        for split in SPLITS:
            documents = TaskDocuments(system, directory, split)
            made[split] = records.build(
                *(documents, folder, split, records.shards_of(len(documents))),
                encoders=encoders,
                regions_per_image=system.image_tokenizer.regions_per_image,
                seed=system.seed,
                job=job(),
            )
        return made

    return run_stage(system, folder, work, overwrite, everyone=True)


def open_task_rows(system: System, directory: Path, split: str) -> Rows:
    """The token rows of a split, as the tuning run sees them."""
    settings, grid = section(system), system.image_tokenizer.model.grid
    found = records.TokenRecords(
        directory / "task_tokens", split, layout=system.layout, grid=(grid, grid)
    )
    if found.tasks != settings.names:
        raise ValueError(
            f"{found.directory} is of the tasks {', '.join(found.tasks)}, not of "
            f"{', '.join(settings.names)}: run the stages prepare_tasks and "
            "tokenize_tasks again with --overwrite"
        )
    seed = system.seed_of(settings)
    numbered = enumerate(settings.names, start=1)
    regions = tuple(number for number, name in numbered if name == _REGION_TASK)
    return Rows(
        found,
        system.layout,
        settings.infill,
        settings.packing,
        seed,
        answers=AnswerConfig(probability=settings.answer, regions=regions),
        mixture=TaskMixture(
            *(counts(found), weights(settings), seed),
            only=[settings.names.index(name) for name in settings.only],
        ),
    )


def share(system: System, directory: Path, only: Sequence[str]) -> float:
    """The rows that the samples of some tasks fill by themselves, over all of the
    mixture: a run on these with that part of its updates sees each as often."""
    tuning = dataclasses.replace(section(system), only=tuple(only))
    both = dataclasses.replace(system, sft=tuning), system
    found = [open_task_rows(x, directory, "train") for x in both]
    some, every = (sum(map(rows.count, range(_EPOCHS))) for rows in found)
    return some / every


def counts(found: records.TokenRecords) -> list[int]:
    """Records of every task, which lie task after task in a token cache."""
    tasks = np.asarray(found.index["task"])
    if (np.diff(tasks.astype(np.int64)) < 0).any():
        raise ValueError(
            f"{found.directory}: the records of split {found.split!r} do not lie task "
            "after task; run the stage tokenize_tasks again"
        )
    return np.bincount(tasks, minlength=1 + len(found.tasks))[1:].tolist()


def weights(settings: SFTConfig) -> list[float]:
    """Of every task, in the order of their numbers."""
    return [float(settings.tasks[name]) for name in settings.names]


def sft(
    system: System,
    directory: Path,
    overwrite: bool = False,
    measures: Mapping[str, tuple[int, Measure]] | None = None,
) -> Results:
    """`task_tokens/` + `pretrain/` -> `sft/`: the decoder, tuned on all tasks."""
    settings = section(system)
    own = settings.start == "pretrain"
    need(directory, "task_tokens", *(["pretrain"] if own else []))

    def load(mesh: Mesh) -> Decoder:
        start = directory / "pretrain" if own else Path(settings.start)
        parts, ema = EVERYTHING, False
        if not own:
            check_tokenizers(start, directory)
            parts, ema = _parts_of(start, system)
        return load_finished(
            *(start, system.decoder_config, parts),
            ema=ema,
            mesh=mesh,
            rules=system.rules,
            settings=system.checkpoint_settings,
        )

    def work() -> Results:
        rows = open_task_rows(system, directory, "train")
        made = train_decoder(
            *(system, settings, directory / "sft", rows),
            open_task_rows(system, directory, "validation"),
            load=load,
            parts=Parts(settings.parts, system.layout),
            ema=settings.ema,
            measures=measures,
        )
        drawn = ratios(counts(rows.records), weights(settings)).round(3).tolist()
        before = [] if own else _trained_before(Path(settings.start))
        return made | {
            "ratios": dict(zip(settings.names, drawn, strict=True)),
            "trained": sorted({*before, *(settings.only or settings.names)}),
        }

    return run_stage(system, directory / "sft", work, overwrite, everyone=True)


def check_tokenizers(start: Path, directory: Path) -> None:
    """ValueError where a decoder to start from reads other ids than these are, as far
    as its own work directory says."""
    for name in ("text_tokenizer", "image_tokenizer"):
        folders = start.parent / name, directory / name
        begun = [folder / workdir.BEGUN for folder in folders]
        if not all(path.is_file() for path in begun):
            continue
        theirs, ours = (json.loads(path.read_text())["hash"] for path in begun)
        if theirs != ours:
            raise ValueError(
                f"sft.start={start}: its {name}/ is not that of {directory}, so ids "
                f"mean other things; copy {name}/ from there, or start from elsewhere"
            )


def _trained_before(folder: Path) -> list[str]:
    """The tasks of a finished run: none of a pretrained decoder."""
    tuned = json.loads((folder / workdir.BEGUN).read_text())["inputs"].get("sft")
    own = [] if tuned is None else tuned["only"] or list(tuned["tasks"])
    return workdir.results(folder).get("trained", own)


def _parts_of(folder: Path, system: System) -> tuple[Parts, bool]:
    """Which parts a finished tuning run has trained, and whether it averaged them."""
    workdir.results(folder)
    tuned = json.loads((folder / workdir.BEGUN).read_text())["inputs"]
    if "sft" not in tuned:
        return EVERYTHING, False
    parts = tuned["sft"]["parts"]
    config = PartsConfig(**parts | {"train": tuple(parts["train"])})
    return Parts(config, system.layout), bool(tuned["sft"]["ema"])
