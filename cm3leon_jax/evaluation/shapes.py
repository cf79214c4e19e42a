"""The shapes world, scored by the oracle on scenes that training has never seen."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image as Pillow

from cm3leon_jax.api import CM3Leon
from cm3leon_jax.data.documents import Document
from cm3leon_jax.data.shapes import HELD_OUT, Object, Scene, ShapesConfig
from cm3leon_jax.data.shapes import document as draw
from cm3leon_jax.evaluation import oracle
from cm3leon_jax.evaluation.protocol import Evaluator, Outcome, Sample, Score, interval
from cm3leon_jax.tokenizers import regions

Objects = frozenset[Object]


def reconstruction(model: CM3Leon, documents: Sequence[Document], _: int) -> Outcome:
    """`objects`: what the image tokenizer keeps of a picture, the ceiling of all."""
    originals = _pictures(documents)
    painted = model.reconstruct(originals)
    wanted, found = _wanted(documents), _parsed(model, painted)
    samples = [
        Sample(text="", pictures={"original": a, "reconstruction": b}, ok=w == f)
        for a, b, w, f in zip(originals, painted, wanted, found, strict=True)
    ]
    return Outcome({"objects": _objects(documents, wanted, found)}, samples)


def text_to_image(model: CM3Leon, documents: Sequence[Document], seed: int) -> Outcome:
    """`objects`: one picture per caption, no choosing among candidates."""
    prompts = _captions(documents)
    painted = model.text_to_image(prompts, seed=seed)
    wanted, found = _wanted(documents), _parsed(model, painted)
    samples = [
        Sample(text=prompt, pictures={"picture": picture}, ok=w == f, note=_say(w, f))
        for prompt, picture, w, f in zip(prompts, painted, wanted, found, strict=True)
    ]
    return Outcome({"objects": _objects(documents, wanted, found)}, samples)


def unseen_pairs(model: CM3Leon, documents: Sequence[Document], seed: int) -> Outcome:
    """As `text_to_image`, on as many other scenes, each with a colour and shape that
    training has never seen together. `objects`: all; `unseen`: those alone."""
    world = _world(model)
    scenes = [draw(world, "test", i, held_out=True) for i in range(len(documents))]
    outcome = text_to_image(model, scenes, seed)
    wanted = _wanted(scenes)
    found = _parsed(model, [sample.pictures["picture"] for sample in outcome.samples])
    pairs = [
        tuple(frozenset(o for o in x if (o.colour, o.shape) in HELD_OUT) for x in both)
        for both in zip(wanted, found, strict=True)
    ]
    unseen = _objects(scenes, *_columns(pairs))
    return Outcome(outcome.scores | {"unseen": unseen}, outcome.samples)


def caption(model: CM3Leon, documents: Sequence[Document], seed: int) -> Outcome:
    """What the caption of a picture names: `objects` of the likeliest of as many as the
    config says, `objects_of_1` of a single one, written greedily."""
    originals = _pictures(documents)
    world = _world(model)
    wanted = _wanted(documents)

    def named(texts: Sequence[str]) -> list[Objects]:
        return [oracle.parse_caption(world, text) for text in texts]

    greedy = dataclasses.replace(model.system.sampling.caption, temperature=0.0)
    alone = named(model.caption(originals, sampler=greedy, seed=seed))
    texts = model.caption(originals, seed=seed)
    found = named(texts)
    scores = {
        "objects": _objects(documents, wanted, found),
        "objects_of_1": _objects(documents, wanted, alone),
    }
    samples = [
        Sample(text=text, pictures={"picture": picture}, ok=w == f, note=_say(w, f))
        for text, picture, w, f in zip(texts, originals, wanted, found, strict=True)
    ]
    return Outcome(scores, samples)


def infill(model: CM3Leon, documents: Sequence[Document], seed: int) -> Outcome:
    """A part of the picture is hidden, and the whole described.

    One object's cell: `objects`, is exactly that object there again; `kept`, are all
    objects outside it those of the reconstruction. A box that cuts through cells:
    `objects_offgrid`, the objects of every cell that it hides or touches; scenes that
    do not fit into the context with so many rows hidden are left out.
    """
    world, grid = _world(model), model.codec.image.grid
    rng = np.random.default_rng(seed)
    cells = [{sorted(w)[rng.integers(len(w))].cell} for w in _wanted(documents)]
    masks = [_cell_mask(world, cell) for (cell,) in cells]
    inside, outside, samples = _fill(model, documents, masks, cells, seed)
    scores = {
        "objects": _objects(documents, *_columns(inside)),
        "kept": _objects(documents, *_columns(outside)),
    }
    boxes = [offgrid_box(rng, world, grid) for _ in documents]
    drawn = zip(documents, boxes, strict=True)
    fitting = [(d, box) for d, box in drawn if _fits(model, d, box)]
    if fitting:
        scenes, boxes = _columns(fitting)
        cells = [_touched(world, _hidden(box, grid)) for box in boxes]
        touched, _, others = _fill(model, scenes, boxes, cells, seed)
        scores["objects_offgrid"] = _objects(scenes, *_columns(touched))
        pairs = zip(samples, others, strict=False)
        samples = [sample for both in pairs for sample in both]
    return Outcome(scores, samples)


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


def _fill(
    model: CM3Leon,
    documents: Sequence[Document],
    masks: Sequence[np.ndarray],
    cells: Sequence[set[int]],
    seed: int,
) -> tuple[list[tuple], list[tuple], list[Sample]]:
    """(wanted, found) objects in `cells` of the layout, (kept, found) of the others,
    and samples, of pictures with `masks` painted anew."""
    originals, prompts = _pictures(documents), _captions(documents)
    painted: Any = model.infill(originals, masks, prompts, seed=seed)
    before = _parsed(model, model.reconstruct(originals))
    inside, outside, samples = [], [], []
    for prompt, a, b, mask, mine, wanted, kept, found in zip(
        *(prompts, originals, painted, masks, cells),
        *(_wanted(documents), before, _parsed(model, painted)),
        strict=True,
    ):
        w, f = ({o for o in x if o.cell in mine} for x in (wanted, found))
        inside.append((w, f))
        k, g = ({o for o in x if o.cell not in mine} for x in (kept, found))
        outside.append((k, g))
        blanked = _blanked(a, _hidden(mask, model.codec.image.grid))
        pictures = {"blanked": blanked, "infilled": b, "original": a}
        samples.append(
            Sample(text=prompt, pictures=pictures, ok=w == f, note=_say(w, f))
        )
    return inside, outside, samples


TASKS: dict[str, Evaluator] = {
    "reconstruction": reconstruction,
    "text_to_image": text_to_image,
    "unseen_pairs": unseen_pairs,
    "caption": caption,
    "infill": infill,
}


def _world(model: CM3Leon) -> ShapesConfig:
    world = model.system.source
    if not isinstance(world, ShapesConfig):
        raise ValueError(
            f"{model.system.name} was not trained on shapes: the oracle can't score it"
        )
    return world


def _wanted(documents: Sequence[Document]) -> list[Objects]:
    return [frozenset(Scene.from_json(d.metadata["scene"]).objects) for d in documents]


def _parsed(model: CM3Leon, pictures: Sequence[Pillow.Image]) -> list[Objects]:
    world = _world(model)
    return [oracle.parse(world, np.asarray(picture)) for picture in pictures]


def _pictures(documents: Sequence[Any]) -> list[Pillow.Image]:
    return [Pillow.fromarray(d.segments[1].array) for d in documents]


def _captions(documents: Sequence[Any]) -> list[str]:
    return [d.segments[0].text for d in documents]


def _objects(
    documents: Sequence[Document], wanted: Sequence[Any], found: Sequence[Any]
) -> Score:
    """F1. A small world repeats itself: scenes of one arrangement of objects count as
    one observation for the interval."""
    counts = oracle.object_counts(wanted, found)
    return interval(counts, oracle.f1, counts[:, 2].sum(), _wanted(documents))


def _columns(pairs: Sequence[tuple]) -> tuple[list, list]:
    return [a for a, _ in pairs], [b for _, b in pairs]


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
    (text,) = _captions([document])
    runs = len(regions.runs(regions.cells(mask, codec.image.grid)))
    needed = 2 + len(codec.pieces(text, 0)) + codec.image_tokens + 3 * runs
    return needed <= model.system.decoder_config.length


def _touched(world: ShapesConfig, mask: np.ndarray) -> set[int]:
    cells = range(world.layout**2)
    return {cell for cell in cells if (mask & _cell_mask(world, cell)).any()}


def _blanked(picture: Pillow.Image, mask: np.ndarray) -> Pillow.Image:
    pixels = np.array(picture)
    pixels[mask] = regions.GREY
    return Pillow.fromarray(pixels)


def _say(wanted: Objects | set, found: Objects | set) -> str:
    """Which objects are missing and which nobody asked for."""

    def names(objects):
        return ", ".join(f"{o.size} {o.colour} {o.shape}" for o in sorted(objects))

    missing, extra = wanted - found, found - wanted
    parts = [f"missing: {names(missing)}"] if missing else []
    return "; ".join(parts + ([f"extra: {names(extra)}"] if extra else []))
