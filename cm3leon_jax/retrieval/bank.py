"""The memory bank: a folder of document vectors that is searched by inner product.

    meta.json                   encoder, size, storage, parts, removed rows
    vectors-00000.npy …         the parts, in the order of the rows
    scales-00000.npy            of int8 vectors: what to multiply each row with
    ids-00000.json              ids of the documents
    documents/                  what was added later, as a source's documents are kept

Row i keeps its number for good: what is added goes to the end, what is removed is
passed over. `meta.json` is written last and whole, so a bank is never seen in part.
A bank is complete in itself (documents of training stay where they are, and it says
where): another one is swapped in by loading another folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from cm3leon_jax.config import read_json, write_whole
from cm3leon_jax.data.documents import Document
from cm3leon_jax.data.sources import read_documents
from cm3leon_jax.parallel.distributed import together
from cm3leon_jax.parallel.mesh import MeshConfig, make_mesh
from cm3leon_jax.retrieval.bank_files import (
    MEND,
    checked,
    is_whole,
    read_array,
    read_ids,
    some,
    store,
    write_part,
)
from cm3leon_jax.retrieval.search import (
    STORAGES,
    Block,
    block_rows,
    place,
    search,
)

META, PLAN = "meta.json", "plan.json"
PART_ROWS = 65_536
BLOCK_BYTES = 64 << 20  # of a device, while a bank is streamed
RESIDENT_BYTES = 2 << 30  # of a device; a smaller bank stays there
_AT_ONCE = 256  # documents embedded together


class Encoder(Protocol):
    """What a bank needs of `retrieval/embed.py`'s `Embedder`."""

    name: str
    size: int

    def documents(self, documents: Sequence[Document]) -> np.ndarray: ...


def build(
    directory: str | Path,
    encoder: Encoder,
    documents: Sequence[Document],
    *,
    storage: str = "float32",
    kept: tuple[str | Path, str] | None = None,
    part_rows: int = PART_ROWS,
) -> Bank:
    """Embeds documents into a bank, row i being document i.

    Every process of a job makes its share of the parts; parts that an earlier run has
    finished are kept. `kept` is (folder, split) where the documents can be read again;
    None keeps a copy in the bank. Raises ValueError for no documents, for vectors that
    are not finite, and where the folder was begun with another encoder, storage or
    number of documents.
    """
    directory, count = Path(directory), len(documents)
    if not count:
        raise ValueError(f"{directory}: a bank of no documents, there is nothing in it")
    if storage not in STORAGES:
        raise ValueError(f"retrieval.storage={storage!r}: choose from {STORAGES}")
    plan = {"encoder": encoder.name, "size": encoder.size, "storage": storage}
    plan |= {"documents": count, "part_rows": part_rows}
    first = jax.process_index() == 0
    if first:
        _begin(directory, plan)
    together("bank begins")
    _agree(directory / PLAN, plan)
    starts = range(0, count, part_rows)
    for part in range(jax.process_index(), len(starts), jax.process_count()):
        if not is_whole(directory, part):
            rows = range(starts[part], min(starts[part] + part_rows, count))
            _embed(directory, part, encoder, documents, rows, storage)
    together("bank embedded")
    if first:
        if kept is None:
            store(documents, directory / "documents", "built")
            kept = directory / "documents", "built"
        where = os.path.relpath(kept[0], directory)
        parts = [
            {
                "count": min(part_rows, count - start),
                "documents": [where, kept[1], start],
            }
            for start in starts
        ]
        meta = {key: plan[key] for key in ("encoder", "size", "storage")}
        write_whole(
            directory / META, json.dumps(meta | {"parts": parts, "removed": []})
        )
    together("bank built")
    return Bank.load(directory, encoder)


