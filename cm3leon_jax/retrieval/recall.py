"""The memory at inference: texts and pictures -> documents that are near to them.

Here nothing is a near-duplicate of the query: a prompt has no answer that could be
copied from its own document. Near-duplicates of each other are still passed over.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from cm3leon_jax.config import read_json
from cm3leon_jax.data.documents import Document, Image, Text
from cm3leon_jax.retrieval import bank_build
from cm3leon_jax.retrieval.bank import Bank
from cm3leon_jax.retrieval.bank_files import MEND
from cm3leon_jax.retrieval.embed import Embedder
from cm3leon_jax.retrieval.strategy import LIKE_CHOSEN, select

_FIRST, _MORE, _MOST = 4, 4, 1024  # hits looked at: times k, times more, at most


class Found(NamedTuple):
    """What was found for a query: the documents, best first, and how many others were
    passed over as near-duplicates of those."""

    documents: list[Document]
    alike: int


class Memory:
    """A bank, the encoder that asks it, and the score of near-duplicates.

    `mesh` is what the bank is searched on, None all devices. Raises ValueError for an
    encoder that the bank was not made with. A bank of which all was removed can be
    added to; only looking in it fails.
    """

    def __init__(
        self,
        bank: Bank,
        embedder: Embedder,
        *,
        skip_above: float,
        mesh: Mesh | None = None,
    ):
        if (bank.encoder, bank.size) != (embedder.name, embedder.size):
            raise ValueError(
                f"{bank.directory} was made with encoder {bank.encoder} of {bank.size} "
                f"numbers, not {embedder.name} of {embedder.size}: use that encoder, "
                "or build the bank again"
            )
        self.bank, self.embedder, self.mesh = bank, embedder, mesh
        self.skip_above = skip_above

    @classmethod
    def load(
        cls,
        directory: str | Path,
        embedder: Embedder,
        *,
        skip_above: float | None,
        mesh: Mesh | None = None,
    ) -> Memory:
        """The bank of a folder; `skip_above` None is the one calibrated there."""
        bank = Bank.load(directory, embedder)
        if skip_above is None:
            path = Path(directory) / "calibration.json"
            skip_above = float(read_json(path, MEND)["skip_above"])
        return cls(bank, embedder, skip_above=skip_above, mesh=mesh)

    def __len__(self) -> int:
        return len(self.bank)

    @property
    def ids(self) -> list[str]:
        """Of the documents that can be found."""
        return [self.bank.ids[row] for row in np.flatnonzero(self.bank.alive)]

    def add(self, documents: Sequence[Document], *, keep: bool = True) -> None:
        """Puts documents into the bank, on disk too if it is to `keep` them;
        ValueError for ids it has."""
        if documents:
            names = [document.id for document in documents]
            made = self.embedder.documents(documents)
            self.bank.add(names, *made, documents, keep=keep)

    def remove(self, ids: Sequence[str], *, keep: bool = True) -> None:
        """Takes documents out of the bank, on disk too if it is to `keep` that;
        ValueError for unknown ids."""
        self.bank.remove(ids, keep=keep)

    def other(self, documents: Sequence[Document]) -> Memory:
        """A memory of other documents, asked in the same way, to be swapped in; in one
        process, and for as long as it is used. Nothing here changes."""
        if jax.process_count() > 1:
            raise ValueError("another memory is made by one process: use build_bank")
        folder = Path(tempfile.mkdtemp(prefix="memory-"))
        bank = bank_build.build(folder, self.embedder, documents)
        weakref.finalize(bank, shutil.rmtree, folder, ignore_errors=True)
        return Memory(bank, self.embedder, skip_above=self.skip_above, mesh=self.mesh)

    def find(
        self, texts: Sequence[str | None], images: Sequence[np.ndarray | None], k: int
    ) -> list[list[Document]]:
        """As `look`, the documents alone."""
        return [found.documents for found in self.look(texts, images, k)]

    def look(
        self, texts: Sequence[str | None], images: Sequence[np.ndarray | None], k: int
    ) -> list[Found]:
        """For each query (a text, a square picture uint8 [Y, X, 3], or both) the
        nearest `k` documents, best first: fewer where the bank has no more.

        Raises ValueError for a query without either, or an empty bank.
        """
        if k < 1:
            raise ValueError(f"k={k} must be at least 1")
        queries_BE = self._queries(texts, images)
        rows_Bk = np.full((len(queries_BE), k), -1, np.int64)
        alike_B = np.zeros(len(queries_BE), np.int64)
        left, wanted = np.arange(len(queries_BE)), _FIRST * k
        while len(left):
            wanted = min(wanted, self.bank.rows)
            _, hits = self.bank.search(queries_BE[left], wanted, self.mesh)
            found = select(
                *(None, None, hits[:, None], self.bank.signatures),
                per_query=(k,),
                skip_above=self.skip_above,
            )
            rows_Bk[left] = found.rows
            alike_B[left] = (found.reasons == LIKE_CHOSEN).sum(axis=(1, 2))
            if wanted >= min(self.bank.rows, max(_MOST, _FIRST * k)):
                break
            left, wanted = left[(found.rows < 0).any(axis=1)], wanted * _MORE
        return [
            Found(self.bank.documents(rows[rows >= 0]), int(alike))
            for rows, alike in zip(rows_Bk, alike_B, strict=True)  # -1 only at the end
        ]

    def _queries(self, texts, images) -> np.ndarray:
        """Float32 [B, E]; a text with its picture is asked for as a document."""
        if len(texts) != len(images):
            raise ValueError(f"{len(texts)} texts, {len(images)} pictures: give pairs")
        made = np.zeros((len(texts), self.embedder.size), np.float32)
        kinds: dict[str, list[int]] = {"text": [], "image": [], "both": []}
        for i, (text, image) in enumerate(zip(texts, images, strict=True)):
            empty = text is None or not text.strip()
            if empty and image is None:
                raise ValueError(f"query {i} is empty: give a text or a picture")
            kinds["text" if image is None else "image" if empty else "both"].append(i)
        for kind, mine in kinds.items():
            if mine and kind == "text":
                made[mine] = self.embedder.texts([texts[i] for i in mine])
            elif mine and kind == "image":
                made[mine] = self.embedder.images([images[i] for i in mine])
            elif mine:
                made[mine], _ = self.embedder.documents(
                    [Document((Text(texts[i]), Image(images[i]))) for i in mine]
                )
        return made
