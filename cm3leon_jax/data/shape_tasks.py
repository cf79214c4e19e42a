"""Exact examples of the tasks of `tasks.py`, made from the scene graph of `shapes.py`.

Every picture of an example, be it source, reference or target, is a scene that belongs
to the example's split and shows no pair of `HELD_OUT`. Metadata says `scene` (of the
picture that is given) and `target_scene` (of the one to be painted), as far as there
is one, and what a scorer needs:

| task | metadata |
|---|---|
| answer, science, science_cot | question, question_kind, answer_text |
| edit, edit_region | edit: kind, cells, kept, spatial, several; region: the box |
| ground | boxes: [[phrase, [x0, y0, x1, y1]], …] |
| reference_… | strength, taken: the facets that are the reference's |

Captions of controls name colours in reading order and neither places nor sizes, which
only the control picture tells. There is nothing here to make `write`, HED, pose or
normal examples from.
"""

import itertools
import zlib
from collections.abc import Callable, Iterator
from string import ascii_uppercase
from typing import Any

import numpy as np

from cm3leon_jax.data import (
    controls,
    shape_edits,
    shape_questions,
    shape_references,
    shape_views,
    shape_words,
    shapes,
)
from cm3leon_jax.data.documents import Document
from cm3leon_jax.data.shape_views import CLASSES, Box
from cm3leon_jax.data.shapes import Scene, ShapesConfig
from cm3leon_jax.data.task_templates import known
from cm3leon_jax.data.tasks import fill, lettered
from cm3leon_jax.tokenizers.regions import GREY

__all__ = ["CLASSES", "TASKS", "examples"]
Made = tuple[dict[str, Any], dict[str, Any]]  # fields of the template, metadata
Maker = Callable[[ShapesConfig, str, np.random.Generator, bool], Made]
_OPTIONS = 4  # of a science question, where there are so many
_NO_PLACE = ("colour", "shape", "background")


def examples(
    config: ShapesConfig, task: str, split: str, *, unseen_wording: bool = False
) -> Iterator[Document]:
    """Endless examples; a pure function of the arguments and the example's number.

    With `unseen_wording`, template and instruction are of those that training never
    uses. Raises ValueError for a task that is not in `TASKS`, or that has no unseen
    wording.
    """
    if task not in _MAKERS:
        raise ValueError(f"shapes makes no {task!r}: choose from {', '.join(TASKS)}")
    spec = known(task)
    if unseen_wording and not spec.unseen and task not in _WORDED:
        raise ValueError(f"task {task!r} has no wording that training does not use")
    return (
        _example(config, task, split, number, unseen_wording)
        for number in itertools.count()
    )


def _example(
    config: ShapesConfig, task: str, split: str, number: int, unseen: bool
) -> Document:
    key = [number, shapes.SPLITS[split].start, zlib.crc32(task.encode()), unseen]
    rng = np.random.default_rng(key)
    spec = known(task)
    wording = int(rng.integers(len(spec.templates)))
    if unseen and spec.unseen:
        wording = len(spec.templates) + int(rng.integers(len(spec.unseen)))
    fields, facts = _MAKERS[task](config, split, rng, unseen)
    document = fill(
        task,
        fields,
        wording,
        id=f"shapes/{task}/{split}/{number:09d}{'-unseen' if unseen else ''}",
        licence="CC0-1.0",
        source="shapes",
        **facts,
    )
    document.metadata["wording"] = "unseen" if unseen else "seen"
    return document


def _text_to_image(config, split, rng, unseen) -> Made:
    scene = shapes.draw(config, split, rng)
    caption = shape_words.detailed(config, scene, rng, unseen)
    return _picture(config, scene, caption=caption)


def _caption_short(config, split, rng, unseen) -> Made:
    scene = shapes.draw(config, split, rng)
    return _picture(config, scene, caption=shape_words.short(scene, rng))


def _caption_detailed(config, split, rng, unseen) -> Made:
    scene = shapes.draw(config, split, rng)
    return _picture(config, scene, caption=shape_words.detailed(config, scene, rng))


def _caption_long(config, split, rng, unseen) -> Made:
    scene = shapes.draw(config, split, rng)
    return _picture(config, scene, caption=shape_words.long(config, scene, rng))


def _answer(config, split, rng, unseen) -> Made:
    q = shape_questions.ask(config, split, rng, unseen)
    fields, facts = _picture(config, q.scene, question=q.question, answer=q.answer)
    facts |= {"question_kind": q.kind, "question": q.question, "answer_text": q.answer}
    return fields, facts


