"""The stages before the decoder: documents, both tokenizers, token cache.

And what every stage is made of: `run_stage`, done once by a job of any number of
processes, and `need`. The list of all stages is in `stages.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cm3leon_jax import workdir
from cm3leon_jax.codec import load_image_tokenizer, load_text_tokenizer
from cm3leon_jax.data import records, sources
from cm3leon_jax.evaluation.reconstruction import scores
from cm3leon_jax.interop import efficientnet
from cm3leon_jax.parallel.distributed import together
from cm3leon_jax.parallel.mesh import make_mesh
from cm3leon_jax.system import System
from cm3leon_jax.tokenizers import text as text_tokenizer
from cm3leon_jax.training import image_tokenizer

Results = dict[str, Any]
FEATURES = {"none": lambda: None, "efficientnet_lite0": efficientnet.features}
_SHARDS = 4


def prepare_data(system: System, directory: Path, overwrite: bool = False) -> Results:
    """Source -> `documents/`: every split as ArrayRecord, with what was skipped."""
    folder = directory / "documents"

    def work() -> Mapping[str, Any]:
        _, documents = sources.SOURCES[system.data.source]
        splits = system.data.limits
        return sources.prepare(system.source, documents, folder, splits)

    return run_stage(system, folder, work, overwrite)


def train_text_tokenizer(
    system: System, directory: Path, overwrite: bool = False
) -> Results:
    """`documents/` -> `text_tokenizer/`: byte-pair pieces of the training captions."""
    folder = directory / "text_tokenizer"
    need(directory, "documents")

    def work() -> Results:
        text_tokenizer.train(
            sources.read_texts(directory / "documents", "train"),
            folder / "model",
            system.vocabulary.text,
            system.seed,
        )
        return {"pieces": system.vocabulary.text}

    return run_stage(system, folder, work, overwrite)


def train_image_tokenizer(
    system: System, directory: Path, overwrite: bool = False
) -> Results:
    """`documents/` -> `image_tokenizer/`: the VQGAN, and how well it reconstructs."""
    folder = directory / "image_tokenizer"
    settings = system.image_tokenizer
    need(directory, "documents")

    def work() -> Mapping[str, Any]:
        held_out = Pictures(directory, "validation")
        count = min(len(held_out), settings.validation_pictures)
        return image_tokenizer.train(
            settings.training,
            settings.model,
            images=Pictures(directory, "train"),
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
        for split in system.data.limits:
            made[split] = records.build(
                sources.read_documents(directory / "documents", split),
                folder,
                split,
                _SHARDS,
                text_tokenizer=load_text_tokenizer(directory),
                image_tokenizer=load_image_tokenizer(directory),
                layout=system.layout,
                regions_per_image=system.image_tokenizer.regions_per_image,
                seed=system.seed,
            )
        return made

    return run_stage(system, folder, work, overwrite)


class Pictures(Sequence):
    """The first picture of every document of a split, uint8 [Y, X, 3]."""

    def __init__(self, directory: Path, split: str):
        self._documents = sources.read_documents(directory / "documents", split)

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index):
        document = self._documents[index]
        if not document.pictures:
            raise ValueError(f"document {document.id!r} has no picture to learn from")
        return document.pictures[0]


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
