"""The memory bank: a folder of document vectors that is searched by inner product.

    meta.json                   encoder, size, storage, parts, removed rows
    vectors-00000.npy …         the parts, in the order of the rows
    scales-00000.npy            of int8 vectors: what to multiply each row with
    signatures-00000.npy        float16: near-duplicates are known by these (`embed.py`)
    ids-00000.json              ids of the documents
    documents/                  what was added later, as a source's documents are kept

Row i keeps its number for good: what is added goes to the end, what is removed is
passed over. `meta.json` is written last and whole, so a bank is never seen in part.
A bank is complete in itself (documents of training stay where they are, and it says
where): another one is swapped in by loading another folder.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jax.sharding import Mesh

from cm3leon_jax.config import read_json, write_whole
from cm3leon_jax.data.documents import Document
from cm3leon_jax.data.sources import read_documents
from cm3leon_jax.parallel.mesh import MeshConfig, make_mesh
from cm3leon_jax.retrieval.bank_files import (
    MEND,
    checked,
    finite,
    read_array,
    read_ids,
    some,
    store,
    write_part,
)
from cm3leon_jax.retrieval.search import Block, block_rows, place, search

META = "meta.json"
BLOCK_BYTES = 64 << 20  # of a device, while a bank is streamed
RESIDENT_BYTES = 2 << 30  # of a device; a smaller bank stays there


class Encoder(Protocol):
    """What a bank needs of `retrieval/embed.py`'s `Embedder`."""

    name: str
    size: int

    def documents(
        self, documents: Sequence[Document]
    ) -> tuple[np.ndarray, np.ndarray]: ...


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
        self._on_disk: dict[str, Any] | None = meta  # None: changed for a while only
        self._scratch: Path | None = None  # where what is not to be kept lies
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
        finished, or the documents of one are not where it says; ValueError for a bank
        that another encoder made, or is damaged. A bank of which all was removed loads,
        as more can be added: only a search of it fails.
        """
        path = Path(directory) / META
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: no bank is finished there, run the build_bank "
                "stage"
            )
        meta = read_json(path, MEND)
        bank = cls(Path(directory), meta, block_bytes, resident_bytes)
        bank._check_documents()
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
            self._places = [self.directory / part.get("folder", ".") for part in parts]
            self._removed = np.array(meta["removed"], np.int64)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.directory / META}: {error!r}; {MEND}") from error
        self._starts = np.cumsum([0, *self._counts])
        places = list(zip(self._places, self._counts, strict=True))
        self._parts = [
            read_array(place, "vectors", i, (count, self.size), self.storage)
            for i, (place, count) in enumerate(places)
        ]
        self._signatures = [
            read_array(place, "signatures", i, (count, self.size), "float16")
            for i, (place, count) in enumerate(places)
        ]
        self._scale = np.ones(self.rows, np.float32)
        if self.storage == "int8":
            self._scale = np.concatenate(
                [
                    read_array(place, "scales", i, (count,), "float32")
                    for i, (place, count) in enumerate(places)
                ]
            )
        if not np.isfinite(self._scale).all():
            raise self._broken("scales")
        self._alive = np.ones(self.rows, bool)
        self._alive[self._removed] = False
        self._resident: tuple[Mesh, list[Block]] | None = None
        self.__dict__.pop("ids", None)

    def _check_documents(self) -> None:
        for folder, split in {kept[:2]: None for kept in self._kept}:
            where = self.directory / folder
            if not (where / f"{split}.json").is_file():
                raise FileNotFoundError(
                    f"bank {self.directory} keeps its documents in {where}, which has "
                    f"no {split!r}: if one of the two was moved or copied, put them "
                    f"back side by side, or {MEND}"
                )

    def _broken(self, what: str) -> ValueError:
        return ValueError(
            f"{self.directory} holds {what} that are not finite numbers, nothing is "
            f"near to those: {MEND}"
        )

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
        return [x for part in range(len(self._counts)) for x in self._ids_of(part)]

    def _ids_of(self, part: int) -> list[str]:
        """Read once: a part never changes."""
        known = self.__dict__.setdefault("_known_ids", {})
        if part not in known:
            known[part] = read_ids(self._places[part], part, self._counts[part])
        return known[part]

    def __getitem__(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """Vectors of rows as they were stored: float32 [N, E]."""
        return self._rows(self._parts, rows) * self._scale[rows][:, None]

    def signatures(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """Signatures of rows as they were stored: float32 [N, E]."""
        return self._rows(self._signatures, rows)

    def _rows(
        self, parts: Sequence[np.ndarray], rows: np.ndarray | Sequence[int]
    ) -> np.ndarray:
        rows = np.asarray(rows, np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < self.rows:
            raise IndexError(f"a row outside [0, {self.rows}) of {self.directory}")
        found = np.empty((len(rows), self.size), np.float32)
        owner = np.searchsorted(self._starts, rows, side="right") - 1
        for part in np.unique(owner):
            mine = owner == part
            found[mine] = parts[part][rows[mine] - self._starts[part]]
        if not finite(found):
            raise self._broken("vectors")
        return found

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
            place = row - int(self._starts[part])
            number, wanted = first + place, self._ids_of(part)[place]
            document = stored[number] if number < len(stored) else None
            if document is None or document.id != wanted:
                raise ValueError(
                    f"{self.directory} has {wanted!r} in row {row}, which is "
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
        ValueError for an empty bank, and for vectors on disk that are no numbers.
        """
        if not len(self):
            raise ValueError(f"{self.directory} is empty: all of it was removed")
        mesh = make_mesh(MeshConfig()) if mesh is None else mesh
        width = self._row_bytes
        if self._resident is not None and self._resident[0] == mesh:
            return search(queries_BE, self._resident[1], k, mesh)
        size = block_rows(self.rows, width, mesh, self._block_bytes)
        blocks = (
            place(self._stored, self._scale, self._alive, first, size, mesh)
            for first in range(0, self.rows, size)
        )
        if self.fits(mesh):
            self._resident = mesh, list(blocks)
            blocks = self._resident[1]
        return search(queries_BE, blocks, k, mesh)

    @property
    def _row_bytes(self) -> int:
        return np.dtype(self._parts[0].dtype).itemsize * self.size

    def fits(self, mesh: Mesh) -> bool:
        """Whether the bank stays on the mesh; else every search reads all of it."""
        return self.rows * self._row_bytes <= self._resident_bytes * mesh.size

    def _stored(self, start: int, stop: int) -> np.ndarray:
        pieces = [
            part[max(start - first, 0) : max(stop - first, 0)]
            for first, part in zip(self._starts.tolist(), self._parts, strict=False)
        ]
        pieces = [piece for piece in pieces if len(piece)] or [self._parts[0][:0]]
        if not all(map(finite, pieces)):
            raise self._broken("vectors")
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def add(
        self,
        ids: Sequence[str],
        vectors_ME: np.ndarray,
        signatures_ME: np.ndarray,
        documents: Sequence[Document],
        *,
        keep: bool = True,
    ) -> range:
        """Appends documents, on disk too; the rows that they have now. Without `keep`
        this object alone has them, and no later change of it can be kept.

        Raises ValueError for ids that the bank has already, or twice, for vectors that
        are not finite or not of the bank's size, and where the change cannot be kept:
        an earlier one was not, or somebody else has changed the bank on disk.
        """
        ids, vectors_ME = list(ids), checked(vectors_ME, ids, self.size)
        signatures_ME = checked(signatures_ME, ids, self.size)
        if len(documents) != len(ids) or not ids:
            raise ValueError(f"{len(ids)} ids of {len(documents)} documents to add")
        there = {self.ids[row] for row in np.flatnonzero(self._alive)}
        known = [i for i in ids if i in there]
        if known or len(set(ids)) < len(ids):
            raise ValueError(
                f"{self.directory} has these already, or they come twice: "
                f"{some(known or ids)}; remove them first"
            )
        self._check_keep(keep)
        part, first = len(self._counts), self.rows
        if not keep and self._scratch is None:
            self._scratch = Path(tempfile.mkdtemp(prefix="bank-"))
            weakref.finalize(self, shutil.rmtree, self._scratch, ignore_errors=True)
        place = self._scratch if self._scratch else self.directory
        split = f"added{part:05d}"
        store(documents, place / "documents", split)
        write_part(place, part, ids, vectors_ME, signatures_ME, self.storage)
        entry: dict[str, Any] = {"count": len(ids)}
        entry["documents"] = ["documents", split, 0]
        if not keep:
            entry |= {"folder": f"{place}"}
            entry["documents"][0] = f"{place / 'documents'}"
        self._change({"parts": [*self._meta["parts"], entry]}, keep)
        return range(first, self.rows)

    def remove(self, ids: Sequence[str], *, keep: bool = True) -> int:
        """Takes documents out, on disk too if it is to `keep` that; how many rows.
        Their numbers stay unused.

        Raises ValueError, and removes nothing, where the bank lacks one of them, and
        where the change cannot be kept (see `add`).
        """
        wanted = set(ids)
        rows = [row for row in np.flatnonzero(self._alive) if self.ids[row] in wanted]
        missing = wanted - {self.ids[row] for row in rows}
        if missing:
            raise ValueError(
                f"{self.directory} does not have {some(sorted(missing))}: nothing "
                "was removed"
            )
        self._check_keep(keep)
        removed = [*self._meta["removed"], *map(int, rows)]
        self._change({"removed": removed}, keep)
        return len(rows)

    def _check_keep(self, keep: bool) -> None:
        """ValueError where a change that is to be kept would lose another."""
        if not keep:
            return
        if self._on_disk is None:
            raise ValueError(
                f"{self.directory} was changed with keep=False, so this change cannot "
                "be kept either: give keep=False, or load the bank again"
            )
        if read_json(self.directory / META, MEND) != self._on_disk:
            raise ValueError(
                f"{self.directory} has been changed since it was loaded: load it "
                "again, then change it"
            )

    def _change(self, changes: Mapping[str, Any], keep: bool) -> None:
        self._meta = {**self._meta, **changes}
        self._on_disk = self._meta if keep else None
        if keep:
            write_whole(self.directory / META, json.dumps(self._meta))
        self._open()
