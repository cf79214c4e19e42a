"""Rows of training tokens, and batches of them, as pure functions of their number.

Row g of the endless sequence of epochs depends on the records, the settings and the
seed alone; batch t is always rows [t * B, (t + 1) * B). Workers and processes only
share that work out, so any of them can stop and go on anywhere (design section 2.7).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from cm3leon_jax.data import infill as cm3
from cm3leon_jax.data.hashing import permute
from cm3leon_jax.data.infill import AnswerConfig, InfillConfig
from cm3leon_jax.data.mixing import Mixture, Neighbours, Plain, join
from cm3leon_jax.data.packing import PackingConfig, Plan, Slice
from cm3leon_jax.data.records import TokenRecords, text_before
from cm3leon_jax.data.task_mixture import TaskMixture
from cm3leon_jax.data.tokenization import Record
from cm3leon_jax.vocab import Layout

_ORDER = 101  # purpose of the random numbers that shuffle an epoch
_ENDLESS = 1 << 40  # steps
_AT_ONCE = 1 << 16  # records counted together


class Rows:
    """Rows of `row_length + 1` tokens over all epochs. Can be pickled.

    `skipped` counts the records that are too long for a row even without any span.
    `neighbours` puts retrieved documents into the samples (None: there are none).
    Records of tasks also need `answers`, how they are masked, and `mixture`, how often
    each comes. Raises ValueError where the records were made with another vocabulary,
    or the neighbours or the mixture with other records.
    """

    def __init__(
        self,
        records: TokenRecords,
        layout: Layout,
        infill: InfillConfig,
        packing: PackingConfig,
        seed: int,
        neighbours: Neighbours | None = None,
        answers: AnswerConfig | None = None,
        mixture: TaskMixture | None = None,
    ):
        if records.layout != layout:
            raise ValueError(
                f"{records.directory} was tokenized with the vocabulary "
                f"{records.layout}, not {layout}: run the tokenize_data stage again"
            )
        self.records, self.layout, self.seed = records, layout, seed
        self.infill, self.packing, self.neighbours = infill, packing, neighbours
        self.answers, self.mixture = answers, mixture
        if neighbours is not None:
            neighbours.check(records)
        if not bool(records.tasks) == (answers is not None) == (mixture is not None):
            raise ValueError(
                f"{records.directory}: records of tasks, and no others, are rows with "
                "answers and a mixture"
            )
        if mixture is not None and (neighbours or mixture.total != len(records)):
            raise ValueError(
                f"{records.directory} has {len(records)} records, the mixture of tasks "
                f"is of {mixture.total}, without neighbours"
            )
        self.skipped = 0
        if packing.capacity is not None:
            too_long = records.index["length"] + 2 > packing.capacity
            self.skipped = int(np.count_nonzero(too_long))
        self._plan = self._make_plan()

    def _make_plan(self) -> Plan:
        samples = self.mixture.size if self.mixture else len(self.records)
        return Plan(self._lengths, samples, self.packing)

    def __getstate__(self):
        return {key: value for key, value in vars(self).items() if key != "_plan"}

    def __setstate__(self, state):
        vars(self).update(state)
        self._plan = self._make_plan()

    def count(self, epoch: int) -> int:
        """How many rows an epoch has."""
        return self._plan.rows(epoch)

    def row(self, number: int) -> dict[str, np.ndarray]:
        """One row: tokens, segments, positions int32 and moved bool, all [L + 1].

        segments: 1, 2, … per sample (first_fit) or 1 throughout (concatenate), 0 is
        padding. positions: of a token in its sample (first_fit) or row (concatenate).
        moved: the token is in a moved span, or is its sentinel or `<eoss>`. With
        neighbours also retrieved, bool: the token is a retrieved document's, or its
        `<break>`, or in a span moved out of one. With tasks also task, int32: the
        number of the sample's task, 0 for padding.
        """
        return {key: value[0] for key, value in self.rows([number]).items()}

    def rows(self, numbers: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Several rows at once, stacked: cheaper, as records are read together."""
        parts = self._parts(numbers)
        samples = self._samples(parts)
        size, resets = self.packing.row_length + 1, self.packing.kind == "first_fit"
        shape = (len(numbers), size)
        batch = {
            "tokens": np.full(shape, self.layout.pad, np.int32),
            "segments": np.zeros(shape, np.int32),
            "positions": np.zeros(shape, np.int32),
            "moved": np.zeros(shape, bool),
        }
        if self.neighbours is not None:
            batch["retrieved"] = np.zeros(shape, bool)
        if self.answers is not None:
            batch["task"] = np.zeros(shape, np.int32)
        filled, segment = [0] * len(numbers), [0] * len(numbers)
        count = np.arange(size, dtype=np.int32)
        for (slot, epoch, part), *_ in parts:
            sample = samples[epoch, part.position]
            low, high = filled[slot], filled[slot] + part.stop - part.start
            segment[slot] += 1
            filled[slot] = high
            for key in batch.keys() & sample._fields:
                whole = getattr(sample, key)
                batch[key][slot, low:high] = whole[part.start : part.stop]
            batch["segments"][slot, low:high] = segment[slot] if resets else 1
            start = 0 if resets else low
            batch["positions"][slot, low:high] = count[start : start + high - low]
        return batch

    def record_ids(self, number: int) -> list[str]:
        """Ids of the records that a row has tokens of; after each those that its
        sample retrieves."""
        parts = self._parts([number])
        ids = []
        for (_, epoch, _), record, _ in parts:
            ids.append(self.records[record].id)
            if self.neighbours is not None:
                numbers = np.array([record])
                rows = self._mix(epoch, numbers, self._draw(epoch, numbers)).rows[0]
                ids += [
                    found.id for found in self.neighbours.bank.read(rows[rows >= 0])
                ]
        return ids

    def retrieved(self, epoch: int) -> dict[str, int]:
        """How many documents the samples of an epoch retrieve (`documents`), lack, as
        there were too few neighbours (`missing`), and leave out, as the row would not
        hold them (`dropped`)."""
        totals = {"documents": 0, "missing": 0, "dropped": 0}
        for start in range(0, len(self.records) if self.neighbours else 0, _AT_ONCE):
            numbers = np.arange(start, min(start + _AT_ONCE, len(self.records)))
            mixture = self._mix(epoch, numbers, self._draw(epoch, numbers))
            totals["documents"] += int((mixture.rows >= 0).sum())
            totals["missing"] += int(mixture.missing.sum())
            totals["dropped"] += int(mixture.dropped.sum())
        return totals

    def _parts(
        self, numbers: Sequence[int] | np.ndarray
    ) -> list[tuple[tuple[int, int, Slice], int, int]]:
        """((slot, epoch, slice of a sample), record, its pass) of all rows."""
        parts = []
        for slot, number in enumerate(numbers):
            epoch, row = self._plan.locate(int(number))
            parts += [(slot, epoch, part) for part in self._plan.slices(epoch, row)]
        records, passes = np.zeros((2, len(parts)), np.int64)
        epochs = np.array([epoch for _, epoch, _ in parts])
        positions = np.array([part.position for _, _, part in parts])
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            records[mine], passes[mine] = self._order(int(epoch), positions[mine])
        return list(zip(parts, records.tolist(), passes.tolist(), strict=True))

    def _order(
        self, epoch: int, positions: np.ndarray
    ) -> tuple[np.ndarray, int | np.ndarray]:
        """Positions in the shuffled epoch -> records, and the pass over them that each
        belongs to: the epoch, unless a mixture of tasks repeats records within one."""
        if self.mixture is not None:
            return self.mixture.locate(epoch, positions)
        return permute(positions, len(self.records), self.seed, epoch, _ORDER), epoch

    def _draw(self, passes: int | np.ndarray, records: np.ndarray) -> cm3.Draws:
        return cm3.draw(
            self.infill,
            self.records.index[records],
            records,
            epoch=passes,
            seed=self.seed,
            sentinels=len(self.layout.sentinels),
            capacity=self.packing.capacity,
            answers=self.answers,
        )

    def _mix(self, epoch: int, records: np.ndarray, draws: cm3.Draws) -> Mixture:
        assert self.neighbours is not None
        return self.neighbours.draw(
            self.records,
            records,
            draws.length,
            epoch=epoch,
            seed=self.seed,
            capacity=self.packing.capacity,
        )

    def _lengths(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        records, passes = self._order(epoch, positions)
        draws = self._draw(passes, records)
        if self.neighbours is None:
            return draws.length
        return draws.length + self._mix(epoch, records, draws).length

    def _samples(self, parts) -> dict[tuple[int, int], Sample]:
        """The sample of each (epoch, position) that is used."""
        wanted: dict[int, dict[int, tuple[int, int]]] = {}
        for (_, epoch, part), *record in parts:
            wanted.setdefault(epoch, {})[part.position] = tuple(record)
        samples = {}
        for epoch, by_position in wanted.items():
            numbers, passes = np.array(list(by_position.values()), np.int64).T
            draws = self._draw(passes, numbers)
            points = cm3.place_points(draws, numbers, epoch=passes, seed=self.seed)
            records = self.records.read(numbers)
            found, rows = {}, None
            if self.neighbours is not None:
                rows = self._mix(epoch, numbers, draws).rows
                found = self.neighbours.read(rows)
            for k, position in enumerate(by_position):
                own = [] if rows is None else rows[k][rows[k] >= 0].tolist()
                samples[epoch, position] = build_sample(
                    *(records[k], draws, k, points[k], self.layout),
                    [found[row] for row in own],
                )
        return samples


class Sample(NamedTuple):
    """tokens, task int32, moved, retrieved bool, all [length]; see `Rows.row`."""

    tokens: np.ndarray
    moved: np.ndarray
    retrieved: np.ndarray
    task: np.ndarray


def build_sample(
    record: Record,
    draws: cm3.Draws,
    k: int,
    points: np.ndarray,
    layout: Layout,
    documents: Sequence[Record] = (),
) -> Sample:
    """Sample of a record under draw number `k`, after its retrieved `documents`.

    Random spans lie anywhere in it; a whole segment or a region is one of the record's
    own, as at inference, and of a task's segments not the last one, which is written at
    the end anyway, unless the answer stands elsewhere. With a region hidden, visible
    codes are those of the blanked picture (an encoder that looks around has seen no
    hidden pixel), moved ones those of the full picture.
    """
    plain = join(documents, record, layout)
    tokens, query, order = plain.tokens, plain.query, None
    if draws.mode[k] == cm3.REGION:
        spans, order = _hide_region(plain, record, draws, k, layout)
    elif draws.mode[k] == cm3.SEGMENT:
        given = slice(-1 if record.task and not len(record.answers) else None)
        spans = [cm3.pick_segment(record.bounds[given] + query, points[0])]
    elif draws.mode[k] == cm3.ANSWER:
        spans = [(start, stop) for start, stop in (record.answers + query).tolist()]
    else:
        spans = cm3.place_spans(int(draws.spans[k]), plain.bounds, points)
    sample = cm3.infill(tokens, spans, layout, order) if spans else tokens
    if len(sample) != draws.length[k] + query - 1:
        raise ValueError(
            f"record {record.id!r} is not the one that the index tells of: remove the "
            "token cache and run the tokenize_data stage again"
        )
    moved, retrieved = np.zeros((2, len(sample)), bool)
    # Spans out of retrieved documents come first, in the sample and where they are
    # moved to: then nothing of the query is moved before its own order.
    before = [stop - start for start, stop in spans if start < query]
    retrieved[1 : query - sum(before) + len(before)] = True
    if spans:
        kept = len(tokens) + len(spans) - sum(stop - start for start, stop in spans)
        moved[kept - 1 : -1] = True
        retrieved[kept - 1 : kept - 1 + sum(before) + 2 * len(before)] = True
    return Sample(sample, moved, retrieved, np.full(len(sample), record.task, np.int32))


def _hide_region(plain: Plain, record: Record, draws: cm3.Draws, k: int, layout):
    """Blanked picture's visible codes, put into the tokens; spans and their order."""
    tokens, query = plain.tokens, plain.query
    region = record.regions[draws.region[k]]
    start, stop = (record.bounds[region.segment] + query).tolist()
    hidden = region.cells.ravel()
    codes = layout.image_ids(region.codes).ravel()
    tokens[start:stop] = np.where(hidden, tokens[start:stop], codes)
    spans = [(start + a, start + b) for a, b in cm3.regions.runs(region.cells).tolist()]
    if not draws.with_text[k]:
        return spans, None
    text = text_before(record, region.segment, layout)
    assert text is not None  # the index said so
    # The text is the last to be written, when its picture is whole again.
    order = [*range(1, len(spans) + 1), 0]
    return [(int(text[0]) + query, int(text[1]) + query), *spans], order


def batches(
    rows: Rows,
    *,
    batch_size: int,
    process_index: int,
    process_count: int,
    workers: int,
    start_step: int,
    steps: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """This process's part of batch `start_step`, `start_step` + 1, …: `steps` of them,
    or without end. Who stops earlier calls `close()`, which ends the workers.

    Arrays as in `Rows.row` with a leading axis of batch_size / process_count, and
    "row": int64, the global row numbers. `workers` child processes build them (0: a
    thread of this one); the bytes are the same for any number of either.
    """
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size={batch_size} does not divide among {process_count} processes"
        )
    local = batch_size // process_count

    def build(step: int) -> dict[str, Any]:
        first = step * batch_size + process_index * local
        numbers = np.arange(first, first + local, dtype=np.int64)
        return {**rows.rows(numbers), "row": numbers}

    stop = _ENDLESS if steps is None else start_step + steps
    dataset = grain.MapDataset.range(start_step, stop).map(build)
    dataset = dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    )
    if workers:
        # Grain's workers read its flags; a notebook has no `app.run` to parse any.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        )
    return _plain(iter(dataset))


def _plain(iterator: Any) -> Iterator[dict[str, np.ndarray]]:
    """Batches as arrays of our own: Grain's live in memory shared with its workers,
    which must be given back, and must not end up as a device's buffer."""
    try:
        for batch in iterator:
            yield {key: np.array(value) for key, value in batch.items()}
    finally:
        iterator.close()
