"""Which tokens of which samples make up row g: a pure function of g.

`concatenate` (the paper's, section 1.6) joins all samples of an epoch and cuts the
stream, wherever that falls; `first_fit` puts whole samples into rows:

```
samples        aaaa bb ccc        concatenate   aaaab bccc.
row capacity   5                  first_fit     aaaa. bbccc
```

Rows hold `row_length + 1` tokens, inputs and shifted targets. The last row of an epoch
is filled up with padding, so every epoch has every token (or sample) exactly once.
Lengths are asked for in blocks, so nothing here grows with the number of samples but a
few numbers per block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

KINDS = ("concatenate", "first_fit")
# First-fit never looks further than this many samples: they come from one place of the
# (shuffled) epoch, and a window can be packed without knowing any other.
_WINDOW = 128
_WINDOWS_PER_BLOCK = 128
_BLOCK = _WINDOW * _WINDOWS_PER_BLOCK
_BLOCKS_KEPT = 4


@dataclass(frozen=True, kw_only=True)
class PackingConfig:
    """kind: how samples fill rows. row_length: inputs of the decoder per row."""

    kind: str
    row_length: int

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"packing.kind={self.kind!r}: choose one of {KINDS}")
        if self.row_length < 1:
            raise ValueError(f"packing.row_length={self.row_length} must be positive")

    @property
    def capacity(self) -> int | None:
        """The longest sample that a row holds; None where samples may be cut."""
        return self.row_length + 1 if self.kind == "first_fit" else None


@dataclass(frozen=True)
class Slice:
    """Tokens [start, stop) of the sample at `position` of the epoch."""

    position: int
    start: int
    stop: int


def first_fit(lengths_WS: np.ndarray, capacity: int) -> np.ndarray:
    """Row of every sample within its window; -1 for samples of length 0.

    All windows W are packed at once, sample by sample: each sample goes to the first
    row of its window that still has room.
    """
    windows, samples = lengths_WS.shape
    if lengths_WS.max(initial=0) > capacity:
        raise ValueError(f"a sample is longer than a row of {capacity} tokens")
    free = np.full((windows, samples), capacity, np.int64)
    rows_WS = np.full((windows, samples), -1, np.int64)
    every = np.arange(windows)
    used = 0  # rows in use in the fullest window; the next one always has room
    for sample in range(samples):
        lengths = lengths_WS[:, sample]
        row = (free[:, : used + 1] >= lengths[:, None]).argmax(axis=1)
        free[every, row] -= lengths
        rows_WS[:, sample] = np.where(lengths > 0, row, -1)
        used = min(max(used, int(rows_WS[:, sample].max()) + 1), samples - 1)
    return rows_WS


class Plan:
    """Rows of all epochs, one after another, numbered from 0.

    `lengths(epoch, positions)` gives the tokens of the samples at those positions of an
    epoch, 0 for those that are left out; `samples` is how many positions there are.
    """

    def __init__(
        self,
        lengths: Callable[[int, np.ndarray], np.ndarray],
        samples: int,
        config: PackingConfig,
    ):
        self._lengths, self._samples, self._config = lengths, samples, config
        self._first_rows = [0]  # of each epoch
        self._block_starts: list[np.ndarray] = []  # rows or tokens before each block
        self._blocks: dict[tuple[int, int], tuple] = {}

    def rows(self, epoch: int) -> int:
        """How many rows an epoch has."""
        self._plan_epoch(epoch)
        return self._first_rows[epoch + 1] - self._first_rows[epoch]

    def locate(self, row: int) -> tuple[int, int]:
        """Global row number -> (epoch, row within it)."""
        if row < 0:
            raise ValueError(f"row {row} is negative")
        while self._first_rows[-1] <= row:
            self._plan_epoch(len(self._block_starts))
        epoch = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return epoch, row - self._first_rows[epoch]

    def slices(self, epoch: int, row: int) -> list[Slice]:
        """What row number `row` of an epoch is made of, in order."""
        self._plan_epoch(epoch)
        starts = self._block_starts[epoch]
        if self._config.kind == "first_fit":
            block = int(np.searchsorted(starts, row, side="right")) - 1
            samples, lengths, bounds = self._block(epoch, block)
            mine = slice(*bounds[row - starts[block] :][:2])
            return [
                Slice(block * _BLOCK + int(sample), 0, int(length))
                for sample, length in zip(samples[mine], lengths[mine], strict=True)
            ]
        size = self._config.row_length + 1
        return self._cut(epoch, row * size, min((row + 1) * size, int(starts[-1])))

    def _cut(self, epoch: int, low: int, high: int) -> list[Slice]:
        """Tokens [low, high) of the epoch's stream."""
        starts, found = self._block_starts[epoch], []
        block = int(np.searchsorted(starts, low, side="right")) - 1
        while block < len(starts) - 1 and starts[block] < high:
            (bounds,) = self._block(epoch, block)
            a, b = low - starts[block], high - starts[block]
            first = max(int(np.searchsorted(bounds, a, side="right")) - 1, 0)
            last = int(np.searchsorted(bounds, b, side="left"))
            for sample in range(first, min(last, len(bounds) - 1)):
                begin, end = int(bounds[sample]), int(bounds[sample + 1])
                start, stop = int(max(a, begin)) - begin, int(min(b, end)) - begin
                if start < stop:
                    found.append(Slice(block * _BLOCK + sample, start, stop))
            block += 1
        return found

    def _plan_epoch(self, epoch: int) -> None:
        while len(self._block_starts) <= epoch:
            number = len(self._block_starts)
            sizes = [
                self._block_size(self._block(number, block))
                for block in range(-(-self._samples // _BLOCK))
            ]
            starts = np.cumsum([0, *sizes])
            rows = int(starts[-1])
            if self._config.kind == "concatenate":
                rows = -(-rows // (self._config.row_length + 1))
            if rows == 0:
                raise ValueError(
                    f"none of {self._samples} samples fits into a row of "
                    f"packing.row_length={self._config.row_length} tokens"
                )
            # In this order: a second thread must never see a row without its blocks.
            self._block_starts.append(starts)
            self._first_rows.append(self._first_rows[number] + rows)

    def _block_size(self, block: tuple) -> int:
        if self._config.kind == "concatenate":
            return int(block[0][-1])  # tokens
        return len(block[2]) - 1  # rows

    def _block(self, epoch: int, block: int) -> tuple:
        """concatenate: (token bounds of the block's samples,); first_fit: (samples,
        their lengths, bounds of each row in these two)."""
        found = self._blocks.get((epoch, block))
        if found is None:
            first = block * _BLOCK
            positions = np.arange(first, min(first + _BLOCK, self._samples))
            lengths = self._lengths(epoch, positions)
            if self._config.kind == "concatenate":
                found = (np.concatenate([[0], np.cumsum(lengths)]),)
            else:
                found = _pack_block(lengths, self._config.row_length + 1)
            self._blocks[epoch, block] = found
            while len(self._blocks) > _BLOCKS_KEPT:
                self._blocks.pop(next(iter(self._blocks)), None)
        return found


def _pack_block(lengths: np.ndarray, capacity: int) -> tuple:
    windows = -(-len(lengths) // _WINDOW)
    padded = np.zeros(windows * _WINDOW, np.int64)
    padded[: len(lengths)] = lengths
    rows_WS = first_fit(padded.reshape(windows, _WINDOW), capacity)
    counts = rows_WS.max(axis=1) + 1
    before = np.concatenate([[0], np.cumsum(counts)])
    rows = np.where(rows_WS >= 0, rows_WS + before[:-1, None], -1).ravel()
    order = np.argsort(rows, kind="stable")
    order = order[rows[order] >= 0]
    bounds = np.searchsorted(rows[order], np.arange(before[-1] + 1))
    return order, padded[order], bounds
