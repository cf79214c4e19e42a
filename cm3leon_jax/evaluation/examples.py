"""Held-out examples of tasks, how a model is asked for them, and what it gave.

Examples are of the test split and of the wordings of training; those with `_unseen`
are of wordings that training has never used. A scorer takes as many examples as show
the wanted number of things that it counts.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from PIL import Image as Pillow

from cm3leon_jax.api import CM3Leon
from cm3leon_jax.data import icon_tasks, shape_tasks, tasks
from cm3leon_jax.data.documents import Document
from cm3leon_jax.data.icons import IconsConfig
from cm3leon_jax.evaluation import scenes
from cm3leon_jax.evaluation.kept import note
from cm3leon_jax.evaluation.protocol import Evaluator, Outcome

UNSEEN = "unseen_wording"
Answer = TypeVar("Answer")
Fields = dict[str, Any]
Counted = Callable[[Document], int]
Scorer = Callable[[CM3Leon, Sequence[Document], int], Outcome]


def drawn(
    model: CM3Leon, task: str, least: int, counted: Counted, unseen: bool = False
) -> list[Document]:
    """The first test examples of a task that have `least` counted things together."""
    world, own = model.system.source, icon_tasks
    if not isinstance(world, IconsConfig):
        world, own = scenes.world_of(model), shape_tasks
    made = own.examples(world, task, "test", unseen_wording=unseen)
    return enough(model, f"{task}_{UNSEEN}" if unseen else task, made, least, counted)


def enough(
    model: CM3Leon, name: str, made: Iterator[Document], least: int, counted: Counted
) -> list[Document]:
    """The first of these documents, known by a name in results, that have `least`
    counted things together."""
    found, total = [], 0
    while total < least:
        found.append(next(made))
        total += counted(found[-1])
    note(model, name, found)
    return found


def objects(document: Document) -> int:
    """Of the picture that is to be painted, or told."""
    key = "target_scene" if "target_scene" in document.metadata else "scene"
    return len(scenes.shown(document, key).objects)


def one(_: Document) -> int:
    return 1


def evaluator(
    task: str, scorer: Scorer, counted: Counted = objects, again: Sequence[str] = ()
) -> Evaluator:
    """Scores of at least as many counted things as the protocol has documents. Those
    named in `again` are measured a second time, in wordings that training never used.
    """

    def evaluate(model: CM3Leon, documents: Sequence[Document], seed: int) -> Outcome:
        least = len(documents)
        found = scorer(model, drawn(model, task, least, counted), seed)
        if not again:
            return found
        others = scorer(model, drawn(model, task, least, counted, True), seed)
        new = {f"{key}_{UNSEEN}": others.scores[key] for key in again}
        return Outcome(found.scores | new, found.samples)

    return evaluate


def asked(
    documents: Sequence[Document],
    ask: Callable[[dict[str, list], int], Sequence[Answer]],
) -> list[Answer]:
    """What `ask(fields, wording)` gives for each document, in their order.

    `fields` has a list for every field of the task's template; it is called once for
    every wording and strength that occur, with what belongs to them.
    """
    places: dict[Any, list[int]] = {}
    for i, document in enumerate(documents):
        facts = document.metadata
        places.setdefault((facts["template"], facts.get("strength")), []).append(i)
    found: dict[int, Answer] = {}
    for (wording, _), mine in places.items():
        rows = [_fields(documents[i]) for i in mine]
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        found |= dict(zip(mine, ask(columns, wording), strict=True))
    return [found[i] for i in range(len(documents))]


def _fields(document: Document) -> Fields:
    """Pictures as arrays uint8 [Y, X, 3], masks as labels int32 [Y, X]; and `example`,
    the document itself."""
    fields = tasks.parse(document.metadata["task"], document)
    plain = {key: getattr(value, "array", value) for key, value in fields.items()}
    return plain | {"example": document}


def picture(array: np.ndarray) -> Pillow.Image:
    return Pillow.fromarray(array)


def column(documents: Sequence[Document], name: str) -> list[Any]:
    """A field of every document."""
    return [_fields(document)[name] for document in documents]
