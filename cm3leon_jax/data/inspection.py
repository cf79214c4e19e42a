"""What must hold for every token record and training row, checked, and their numbers.

Numpy alone: a token cache is inspected without its tokenizers, on any machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from cm3leon_jax.data import infill
from cm3leon_jax.data.pipeline import Rows
from cm3leon_jax.data.records import TokenRecords, index_of
from cm3leon_jax.data.tokenization import Record
from cm3leon_jax.tokenizers import regions
from cm3leon_jax.vocab import CLASS, IMAGE, TEXT, Layout

NAMED = 20  # faults that are told one by one
_AT_ONCE = 512  # records, or rows
_QUANTILES = {"least": 0, "5%": 0.05, "median": 0.5, "95%": 0.95, "most": 1}


def faults_of(record: Record, layout: Layout, grid: tuple[int, int]) -> list[str]:
    """What is wrong with a record, in words; nothing where all is well."""
    tokens, bounds = record.tokens, record.bounds
    if not len(tokens) or tokens.min() < 0 or tokens.max() >= layout.size:
        return [f"ids outside [0, {layout.size}), or none at all"]
    ends = np.append(bounds[1:, 0] - 1, len(tokens))
    if bounds[0, 0] != 0 or (bounds[:, 1] != ends).any() or (bounds < 0).any():
        return ["segments do not follow each other with one <break> between them"]
    found = []
    breaks = np.flatnonzero(tokens == layout.brk)
    if breaks.tolist() != bounds[:-1, 1].tolist():
        found.append("<break> elsewhere than between segments")
    kinds = layout.modality(tokens)
    cells = grid[0] * grid[1]
    for number, (start, stop) in enumerate(bounds):
        if len(here := set(kinds[start:stop].tolist())) > 1 or not here <= {
            *(TEXT, IMAGE, CLASS)
        }:
            found.append(f"segment {number} is not of one kind of ids")
        elif here == {IMAGE} and stop - start != cells:
            found.append(f"a picture of {stop - start} codes, not {cells}")
        elif here == {CLASS} and int((stop - start) ** 0.5) ** 2 != stop - start:
            found.append(f"a mask of {stop - start} classes is not square")
    for region in record.regions:
        if not _region_fits(region, record, kinds, layout, grid):
            found.append(f"a region of segment {region.segment} does not fit it")
    texts = bounds[[bool(stop > start) for start, stop in bounds]]
    for start, stop in record.answers:
        inside = (texts[:, 0] <= start) & (stop <= texts[:, 1])
        if not start < stop or not inside.any():
            found.append(f"an answer at [{start}, {stop}) is in no segment")
    return found


def _region_fits(region, record: Record, kinds, layout: Layout, grid) -> bool:
    if not 0 <= region.segment < len(record.bounds):
        return False
    start, stop = record.bounds[region.segment]
    return (
        (kinds[start:stop] == IMAGE).all()
        and region.cells.shape == region.codes.shape == grid
        and 0 < region.cells.sum() < region.cells.size
        and len(regions.runs(region.cells)) < len(layout.sentinels)
        and 0 <= region.codes.min() <= region.codes.max() < len(layout.image)
    )


def check_records(records: TokenRecords, most: int) -> tuple[dict[str, Any], list[str]]:
    """(numbers of up to `most` records spread over the split, faults by record; at most
    `NAMED` are told)."""
    lengths: dict[str, list[int]] = {"tokens": [], "text": []}
    names: Counter[str] = Counter()
    faults: list[str] = []
    counts = Counter(pictures=0, regions=0, faulty=0)
    hidden = 0.0
    chosen = spread(len(records), most)
    for start in range(0, len(chosen), _AT_ONCE):
        numbers = chosen[start : start + _AT_ONCE]
        chunk = records.read(numbers)
        for number, record in zip(numbers.tolist(), chunk, strict=True):
            wrong = faults_of(record, records.layout, records.grid)
            if not wrong and not _indexed(record, records, number):
                wrong.append("the index tells of another record")
            names[record.id] += 1
            if names[record.id] == 2:
                wrong.append("another record has this name")
            counts["faulty"] += bool(wrong)
            faults += [f"record {number} ({record.id!r}): {what}" for what in wrong]
            kinds = records.layout.modality(record.tokens)
            lengths["tokens"].append(len(record.tokens))
            lengths["text"].append(int((kinds == TEXT).sum()))
            counts["pictures"] += int((kinds == IMAGE).sum() // np.prod(records.grid))
            counts["regions"] += len(record.regions)
            hidden += sum(float(region.cells.mean()) for region in record.regions)
    told: dict[str, Any] = {"records": len(records), "records looked at": len(chosen)}
    told |= {k: int(n) for k, n in counts.items()}
    told |= {f"{name} of a record": quantiles(n) for name, n in lengths.items()}
    if counts["regions"]:
        told["hidden of a picture"] = round(hidden / counts["regions"], 3)
    return told, faults[:NAMED]


def _indexed(record: Record, records: TokenRecords, number: int) -> bool:
    """Whether the row of the index is that of this record."""
    ours = index_of([record], records.layout, bool(records.tasks))[0]
    theirs = records.index[number]
    for name in ours.dtype.names:
        value = np.atleast_1d(theirs[name])
        wanted = np.zeros_like(value)  # the index may have room for more regions
        own = np.atleast_1d(ours[name])
        if len(own) > len(wanted):
            return False
        wanted[: len(own)] = own
        if (value != wanted).any():
            return False
    return True


def check_rows(rows: Rows, most: int) -> tuple[dict[str, Any], list[str]]:
    """(numbers of up to `most` rows spread over the first epoch, their faults).

    Neighbours were checked when `rows` were opened: they are rows of the bank, and no
    record is its own.
    """
    count = rows.count(0)
    chosen = spread(count, most)
    layout, faults = rows.layout, []
    lengths: list[int] = []
    spans: Counter[int] = Counter()
    totals: Counter[str] = Counter()
    for start in range(0, len(chosen), _AT_ONCE):
        numbers = chosen[start : start + _AT_ONCE]
        batch = rows.rows(numbers)
        totals["places"] += batch["tokens"].size
        totals["filled"] += int((batch["segments"] > 0).sum())
        for name in ("moved", "retrieved"):
            totals[name] += int(batch[name].sum()) if name in batch else 0
        for row, sample in _samples(batch, rows.packing.kind, layout.eos):
            try:
                plain = infill.uninfill(sample, layout)
                moved = (len(sample) - len(plain)) // infill.OVERHEAD
                if plain[0] != layout.eos or (plain[1:-1] == layout.eos).any():
                    raise ValueError("<eos> inside a sample")
            except ValueError as error:
                faults.append(f"row {numbers[row]}: {error}")
                continue
            spans[moved] += 1
            lengths.append(len(sample))
    samples = sum(spans.values())
    numbers = {
        "rows of an epoch": count,
        "rows looked at": len(chosen),
        "samples": samples,
        "tokens of a sample": quantiles(lengths),
        "packing efficiency": round(totals["filled"] / totals["places"], 4),
        "moved spans of a sample": {
            str(n): round(k / samples, 4) for n, k in sorted(spans.items())
        },
        "moved tokens": round(totals["moved"] / max(totals["filled"], 1), 4),
    }
    if rows.neighbours is not None:
        near = rows.neighbours.table
        numbers["retrieved tokens"] = round(totals["retrieved"] / totals["filled"], 4)
        numbers["neighbours of a record"] = round(float((near >= 0).sum(1).mean()), 3)
        numbers["retrieved documents of an epoch"] = rows.retrieved(0)
    return numbers, faults[:NAMED]


def _samples(
    batch: dict[str, np.ndarray], kind: str, eos: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(row, tokens) of every sample that lies whole in its row."""
    for row, tokens in enumerate(batch["tokens"]):
        segments = batch["segments"][row]
        if kind == "first_fit":
            for segment in range(1, int(segments.max()) + 1):
                yield row, tokens[segments == segment]
            continue
        # Samples are cut anywhere: those between two borders, `<eos> <eos>`, are whole.
        borders = np.flatnonzero((tokens[:-1] == eos) & (tokens[1:] == eos)) + 1
        for start, stop in zip(borders, borders[1:], strict=False):
            yield row, tokens[start:stop]


def spread(count: int, most: int) -> np.ndarray:
    """Up to `most` of the numbers below `count`, evenly apart."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(np.int64)


def quantiles(values: Any) -> dict[str, int]:
    """How a whole number is distributed."""
    return {
        name: int(np.quantile(values, at, method="nearest"))
        for name, at in _QUANTILES.items()
        if len(values)
    }
