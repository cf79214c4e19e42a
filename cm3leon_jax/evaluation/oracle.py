"""Reads shapes pictures and captions back into objects, from pixels or words alone.

The oracle never sees a scene graph. It explains every cell of a picture by the
template (shape, size, colour) that is nearest in squared pixel distance, or by
emptiness; what no template explains is `UNKNOWN`, an object that nobody asked for.
Templates are computed by point-in-shape tests, not by the drawing code of
`data/shapes.py`. Frozen: `tests/test_oracle.py` holds it to 100 % on rendered truth
and under the blur of a tokenizer, before any model is scored with it.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterable

import numpy as np

from cm3leon_jax.data import shapes
from cm3leon_jax.data.shapes import Object, ShapesConfig

UNKNOWN = "unknown"
_POINTS = 8  # sub-pixel samples per side
_UNEXPLAINED = 0.35  # of the nearest object's energy: above, it is no known object
_VISIBLE = 40  # colour levels off the background: less is blur or noise, not paint
_HALF = 0.47  # of an object's colour: half, but for rounding
_SPECK = 0.25  # of the smallest template's energy: an empty cell may hold that much


def _inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points, in units of the half extent around the centre, are covered."""
    if shape == "circle":
        return u**2 + v**2 <= 1
    if shape == "square":
        return np.maximum(abs(u), abs(v)) <= 0.86
    if shape == "cross":
        arm = shapes._CROSS_ARM
        reach = np.maximum(abs(u), abs(v)) <= 1
        return reach & (np.minimum(abs(u), abs(v)) <= arm)
    corners = shapes.outline(shape)
    inside = np.zeros(u.shape, bool)
    for (u0, v0), (u1, v1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if v0 == v1:
            continue
        crosses = (v0 > v) != (v1 > v)
        inside ^= crosses & (u < (u1 - u0) * (v - v0) / (v1 - v0) + u0)
    return inside


@functools.lru_cache
def _windows(config: ShapesConfig) -> list[tuple[slice, slice]]:
    """Pixel rows and columns of every cell, in raster order."""
    edges = np.rint(np.arange(config.layout + 1) * config.image_size / config.layout)
    spans = [slice(int(a), int(b)) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return [(rows, columns) for rows in spans for columns in spans]


@functools.lru_cache
def _templates(config: ShapesConfig, cell: int) -> tuple[list, np.ndarray]:
    """Names (shape, size) and their coverage in [0, 1] of the pixels of one cell."""
    side = config.image_size / config.layout
    rows, columns = _windows(config)[cell]
    offsets = (np.arange(_POINTS) + 0.5) / _POINTS
    y = (np.arange(rows.start, rows.stop)[:, None] + offsets).ravel()
    x = (np.arange(columns.start, columns.stop)[:, None] + offsets).ravel()
    centre_y = (cell // config.layout + 0.5) * side
    centre_x = (cell % config.layout + 0.5) * side
    names = [(shape, size) for shape in config.shapes for size in shapes.RADIUS]
    coverage = []
    for shape, size in names:
        r = shapes.RADIUS[size] * side
        v, u = np.meshgrid((y - centre_y) / r, (x - centre_x) / r, indexing="ij")
        samples = _inside(shape, u, v).reshape(
            len(y) // _POINTS, _POINTS, len(x) // _POINTS, _POINTS
        )
        coverage.append(samples.mean((1, 3)).ravel())
    return names, np.array(coverage)


def background(config: ShapesConfig, picture: np.ndarray) -> str:
    """The background that most of the cells' corner pixels are nearest to."""
    corners = np.concatenate(
        [
            picture[rows, columns][[0, 0, -1, -1], [0, -1, 0, -1]]
            for rows, columns in _windows(config)
        ]
    ).astype(np.float64)
    palette = np.array([shapes.BACKGROUNDS[name] for name in config.backgrounds])
    distance = ((corners[:, None] - palette) ** 2).sum(-1)
    return config.backgrounds[np.bincount(distance.argmin(1)).argmax()]


def parse(config: ShapesConfig, picture: np.ndarray) -> frozenset[Object]:
    """The objects of a uint8 picture [Y, X, 3]; unexplained ones have UNKNOWN looks."""
    if picture.shape != (config.image_size, config.image_size, 3):
        raise ValueError(f"picture of shape {picture.shape}: not of this world")
    ground = np.array(shapes.BACKGROUNDS[background(config, picture)], np.float64)
    colours = np.array([shapes.COLOURS[c] for c in config.colours]) - ground
    found = set()
    for cell, (rows, columns) in enumerate(_windows(config)):
        pixels = picture[rows, columns].reshape(-1, 3) - ground
        names, coverage = _templates(config, cell)
        # |p - t c|^2 = |p|^2 - 2 t p.c + t^2 |c|^2, summed over the cell's pixels.
        energy = np.outer((coverage**2).sum(1), (colours**2).sum(1))
        error = (pixels**2).sum() - 2 * coverage @ (pixels @ colours.T) + energy
        kind, colour = np.unravel_index(error.argmin(), error.shape)
        deviation = (pixels**2).sum(1)
        smear = deviation[deviation > _VISIBLE**2].sum()
        if smear <= _SPECK * energy.min() and deviation.sum() <= error.min():
            continue
        if error[kind, colour] <= _UNEXPLAINED * energy[kind, colour]:
            shape, size = names[kind]
            found.add(Object(cell, size, config.colours[colour], shape))
        else:
            found.add(Object(cell, UNKNOWN, UNKNOWN, UNKNOWN))
    return frozenset(found)


def covered(
    config: ShapesConfig, picture: np.ndarray
) -> list[tuple[Object, np.ndarray]]:
    """The objects of a picture, each with the pixels that are at least half its own:
    bool [Y, X]. Of an unknown one, all that are not background."""
    ground = np.array(shapes.BACKGROUNDS[background(config, picture)], np.float64)
    found = []
    for o in sorted(parse(config, picture)):
        window = _windows(config)[o.cell]
        pixels = picture[window] - ground
        if o.colour == UNKNOWN:
            own = (pixels**2).sum(-1) > _VISIBLE**2
        else:
            ink = np.array(shapes.COLOURS[o.colour]) - ground
            own = pixels @ ink >= _HALF * (ink @ ink)
        whole = np.zeros(picture.shape[:2], bool)
        whole[window] = own
        found.append((o, whole))
    return found


def boxes(
    config: ShapesConfig, picture: np.ndarray
) -> dict[Object, tuple[int, int, int, int]]:
    """The smallest box around each object: x0, y0, x1, y1, the last two exclusive."""
    found = {}
    for o, own in covered(config, picture):
        y, x = np.nonzero(own)
        if len(y):
            corners = x.min(), y.min(), x.max() + 1, y.max() + 1
            found[o] = tuple(int(corner) for corner in corners)
    return found


def parse_pairs(text: str) -> Counter[tuple[str, str]]:
    """How often a text names each colour and shape, as short captions do."""
    pattern = rf"\b({'|'.join(shapes.COLOURS)}) ({'|'.join(shapes.SHAPES)})\b"
    return Counter(re.findall(pattern, text))


def parse_caption(config: ShapesConfig, text: str) -> frozenset[Object]:
    """The objects that a caption names; one without a place gets cell -1."""
    sizes = {word: s for s, words in shapes.SIZE_WORDS.items() for word in words}
    names = shapes.CELL_NAMES[config.layout]
    cell = "|".join(sorted(names, key=len, reverse=True))
    thing = (
        f"({'|'.join(sizes)}) ({'|'.join(shapes.COLOURS)}) ({'|'.join(shapes.SHAPES)})"
    )
    pattern = rf"(?:({cell}): )?\b{thing}\b(?: at the ({cell}))?"
    found = set()
    for before, size, colour, shape, after in re.findall(pattern, text):
        place = before or after
        index = names.index(place) if place else -1
        found.add(Object(index, sizes[size], colour, shape))
    return frozenset(found)


def object_counts(
    wanted: Iterable[frozenset[Object]], found: Iterable[frozenset[Object]]
) -> np.ndarray:
    """Per picture (right, found, wanted) numbers of exact objects: int [n, 3]."""
    rows = [(len(w & f), len(f), len(w)) for w, f in zip(wanted, found, strict=True)]
    return np.array(rows, np.int64).reshape(-1, 3)


def f1(counts: np.ndarray) -> float:
    """F1 over all objects: 2 right / (found + wanted). `counts` as above."""
    right, found, wanted = counts.sum(0)
    return float(2 * right / max(found + wanted, 1))
