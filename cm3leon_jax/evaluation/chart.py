"""Line charts as inline SVG: no script, no font, no file; colours come from CSS."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

Point = tuple[float, float]

COLOURS = 6  # CSS classes c0…c5
MAX_POINTS = 400  # more would not be seen at a report's width
SMOOTH_FROM = 60  # points from which on a raw curve stands behind its average
LOGARITHMIC_FROM = 30.0  # ratio of largest to smallest value


@dataclass(frozen=True)
class Series:
    """One named curve; `dashed` for what was measured on held-out data.

    Curves of one `colour` belong together.
    """

    name: str
    points: Sequence[Point]
    dashed: bool = False
    colour: int = 0


def chart(series: Sequence[Series], width: int, height: int, unit: str = "step") -> str:
    """An SVG of all series over a common x axis, with a legend that tells last values.

    `unit` is what the x axis counts. The y axis is logarithmic where positive values
    span more than a factor of 30.
    """
    raw = [_thin(sorted(s.points)) for s in series]
    lines = [_smooth(points) for points in raw]
    x_low, x_high = _range([x for line in lines for x, _ in line])
    values = [y for line in lines for _, y in line]
    low, high = min(values), max(values)
    log = low > 0 and high / low > LOGARITHMIC_FROM
    if log:
        values = [math.log10(v) for v in values]
    y_low, y_high = _range(values, margin=0.06)
    small = width < 500
    left, right, top, bottom = (40, 16, 8, 18) if small else (52, 22, 12, 34)

    def across(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (width - left - right)

    def down(y: float) -> float:
        y = math.log10(max(y, 1e-300)) if log else y
        share = (y - y_low) / (y_high - y_low)
        # A raw value outside what is drawn lies on the border.
        return height - bottom - min(max(share, 0.0), 1.0) * (height - top - bottom)

    def where(x: float) -> str:
        if unit == "step":
            return f"step {x:,.0f}"
        return f"{x:.4g} {escape(unit)}"

    parts = []
    rows, columns = (3, 3) if small else (6, 7)
    y_ticks = (_powers if log else _ticks)(y_low, y_high, rows)
    for y in y_ticks:
        v = down(y)
        ends = f'x1="{left}" x2="{width - right}" y1="{v:.1f}" y2="{v:.1f}"'
        label = f'<text class=y x="{left - 6}" y="{v + 4:.1f}">{_short(y)}</text>'
        parts.append(f"<line class=grid {ends}/>{label}")
    for x in _ticks(x_low, x_high, columns):
        place = f'x="{across(x):.1f}" y="{height - bottom + 15}"'
        parts.append(f"<text class=x {place}>{_short(x)}</text>")
    if not small:
        place = f'x="{(left + width - right) / 2}" y="{height - 2}"'
        parts.append(f"<text class=x {place}>{escape(unit)}</text>")
    for one, points, line in zip(series, raw, lines, strict=True):
        colour = f"c{one.colour % COLOURS}"
        path = _path([(across(x), down(y)) for x, y in line])
        if line is not points:
            faint = _path([(across(x), down(y)) for x, y in points])
            parts.append(f'<path class="raw {colour}" d="{faint}"/>')
        dashes = " dashed" * one.dashed
        parts.append(f'<path class="line {colour}{dashes}" d="{path}"/>')
        # Invisible targets that tell a point's values when pointed at.
        for (x, y), _ in zip(line[:: max(1, len(line) // 60)], range(80), strict=False):
            parts.append(
                f'<circle class="{colour}" cx="{across(x):.1f}" cy="{down(y):.1f}" r=4>'
                f"<title>{escape(one.name)}: {y:.4g} at {where(x)}</title></circle>"
            )
    keys = "".join(
        f'<span><i class="c{one.colour % COLOURS}{" dashed" * one.dashed}"></i>'
        f"{escape(one.name.replace('_', ' '))} <b>{_short(line[-1][1])}</b></span>"
        for one, line in zip(series, lines, strict=True)
    )
    names = escape(", ".join(s.name for s in series))
    return (
        f"<div class=legend>{keys}</div>"
        f'<svg viewBox="0 0 {width} {height}" role=img aria-label="{names}">'
        f"{''.join(parts)}</svg>"
    )


def _range(values: Sequence[float], margin: float = 0.0) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low <= 1e-9 * abs(high):  # one point, or a constant
        pad = abs(low) * 0.1 or 1.0
        return low - pad, high + pad
    pad = (high - low) * margin
    return low - pad, high + pad


def _thin(points: Sequence[Point]) -> list[Point]:
    """At most 400 points: means over equal stretches, the first and last kept."""
    if len(points) <= MAX_POINTS:
        return list(points)
    size = math.ceil(len(points) / (MAX_POINTS - 2))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    means = [
        (sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups
    ]
    return [points[0], *means, points[-1]]


def _smooth(points: list[Point]) -> list[Point]:
    """Centred moving average of a curve that goes up and down; others stay.

    Its window shrinks at the start, so that the first value (ln V) stays in place.
    """
    values = [y for _, y in points]
    travelled = sum(abs(b - a) for a, b in pairwise(values))
    if len(points) < SMOOTH_FROM or travelled <= 2 * (max(values) - min(values)):
        return points
    half = len(points) // 50 + 1
    out = []
    for i, (x, _) in enumerate(points):
        reach = min(half, i)
        window = points[i - reach : i + reach + 1]
        out.append((x, sum(y for _, y in window) / len(window)))
    return out


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) inside a range."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(f for f in (1, 2, 5, 10) if (high - low) / (step * f) <= count)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [i * step for i in range(first, last + 1)]


def _powers(low: float, high: float, count: int) -> list[float]:
    """Ticks of a logarithmic axis whose ends are given as powers of ten."""
    factors = (1, 2, 5) if high - low < count / 3 else (1, 3)
    if high - low > count / 2:
        factors = (1,)
    powers = range(math.floor(low), math.ceil(high) + 1)
    powers = powers[:: math.ceil(len(powers) / (2 * count))]
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    return [tick for tick in ticks if low <= math.log10(tick) <= high]


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            unit = 1e3 if letter == "k" else size
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}" if value else "0"


def _path(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
