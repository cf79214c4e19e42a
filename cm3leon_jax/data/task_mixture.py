"""How often each task comes in an epoch, and which of its records (paper 1.12).

A task's share is proportional to its weight and its size, but no record is repeated
more than 3 times an epoch and no task loses more than 70 % of its records: the paper's
"threshold 3 / 0.3", read as bounds on the resampling ratio.

    task      records  weight   ratio           samples of an epoch
    edit        8,000       1   0.83                          6,667
    answer      2,000       1   0.83                          1,667
    write         500      10   8.33 -> 3                     1,500

Where the next sample of a task comes from is a pure function of (config, epoch,
position): its records are gone through in shuffled passes, which go on from one epoch
to the next, so all of them are used equally often.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cm3leon_jax.data.hashing import permute

RATIOS = (0.3, 3.0)
_ORDER, _PASS = 301, 302  # purposes of random numbers


def ratios(counts: Sequence[int], weights: Sequence[float]) -> np.ndarray:
    """Samples per record and epoch of every task, float64, within `RATIOS`.

    Proportional to the weights; before the bounds, an epoch has as many samples as
    there are records. Raises ValueError for a weight that is not positive or a task
    without records.
    """
    counts_T, weights_T = np.asarray(counts, np.int64), np.asarray(weights, np.float64)
    if not np.isfinite(weights_T).all() or (weights_T <= 0).any():
        raise ValueError(f"task weights {list(weights)} must be positive")
    if (counts_T <= 0).any():
        raise ValueError(f"a task has no records: {list(counts)}")
    ratios_T = weights_T * counts_T.sum() / (weights_T * counts_T).sum()
    return ratios_T.clip(*RATIOS)


class TaskMixture:
    """`size` samples an epoch out of records that lie task after task.

    counts: records of each task; weights: theirs. `only`, numbers of tasks from 0,
    leaves the samples of all others out: the rest keep their order, so a run on one
    task sees exactly what the whole mixture has of it. Raises ValueError as `ratios`
    does.
    """

    def __init__(
        self,
        counts: Sequence[int],
        weights: Sequence[float],
        seed: int,
        only: Sequence[int] = (),
    ):
        self.counts, self.seed = [int(count) for count in counts], seed
        wanted = np.rint(ratios(counts, weights) * self.counts).astype(np.int64)
        self.samples = wanted.clip(1).tolist()
        self._records = np.cumsum([0, *self.counts])
        self._slots = np.cumsum([0, *self.samples])
        self._only = np.array(sorted(only), np.int64)
        self._kept: tuple[int, np.ndarray] | None = None  # epoch, its positions

    @property
    def size(self) -> int:
        """Samples of an epoch."""
        return sum(self.samples[task] for task in self._only) or int(self._slots[-1])

    @property
    def total(self) -> int:
        """Records of all tasks."""
        return int(self._records[-1])

    def locate(
        self, epoch: int, positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Positions of an epoch -> records and the pass of each, both int64.

        A record comes at most once in a pass, so (pass, record) names a sample.
        """
        if len(self._only):
            positions = self._positions(epoch)[positions]
        slots, tasks = self._drawn(epoch, positions)
        records = np.zeros(len(slots), np.int64)
        passes = np.zeros(len(slots), np.int64)
        for task in np.unique(tasks):
            mine, count = np.flatnonzero(tasks == task), self.counts[task]
            drawn = slots[mine] - self._slots[task] + epoch * self.samples[task]
            passes[mine] = drawn // count
            for number in np.unique(passes[mine]):
                now = mine[passes[mine] == number]
                place = drawn[passes[mine] == number] % count
                place = permute(place, count, self.seed, number, task, _PASS)
                records[now] = self._records[task] + place
        return records, passes

    def _drawn(
        self, epoch: int, positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the whole mixture -> slots, and the tasks that own them."""
        slots = permute(positions, int(self._slots[-1]), self.seed, epoch, _ORDER)
        return slots, np.searchsorted(self._slots, slots, side="right") - 1

    def _positions(self, epoch: int) -> np.ndarray:
        """Those of the whole mixture that belong to the tasks that are left."""
        kept = self._kept
        if kept is None or kept[0] != epoch:
            _, tasks = self._drawn(epoch, np.arange(self._slots[-1]))
            kept = epoch, np.flatnonzero(np.isin(tasks, self._only))
            self._kept = kept
        return kept[1]
