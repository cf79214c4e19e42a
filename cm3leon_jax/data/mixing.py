"""Retrieved documents in front of a training document (paper sections 1.6, 1.8).

```
<eos> doc <break> doc <break> query <eos>
```

Which documents a record may get stands in a neighbour file, int32 [records, P]: rows of
the bank's token records, -1 for none. Which of them a sample has, and how many, is a
hash of (seed, epoch, record), and their lengths stand in the bank's index, so a packing
plan knows every length without reading a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cm3leon_jax.data.hashing import uniform
from cm3leon_jax.data.records import TokenRecords
from cm3leon_jax.data.tokenization import Record
from cm3leon_jax.vocab import Layout

_PICK, _NUMBER, _NOISE, _OTHER = range(201, 205)  # purposes of random numbers
_CHECKED_AT_ONCE = 1 << 20  # rows of a neighbour file
_MEND = "delete WORKDIR/bank, then run build_bank again"


@dataclass(frozen=True, eq=False)
class Mixture:
    """What each of some samples retrieves: arrays of one length.

    rows: int64 [samples, R], rows of the bank in the order of the sample, -1 for none.
    length: int64, tokens that they add, with a `<break>` each. missing: how many had to
    be done without, as there were too few neighbours. dropped: how many were left out,
    as the row would not have held the sample.
    """

    rows: np.ndarray
    length: np.ndarray
    missing: np.ndarray
    dropped: np.ndarray


class Neighbours:
    """The neighbour file of one split, and how it is used. Can be pickled.

    path: int32 [records, P] as `.npy`. bank: the token records that its rows mean.
    documents: retrieved documents of a sample; fewest: a number between this and
    `documents` is drawn, all alike (None: always `documents`, as in the paper; 0 is
    RA-CM3's choice). noise: share of them that is replaced by random records of the
    bank (an ablation). Raises FileNotFoundError, or ValueError for a file that is no
    table of rows of this bank.
    """

    def __init__(
        self,
        path: str | Path,
        bank: TokenRecords,
        *,
        documents: int,
        fewest: int | None = None,
        noise: float = 0.0,
    ):
        self.path, self.bank, self.noise = Path(path), bank, noise
        self.documents = documents
        self.fewest = documents if fewest is None else fewest
        if not self.path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: run build_bank, which writes it; where that "
                f"has been done, {_MEND}"
            )
        self.table = self._open()
        if not 0 <= self.fewest <= documents <= self.table.shape[1] or not documents:
            raise ValueError(
                f"retrieval.documents={documents} (fewest={self.fewest}) of the "
                f"{self.table.shape[1]} neighbours in {path}: choose 1 … "
                f"{self.table.shape[1]}, and fewest within 0 … documents"
            )
        if not 0 <= noise <= 1:
            raise ValueError(f"retrieval.noise={noise} must be within [0, 1]")

    def _open(self) -> np.ndarray:
        try:
            table = np.load(self.path, mmap_mode="r")
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{self.path} is damaged ({error}): {_MEND}") from error
        if table.ndim != 2 or table.dtype != np.int32:
            raise ValueError(
                f"{self.path} is {table.dtype} {list(table.shape)}, not int32 "
                f"[records, neighbours]: {_MEND}"
            )
        return table

    def __getstate__(self):  # a pickled memory map would be a copy of the whole table
        return {key: value for key, value in vars(self).items() if key != "table"}

    def __setstate__(self, state):
        vars(self).update(state)
        self.table = self._open()

    def check(self, records: TokenRecords) -> None:
        """ValueError unless the file is of these records, and of this bank."""
        if records.layout != self.bank.layout:
            raise ValueError(
                f"the bank's {self.bank.directory} was tokenized with another "
                f"vocabulary than {records.directory}: run both stages again"
            )
        if len(self.table) != len(records):
            raise ValueError(
                f"{self.path} is of {len(self.table)} records, split "
                f"{records.split!r} of {records.directory} has {len(records)}: {_MEND}"
            )
        own = self._is_bank(records)
        for start in range(0, len(self.table), _CHECKED_AT_ONCE):
            part = self.table[start : start + _CHECKED_AT_ONCE]
            beyond = (part < -1) | (part >= len(self.bank))
            if beyond.any():
                record = start + int(beyond.any(axis=1).argmax())
                raise ValueError(
                    f"{self.path} gives record {record} the neighbours "
                    f"{self.table[record].tolist()}, but the bank has "
                    f"{len(self.bank)} records: it was made with other records; {_MEND}"
                )
            itself = part == np.arange(start, start + len(part))[:, None]
            if own and itself.any():
                record = start + int(itself.any(axis=1).argmax())
                raise ValueError(
                    f"{self.path} gives record {record} itself as a neighbour: the "
                    f"answer would stand in its context; {_MEND}"
                )

    def _is_bank(self, records: TokenRecords) -> bool:
        """Whether record i is row i of the bank."""
        return (records.directory.resolve(), records.split) == (
            self.bank.directory.resolve(),
            self.bank.split,
        )

    def draw(
        self,
        records: TokenRecords,
        numbers: np.ndarray,
        lengths: np.ndarray,
        *,
        epoch: int,
        seed: int,
        capacity: int | None,
    ) -> Mixture:
        """What the samples of the records `numbers` retrieve in an epoch.

        `lengths` are those of the samples without retrieved documents, 0 for those that
        are left out. A document with which a sample would be longer than
        `capacity` is dropped whole, in the order of the sample: what comes after it and
        is shorter may still be taken. None: nothing is dropped, rows are cut.
        """
        near = self.table[numbers].astype(np.int64)
        slots = np.arange(near.shape[1])

        def random(purpose):
            return uniform(seed, epoch, purpose, numbers[:, None], slots)

        if self.noise:
            own = numbers if self._is_bank(records) else None
            other = self._others(random(_OTHER), own)
            near = np.where((near >= 0) & (random(_NOISE) < self.noise), other, near)
        turn = np.where(near >= 0, random(_PICK), 2.0)  # those that are none come last
        order = np.argsort(turn, axis=1, kind="stable")[:, : self.documents]
        rows = np.take_along_axis(near, order, axis=1)
        choices = self.documents - self.fewest + 1
        number = uniform(seed, epoch, _NUMBER, numbers) * choices
        number = self.fewest + number.astype(np.int64)
        number = np.where(lengths > 0, number, 0)
        rows[np.arange(self.documents) >= number[:, None]] = -1
        missing = number - (rows >= 0).sum(axis=1)
        sizes = self.bank.index["length"][rows.clip(0)].astype(np.int64) + 1
        sizes[rows < 0] = 0
        dropped = np.zeros(len(rows), np.int64)
        added = np.zeros(len(rows), np.int64)
        for slot in range(self.documents):
            size = sizes[:, slot]
            if capacity is not None:
                over = (size > 0) & (lengths + added + size > capacity)
                rows[over, slot] = -1
                dropped += over
                size = np.where(over, 0, size)
            added += size
        return Mixture(rows, added, missing, dropped)

    def read(self, rows: np.ndarray) -> dict[int, Record]:
        """The bank's records of these rows, each once; -1 is none."""
        wanted = np.unique(rows[rows >= 0])
        found = self.bank.read(wanted)
        lengths = self.bank.index["length"][wanted].tolist()
        for record, length in zip(found, lengths, strict=True):
            if len(record.tokens) != length:
                raise ValueError(
                    f"record {record.id!r} of the bank is not the one that its index "
                    "tells of: remove the token cache and tokenize again"
                )
        return dict(zip(wanted.tolist(), found, strict=True))

    def _others(self, draws: np.ndarray, own: np.ndarray | None) -> np.ndarray:
        """Uniform numbers -> rows of the bank, never the record's own."""
        if own is None:
            return (draws * len(self.bank)).astype(np.int64)
        other = (draws * (len(self.bank) - 1)).astype(np.int64)
        return other + (other >= own[:, None])


@dataclass(frozen=True, eq=False)
class Plain:
    """A sample before any span is moved.

    tokens: int32 [L]. bounds: (start, stop) of the segments of all documents.
    query: where the training document begins, after those retrieved.
    """

    tokens: np.ndarray
    bounds: np.ndarray
    query: int


def join(documents: Sequence[Record], query: Record, layout: Layout) -> Plain:
    """`<eos> (document <break>)×R query <eos>`."""
    start = 1 + sum(len(document.tokens) + 1 for document in documents)
    tokens = np.empty(start + len(query.tokens) + 1, np.int32)
    tokens[0] = tokens[-1] = layout.eos
    tokens[start:-1] = query.tokens
    if not documents:
        return Plain(tokens, query.bounds + 1, start)
    bounds, at = [], 1
    for document in documents:
        stop = at + len(document.tokens)
        tokens[at:stop] = document.tokens
        tokens[stop] = layout.brk
        bounds.append(document.bounds + at)
        at = stop + 1
    return Plain(tokens, np.concatenate([*bounds, query.bounds + start]), start)
