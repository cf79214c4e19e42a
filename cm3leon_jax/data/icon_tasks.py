"""Examples of the tasks made of real artwork (paper 1.12; `task_templates.py`).

Single drawings serve captions, generation and references; composited scenes
(`icon_scenes.py`) serve what needs places, masks or boxes. All artwork of an example is
of its split, which is drawn by the name: a test name is in no training example, be it
as reference, as part of a scene or as an answer.

metadata: licence (SPDX; of several pieces "A AND B", see `icon_sets.showable`), source,
artwork (id, licence, author, … of every piece, that of the output first), and

| task | metadata |
|---|---|
| with a scene | scene of the picture that is given, target_scene of the other |
| with a single drawing | name, style, background of the one that is asked for |
| answer | question, question_kind, answer_text |
| edit, edit_region | edit: kind, cells, kept, spatial, target, …; region: its box |
| ground | boxes: [[phrase, [x0, y0, x1, y1]], …] |
| reference_… | strength (see `icon_references.py`); reference: id of a single drawing |

A scene is {background, objects: [{id, name, class, cell, size, colour, box}]}.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from cm3leon_jax.data import controls, hashing, icon_names, tasks
from cm3leon_jax.data import icon_references as references
from cm3leon_jax.data import icon_scenes as scenes
from cm3leon_jax.data.documents import Document
from cm3leon_jax.data.icon_edits import edit, edit_region
from cm3leon_jax.data.icon_scenes import CELLS, CLASSES, Artwork, Scene
from cm3leon_jax.data.icon_wording import (
    Draws,
    Example,
    a,
    ground,
    origin,
    scene_caption,
    scene_narration,
)
from cm3leon_jax.data.icons import Drawing, IconsConfig

__all__ = ["CLASSES", "TASKS", "examples"]
_SCENES = 0.5  # share of scenes where single drawings serve too
_TRIES = 200

# Kind of question -> wordings of training, and wordings that it never uses.
QUESTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "what": (("what is this?", "what does the picture show?"), ("name what you see",)),
    "what there": (
        ("what is at the {cell}?", "what is in the {cell} of the picture?"),
        ("which thing can be seen at the {cell}?",),
    ),
    "whether": (
        ("is there {a_name}?", "does the picture show {a_name}?"),
        ("can you see {a_name}?",),
    ),
    "where": (
        ("where is the {name}?", "where in the picture is the {name}?"),
        ("at which place is the {name}?",),
    ),
    "how many": (
        ("how many drawings are there?", "how many things does the picture show?"),
        ("count the drawings",),
    ),
    "how many of": (
        ("how many times is there {a_name}?", "how often is the {name} shown?"),
        ("count the drawings of {a_name}",),
    ),
}


def examples(
    config: IconsConfig, task: str, split: str, *, unseen_wording: bool = False
) -> Iterator[Document]:
    """Endless examples of a task; a pure function of the arguments and the number.

    With `unseen_wording`, in wordings that training never uses (of the template and of
    what is asked), about the same pictures. The first examples are about different
    drawings, until all that serve the task have been used.

    Raises ValueError for a task, split or wording that does not exist and where the
    chosen sets can't serve the task; else what `icons.documents` raises.
    """
    if task not in TASKS:
        raise ValueError(f"icons: no task {task!r}: choose from {', '.join(TASKS)}")
    spec = tasks.known(task)
    if unseen_wording and not spec.unseen:
        raise ValueError(f"task {task!r} has no wordings that training never uses")
    artwork = _artwork(config, split)
    numbers = range(len(spec.templates))
    if unseen_wording:
        numbers = range(len(spec.templates), len(spec.wordings))
    return (
        _example(artwork, task, split, number, numbers, unseen_wording)
        for number in itertools.count()
    )


# One entry for each split of one world: stages go through all tasks of each.
@lru_cache(maxsize=3)
def _artwork(config: IconsConfig, split: str) -> Artwork:
    return Artwork(config, split)


def _example(
    artwork: Artwork,
    task: str,
    split: str,
    number: int,
    templates: Sequence[int],
    unseen: bool,
) -> Document:
    pool, build = _BUILDERS[task]
    leads = getattr(artwork, pool)
    seed = icon_names.digest("task", task, split)
    rng = np.random.default_rng([seed, number])
    words = np.random.default_rng([seed, number, 1])
    template = templates[int(words.integers(len(templates)))]
    draws = Draws(content=rng, words=words, unseen=unseen)
    for attempt in range(_TRIES if leads else 0):
        position = int(rng.integers(len(leads))) if attempt else number
        epoch, place = divmod(position, len(leads))
        lead = leads[int(hashing.permute(place, len(leads), seed, epoch))]
        example = build(artwork, draws, lead)
        if example is not None:
            return tasks.fill(
                task,
                example.fields,
                template,
                id=f"icons/{task}/{split}/{number:09d}{'-unseen' if unseen else ''}",
                **origin(example.pieces),
                **example.facts,
            )
    raise ValueError(
        f"icons: the chosen sets have no artwork for the task {task!r} in the split "
        f"{split!r}: choose more sets in icons.sets"
    )


def _single_pair(artwork: Artwork, draws: Draws, lead: Drawing) -> Example | None:
    """One drawing and its caption as in pretraining."""
    made = artwork.single(lead, draws.content)
    if made is None:
        return None
    picture, background = made
    tags = lead.emoji.tags if lead.emoji else ()
    key = f"{lead.id} {draws.content.integers(1000)}"
    caption = icon_names.caption(key, lead.names, tags, lead.style, background)
    facts = {"name": lead.names[0], "style": lead.style, "background": background}
    return Example(
        fields={"caption": caption, "image": picture}, pieces=(lead,), facts=facts
    )


def _scene(
    artwork: Artwork, draws: Draws, lead: Drawing
) -> tuple[Scene, scenes.Composite, Example] | None:
    """A scene of one to four items, its picture, and both as a captioned pair."""
    count = int(draws.content.integers(1, len(CELLS) + 1))
    scene = scenes.draw(artwork, draws.content, lead, count=count)
    if scene is None:
        return None
    composite = artwork.compose(scene)
    caption = scene_caption(scene, places=True)
    return scene, composite, _about(scene, composite, caption=caption)


def _about(scene: Scene, composite: scenes.Composite, **fields: Any) -> Example:
    facts = scenes.to_json(scene, composite)
    return Example(
        fields={"image": composite.picture, **fields},
        pieces=tuple(item.drawing for item in scene.items),
        facts={"scene": facts, "target_scene": facts},
    )


def _pair(artwork: Artwork, draws: Draws, lead: Drawing) -> Example | None:
    """A single drawing or a scene, with its caption."""
    if not artwork.items or draws.content.random() >= _SCENES:
        return _single_pair(artwork, draws, lead)
    items = artwork.items
    made = _scene(artwork, draws, items[int(draws.content.integers(len(items)))])
    return made and made[2]


def _short(artwork: Artwork, draws: Draws, lead: Drawing) -> Example | None:
    pair = _single_pair(artwork, draws, lead)
    return pair and pair.having(caption=lead.names[0])


def _detailed(artwork: Artwork, draws: Draws, lead: Drawing) -> Example | None:
    pair = _pair(artwork, draws, lead)
    if pair is None or "scene" in pair.facts:
        return pair
    caption = f"{lead.names[0]}, {lead.style}{ground(pair.facts['background'])}"
    return pair.having(caption=caption)


def _long(artwork: Artwork, draws: Draws, lead: Drawing) -> Example | None:
    made = _scene(artwork, draws, lead)
    return made and made[2].having(caption=scene_narration(made[0]))


def _control_edge(artwork: Artwork, draws: Draws, lead: Drawing) -> Example | None:
    pair = _pair(artwork, draws, lead)
    return pair and pair.having(edge=controls.edges(pair.fields["image"]))


def _control_scribble(artwork: Artwork, draws: Draws, lead: Drawing) -> Example | None:
    pair = _pair(artwork, draws, lead)
    if pair is None:
        return None
    seed = int(draws.content.integers(2**32))
    return pair.having(scribble=controls.scribble(pair.fields["image"], seed))


def _segment(artwork: Artwork, draws: Draws, lead: Drawing) -> Example | None:
    made = _scene(artwork, draws, lead)
    return made and _about(made[0], made[1], mask=made[1].mask)


def _control_segmentation(
    artwork: Artwork, draws: Draws, lead: Drawing
) -> Example | None:
    made = _scene(artwork, draws, lead)
    if made is None:
        return None
    scene, composite, pair = made
    return pair.having(
        segmentation=controls.class_picture(composite.mask, len(CLASSES)),
        caption=scene_caption(scene, places=False),
    )


def _ground(artwork: Artwork, draws: Draws, lead: Drawing) -> Example | None:
    made = _scene(artwork, draws, lead)
    if made is None:
        return None
    scene, composite, _ = made
    names = [item.name for item in scene.items]
    objects = list(zip(names, composite.boxes, strict=True))
    caption = scene_caption(scene, places=False)
    example = _about(scene, composite, caption=caption, objects=objects)
    example.facts["boxes"] = [[name, list(box)] for name, box in objects]
    return example


def _answer(artwork: Artwork, draws: Draws, lead: Drawing) -> Example | None:
    """Kinds of questions in equal shares; "whether" is yes in half of them."""
    rng = draws.content
    kind = str(rng.choice(list(QUESTIONS)))
    if kind == "what":
        pair = _single_pair(artwork, draws, lead)
        return pair and _asked(pair, draws, kind, pair.facts["name"])
    count = int(rng.integers(1, len(CELLS) + 1))
    copies = int(rng.integers(count)) if kind == "how many of" else 0
    scene = scenes.draw(artwork, rng, lead, count=count, copies=copies)
    if scene is None:
        return None
    pair = _about(scene, artwork.compose(scene))
    item = scene.items[int(rng.integers(count))]
    name, cell = item.name, CELLS[item.cell]
    if kind == "what there":
        return _asked(pair, draws, kind, name, cell=cell)
    if kind == "where":
        return _asked(pair, draws, kind, f"at the {cell}", name=name)
    if kind == "how many":
        return _asked(pair, draws, kind, str(count))
    if kind == "how many of":
        return _asked(pair, draws, kind, str(copies + 1), name=lead.names[0])
    if rng.random() < 0.5:
        return _asked(pair, draws, kind, "yes", name=name)
    absent = scenes.fresh(artwork, rng, scene, artwork.mates(lead), 0)
    return absent and _asked(pair, draws, kind, "no", name=absent.name)


def _asked(
    pair: Example, draws: Draws, kind: str, answer: str, **parts: str
) -> Example:
    parts = {**parts, "a_name": a(parts["name"])} if "name" in parts else parts
    question = draws.phrase(QUESTIONS[kind], **parts)
    return Example(
        fields={"question": question, "answer": answer, "image": pair.fields["image"]},
        pieces=pair.pieces,
        facts={
            **pair.facts,
            "question": question,
            "question_kind": kind,
            "answer_text": answer,
        },
    )


_Builder = Callable[[Artwork, Draws, Drawing], Example | None]
# Task -> which drawings of `Artwork` its examples are about, and their builder.
_BUILDERS: dict[str, tuple[str, _Builder]] = {
    "caption_short": ("singles", _short),
    "caption_detailed": ("singles", _detailed),
    "caption_long": ("items", _long),
    "text_to_image": ("singles", _pair),
    "infill": ("singles", _pair),
    "variation": ("twins", references.variation),
    "reference_style": ("singles", references.style),
    "reference_content": ("twins", references.content),
    "reference_composition": ("items", references.composition),
    "segment": ("items", _segment),
    "control_segmentation": ("items", _control_segmentation),
    "control_edge": ("singles", _control_edge),
    "control_scribble": ("singles", _control_scribble),
    "edit": ("items", edit),
    "edit_region": ("items", edit_region),
    "ground": ("items", _ground),
    "answer": ("items", _answer),
}
TASKS: tuple[str, ...] = tuple(_BUILDERS)
