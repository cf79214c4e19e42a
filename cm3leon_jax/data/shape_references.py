"""Reference pictures for scenes of `shapes.py`: what is kept of them, and how much.

Each kind of reference has three facets, and the strength says how many of them the new
picture takes over, in this order; the caption decides the others.

| | slightly | moderately also | strongly also |
|---|---|---|---|
| style: how it is painted | background | colour of all objects | size of all objects |
| composition: where paint is | cells | sizes | background |
| content: what is shown | shapes | colours | sizes |

So every target is exact. A reference of style has objects of one colour and one size.
Objects go together in reading order: the first of the caption with the first of the
reference.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from cm3leon_jax.data import shape_words, shapes
from cm3leon_jax.data.shapes import Object, Scene, ShapesConfig
from cm3leon_jax.data.tasks import STRENGTHS

FACETS = {
    "style": ("background", "colour", "size"),
    "composition": ("cell", "size", "background"),
    "content": ("shape", "colour", "size"),
}

_WHOLE = 0.3  # of the captions also say what is to be taken from the reference
_PER_REFERENCE = 60  # captions tried before another reference is drawn


@dataclasses.dataclass(frozen=True)
class Referred:
    """`taken` are the facets of `target` that are the reference's, by `strength`."""

    reference: Scene
    strength: str
    caption: str
    target: Scene
    taken: tuple[str, ...]


def refer(
    config: ShapesConfig, split: str, rng: np.random.Generator, kind: str
) -> Referred:
    """A reference of a kind of `FACETS`, a caption, and what they come to; all of the
    scenes belong to `split`."""
    word = tuple(STRENGTHS)[rng.integers(len(STRENGTHS))]
    taken = FACETS[kind][: 1 + tuple(STRENGTHS).index(word)]

    whole = rng.random() < _WHOLE
    told = tuple(name for name in shape_words.FACTS if whole or name not in taken)

    def attempt() -> Referred | None:
        reference = _reference(config, split, rng, kind)
        if reference is None:
            return None
        count = None if kind == "style" else len(reference.objects)
        for _ in range(_PER_REFERENCE):
            # A scene that is neither shown nor wholly told may be of any split.
            asked = shapes.draw(config, split if whole else None, rng, count=count)
            target = combine(reference, asked, taken)
            if target != asked and shapes.allowed(config, split, target.objects):
                caption = shape_words.told_caption(config, asked, rng, told)
                return Referred(reference, word, caption, target, taken)
        return None

    return shapes.search(attempt, f"reference of {kind}")


def combine(reference: Scene, asked: Scene, taken: Sequence[str]) -> Scene:
    """`asked` with the facets `taken` from the reference, object by object; those of a
    style come from its first object, so the numbers of objects may differ."""
    facts = [name for name in taken if name != "background"]
    background = (reference if "background" in taken else asked).background
    models = reference.objects
    if taken[0] == "background":  # a style
        models = models[:1] * len(asked.objects)
    objects = tuple(
        dataclasses.replace(o, **{name: getattr(model, name) for name in facts})
        for o, model in zip(asked.objects, models, strict=True)
    )
    return Scene(objects, background)


def _reference(
    config: ShapesConfig, split: str, rng: np.random.Generator, kind: str
) -> Scene | None:
    if kind != "style":
        return shapes.draw(config, split, rng)
    scene = shapes.draw(config, None, rng)
    one = scene.objects[rng.integers(len(scene.objects))]
    alike = tuple(
        dataclasses.replace(o, colour=one.colour, size=one.size) for o in scene.objects
    )
    return (
        Scene(alike, scene.background) if shapes.allowed(config, split, alike) else None
    )


def vary(
    config: ShapesConfig, split: str, rng: np.random.Generator
) -> tuple[Scene, Scene]:
    """A scene and a variation: the same colours, shapes and background, anew in other
    places and sizes."""

    def attempt() -> tuple[Scene, Scene] | None:
        source = shapes.draw(config, split, rng)
        for _ in range(_PER_REFERENCE):
            cells = rng.choice(config.layout**2, len(source.objects), replace=False)
            sizes = rng.choice(tuple(shapes.RADIUS), len(source.objects))
            objects = tuple(
                sorted(
                    Object(int(cell), str(size), o.colour, o.shape)
                    for cell, size, o in zip(cells, sizes, source.objects, strict=True)
                )
            )
            other = Scene(objects, source.background)
            if other != source and shapes.allowed(config, split, objects):
                return source, other
        return None

    return shapes.search(attempt, "variation")
