"""The stages of a system with retrieval: dual encoder, memory bank; and its changes.

The bank of training holds the training documents: row i is document i of the split
`train`, and record i of the token cache, so that a neighbour file speaks of records.
What is added later has rows after those.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from cm3leon_jax import encoders, workdir
from cm3leon_jax.codec import load_text_tokenizer
from cm3leon_jax.config import make, write_whole
from cm3leon_jax.data import sources
from cm3leon_jax.data.documents import Document, Skipped
from cm3leon_jax.parallel.distributed import together
from cm3leon_jax.parallel.mesh import MeshConfig, make_mesh
from cm3leon_jax.preparation import Pictures, Results, need, run_stage
from cm3leon_jax.retrieval import bank_build, examples, neighbours
from cm3leon_jax.retrieval.bank import Bank
from cm3leon_jax.retrieval.embed import Embedder
from cm3leon_jax.retrieval_config import RetrievalConfig
from cm3leon_jax.system import System
from cm3leon_jax.training import dual_encoder

FOLDER = "bank"
SPLITS = ("train", "validation")  # that have neighbour files
_ADDED_AT_ONCE = 4096


def train_dual_encoder(
    system: System, directory: Path, overwrite: bool = False
) -> Results:
    """`documents/` -> `dual_encoder/`: trained on the pairs, or what stands for it."""
    folder = directory / encoders.FOLDER
    encoder = _retrieval(system).encoder
    need(directory, "documents", "text_tokenizer")

    def work() -> Mapping[str, Any]:
        if encoder.training is None or encoder.model is None:
            found = encoders.load(encoder, directory)  # says now what is missing
            return {"encoder": found.name, "size": found.size}
        return dual_encoder.train(
            encoder.training,
            encoder.model,
            pairs=_pairs(directory, "train"),
            validation=_pairs(directory, "validation"),
            encode=load_text_tokenizer(directory).encode,
            directory=folder,
            mesh=make_mesh(system.mesh),
            rules=system.rules,
            seed=system.seed,
        )

    return run_stage(system, folder, work, overwrite, everyone=True)


def build_bank(system: System, directory: Path, overwrite: bool = False) -> Results:
    """`documents/` -> `bank/`: vectors, and the neighbours of training documents."""
    folder = directory / FOLDER
    settings = _retrieval(system)
    need(directory, "documents", encoders.FOLDER)

    def work() -> Results:
        embedder = encoders.load(settings.encoder, directory)
        documents = {
            split: sources.read_documents(directory / "documents", split)
            for split in SPLITS
        }
        left = bank_build.left(folder, len(documents["train"]))
        began = time.monotonic()
        bank = bank_build.build(
            folder,
            embedder,
            documents["train"],
            storage=settings.storage,
            kept=(directory / "documents", "train"),
        )
        seconds = max(time.monotonic() - began, 1e-3)
        made: Results = {"documents": len(bank), "encoder": bank.encoder}
        made["documents_per_second"] = round(left / seconds, 1)
        made |= _threshold(system, directory, embedder, documents)
        for split in SPLITS:
            made[split] = neighbours.build(
                bank,
                embedder,
                documents[split],
                split,
                in_bank=split == "train",
                per_query=settings.per_query,
                skip_above=made["skip_above"],
                query_dropout=settings.query_dropout if split == "train" else 0.0,
                seed=system.seed,
            )
        if jax.process_index() == 0:
            examples.write(
                bank,
                embedder,
                documents["train"],
                per_query=settings.per_query,
                skip_above=made["skip_above"],
                query_dropout=settings.query_dropout,
                seed=system.seed,
                mesh=make_mesh(MeshConfig(), jax.local_devices()),
            )
            counts = {split: made[split] for split in SPLITS}
            write_whole(folder / "skipped.json", json.dumps(counts, indent=1))
        return made

    return run_stage(system, folder, work, overwrite, everyone=True)


def _threshold(
    system: System,
    directory: Path,
    embedder: Embedder,
    documents: Mapping[str, Sequence[Document]],
) -> Results:
    """`skip_above`, the score of near-duplicates, and if it is calibrated whether it is
    `met`, what it is to do; the same on every process of a job."""
    given = _retrieval(system).skip_above
    if given is not None:
        return {"skip_above": given}
    found = neighbours.thresholds(
        embedder, documents["validation"], documents["train"], system.seed
    )
    if jax.process_index() == 0:
        file = directory / FOLDER / "calibration.json"
        write_whole(file, json.dumps(vars(found), indent=1))
    if not found.met:
        logging.warning(
            "retrieval.skip_above=%.4f, calibrated, does not tell copies from other "
            "documents: it drops %.1f %% of copies (99 %% wanted) and %.1f %% of other "
            "documents of the same thing (1 %% allowed); another encoder may do better",
            *(found.skip_above, 100 * found.duplicates, 100 * found.same_entity),
        )
    return {"skip_above": found.skip_above, "met": found.met}


def add(directory: Path, source: str) -> Results:
    """Adds a split of `documents/`, or a folder of pictures with captions, to the bank.

    Nothing is trained, and neighbours of training documents stay as they are. Raises
    ValueError, and adds nothing, where one of the ids is in the bank already.
    """
    system = System.load(directory)
    workdir.results(directory / FOLDER)
    documents, skipped = _documents(system, directory, source)
    embedder = encoders.load(_retrieval(system).encoder, directory)
    bank = Bank.load(directory / FOLDER, embedder)
    if jax.process_index() == 0:
        made = [
            embedder.documents(documents[start : start + _ADDED_AT_ONCE])
            for start in range(0, len(documents), _ADDED_AT_ONCE)
        ]
        names = [document.id for document in documents]
        vectors, signatures = map(np.concatenate, zip(*made, strict=True))
        bank.add(names, vectors, signatures, documents)
    together("bank changed")
    bank = Bank.load(directory / FOLDER)
    return {"added": len(documents), "skipped": skipped, "documents": len(bank)}


def remove(directory: Path, ids: Sequence[str]) -> Results:
    """Takes documents out of the bank. Raises ValueError, and removes nothing, where
    it lacks one of them. Neighbour files still name what training has seen."""
    workdir.results(directory / FOLDER)
    bank = Bank.load(directory / FOLDER)
    before = len(bank)
    together("bank read")
    if jax.process_index() == 0:
        bank.remove(ids)
    together("bank changed")
    bank = Bank.load(directory / FOLDER)
    return {"removed": before - len(bank), "documents": len(bank)}


def _documents(
    system: System, directory: Path, source: str
) -> tuple[list[Document], int]:
    """The documents of a split or of a folder, and how many could not be used."""
    if (directory / "documents" / f"{source}.json").is_file():
        return list(sources.read_documents(directory / "documents", source)), 0
    if not Path(source).is_dir():
        raise FileNotFoundError(
            f"--add {source}: neither a split of {directory / 'documents'} nor a folder"
        )
    side = system.image_tokenizer.model.image_size
    settings = {"path": source, "image_size": side}
    settings |= {"validation_percent": 0.0, "test_percent": 0.0}
    kind, read = sources.SOURCES["folder"]
    found = list(read(make(kind, settings, "folder"), "train"))
    documents = [item for item in found if not isinstance(item, Skipped)]
    if not documents:
        raise ValueError(f"--add {source}: no pictures with captions in that folder")
    return documents, len(found) - len(documents)


def _retrieval(system: System) -> RetrievalConfig:
    if system.retrieval is None:
        raise ValueError(
            f"system {system.name!r} has no section `retrieval`: it has no bank"
        )
    return system.retrieval


def _pairs(directory: Path, split: str) -> tuple[Sequence[str], Sequence[np.ndarray]]:
    return _Texts(directory, split), Pictures(directory, split)


class _Texts(Sequence):
    """The texts of every document of a split, as one."""

    def __init__(self, directory: Path, split: str):
        self._documents = sources.read_documents(directory / "documents", split)

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index):
        return " ".join(self._documents[index].texts)
