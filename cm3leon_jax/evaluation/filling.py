"""Infilling in the shapes world: what is hidden comes back, and nothing else changes.

Visible codes are copied, so `kept` tells of objects that a mask cuts through. `seams`:
the jumps of pixels at the borders of hidden cells, over those of the reconstruction at
the same borders; 1 is none (a level is added to both: flat ground has no jumps).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image as Pillow

from cm3leon_jax.api import CM3Leon
from cm3leon_jax.data.documents import Document
from cm3leon_jax.data.infill import draw_region
from cm3leon_jax.data.shapes import ShapesConfig
from cm3leon_jax.evaluation import oracle, scenes
from cm3leon_jax.evaluation.protocol import Outcome, Sample, Score, interval
from cm3leon_jax.tokenizers import regions

_ROUNDING = 8  # levels of a channel
SIZES = ((10, 25), (25, 50), (50, 75))  # % of the code cells that are hidden


def infill(model: CM3Leon, documents: Sequence[Document], seed: int) -> Outcome:
    """A part of the picture is hidden, and the whole described.

    One object's cell: `objects`, is exactly that object there again; `kept`, are all
    objects outside it those of the reconstruction. A box that cuts through cells:
    `objects_offgrid`, the objects of every cell that it hides or touches; scenes that
    do not fit into the context with so many rows hidden are left out.
    """
    world, grid = scenes.world_of(model), model.codec.image.grid
    rng = np.random.default_rng(seed)
    cells = [{sorted(w)[rng.integers(len(w))].cell} for w in scenes.wanted(documents)]
    masks = [_cell_mask(world, cell) for (cell,) in cells]
    inside, outside, borders, samples = _fill(model, documents, masks, cells, seed)
    scores = {
        "objects": _f1(documents, inside),
        "kept": _f1(documents, outside),
        "seams": seams(borders),
    }
    boxes = [offgrid_box(rng, world, grid) for _ in documents]
    given, touched, _, borders, others = _fill_fitting(model, documents, boxes, seed)
    if given:
        made = {"objects_offgrid": _f1(given, touched), "seams_offgrid": seams(borders)}
        scenes.partial(made, documents, given)
        scores |= made
        pairs = zip(samples, others, strict=False)
        samples = [sample for both in pairs for sample in both]
    return Outcome(scores, samples)


def infill_sizes(model: CM3Leon, documents: Sequence[Document], seed: int) -> Outcome:
    """By how much is hidden, by boxes and free forms as in training, in % of the code
    cells: `objects_LOW_HIGH` are those of all cells of the layout that a mask touches,
    `kept_LOW_HIGH` all others, against the reconstruction; `seams_LOW_HIGH`."""
    rng = np.random.default_rng(seed)
    scores, samples = {}, []
    for low, high in SIZES:
        masks = [mask_of_size(rng, model, low, high) for _ in documents]
        given, inside, outside, borders, some = _fill_fitting(
            model, documents, masks, seed
        )
        if given:
            made = {"objects": _f1(given, inside), "kept": _f1(given, outside)}
            made |= {"seams": seams(borders)}
            scenes.partial(made, documents, given)
            scores |= {f"{key}_{low}_{high}": score for key, score in made.items()}
            samples.append(some)
    turns = zip(*samples, strict=False)
    return Outcome(scores, [sample for turn in turns for sample in turn])


def infill_untold(model: CM3Leon, documents: Sequence[Document], seed: int) -> Outcome:
    """Without a text, by how much is hidden: nothing says what is to come, but it must
    go with the rest. `valid_LOW_HIGH`: pictures that are a scene of this world, every
    object whole and no more of them than there may be. `kept_LOW_HIGH`: objects of the
    cells that no mask touches, against the reconstruction. `visible_LOW_HIGH`: pixels
    of visible code cells that are those of the reconstruction, but for rounding.
    `seams_LOW_HIGH`."""
    world, grid = scenes.world_of(model), model.codec.image.grid
    rng = np.random.default_rng(seed)
    originals = scenes.pictures(documents)
    rebuilt = [np.asarray(picture) for picture in model.reconstruct(originals)]
    scores, samples = {}, []
    for low, high in SIZES:
        masks = [mask_of_size(rng, model, low, high) for _ in documents]
        cells = [_touched(world, _hidden(mask, grid)) for mask in masks]
        _, outside, borders, some = _fill(
            model, documents, masks, cells, seed, told=False
        )
        made = [np.asarray(sample.pictures["infilled"]) for sample in some]
        valid = [_is_scene(oracle.parse(world, x), world) for x in made]
        same = [kept(a, b, ~m) for a, b, m in zip(rebuilt, made, masks, strict=True)]
        name = f"{low}_{high}"
        scores[f"valid_{name}"] = scenes.share(valid)
        scores[f"kept_{name}"] = _f1(documents, outside)
        scores[f"visible_{name}"] = scenes.share(same)
        scores[f"seams_{name}"] = seams(borders)
        pairs = zip(some, valid, outside, strict=True)
        samples.append(
            [dataclasses.replace(s, ok=bool(v and a == b)) for s, v, (a, b) in pairs]
        )
    turns = zip(*samples, strict=True)
    return Outcome(scores, [sample for turn in turns for sample in turn])


def kept(before_YXC: np.ndarray, after_YXC: np.ndarray, where_YX: np.ndarray) -> float:
    """The share of pixels, of those meant, that are the same but for rounding."""
    far_YX = np.abs(before_YXC.astype(int) - after_YXC).max(axis=2) > _ROUNDING
    return float(1 - far_YX[where_YX].mean()) if where_YX.any() else 1.0


def jumps(picture_YXC: np.ndarray, hidden_YX: np.ndarray) -> float:
    """Levels that pixels differ by over the border of what is hidden, all together."""
    steps = (np.abs(np.diff(picture_YXC.astype(int), axis=a)).mean(2) for a in (0, 1))
    return float(sum(x[np.diff(hidden_YX, axis=a)].sum() for a, x in enumerate(steps)))


def seams(borders: Sequence[tuple[float, float]]) -> Score:
    """Of the `jumps` of what was painted and of its reconstruction."""
    rows = np.array(borders)
    return interval(rows, lambda x: float(np.divide(*(x.sum(0) + 1))), len(rows))


def _is_scene(found: scenes.Objects, world: ShapesConfig) -> bool:
    known = all(o.shape != oracle.UNKNOWN for o in found)
    return bool(known and 1 <= len(found) <= world.max_objects)


def mask_of_size(
    rng: np.random.Generator, model: CM3Leon, low: int, high: int
) -> np.ndarray:
    """Bool [Y, X], True in `low` to `high` % of the code cells."""
    grid, size = model.codec.image.grid, model.system.source.image_size
    runs = len(model.layout.sentinels) - 1  # and one for the text
    while True:
        cells = draw_region(rng, grid, runs)
        if low <= 100 * cells.mean() <= high:
            return np.kron(cells, np.ones((size // grid[0], size // grid[1]))) > 0


def offgrid_box(
    rng: np.random.Generator, world: ShapesConfig, grid: tuple[int, int]
) -> np.ndarray:
    """A mask bool [Y, X] of a box that hides 20 to 60 % of the picture.

    Rounded out to the code cells of `grid`, as infilling does, it still has a side
    that lies inside a cell of the layout.
    """
    size = world.image_size
    for _ in range(1000):
        height, width = np.rint(rng.uniform(0.45, 0.77, 2) * size).astype(int)
        y, x = rng.integers(size - height + 1), rng.integers(size - width + 1)
        mask = np.zeros((size, size), bool)
        mask[y : y + height, x : x + width] = True
        hidden = regions.cells(mask, grid)
        sides = [
            edge * world.layout % len(line)
            for line in map(np.asarray, (hidden.any(1), hidden.any(0)))
            for edge in np.flatnonzero(np.diff(line)) + 1
        ]
        if any(sides) and 0.2 <= hidden.mean() <= 0.6:
            return mask
    raise ValueError(f"no box of {grid} code cells cuts through the layout's cells")


def _fill_fitting(
    model: CM3Leon,
    documents: Sequence[Document],
    masks: Sequence[np.ndarray],
    seed: int,
) -> tuple[list[Document], list[tuple], list[tuple], list[tuple], list[Sample]]:
    """The documents for which the context has room, and as `_fill` of these, in all
    cells that their masks touch."""
    world, grid = scenes.world_of(model), model.codec.image.grid
    drawn = zip(documents, masks, strict=True)
    fitting = [(d, mask) for d, mask in drawn if _fits(model, d, mask)]
    if not fitting:
        return [], [], [], [], []
    given, masks = scenes.columns(fitting)
    cells = [_touched(world, _hidden(mask, grid)) for mask in masks]
    return given, *_fill(model, given, masks, cells, seed)


def _fill(
    model: CM3Leon,
    documents: Sequence[Document],
    masks: Sequence[np.ndarray],
    cells: Sequence[set[int]],
    seed: int,
    told: bool = True,
) -> tuple[list[tuple], list[tuple], list[tuple], list[Sample]]:
    """(wanted, found) objects in `cells` of the layout, (kept, found) of the others,
    the borders' `jumps` and those of the reconstruction, and samples, of pictures with
    `masks` painted anew, described or not."""
    originals, prompts = scenes.pictures(documents), scenes.captions(documents)
    texts = prompts if told else None
    painted: Any = model.infill(originals, masks, texts, seed=seed)
    rebuilt = model.reconstruct(originals)
    before = scenes.parsed(model, rebuilt)
    inside, outside, borders, samples = [], [], [], []
    for prompt, a, b, c, mask, mine, wanted, kept, found in zip(
        *(prompts, originals, painted, rebuilt, masks, cells),
        *(scenes.wanted(documents), before, scenes.parsed(model, painted)),
        strict=True,
    ):
        w, f = ({o for o in x if o.cell in mine} for x in (wanted, found))
        inside.append((w, f))
        k, g = ({o for o in x if o.cell not in mine} for x in (kept, found))
        outside.append((k, g))
        hidden = _hidden(mask, model.codec.image.grid)
        borders.append(tuple(jumps(np.asarray(image), hidden) for image in (b, c)))
        grey = blanked(a, hidden)
        pictures = {"blanked": grey, "infilled": b, "original": a}
        samples.append(
            Sample(
                text=prompt if told else "",
                pictures=pictures,
                ok=w == f,
                note=scenes.difference(w, f) if told else "",
            )
        )
    return inside, outside, borders, samples


def _f1(documents: Sequence[Document], pairs: Sequence[tuple]) -> Score:
    return scenes.f1(*scenes.columns(pairs), scenes.wanted(documents))


def _cell_mask(world: ShapesConfig, cell: int) -> np.ndarray:
    side = world.image_size / world.layout
    y, x = divmod(cell, world.layout)
    at = (np.arange(world.image_size) + 0.5) // side
    return (at == y)[:, None] & (at == x)[None]


def _hidden(mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The pixels that infilling hides for a mask: all of the code cells it touches."""
    sides = (mask.shape[0] // grid[0], mask.shape[1] // grid[1])
    return np.kron(regions.cells(mask, grid), np.ones(sides, bool))


def _fits(model: CM3Leon, document: Document, mask: np.ndarray) -> bool:
    """Whether a picture described and painted anew fits into the context: each run of
    hidden codes needs its sentinel twice and an `<eoss>`."""
    codec = model.codec
    (text,) = scenes.captions([document])
    runs = len(regions.runs(regions.cells(mask, codec.image.grid)))
    needed = 2 + len(codec.pieces(text, 0)) + codec.image_tokens + 3 * runs
    return needed <= model.system.decoder_config.length


def _touched(world: ShapesConfig, mask: np.ndarray) -> set[int]:
    cells = range(world.layout**2)
    return {cell for cell in cells if (mask & _cell_mask(world, cell)).any()}


def blanked(picture: Pillow.Image, mask: np.ndarray) -> Pillow.Image:
    pixels = np.array(picture)
    pixels[mask] = regions.GREY
    return Pillow.fromarray(pixels)