def _science(config, split, rng, unseen) -> Made:
    """The same questions with a choice of answers."""
    fields, facts = _answer_of(config, shape_questions.ask(config, split, rng), rng)
    return fields, facts


def _science_cot(config, split, rng, unseen) -> Made:
    """And with the whole picture told before the answer."""
    q = shape_questions.ask(config, split, rng)
    fields, facts = _answer_of(config, q, rng)
    told = shape_words.FACTS
    caption = shape_words.told_caption(config, q.scene, rng, told)
    fields["explanation"] = f"I see {caption}. That means: {q.answer}."
    return fields, facts


def _answer_of(
    config: ShapesConfig, q: shape_questions.Question, rng: np.random.Generator
) -> Made:
    wrong = [option for option in q.options if option != q.answer]
    chosen = [wrong[i] for i in rng.permutation(len(wrong))[: _OPTIONS - 1]]
    chosen.insert(int(rng.integers(len(chosen) + 1)), q.answer)
    letter = f"({ascii_uppercase[chosen.index(q.answer)]})"
    fields, facts = _picture(
        config,
        q.scene,
        question=q.question,
        context=f"{config.layout} rows of {config.layout} places",
        options=lettered(chosen),
        answer=letter,
    )
    facts |= {"question_kind": q.kind, "question": q.question, "answer_text": letter}
    return fields, facts


def _edit(config, split, rng, unseen) -> Made:
    return _edited(config, shape_edits.edit(config, split, rng, unseen))


def _edited(config: ShapesConfig, edit: shape_edits.Edit, **more: Any) -> Made:
    fields, facts = _picture(config, edit.target, instruction=edit.instruction)
    fields["source"] = shapes.render(config, edit.source)
    return fields, facts | {
        "scene": edit.source.to_json(),
        "edit": edit.facts(config) | more,
    }


def two_edits(config: ShapesConfig, split: str) -> Iterator[Document]:
    """Endless examples of the task `edit` with two edits in one instruction, which no
    training example has. Metadata as of `edit`; its "parts" are the cells of each."""
    for number, rng in _numbered(split, "two edits"):
        both, parts = shape_edits.two(config, split, rng)
        made = _edited(config, both, parts=[list(cells) for cells in parts])
        yield _untrained(made, "two edits", split, number)


def untaught_edits(config: ShapesConfig, split: str) -> Iterator[Document]:
    """Endless examples of the task `edit` of kinds that no training example has.
    Metadata as of `edit`."""
    for number, rng in _numbered(split, "untaught edits"):
        made = _edited(config, shape_edits.untaught(config, split, rng))
        yield _untrained(made, "untaught edits", split, number)


def _numbered(split: str, name: str) -> Iterator[tuple[int, np.random.Generator]]:
    for number in itertools.count():
        key = [number, shapes.SPLITS[split].start, zlib.crc32(name.encode())]
        yield number, np.random.default_rng(key)


def _untrained(made: Made, name: str, split: str, number: int) -> Document:
    fields, facts = made
    facts |= {"licence": "CC0-1.0", "source": "shapes"}
    return fill("edit", fields, 0, id=f"shapes/{name}/{split}/{number:09d}", **facts)


def _edit_region(config, split, rng, unseen) -> Made:
    edit = shape_edits.edit(config, split, rng, unseen, local=True)
    fields, facts = _picture(config, edit.target, instruction=edit.instruction)
    source = shapes.render(config, edit.source)
    x0, y0, x1, y1 = box = _region(config, edit, rng)
    region = source.copy()
    region[y0:y1, x0:x1] = GREY
    return fields | {"source": source, "region": region}, facts | {
        "scene": edit.source.to_json(),
        "edit": edit.facts(config),
        "region": list(box),
    }


