"""The CM3 objective as a rearrangement of tokens, and its inverse (paper section 1.7).

```
<eos> a red star <break> i0 i1 i2 i3 <eos>                         spans [2, 4) [6, 8)
<eos> a <s0> <break> i0 <s1> i3 <s0> red star <eoss> <s1> i1 i2 <eoss> <eos>
```

Spans are numbered by position, never cross a `<break>`, and each costs exactly three
tokens (the hole, its repetition, `<eoss>`). How many spans a sample has depends on
hashes of (seed, epoch, record) alone, so a packing plan knows every length without
reading a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cm3leon_jax.data.hashing import uniform
from cm3leon_jax.tokenizers import regions
from cm3leon_jax.vocab import Layout

SPANS, SEGMENT, REGION, ANSWER = range(4)  # the modes
OVERHEAD = 3  # tokens per span
# Purposes of random numbers.
_MODE, _COUNT, _REGION, _TEXT, _PLACE, _ANSWER = range(6)


@dataclass(frozen=True, kw_only=True)
class InfillConfig:
    """How samples are masked.

    spans: mean of the Poisson number of random spans; 0 of them leaves a sample causal.
    segment: probability of moving one whole segment (a text or a picture) instead.
    region: probability of moving a region of a picture instead.
    region_without_text: share of region samples whose text is moved too.
    """

    spans: float = 1.0
    segment: float
    region: float
    region_without_text: float

    def __post_init__(self):
        if not 0 <= self.spans <= 100:
            raise ValueError(f"infill.spans={self.spans} must be within [0, 100]")
        for name in ("segment", "region", "region_without_text"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"infill.{name}={value} must be within [0, 1]")
        if self.segment + self.region > 1:
            raise ValueError(
                f"infill.segment={self.segment} and infill.region={self.region} must "
                "not exceed 1 together"
            )


@dataclass(frozen=True, kw_only=True)
class AnswerConfig:
    """How samples of tasks are masked: before, and instead of, `InfillConfig`.

    probability: of exactly the answer being moved; a task whose output comes last has
    nothing to move, its sample stays causal. regions: numbers of the tasks of which a
    region is always what is moved.
    """

    probability: float
    regions: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Draws:
    """What happens to each of some samples: arrays of one length."""

    mode: np.ndarray  # SPANS, SEGMENT, REGION or ANSWER
    spans: np.ndarray  # how many spans are moved
    region: np.ndarray  # which of the record's regions
    with_text: np.ndarray  # bool: the region's text is moved too
    length: np.ndarray  # int64 tokens of the sample, 0 for records that cannot fit


def draw(
    config: InfillConfig,
    index: np.ndarray,
    records: np.ndarray,
    *,
    epoch: int | np.ndarray,
    seed: int,
    sentinels: int,
    capacity: int | None,
    answers: AnswerConfig | None = None,
) -> Draws:
    """Modes, numbers of spans and lengths of the samples of `records` in an epoch.

    `index` holds the rows of `records.TokenRecords.index` for these records. `capacity`
    is the longest sample that a row holds (None: no limit). A mode that does not fit
    or does not apply falls back to random spans, as many of them as fit. `answers`
    (None: records have no tasks) goes before all of that. `epoch` may be one for each
    sample: whatever makes a record's repetitions differ.
    """
    length = index["length"].astype(np.int64) + 2  # <eos> at both ends
    room = np.full(len(records), sentinels, np.int64)
    if capacity is not None:
        room = np.minimum(room, (capacity - length) // OVERHEAD)

    def random(purpose):
        return uniform(seed, epoch, purpose, records)

    # The original clamps its Poisson draw to [0, sentinels - 1].
    cdf = _poisson_cdf(config.spans, max(sentinels - 1, 0))
    spans = np.searchsorted(cdf, random(_COUNT), side="right")
    spans = np.minimum(spans, np.minimum(room, index["maskable"])).clip(0)

    mode_draw = random(_MODE)
    region, with_text, region_spans = _draw_region_mode(
        config, index, random(_REGION), random(_TEXT), room
    )
    in_answer, always = np.zeros((2, len(records)), bool)
    if answers is not None:
        always = np.isin(index["task"], answers.regions)
        in_answer = (random(_ANSWER) < answers.probability) & (index["task"] > 0)
        in_answer &= ~always & (index["answers"] <= room)
    in_region = (always | (mode_draw < config.region)) & ~in_answer & (region_spans > 0)
    in_segment = (
        ~in_answer
        & (mode_draw >= config.region)
        & (mode_draw < config.region + config.segment)
        & (index["segments"] >= 2)  # else there would be nothing left to see
        & (room >= 1)
    )
    mode = np.where(in_region, REGION, np.where(in_segment, SEGMENT, SPANS))
    spans = np.where(in_region, region_spans, np.where(in_segment, 1, spans))
    if answers is not None:
        mode = np.where(in_answer, ANSWER, mode)
        spans = np.where(in_answer, index["answers"], spans)
    total = length + OVERHEAD * spans
    if capacity is not None:
        total = np.where(length > capacity, 0, total)
    return Draws(mode, spans, region, in_region & with_text, total)


def _draw_region_mode(config, index, region_draw, text_draw, room):
    """(region, with text, spans) per sample; 0 spans where no region fits."""
    runs = index["runs"].astype(np.int64)
    counts = (runs > 0).sum(axis=1)
    if runs.shape[1] == 0:
        nothing = np.zeros(len(index), np.int64)
        return nothing, nothing.astype(bool), nothing
    region = np.minimum((region_draw * counts).astype(np.int64), counts - 1).clip(0)
    rows = np.arange(len(index))
    spans = runs[rows, region]
    with_text = (text_draw < config.region_without_text) & (spans + 1 <= room)
    with_text &= index["text"][rows, region]
    spans = np.where(spans <= room, spans + with_text, 0)
    return region, with_text, spans


def _poisson_cdf(mean: float, largest: int) -> np.ndarray:
    """Cumulative probabilities of 0 … largest - 1; what is left falls on `largest`."""
    terms, term = [], math.exp(-mean)
    for k in range(largest):
        terms.append(term)
        term *= mean / (k + 1)
    return np.cumsum(terms) if terms else np.zeros(0)


def place_points(
    draws: Draws, records: np.ndarray, *, epoch: int | np.ndarray, seed: int
) -> np.ndarray:
    """Uniform numbers for `place_spans` and `pick_segment`: float64 [samples, points],
    at least two per random span."""
    spans = np.where(draws.mode == REGION, 1, draws.spans)
    points = np.arange(2 * spans.max(initial=1))
    epoch = np.asarray(epoch)[..., None]
    return uniform(seed, epoch, _PLACE, records[:, None], points)


def place_spans(
    count: int, segments_S2: np.ndarray, points: np.ndarray
) -> list[tuple[int, int]]:
    """Exactly `count` disjoint random spans (start, stop), none across two segments.

    `segments_S2` are the (start, stop) of a sample's segments and `points` uniform
    numbers, of which the first 2 * count are used. Both ends of a span are
    uniform over the sample: 2 * count sorted uniform points taken in pairs have the
    distribution of that many uniform spans given that none intersect. Each is clipped
    to the segment that it overlaps most.
    """
    if count == 0:
        return []
    low, high = int(segments_S2[0, 0]), int(segments_S2[-1, 1])
    points = np.sort(points[: 2 * count]) * (high - low) + low
    spans, free_from = [], low
    for k in range(count):
        start = max(math.floor(points[2 * k]), free_from)
        stop = min(math.ceil(points[2 * k + 1]), high)
        overlap = np.minimum(segments_S2[:, 1], stop) - np.maximum(
            segments_S2[:, 0], start
        )
        most = int(overlap.argmax())
        if overlap[most] > 0:
            start = max(start, int(segments_S2[most, 0]))
            stop = min(stop, int(segments_S2[most, 1]))
            spans.append((start, stop))
            free_from = stop
    if len(spans) < count:
        spans = _complete(spans, count, segments_S2, points)
    return spans


def _complete(
    spans: list[tuple[int, int]], count: int, segments_S2: np.ndarray, points
) -> list[tuple[int, int]]:
    """Single tokens in place of the spans that fell on a `<break>` or on each other."""
    tokens = np.concatenate([np.arange(*segment) for segment in segments_S2])
    taken = np.zeros(tokens[-1] + 1, bool)
    for start, stop in spans:
        taken[start:stop] = True
    free = tokens[~taken[tokens]]
    missing = count - len(spans)
    if len(free) < missing:  # almost everything is taken: nothing but single tokens
        spans, free, missing = [], tokens, count
    if len(free) < missing:
        raise ValueError(f"{count} spans do not fit into {len(tokens)} tokens")
    turn = int(points[0]) % len(free)
    chosen = np.roll(free, turn)[np.arange(missing) * len(free) // missing]
    return sorted(spans + [(int(token), int(token) + 1) for token in chosen])


def pick_segment(segments_S2: np.ndarray, point: float) -> tuple[int, int]:
    """One of the segments that are not empty, all alike."""
    filled = segments_S2[segments_S2[:, 1] > segments_S2[:, 0]]
    start, stop = filled[int(point * len(filled))]
    return int(start), int(stop)


def draw_region(
    rng: np.random.Generator, grid: tuple[int, int], max_runs: int
) -> np.ndarray:
    """A random region on a code grid: bool [Yg, Xg], True = hidden.

    Half boxes, half free forms (a wandering brush); 10-75 % of the cells, in at most
    `max_runs` horizontal runs. ValueError where no such box exists.
    """
    height, width = grid
    target = rng.uniform(0.1, 0.75)
    if rng.random() < 0.5:
        cells = _free_form(rng, grid, target)
        if 0.1 <= cells.mean() <= 0.75 and len(regions.runs(cells)) <= max_runs:
            return cells
    sizes = np.indices((height, width)).reshape(2, -1).T + 1
    share = sizes.prod(axis=1) / (height * width)
    allowed = (share >= 0.1) & (share <= 0.75) & (sizes[:, 0] <= max_runs)
    if not allowed.any():
        raise ValueError(
            f"no region of a {height}x{width} grid has at most {max_runs} runs: set "
            f"vocab.sentinels to more than {height}"
        )
    distance = np.where(allowed, np.abs(share - target), np.inf)
    near = np.flatnonzero(distance <= max(0.05, distance.min()))
    h, w = sizes[rng.choice(near)]
    y, x = rng.integers(height - h + 1), rng.integers(width - w + 1)
    cells = np.zeros(grid, bool)
    cells[y : y + h, x : x + w] = True
    return cells


def _free_form(rng, grid, target: float) -> np.ndarray:
    """The first cells that a square brush touches on a random walk over the grid."""
    cells = grid[0] * grid[1]
    brush = int(rng.integers(1, max(2, min(grid) // 3) + 1))
    vertical = rng.random(8 * cells) < 0.5
    steps = rng.choice((-1, 1), 8 * cells)
    y = _reflect(rng.integers(grid[0]) + np.cumsum(steps * vertical), grid[0])
    x = _reflect(rng.integers(grid[1]) + np.cumsum(steps * ~vertical), grid[1])
    dy, dx = np.indices((brush, brush)).reshape(2, -1)
    touched = np.minimum(y[:, None] + dy, grid[0] - 1) * grid[1]
    touched = (touched + np.minimum(x[:, None] + dx, grid[1] - 1)).ravel()
    found, first = np.unique(touched, return_index=True)
    form = np.zeros(cells, bool)
    form[found[np.argsort(first)][: round(target * cells)]] = True
    return form.reshape(grid)


def _reflect(positions: np.ndarray, size: int) -> np.ndarray:
    """Positions of a walk between two walls."""
    last = size - 1
    return last - np.abs(positions % (2 * last) - last) if last else positions * 0


def infill(
    tokens_L: np.ndarray,
    spans: Sequence[tuple[int, int]],
    layout: Layout,
    order: Sequence[int] | None = None,
) -> np.ndarray:
    """Move spans to the end of a sample `<eos> … <eos>`; int32 [L + 3 * spans].

    `spans` are (start, stop) in rising order; `order` says in which order their numbers
    are moved (default: rising). ValueError for spans that overlap, cross a `<break>`,
    touch the outer `<eos>` or are more than the sentinels.
    """
    tokens_L = np.asarray(tokens_L, np.int32)
    _check(tokens_L, spans, layout)
    order = range(len(spans)) if order is None else order
    if sorted(order) != list(range(len(spans))):
        raise ValueError(f"order {list(order)} does not number {len(spans)} spans")
    first = layout.sentinels.start
    parts: list[Any] = []
    seen = 0
    for number, (start, stop) in enumerate(spans):
        parts += [tokens_L[seen:start], (first + number,)]
        seen = stop
    parts.append(tokens_L[seen:-1])
    for number in order:
        start, stop = spans[number]
        parts += [(first + number,), tokens_L[start:stop], (layout.eoss,)]
    parts.append(tokens_L[-1:])
    return np.concatenate(parts, dtype=np.int32, casting="unsafe")


def _check(tokens_L, spans, layout: Layout) -> None:
    if len(tokens_L) < 2 or tokens_L[0] != layout.eos or tokens_L[-1] != layout.eos:
        raise ValueError("a sample begins and ends with <eos>")
    if len(spans) > len(layout.sentinels):
        raise ValueError(
            f"{len(spans)} spans need as many sentinels, the vocabulary has "
            f"{len(layout.sentinels)}: raise vocab.sentinels"
        )
    seen = 1
    for start, stop in spans:
        if not seen <= start < stop < len(tokens_L):
            raise ValueError(
                f"span [{start}, {stop}) is empty, overlaps the one before it, or "
                f"leaves [1, {len(tokens_L) - 1})"
            )
        if (tokens_L[start:stop] == layout.brk).any():
            raise ValueError(f"span [{start}, {stop}) crosses a <break>")
        seen = stop


def uninfill(tokens: np.ndarray, layout: Layout) -> np.ndarray:
    """The inverse of `infill`: moved spans back in their holes.

    ValueError where holes and moved spans do not match, as in a sample cut short.
    """
    tokens = np.asarray(tokens, np.int32)
    if len(tokens) < 2 or tokens[-1] != layout.eos:
        raise ValueError("a sample begins and ends with <eos>")
    sentinels = layout.sentinels
    (at,) = np.nonzero((tokens >= sentinels.start) & (tokens < sentinels.stop))
    if len(at) == 0:
        return tokens
    holes, moved = at[: len(at) // 2], at[len(at) // 2 :]
    ends = np.append(moved[1:], len(tokens) - 1) - 1
    if (
        sorted(tokens[holes]) != sorted(tokens[moved])
        or len(set(tokens[holes].tolist())) != len(holes)
        or (tokens[ends] != layout.eoss).any()
    ):
        raise ValueError("holes and moved spans do not match: the sample is damaged")
    contents = {
        tokens[start]: tokens[start + 1 : end]
        for start, end in zip(moved, ends, strict=True)
    }
    parts, seen = [], 0
    for hole in holes:
        parts += [tokens[seen:hole], contents[tokens[hole]]]
        seen = hole + 1
    parts += [tokens[seen : moved[0]], tokens[-1:]]
    return np.concatenate(parts)
