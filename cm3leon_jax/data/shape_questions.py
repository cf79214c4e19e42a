"""Questions about scenes of `shapes.py`, and their answers.

An answer is drawn before its scene wherever scenes alone would make one answer the
usual one, so that nobody does well without looking: half of all "yes" or "no" is "yes",
and no other answer of a kind is given to more than half of its questions.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from cm3leon_jax.data import shape_words, shapes
from cm3leon_jax.data.shape_words import (
    DIRECTIONS,
    SEEN,
    UNSEEN,
    Reference,
    pick,
    plural,
)
from cm3leon_jax.data.shapes import CELL_NAMES, HELD_OUT, Scene, ShapesConfig

WORDINGS = {
    SEEN: {
        "count": ("How many objects are there?", "How many objects do you see?"),
        "count_of": ("How many {some} are there?", "How many {some} do you see?"),
        "colour": ("What colour is {what}?", "Which colour does {what} have?"),
        "shape": ("What shape is {what}?", "Which shape does {what} have?"),
        "size": ("What size is {what}?", "Is {what} small or large?"),
        "place": ("Where is {what}?", "At which place is {what}?"),
        "exists": ("Is there {one}?", "Do you see {one}?"),
        "larger": ("Which is larger, {what} or {other}?",),
        "is_larger": ("Is {what} larger than {other}?",),
        "relation": ("Is {what} {direction} {other}?",),
        "background": ("What colour is the background?",),
    },
    UNSEEN: {
        "count": ("What is the number of objects?", "Objects: how many?"),
        "count_of": ("What is the number of {some}?", "{Some}: how many?"),
        "colour": ("Tell me the colour of {what}.", "{What} is of which colour?"),
        "shape": ("Tell me the shape of {what}.", "{What} is of which shape?"),
        "size": ("Tell me the size of {what}.", "{What}: small or large?"),
        "place": ("Tell me where {what} is.", "{What} is at which place?"),
        "exists": ("Can you see {one}?", "Does the picture show {one}?"),
        "larger": ("Is {what} the larger one, or {other}?",),
        "is_larger": ("Would you say that {what} is larger than {other}?",),
        "relation": ("Would you say that {what} is {direction} {other}?",),
        "background": ("Tell me the colour of the background.",),
    },
}
KINDS = tuple(WORDINGS[SEEN])
_ATTRIBUTES = ("size", "colour", "shape")
Value = TypeVar("Value")
_MOST = 3  # of a kind that are asked for
_EMPTY_CELL = 0.25  # of the questions whether something is there ask for a place only


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about `scene`; `options` are all answers of its kind in this world."""

    kind: str
    question: str
    answer: str
    options: tuple[str, ...]
    scene: Scene


@dataclasses.dataclass(frozen=True)
class _Wish:
    """What a question is to be like; a scene that does not allow it is passed over."""

    wordings: bool
    yes: bool
    count: int
    attribute: str


Facts = tuple[dict[str, str], str] | None  # words of the question, answer


def ask(
    config: ShapesConfig, split: str, rng: np.random.Generator, wordings: bool = SEEN
) -> Question:
    """A random question about a scene of `split`."""
    kinds = [kind for kind in KINDS if _possible(config, kind)]
    kind = pick(kinds, rng)
    wish = _Wish(
        wordings=wordings,
        yes=bool(rng.integers(2)),
        count=_wanted_count(config, rng),
        attribute=pick(_ATTRIBUTES, rng),
    )

    def attempt() -> tuple[Scene, dict[str, str], str] | None:
        scene = shapes.draw(config, split, rng)
        found = _KINDS[kind](config, scene, rng, wish)
        return None if found is None else (scene, *found)

    scene, words, answer = shapes.search(attempt, f"question of the kind {kind!r}")
    forms = WORDINGS[wordings][kind]
    capitals = {name.capitalize(): _capital(text) for name, text in words.items()}
    text = pick(forms, rng).format(**words, **capitals)
    options = _options(config, kind, words)
    return Question(kind, text, answer, options, scene)


def _possible(config: ShapesConfig, kind: str) -> bool:
    pairs = kind in ("larger", "is_larger", "relation")
    return config.max_objects > 1 if pairs else True


def _options(config: ShapesConfig, kind: str, words: dict[str, str]) -> tuple[str, ...]:
    numbers = tuple(str(n) for n in range(config.max_objects + 1))
    some = numbers[: _MOST + 1]
    if kind == "larger":
        return words["what"], words["other"]
    return {
        "count": numbers[1:],
        "count_of": some,
        "colour": config.colours,
        "shape": config.shapes,
        "size": tuple(shapes.RADIUS),
        "place": CELL_NAMES[config.layout],
        "background": config.backgrounds,
    }.get(kind, ("yes", "no"))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _wanted_count(config: ShapesConfig, rng: np.random.Generator) -> int:
    """0 to 3 or as many as there can be; the most half as often (it is rare)."""
    most = min(config.max_objects, _MOST)
    weights = np.array([2.0] * most + [1.0])
    return int(rng.choice(most + 1, p=weights / weights.sum()))