class Bank:
    """A bank that is there; `len` is the number of documents that can be found."""

    def __init__(
        self,
        directory: Path,
        meta: dict[str, Any],
        block_bytes: int,
        resident_bytes: int,
    ):
        self.directory, self._meta = directory, meta
        self._block_bytes, self._resident_bytes = block_bytes, resident_bytes
        self._open()

    @classmethod
    def load(
        cls,
        directory: str | Path,
        encoder: Encoder | None = None,
        *,
        block_bytes: int = BLOCK_BYTES,
        resident_bytes: int = RESIDENT_BYTES,
    ) -> Bank:
        """The bank of a folder, to be asked with the vectors of `encoder`.

        A bank of more than `resident_bytes` a device is read from disk for each search,
        in blocks of `block_bytes` a device. FileNotFoundError where no bank is
        finished; ValueError for a bank that another encoder made, is damaged or empty.
        """
        path = Path(directory) / META
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: no bank is finished there, run the build_bank "
                "stage"
            )
        meta = read_json(path, MEND)
        bank = cls(Path(directory), meta, block_bytes, resident_bytes)
        if encoder is not None and encoder.size != bank.size:
            raise ValueError(
                f"{directory} holds vectors of {bank.size} numbers, the encoder makes "
                f"{encoder.size}: use the encoder it was built with, or {MEND}"
            )
        if encoder is not None and encoder.name != bank.encoder:
            raise ValueError(
                f"{directory} was built with encoder {bank.encoder}, not "
                f"{encoder.name}, whose vectors mean something else: use that encoder, "
                f"or {MEND}"
            )
        return bank

    def _open(self) -> None:
        """Maps the files that `meta.json` names; ValueError where one does not fit."""
        meta = self._meta
        try:
            self.encoder, self.size = str(meta["encoder"]), int(meta["size"])
            self.storage, parts = meta["storage"], meta["parts"]
            self._counts = [int(part["count"]) for part in parts]
            self._kept = [tuple(part["documents"]) for part in parts]
            self._removed = np.array(meta["removed"], np.int64)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.directory / META}: {error!r}; {MEND}") from error
        self._starts = np.cumsum([0, *self._counts])
        self._parts = [
            read_array(self.directory, "vectors", i, (count, self.size), self.storage)
            for i, count in enumerate(self._counts)
        ]
        self._scale = np.ones(self.rows, np.float32)
        if self.storage == "int8":
            self._scale = np.concatenate(
                [
                    read_array(self.directory, "scales", i, (count,), "float32")
                    for i, count in enumerate(self._counts)
                ]
            )
        self._alive = np.ones(self.rows, bool)
        self._alive[self._removed] = False
        self._resident: tuple[Mesh, list[Block]] | None = None
        self.__dict__.pop("ids", None)

    @property
    def rows(self) -> int:
        """Rows of the bank, removed ones included."""
        return int(self._starts[-1])

    def __len__(self) -> int:
        return self.rows - len(self._removed)

    @property
    def alive(self) -> np.ndarray:
        """Which rows can be found: bool [rows], False where one was removed."""
        return self._alive

    @cached_property
    def ids(self) -> list[str]:
        """The id of the document of every row, removed ones included."""
        parts = enumerate(self._counts)
        return [x for i, n in parts for x in read_ids(self.directory, i, n)]

    def __getitem__(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """Vectors of rows as they were stored: float32 [N, E]."""
        rows = np.asarray(rows, np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < self.rows:
            raise IndexError(f"a row outside [0, {self.rows}) of {self.directory}")
        found = np.empty((len(rows), self.size), np.float32)
        owner = np.searchsorted(self._starts, rows, side="right") - 1
        for part in np.unique(owner):
            mine = owner == part
            found[mine] = self._parts[part][rows[mine] - self._starts[part]]
        return found * self._scale[rows][:, None]

    def documents(self, rows: Sequence[int] | np.ndarray) -> list[Document]:
        """The documents of rows; FileNotFoundError or ValueError where they are gone or
        are others than those that were embedded."""
        found = []
        for row in np.asarray(rows, np.int64).tolist():
            if not 0 <= row < self.rows:
                raise IndexError(f"no row {row} of {self.rows} in {self.directory}")
            part = int(np.searchsorted(self._starts, row, side="right")) - 1
            folder, split, first = self._kept[part]
            stored = self._stored_documents(folder, split)
            number = first + row - int(self._starts[part])
            document = stored[number] if number < len(stored) else None
            if document is None or document.id != self.ids[row]:
                raise ValueError(
                    f"{self.directory} has {self.ids[row]!r} in row {row}, which is "
                    f"no longer document {number} of {split!r} in "
                    f"{self.directory / folder}: {MEND}"
                )
            found.append(document)
        return found

    def _stored_documents(self, folder: str, split: str) -> Sequence[Document]:
        opened = self.__dict__.setdefault("_opened", {})
        if (folder, split) not in opened:
            opened[folder, split] = read_documents(self.directory / folder, split)
        return opened[folder, split]

    def search(
        self, queries_BE: np.ndarray, k: int, mesh: Mesh | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(scores float32, rows int64), both [B, k], best first; see `search.search`.

        -inf and -1 where the bank has fewer documents. `mesh` None is all devices.
        """
        if not len(self):
            raise ValueError(f"{self.directory} is empty: all of it was removed")
        mesh = make_mesh(MeshConfig()) if mesh is None else mesh
        width = np.dtype(self._parts[0].dtype).itemsize * self.size
        if self._resident is not None and self._resident[0] == mesh:
            return search(queries_BE, self._resident[1], k, mesh)
        size = block_rows(self.rows, width, mesh, self._block_bytes)
        blocks = (
            place(self._stored, self._scale, self._alive, first, size, mesh)
            for first in range(0, self.rows, size)
        )
        if self.rows * width <= self._resident_bytes * mesh.size:
            self._resident = mesh, list(blocks)
            blocks = self._resident[1]
        return search(queries_BE, blocks, k, mesh)

    def _stored(self, start: int, stop: int) -> np.ndarray:
        pieces = [
            part[max(start - first, 0) : max(stop - first, 0)]
            for first, part in zip(self._starts.tolist(), self._parts, strict=False)
        ]
        pieces = [piece for piece in pieces if len(piece)] or [self._parts[0][:0]]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def add(
        self,
        ids: Sequence[str],
        vectors_ME: np.ndarray,
        documents: Sequence[Document],
    ) -> range:
        """Appends documents, on disk too; the rows that they have now.

        Raises ValueError for ids that the bank has already, or twice, and for vectors
        that are not finite or not of the bank's size.
        """
        ids, vectors_ME = list(ids), checked(vectors_ME, ids, self.size)
        if len(documents) != len(ids) or not ids:
            raise ValueError(f"{len(ids)} ids of {len(documents)} documents to add")
        there = {self.ids[row] for row in np.flatnonzero(self._alive)}
        known = [i for i in ids if i in there]
        if known or len(set(ids)) < len(ids):
            raise ValueError(
                f"{self.directory} has these already, or they come twice: "
                f"{some(known or ids)}; remove them first"
            )
        part, first = len(self._counts), self.rows
        split = f"added{part:05d}"
        store(documents, self.directory / "documents", split)
        write_part(self.directory, part, ids, vectors_ME, self.storage)
        entry = {"count": len(ids), "documents": ["documents", split, 0]}
        self._change({"parts": [*self._meta["parts"], entry]})
        return range(first, self.rows)

    def remove(self, ids: Sequence[str]) -> int:
        """Takes documents out, on disk too; how many rows. Their numbers stay unused.

        Raises ValueError, and removes nothing, where the bank lacks one of them.
        """
        wanted = set(ids)
        rows = [row for row in np.flatnonzero(self._alive) if self.ids[row] in wanted]
        missing = wanted - {self.ids[row] for row in rows}
        if missing:
            raise ValueError(
                f"{self.directory} does not have {some(sorted(missing))}: nothing "
                "was removed"
            )
        self._change({"removed": [*self._meta["removed"], *map(int, rows)]})
        return len(rows)

    def _change(self, changes: Mapping[str, Any]) -> None:
        self._meta = {**self._meta, **changes}
        write_whole(self.directory / META, json.dumps(self._meta))
        self._open()


def _begin(directory: Path, plan: Mapping[str, Any]) -> None:
    path = directory / PLAN
    if path.is_file():
        _agree(path, plan)
    else:
        write_whole(path, json.dumps(plan))


def _agree(path: Path, plan: Mapping[str, Any]) -> None:
    found = read_json(path, f"delete {path.parent} and build the bank again")
    other = [key for key in plan if found.get(key) != plan[key]]
    if other:
        changes = "; ".join(f"{k}: {found.get(k)} -> {plan[k]}" for k in other)
        raise ValueError(
            f"{path.parent} was begun with other settings ({changes}): delete it to "
            "build the bank anew"
        )


def _embed(
    directory: Path,
    part: int,
    encoder: Encoder,
    documents: Sequence[Document],
    rows: range,
    storage: str,
) -> None:
    ids: list[str] = []
    vectors = []
    for start in range(rows.start, rows.stop, _AT_ONCE):
        stop = min(start + _AT_ONCE, rows.stop)
        chunk = [documents[i] for i in range(start, stop)]
        names = [document.id for document in chunk]
        vectors.append(checked(encoder.documents(chunk), names, encoder.size))
        ids += names
    write_part(directory, part, ids, np.concatenate(vectors), storage)
