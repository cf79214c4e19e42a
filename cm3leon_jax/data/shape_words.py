"""Words for the scenes of `shapes.py`: which object is meant, and captions.

Every list of wordings comes twice: `SEEN` forms are for training, `UNSEEN` ones only
for the evaluation of wordings that training never used.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from cm3leon_jax.data import shapes
from cm3leon_jax.data.shapes import CELL_NAMES, SIZE_WORDS, Object, Scene, ShapesConfig

SEEN, UNSEEN = False, True  # which of the two lists of wordings
ROWS = {2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
COLUMNS = {2: ("left", "right"), 3: ("left", "middle", "right")}
DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
LOOK = ("size", "colour", "shape")
FACTS = (*LOOK, "cell", "background")
PLACES = {
    SEEN: {
        "cell": ("the {noun} at the {place}",),
        "line": ("the {noun} in the {line}", "the only {noun} in the {line}"),
        "lines": ("all {nouns} in the {line}", "every {noun} in the {line}"),
        "of two": {
            "left of": ("the left {one}", "the {noun} on the left"),
            "right of": ("the right {one}", "the {noun} on the right"),
            "above": ("the upper {one}", "the {noun} at the top"),
            "below": ("the lower {one}", "the {noun} at the bottom"),
        },
        "of three": {
            "left of": ("the leftmost {noun}",),
            "right of": ("the rightmost {noun}",),
            "above": ("the topmost {noun}",),
            "below": ("the bottommost {noun}",),
        },
        "beside": ("the {noun} {direction} {other}",),
    },
    UNSEEN: {
        "cell": ("the {place} {noun}",),
        "line": ("the {noun} that is in the {line}",),
        "lines": ("the {nouns} in the {line}",),
        "of two": {
            "left of": ("the {noun} to the left",),
            "right of": ("the {noun} to the right",),
            "above": ("the top {one}",),
            "below": ("the bottom {one}",),
        },
        "of three": {
            "left of": ("the {noun} that is leftmost",),
            "right of": ("the {noun} that is rightmost",),
            "above": ("the {noun} that is topmost",),
            "below": ("the {noun} that is bottommost",),
        },
        "beside": ("the {noun} that is {direction} {other}",),
    },
}
COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHORT = ("{things}", "a picture of {things}")
UNSEEN_DETAILED = (
    "{things}, all on {background}",
    "{things}, and the background is {background}",
)
FIRST = (
    "There {are} {count} {objects} on a {background} background.",
    "The picture shows {count} {objects}, and the background is {background}.",
)
LAST = ("There is nothing else.", "All other places are empty.")
Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Reference:
    """Words that mean these objects of a scene and no others.

    `told` are the facts that the words give away: of `LOOK`, and "place".
    """

    phrase: str
    objects: tuple[Object, ...]
    told: frozenset[str]

    @property
    def spatial(self) -> bool:
        return "place" in self.told


def pick(values: Sequence[Value], rng: np.random.Generator) -> Value:
    """One of them; ValueError where there is none."""
    return values[int(rng.integers(len(values)))]


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def listed(phrases: Sequence[str]) -> str:
    """`a, b and c`."""
    if len(phrases) == 1:
        return phrases[0]
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def position(config: ShapesConfig, cell: int) -> tuple[int, int]:
    """(row, column) of a cell."""
    return divmod(cell, config.layout)


def by_look(objects: Sequence[Object]) -> list[Reference]:
    """`the red circle`, `all small objects`: every way to mean objects by their look.

    A scene of one object has `the object`; of several, `all objects`.
    """
    found = []
    for count in range(len(LOOK) + 1):
        for told in itertools.combinations(LOOK, count):
            looks = {tuple(getattr(o, name) for name in told) for o in objects}
            for look in sorted(looks):
                mine = tuple(
                    o
                    for o in objects
                    if tuple(getattr(o, name) for name in told) == look
                )
                words = dict(zip(told, look, strict=True))
                noun = words.get("shape", "object")
                before = [words[name] for name in ("size", "colour") if name in words]
                single = " ".join(["the", *before, noun])
                several = " ".join(["all", *before, plural(noun)])
                phrase = single if len(mine) == 1 else several
                found.append(Reference(phrase, mine, frozenset(told)))
    return found


def by_place(
    config: ShapesConfig, objects: Sequence[Object], wordings: bool = SEEN
) -> list[Reference]:
    """`the left one`, `the circle in the top row`, `the object above the red star`."""
    found: list[Reference] = []
    forms = PLACES[wordings]
    anchors = [
        (reference.objects[0], reference.phrase)
        for reference in by_look(objects)
        if reference.told == {"colour", "shape"} and len(reference.objects) == 1
    ]
    for noun in ("object", *sorted({o.shape for o in objects})):
        mine = [o for o in objects if noun in ("object", o.shape)]
        told = frozenset({"place"} if noun == "object" else {"place", "shape"})
        words = {
            "noun": noun,
            "nouns": plural(noun),
            "one": "one" if noun == "object" else noun,
        }

        def add(kind, some, told=told, words=words, **more):
            for form in kind:
                phrase = form.format(**words, **more)
                found.append(Reference(phrase, tuple(some), told))

        for o in mine:
            add(forms["cell"], [o], place=CELL_NAMES[config.layout][o.cell])
        for axis, names in enumerate((ROWS[config.layout], COLUMNS[config.layout])):
            for number, name in enumerate(names):
                line = f"{name} {('row', 'column')[axis]}"
                some = [o for o in mine if position(config, o.cell)[axis] == number]
                if some:
                    kind = forms["line" if len(some) == 1 else "lines"]
                    add(kind, some, line=line)
        for direction, step in DIRECTIONS.items():
            ends = _furthest(config, mine, step)
            if len(mine) >= 2 and len(ends) == 1:
                add(forms["of two" if len(mine) == 2 else "of three"][direction], ends)
            for other, phrase in anchors:
                beyond = [o for o in mine if is_beyond(config, o, other, step)]
                if len(beyond) == 1:
                    add(forms["beside"], beyond, direction=direction, other=phrase)
    return found


def is_beyond(
    config: ShapesConfig, one: Object, other: Object, step: tuple[int, int]
) -> bool:
    """Whether `one` lies in the direction `step` of `other`, straight or not."""
    (y, x), (v, u) = position(config, one.cell), position(config, other.cell)
    return (y - v) * step[0] + (x - u) * step[1] > 0


def _furthest(
    config: ShapesConfig, objects: Sequence[Object], step: tuple[int, int]
) -> list[Object]:
    """Those furthest in a direction."""

    def reach(o: Object) -> int:
        y, x = position(config, o.cell)
        return y * step[0] + x * step[1]

    most = max(map(reach, objects))
    return [o for o in objects if reach(o) == most]


def thing(o: Object, rng: np.random.Generator, told: Sequence[str] = LOOK) -> str:
    """`little red circle`, `large object`: the facts in `told`, without an article."""
    words = []
    if "size" in told:
        words.append(pick(SIZE_WORDS[o.size], rng))
    if "colour" in told:
        words.append(o.colour)
    return " ".join([*words, o.shape if "shape" in told else "object"])


def told_caption(
    config: ShapesConfig, scene: Scene, rng: np.random.Generator, told: Sequence[str]
) -> str:
    """The facts in `told` (of `FACTS`), objects in reading order:
    `a red circle and a blue star on a white background`."""
    phrases = []
    for o in scene.objects:
        at = f" at the {CELL_NAMES[config.layout][o.cell]}" if "cell" in told else ""
        phrases.append(a(thing(o, rng, told)) + at)
    if "background" not in told:
        return listed(phrases)
    if rng.integers(2):
        return f"a {scene.background} picture with {listed(phrases)}"
    return f"{listed(phrases)} on a {scene.background} background"


def short(scene: Scene, rng: np.random.Generator) -> str:
    """Colours and shapes only: `a red circle and a blue star`."""
    order = rng.permutation(len(scene.objects))
    things = [a(thing(scene.objects[i], rng, ("colour", "shape"))) for i in order]
    return pick(SHORT, rng).format(things=listed(things))


def detailed(
    config: ShapesConfig, scene: Scene, rng: np.random.Generator, wordings: bool = SEEN
) -> str:
    """Every fact in a sentence: what pretraining's captions say."""
    if wordings == SEEN:
        return shapes.caption(config, scene, int(rng.integers(2**31)))
    names = CELL_NAMES[config.layout]
    things = [f"{a(thing(o, rng))} at the {names[o.cell]}" for o in scene.objects]
    form = pick(UNSEEN_DETAILED, rng)
    return form.format(things=", ".join(things), background=scene.background)


def long(config: ShapesConfig, scene: Scene, rng: np.random.Generator) -> str:
    """Every fact in sentences of their own, and how two of the objects lie."""
    objects, names = scene.objects, CELL_NAMES[config.layout]
    count = len(objects)
    first = pick(FIRST, rng)
    sentences = [
        first.format(
            are="is" if count == 1 else "are",
            count=COUNTS[count],
            objects="object" if count == 1 else "objects",
            background=scene.background,
        )
    ]
    for i, o in enumerate(objects):
        subject = "It" if count == 1 else "One" if i == 0 else "Another"
        words = a(thing(o, rng))
        sentences.append(f"{subject} is {words} at the {names[o.cell]}.")
    if count > 1:
        i, j = rng.choice(count, 2, replace=False)
        names = [f"{o.colour} {o.shape}" for o in (objects[i], objects[j])]
        ways = [
            way
            for way, step in DIRECTIONS.items()
            if is_beyond(config, objects[i], objects[j], step)
        ]
        if names[0] != names[1]:
            way = pick(ways, rng)
            sentences.append(f"The {names[0]} is {way} the {names[1]}.")
    sentences.append(pick(LAST, rng))
    return " ".join(sentences)