def _any(values: Sequence[Value], rng: np.random.Generator) -> Value | None:
    return shape_words.pick(values, rng) if values else None


def _single(
    config: ShapesConfig,
    scene: Scene,
    rng: np.random.Generator,
    wordings: bool,
    *,
    hidden: str,
) -> Reference | None:
    """One object, by words that do not tell the fact `hidden`, nor are empty."""
    found = shape_words.by_look(scene.objects)
    if hidden != "place" and rng.integers(2):
        found = shape_words.by_place(config, scene.objects, wordings)
    found = [r for r in found if len(r.objects) == 1 and hidden not in r.told]
    return _any([r for r in found if r.told], rng)


def _count(config, scene, rng, wish) -> Facts:
    return {}, str(len(scene.objects))


def _count_of(config, scene, rng, wish) -> Facts:
    values = {
        "size": tuple(shapes.RADIUS),
        "colour": config.colours,
        "shape": config.shapes,
    }[wish.attribute]
    fitting = [
        value
        for value in values
        if sum(getattr(o, wish.attribute) == value for o in scene.objects) == wish.count
    ]
    value = _any(fitting, rng)
    if value is None:
        return None
    some = plural(value) if wish.attribute == "shape" else f"{value} objects"
    return {"some": some}, str(wish.count)


def _fact(name: str) -> Callable:
    def make(config, scene, rng, wish) -> Facts:
        meant = _single(config, scene, rng, wish.wordings, hidden=name)
        if meant is None:
            return None
        value = getattr(meant.objects[0], name)
        if name == "size" and (value == "large") != wish.yes:
            return None
        return {"what": meant.phrase}, value

    return make


def _place(config, scene, rng, wish) -> Facts:
    meant = _single(config, scene, rng, wish.wordings, hidden="place")
    if meant is None:
        return None
    return {"what": meant.phrase}, CELL_NAMES[config.layout][meant.objects[0].cell]


def _exists(config, scene, rng, wish) -> Facts:
    """Of a place, or of a look: a "no" names a colour, a shape or both that are there,
    just not together."""
    answer = "yes" if wish.yes else "no"
    if rng.random() < _EMPTY_CELL:
        taken = {o.cell for o in scene.objects}
        cells = [c for c in range(config.layout**2) if (c in taken) == wish.yes]
        cell = _any(cells, rng)
        if cell is None:
            return None
        return {"one": f"an object at the {CELL_NAMES[config.layout][cell]}"}, answer
    there = {(o.colour, o.shape) for o in scene.objects}
    if wish.yes:
        pairs = sorted(there)
    else:
        colours, kinds = ({pair[i] for pair in there} for i in range(2))
        pairs = [
            (colour, shape)
            for colour in config.colours
            for shape in config.shapes
            if (colour in colours or shape in kinds)
            and (colour, shape) not in there | HELD_OUT
        ]
    pair = _any(pairs, rng)
    return pair and ({"one": shape_words.a(" ".join(pair))}, answer)


def _pair(scene: Scene, rng: np.random.Generator) -> list[Reference] | None:
    """Two objects, each by a look that no other has."""
    found = []
    for o in rng.permutation(len(scene.objects))[:2]:
        mine = [
            r
            for r in shape_words.by_look(scene.objects)
            if r.objects == (scene.objects[o],)
            and "size" not in r.told
            and "shape" in r.told
        ]
        found.append(_any(mine, rng))
    return found if len(found) == 2 and all(found) else None


def _larger(config, scene, rng, wish) -> Facts:
    pair = _pair(scene, rng)
    if pair is None or pair[0].objects[0].size == pair[1].objects[0].size:
        return None
    first_is = pair[0].objects[0].size == "large"
    if first_is != wish.yes:  # then the answer is the one named last
        return None
    answer = pair[0 if first_is else 1].phrase
    return {"what": pair[0].phrase, "other": pair[1].phrase}, answer


def _is_larger(config, scene, rng, wish) -> Facts:
    pair = _pair(scene, rng)
    if pair is None:
        return None
    sizes = [r.objects[0].size for r in pair]
    if (sizes == ["large", "small"]) != wish.yes:
        return None
    words = {"what": pair[0].phrase, "other": pair[1].phrase}
    return words, "yes" if wish.yes else "no"


def _relation(config, scene, rng, wish) -> Facts:
    pair = _pair(scene, rng)
    if pair is None:
        return None
    one, other = (r.objects[0] for r in pair)
    ways = [
        way
        for way, step in DIRECTIONS.items()
        if shape_words.is_beyond(config, one, other, step) == wish.yes
    ]
    way = _any(ways, rng)
    words = {"what": pair[0].phrase, "other": pair[1].phrase, "direction": way}
    return words, "yes" if wish.yes else "no"


def _background(config, scene, rng, wish) -> Facts:
    return {}, scene.background


_KINDS: dict[str, Callable] = {
    "count": _count,
    "count_of": _count_of,
    "colour": _fact("colour"),
    "shape": _fact("shape"),
    "size": _fact("size"),
    "place": _place,
    "exists": _exists,
    "larger": _larger,
    "is_larger": _is_larger,
    "relation": _relation,
    "background": _background,
}
