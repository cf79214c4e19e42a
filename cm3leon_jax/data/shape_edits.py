"""Instructions that change a scene of `shapes.py`, and the scene they lead to.

Whatever an instruction does not name stays as it is: a replaced object keeps its size
and cell, a recoloured one all but its colour.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from cm3leon_jax.data import shape_words, shapes
from cm3leon_jax.data.shape_words import DIRECTIONS, SEEN, UNSEEN, Reference, a, pick
from cm3leon_jax.data.shapes import CELL_NAMES, Object, Scene, ShapesConfig

WORDINGS = {
    SEEN: {
        "add": ("add {thing} {where}", "put {thing} {where}", "draw {thing} {where}"),
        "remove": ("remove {what}", "delete {what}", "take away {what}"),
        "recolour": (
            "make {what} {colour}",
            "paint {what} {colour}",
            "change the colour of {what} to {colour}",
        ),
        "replace": (
            "replace {what} with {new}",
            "turn {what} into {new}",
            "change {what} to {new}",
        ),
        "resize": (
            "make {what} {size}",
            "change the size of {what} to {size}",
            "draw {what} {size}",
        ),
        "move": ("move {what} {whither}", "shift {what} {whither}"),
        "background": (
            "make the background {background}",
            "change the background to {background}",
            "paint the background {background}",
        ),
    },
    UNSEEN: {
        "add": ("there should also be {thing} {where}", "place {thing} {where}"),
        "remove": ("I do not want {what}", "erase {what}"),
        "recolour": ("{what} should be {colour}", "give {what} the colour {colour}"),
        "replace": ("{new} instead of {what}", "swap {what} for {new}"),
        "resize": ("{what} should be {size}", "give {what} the size {size}"),
        "move": ("{what} should go {whither}", "bring {what} {whither}"),
        "background": (
            "the background should be {background}",
            "put everything on a {background} background",
        ),
    },
}
# For a region that holds the object and nothing else, or where one is to appear.
LOCAL = {
    SEEN: {
        "add": ("add {thing} here", "put {thing} here"),
        "remove": ("remove it", "delete it"),
        "recolour": ("make it {colour}", "paint it {colour}"),
        "replace": ("replace it with {new}", "turn it into {new}"),
        "resize": ("make it {size}", "draw it {size}"),
    },
    UNSEEN: {
        "add": ("there should be {thing} here", "here, {thing}"),
        "remove": ("take it away", "there should be nothing here"),
        "recolour": ("it should be {colour}", "change its colour to {colour}"),
        "replace": ("{new} instead of it", "change it to {new}"),
        "resize": ("it should be {size}", "change its size to {size}"),
    },
}
# Kinds of which no training example has one, asked for in words that it knows.
UNTAUGHT = {
    "copy": ("draw {what} {where} too", "draw {what} again {where}"),
    "exchange": (
        "put {what} in the place of {other} and {other} in the place of {what}",
        "exchange {what} and {other}",
    ),
}
KINDS = tuple(WORDINGS[SEEN])
LOCAL_KINDS = tuple(LOCAL[SEEN])
_PER_SCENE = 30  # targets tried before another scene is drawn
_SEVERAL = 0.25  # of the edits that can mean several objects at once
_BY_PLACE = 0.5  # of the objects meant are meant by where they are


@dataclasses.dataclass(frozen=True)
class Edit:
    """`cells` change and all others stay; with a new background, the others' objects.

    `spatial`: an object is meant by where it is, or the place is given by another
    object's. `several`: more than one object changes.
    """

    kind: str
    instruction: str
    source: Scene
    target: Scene
    cells: tuple[int, ...]
    spatial: bool
    several: bool

    def facts(self, config: ShapesConfig) -> dict:
        """For the metadata: what changes, and `kept`, the cells that must not."""
        kept = sorted(set(range(config.layout**2)) - set(self.cells))
        facts = {"kind": self.kind, "cells": list(self.cells), "kept": kept}
        return facts | {"spatial": self.spatial, "several": self.several}


@dataclasses.dataclass(frozen=True)
class _Step:
    """A change before it has words: `before` goes, `after` comes."""

    before: tuple[Object, ...]
    after: tuple[Object, ...]
    words: dict[str, str]
    spatial: bool
    background: str | None = None


def edit(
    config: ShapesConfig,
    split: str,
    rng: np.random.Generator,
    wordings: bool = SEEN,
    *,
    local: bool = False,
) -> Edit:
    """A random edit whose two scenes belong to `split`.

    `local`: of a kind in `LOCAL_KINDS`, of one object; half of the time its instruction
    is one of `LOCAL`, which make sense for a region only.
    """
    kinds = [kind for kind in KINDS if _possible(config, kind)]
    if local:
        kinds = [kind for kind in kinds if kind in LOCAL_KINDS]
    kind = pick(kinds, rng)

    def attempt() -> Edit | None:
        source = shapes.draw(config, split, rng)
        if kind == "add" and len(source.objects) == config.max_objects:
            return None
        if kind == "remove" and len(source.objects) == 1:
            return None
        references = _references(config, source, kind, wordings, rng, local)
        for _ in range(_PER_SCENE):
            step = _step(config, source, kind, references, rng)
            target = None if step is None else _apply(source, step)
            if step and target and shapes.allowed(config, split, target.objects):
                forms = WORDINGS
                if local and rng.integers(2):
                    forms = LOCAL
                some = forms[wordings][kind]
                words = pick(some, rng).format(**step.words)
                cells = {o.cell for o in (*step.before, *step.after)}
                return Edit(
                    kind=kind,
                    instruction=words,
                    source=source,
                    target=target,
                    cells=tuple(sorted(cells)),
                    spatial=step.spatial and forms is WORDINGS,
                    several=len(step.before) > 1,
                )
        return None

    return shapes.search(attempt, f"edit of the kind {kind!r}")


def two(
    config: ShapesConfig, split: str, rng: np.random.Generator
) -> tuple[Edit, tuple[tuple[int, ...], ...]]:
    """Two edits of different kinds in one instruction, and the cells of each.

    No training example has two: this asks for a composition of what is known. Both mean
    the objects of the given picture; neither touches a cell of the other.
    """
    kinds = [k for k in KINDS if k != "background" and _possible(config, k)]

    def attempt():
        source = shapes.draw(config, split, rng)
        for _ in range(_PER_SCENE):
            chosen = [kinds[i] for i in rng.permutation(len(kinds))[:2]]
            found = [
                _step(config, source, k, _references(config, source, k, SEEN, rng), rng)
                for k in chosen
            ]
            steps = [step for step in found if step is not None]
            if len(steps) < 2:
                continue
            parts = tuple(
                tuple(sorted({o.cell for o in (*s.before, *s.after)})) for s in steps
            )
            target = _apply(_apply(source, steps[0]), steps[1])
            apart = not {*parts[0]} & {*parts[1]}
            if apart and shapes.allowed(config, split, target.objects):
                words = [
                    pick(WORDINGS[SEEN][kind], rng).format(**step.words)
                    for kind, step in zip(chosen, steps, strict=True)
                ]
                made = Edit(
                    kind=" and ".join(sorted(chosen)),
                    instruction=" and ".join(words),
                    source=source,
                    target=target,
                    cells=tuple(sorted((*parts[0], *parts[1]))),
                    spatial=any(step.spatial for step in steps),
                    several=any(len(step.before) > 1 for step in steps),
                )
                return made, parts
        return None

    return shapes.search(attempt, "two edits of one scene")


def untaught(config: ShapesConfig, split: str, rng: np.random.Generator) -> Edit:
    """An edit of a kind of `UNTAUGHT`: an object is copied to a free place, or two that
    look different change places."""
    kind = pick(tuple(UNTAUGHT), rng)

    def attempt() -> Edit | None:
        source = shapes.draw(config, split, rng)
        if kind == "copy" and len(source.objects) == config.max_objects:
            return None
        known = _references(config, source, "move", SEEN, rng)
        for _ in range(_PER_SCENE):
            step = (_copy if kind == "copy" else _exchange)(config, source, known, rng)
            target = None if step is None else _apply(source, step)
            if step and target and shapes.allowed(config, split, target.objects):
                return Edit(
                    kind=kind,
                    instruction=pick(UNTAUGHT[kind], rng).format(**step.words),
                    source=source,
                    target=target,
                    cells=tuple(sorted({o.cell for o in step.after})),
                    spatial=step.spatial,
                    several=kind == "exchange",
                )
        return None

    return shapes.search(attempt, f"edit of the kind {kind!r}")


def _copy(
    config: ShapesConfig,
    scene: Scene,
    references: Sequence[Reference],
    rng: np.random.Generator,
) -> _Step | None:
    place = _place(config, scene, (), rng) if references else None
    if place is None:
        return None
    meant = pick(references, rng)
    words = {"what": meant.phrase, "where": place[1]}
    made = _changed(meant.objects, cell=place[0])
    return _Step((), made, words, meant.spatial or place[2])


def _exchange(
    config: ShapesConfig,
    scene: Scene,
    references: Sequence[Reference],
    rng: np.random.Generator,
) -> _Step | None:
    if len(references) < 2:
        return None
    first, second = (references[i] for i in rng.permutation(len(references))[:2])
    (one,), (other,) = first.objects, second.objects
    after = _changed((one,), cell=other.cell) + _changed((other,), cell=one.cell)
    if {one, other} & {*after}:  # they look the same, or are the same
        return None
    words = {"what": first.phrase, "other": second.phrase}
    return _Step((one, other), after, words, first.spatial or second.spatial)


def _possible(config: ShapesConfig, kind: str) -> bool:
    """Whether this world has anything to choose from."""
    return {
        "add": config.max_objects > 1,
        "remove": config.max_objects > 1,
        "recolour": len(config.colours) > 1,
        "replace": len(config.shapes) > 1,
        "background": len(config.backgrounds) > 1,
    }.get(kind, True)


def _references(
    config: ShapesConfig,
    scene: Scene,
    kind: str,
    wordings: bool,
    rng: np.random.Generator,
    local: bool = False,
) -> list[Reference]:
    """Those among which the object or objects to be changed are chosen."""
    if kind in ("add", "background"):
        return []
    if rng.random() < _BY_PLACE:
        found = shape_words.by_place(config, scene.objects, wordings)
    else:
        found = shape_words.by_look(scene.objects)
    several = [r for r in found if len(r.objects) > 1]
    if several and kind != "move" and not local and rng.random() < _SEVERAL:
        return several
    return [r for r in found if len(r.objects) == 1]


def _apply(source: Scene, step: _Step) -> Scene:
    objects = (set(source.objects) - set(step.before)) | set(step.after)
    background = step.background or source.background
    return Scene(tuple(sorted(objects)), background)


def _step(
    config: ShapesConfig,
    scene: Scene,
    kind: str,
    references: Sequence[Reference],
    rng: np.random.Generator,
) -> _Step | None:
    """A random change; None where it would change nothing."""

    if kind == "background":
        new = pick([b for b in config.backgrounds if b != scene.background], rng)
        return _Step((), (), {"background": new}, False, new)
    if kind == "add":
        size, colour = pick(tuple(shapes.RADIUS), rng), pick(config.colours, rng)
        place = _place(config, scene, (), rng)
        if place is None:
            return None
        made = Object(place[0], size, colour, pick(config.shapes, rng))
        words = {"thing": a(shape_words.thing(made, rng)), "where": place[1]}
        return _Step((), (made,), words, place[2])
    if not references:
        return None
    meant = pick(references, rng)
    before, words = meant.objects, {"what": meant.phrase}
    spatial = meant.spatial
    after: tuple[Object, ...]
    if kind == "remove":
        after = ()
    elif kind == "recolour":
        words["colour"] = pick(config.colours, rng)
        after = _changed(before, colour=words["colour"])
    elif kind == "resize":
        size = pick(tuple(shapes.RADIUS), rng)
        words["size"] = pick(shapes.SIZE_WORDS[size], rng)
        after = _changed(before, size=size)
    elif kind == "replace":
        new = {"shape": pick(config.shapes, rng)}
        if rng.integers(2):
            new["colour"] = pick(config.colours, rng)
        after = _changed(before, **new)
        if {o.shape for o in before} & {new["shape"]}:
            return None
        name = " ".join([*([new["colour"]] if "colour" in new else []), new["shape"]])
        words["new"] = a(name) if len(before) == 1 else shape_words.plural(name)
    else:
        place = _place(config, scene, before, rng)
        if place is None:
            return None
        after = _changed(before, cell=place[0])
        words["whither"] = place[1].replace("at the", "to the", 1)
        spatial |= place[2]
    if set(before) & set(after):  # "make all objects red" means those that are not
        return None
    return _Step(before, after, words, spatial)


def _changed(objects: Sequence[Object], **facts) -> tuple[Object, ...]:
    return tuple(dataclasses.replace(o, **facts) for o in objects)


def _place(
    config: ShapesConfig,
    scene: Scene,
    moved: Sequence[Object],
    rng: np.random.Generator,
) -> tuple[int, str, bool] | None:
    """A free cell, words for it, and whether they speak of another object: `at the top
    left` or, of neighbours in a row or column, `directly above the red circle`."""
    taken = {o.cell for o in scene.objects}
    if rng.random() >= _BY_PLACE:
        free = [cell for cell in range(config.layout**2) if cell not in taken]
        if not free:
            return None
        cell = pick(free, rng)
        return cell, f"at the {CELL_NAMES[config.layout][cell]}", False
    found = []
    for other in shape_words.by_look(scene.objects):
        (first, *rest) = other.objects
        if rest or first in moved or not other.told:
            continue
        y, x = shape_words.position(config, first.cell)
        for direction, (down, right) in DIRECTIONS.items():
            v, u = y + down, x + right
            cell = v * config.layout + u
            if 0 <= min(v, u) and max(v, u) < config.layout and cell not in taken:
                found.append((cell, f"directly {direction} {other.phrase}", True))
    return pick(found, rng) if found else None
