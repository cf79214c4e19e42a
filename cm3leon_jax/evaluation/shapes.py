"""The shapes world, scored by the oracle on scenes that training has never seen."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image as Pillow

from cm3leon_jax.api import CM3Leon
from cm3leon_jax.data.documents import Document
from cm3leon_jax.data.shapes import Object, Scene, ShapesConfig
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
    return Outcome({"objects": _objects(wanted, found)}, samples)


def text_to_image(model: CM3Leon, documents: Sequence[Document], seed: int) -> Outcome:
    """`objects`: one picture per caption, no choosing among candidates."""
    prompts = _captions(documents)
    painted = model.text_to_image(prompts, seed=seed)
    wanted, found = _wanted(documents), _parsed(model, painted)
    samples = [
        Sample(text=prompt, pictures={"picture": picture}, ok=w == f, note=_say(w, f))
        for prompt, picture, w, f in zip(prompts, painted, wanted, found, strict=True)
    ]
    return Outcome({"objects": _objects(wanted, found)}, samples)


def caption(model: CM3Leon, documents: Sequence[Document], seed: int) -> Outcome:
    """`objects`: what the caption of a picture names."""
    originals = _pictures(documents)
    texts = model.caption(originals, seed=seed)
    world = _world(model)
    wanted = _wanted(documents)
    found = [oracle.parse_caption(world, text) for text in texts]
    samples = [
        Sample(text=text, pictures={"picture": picture}, ok=w == f, note=_say(w, f))
        for text, picture, w, f in zip(texts, originals, wanted, found, strict=True)
    ]
    return Outcome({"objects": _objects(wanted, found)}, samples)


def infill(model: CM3Leon, documents: Sequence[Document], seed: int) -> Outcome:
    """One object's cell is hidden and its picture described.

    `objects`: is exactly that object there again; `kept`: are all objects outside the
    hidden cell those of the reconstruction.
    """
    world = _world(model)
    originals, prompts = _pictures(documents), _captions(documents)
    wanted = _wanted(documents)
    rng = np.random.default_rng(seed)
    hidden = [sorted(w)[rng.integers(len(w))].cell for w in wanted]
    masks = [_cell_mask(world, cell) for cell in hidden]
    painted = model.infill(originals, masks, prompts, seed=seed)
    found = _parsed(model, painted)
    before = _parsed(model, model.reconstruct(originals))
    inside = [
        ({o for o in w if o.cell == c}, {o for o in f if o.cell == c})
        for w, f, c in zip(wanted, found, hidden, strict=True)
    ]
    outside = [
        ({o for o in b if o.cell != c}, {o for o in f if o.cell != c})
        for b, f, c in zip(before, found, hidden, strict=True)
    ]
    samples = [
        Sample(
            text=prompt,
            pictures={"blanked": _blanked(a, m), "infilled": b, "original": a},
            ok=w == f,
            note=_say(w, f),
        )
        for prompt, a, b, m, (w, f) in zip(
            prompts, originals, painted, masks, inside, strict=True
        )
    ]
    return Outcome(
        {"objects": _objects(*_columns(inside)), "kept": _objects(*_columns(outside))},
        samples,
    )


TASKS: dict[str, Evaluator] = {
    "reconstruction": reconstruction,
    "text_to_image": text_to_image,
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


def _objects(wanted: Sequence[Any], found: Sequence[Any]) -> Score:
    counts = oracle.object_counts(wanted, found)
    return interval(counts, oracle.f1, counts[:, 2].sum())


def _columns(pairs: Sequence[tuple]) -> tuple[list, list]:
    return [a for a, _ in pairs], [b for _, b in pairs]


def _cell_mask(world: ShapesConfig, cell: int) -> np.ndarray:
    side = world.image_size / world.layout
    y, x = divmod(cell, world.layout)
    at = (np.arange(world.image_size) + 0.5) // side
    return (at == y)[:, None] & (at == x)[None]


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
