"""The stages before the decoder: documents, both tokenizers, token cache.

And what every stage is made of: `run_stage`, done once by a job of any number of
processes, and `need`. The list of all stages is in `stages.py`.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cm3leon_jax import workdir
from cm3leon_jax.codec import load_image_tokenizer, load_text_tokenizer
from cm3leon_jax.data import ingest, records, sources
from cm3leon_jax.data.tokenization import Encoders
from cm3leon_jax.evaluation.reconstruction import scores
from cm3leon_jax.interop import efficientnet
from cm3leon_jax.parallel.distributed import together
from cm3leon_jax.parallel.mesh import make_mesh
from cm3leon_jax.system import System
from cm3leon_jax.tokenizers import text as text_tokenizer
from cm3leon_jax.training import image_tokenizer

Results = dict[str, Any]
FEATURES = {"none": lambda: None, "efficientnet_lite0": efficientnet.features}


def prepare_data(system: System, directory: Path, overwrite: bool = False) -> Results:
    """Source -> `documents/`: every split as ArrayRecord, with what was skipped."""
    folder = directory / "documents"

    def work() -> Mapping[str, Any]:
        name, splits = system.data.source, system.data.limits
        if name in sources.OWN:
            kind = sources.OWN[name]
            return ingest.prepare(
                kind, system.source, folder, splits, system.data.ingest
            )
        _, documents = sources.SOURCES[name]
        return sources.prepare(system.source, documents, folder, splits)

    return run_stage(system, folder, work, overwrite)


def train_text_tokenizer(
    system: System, directory: Path, overwrite: bool = False
) -> Results:
    """`documents/` -> `text_tokenizer/`: byte-pair pieces of the training captions, and
    of the texts of the tasks that `sft.tokenizers` names."""
    folder = directory / "text_tokenizer"
    tasks = _teaching_tasks(system, directory)

    def work() -> Results:
        folders = [directory / "documents", *task_folders(directory, tasks)]
        text_tokenizer.train(
            itertools.chain(*(sources.read_texts(path, "train") for path in folders)),
            folder / "model",
            system.vocabulary.text,
            system.seed,
        )
        return {"pieces": system.vocabulary.text}

    return run_stage(system, folder, work, overwrite)


def train_image_tokenizer(
    system: System, directory: Path, overwrite: bool = False
) -> Results:
    """`documents/` -> `image_tokenizer/`: the VQGAN, and how well it reconstructs.

    It learns from the pictures of the tasks that `sft.tokenizers` names as well.
    """
    folder = directory / "image_tokenizer"
    settings = system.image_tokenizer
    tasks = _teaching_tasks(system, directory)

    def work() -> Mapping[str, Any]:
        held_out = Pictures(directory, "validation")
        count = min(len(held_out), settings.validation_pictures)
        return image_tokenizer.train(
            settings.training,
            settings.model,
            images=Pictures(directory, "train", tasks),
            validation=np.stack([held_out[i] for i in range(count)]),
            directory=folder,
            mesh=make_mesh(system.mesh),
            rules=system.rules,
            score=scores,
            seed=system.seed,
            features=FEATURES[settings.features](),
        )

    return run_stage(system, folder, work, overwrite, everyone=True)


def tokenize_data(system: System, directory: Path, overwrite: bool = False) -> Results:
    """`documents/` -> `tokens/`, with both tokenizers."""
    folder = directory / "tokens"
    need(directory, "documents", "text_tokenizer", "image_tokenizer")

    def work() -> Results:
        made = {}
        encoders = Encoders(
            load_text_tokenizer(directory),
            load_image_tokenizer(directory),
            system.layout,
        )
        for split in system.data.limits:
            documents = sources.read_documents(directory / "documents", split)
            made[split] = records.build(
                *(documents, folder, split, records.shards_of(len(documents))),
                encoders=encoders,
                regions_per_image=system.image_tokenizer.regions_per_image,
                seed=system.seed,
                job=job(),
            )
        return made

    return run_stage(system, folder, work, overwrite, everyone=True)


def job() -> records.Job:
    """The processes of this job."""
    return records.Job(jax.process_index(), jax.process_count(), together)


def task_folders(directory: Path, tasks: Iterable[str]) -> list[Path]:
    """The folders of the tasks' examples."""
    return [directory / "tasks" / "documents" / name for name in tasks]


def _teaching_tasks(system: System, directory: Path) -> tuple[str, ...]:
    """The tasks that both tokenizers learn from, once all is there to learn from."""
    tasks = system.sft.tokenizers if system.sft else ()
    need(directory, "documents", *(["tasks"] if tasks else []))
    return tasks


class Pictures(Sequence):
    """The first picture of every document of a split, then all those of the examples
    of some tasks; uint8 [Y, X, 3]."""

    def __init__(self, directory: Path, split: str, tasks: Iterable[str] = ()):
        folders = [directory / "documents", *task_folders(directory, tasks)]
        self._parts = [sources.read_documents(folder, split) for folder in folders]
        # All examples of a task have the same number of pictures.
        self._each = [1, *(len(part[0].pictures) for part in self._parts[1:])]
        sizes = map(len, self._parts)
        totals = [n * each for n, each in zip(sizes, self._each, strict=True)]
        self._starts = np.cumsum([0, *totals])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index):
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        number, which = divmod(index - int(self._starts[part]), self._each[part])
        document = self._parts[part][number]
        if len(document.pictures) <= which:
            raise ValueError(f"document {document.id!r} has no picture to learn from")
        return document.pictures[which]


def run_stage(
    system: System,
    folder: Path,
    work: Callable[[], Mapping[str, Any]],
    overwrite: bool,
    everyone: bool = False,
) -> Results:
    """`workdir.run_stage` by the first process; `everyone` takes part in the work.

    Every process looks whether the stage is done before any of them begins.
    """
    wanted = system.stage_inputs[folder.name]
    if jax.process_count() == 1:
        return workdir.run_stage(folder, wanted, work, overwrite=overwrite)
    done = workdir.is_done(folder, wanted)
    together(f"{folder.name} begins")
    if jax.process_index() == 0:
        workdir.run_stage(folder, wanted, work, overwrite=overwrite)
    elif everyone and not done:
        work()
    together(f"{folder.name} ends")
    return workdir.results(folder)


def need(directory: Path, *folders: str) -> None:
    """FileNotFoundError where a stage before this one has not finished."""
    for name in folders:
        workdir.results(directory / name)