def _region(
    config: ShapesConfig, edit: shape_edits.Edit, rng: np.random.Generator
) -> Box:
    """A box around all that changes, and nothing that does not: close, its whole cell,
    or (but where an object is to be added: it would not say where) several cells."""
    (cell,) = edit.cells
    x0, y0, x1, y1 = whole = shape_views.cell_box(config, cell)
    form = rng.integers(3)
    if form == 0:
        both = [
            shape_views.boxes(config, Scene((o,), edit.source.background))[0]
            for scene in (edit.source, edit.target)
            for o in scene.objects
            if o.cell == cell
        ]
        margin = 1 + rng.integers(0, 1 + (x1 - x0) // 8, 4)  # 1: half-covered pixels
        close = [min(b[i] for b in both) for i in (0, 1)]
        close += [max(b[i] for b in both) for i in (2, 3)]
        return (
            max(x0, close[0] - int(margin[0])),
            max(y0, close[1] - int(margin[1])),
            min(x1, close[2] + int(margin[2])),
            min(y1, close[3] + int(margin[3])),
        )
    if form == 1 or edit.kind == "add":
        return whole
    taken = {o.cell for o in edit.source.objects} - {cell}
    return _rectangle(config, cell, taken, rng)


def _rectangle(
    config: ShapesConfig, cell: int, taken: set[int], rng: np.random.Generator
) -> Box:
    """Of the cells of a rectangle with `cell` in it and none of those `taken`."""
    side = config.layout
    y, x = divmod(cell, side)
    found = [
        (top, left, bottom, right)
        for top in range(y + 1)
        for left in range(x + 1)
        for bottom in range(y, side)
        for right in range(x, side)
        if not taken
        & {v * side + u for v in range(top, bottom + 1) for u in range(left, right + 1)}
    ]
    top, left, bottom, right = found[rng.integers(len(found))]
    x0, y0, _, _ = shape_views.cell_box(config, top * side + left)
    _, _, x1, y1 = shape_views.cell_box(config, bottom * side + right)
    return x0, y0, x1, y1


def _ground(config, split, rng, unseen) -> Made:
    scene = shapes.draw(config, split, rng)
    boxes = shape_views.boxes(config, scene)
    names = [f"{o.colour} {o.shape}" for o in scene.objects]
    order = rng.permutation(len(names))
    objects = [(names[i], boxes[i]) for i in order]
    count = shape_words.COUNTS[len(names)]
    noun = "object" if len(names) == 1 else "objects"
    caption = f"{count} {noun} on a {scene.background} background"
    fields, facts = _picture(config, scene, caption=caption, objects=objects)
    return fields, facts | {"boxes": [[name, list(box)] for name, box in objects]}


def _control(kind: str) -> Maker:
    def make(config, split, rng, unseen) -> Made:
        scene = shapes.draw(config, split, rng)
        caption = shape_words.told_caption(config, scene, rng, _NO_PLACE)
        fields, facts = _picture(config, scene, caption=caption)
        if kind == "edge":
            control = controls.edges(fields["image"])
        elif kind == "scribble":
            control = shape_views.scribble(config, scene, rng)
        elif kind == "segmentation":
            mask = shape_views.mask(config, scene)
            control = controls.class_picture(mask, len(CLASSES))
        else:
            control = shape_views.depth(config, scene)
        return fields | {kind: control}, facts

    return make


def _segment(config, split, rng, unseen) -> Made:
    scene = shapes.draw(config, split, rng)
    fields = {
        "image": shapes.render(config, scene),
        "mask": shape_views.mask(config, scene),
    }
    return fields, {"scene": scene.to_json()}


def _reference(kind: str) -> Maker:
    def make(config, split, rng, unseen) -> Made:
        made = shape_references.refer(config, split, rng, kind)
        fields, facts = _picture(config, made.target, caption=made.caption)
        reference = shapes.render(config, made.reference)
        return fields | {"reference": reference, "strength": made.strength}, facts | {
            "scene": made.reference.to_json(),
            "strength": made.strength,
            "taken": list(made.taken),
        }

    return make


def _variation(config, split, rng, unseen) -> Made:
    source, other = shape_references.vary(config, split, rng)
    fields, facts = _picture(config, other)
    fields["source"] = shapes.render(config, source)
    return fields, facts | {"scene": source.to_json()}


def _picture(config: ShapesConfig, scene: Scene, **texts: Any) -> Made:
    """Fields and metadata of a task whose `image` is this scene."""
    facts = {"scene": scene.to_json(), "target_scene": scene.to_json()}
    return {**texts, "image": shapes.render(config, scene)}, facts


_MAKERS: dict[str, Maker] = {
    "text_to_image": _text_to_image,
    "infill": _text_to_image,
    "caption_short": _caption_short,
    "caption_detailed": _caption_detailed,
    "caption_long": _caption_long,
    "answer": _answer,
    "science": _science,
    "science_cot": _science_cot,
    "edit": _edit,
    "edit_region": _edit_region,
    "ground": _ground,
    "control_edge": _control("edge"),
    "control_scribble": _control("scribble"),
    "control_segmentation": _control("segmentation"),
    "control_depth": _control("depth"),
    "segment": _segment,
    "reference_style": _reference("style"),
    "reference_composition": _reference("composition"),
    "reference_content": _reference("content"),
    "variation": _variation,
}
# Whose fields have unseen wordings, whatever their templates have.
_WORDED = ("text_to_image", "infill", "answer", "edit", "edit_region")
TASKS: tuple[str, ...] = tuple(_MAKERS)
