"""Where examples of tasks come from: the world of a config, or a folder of JSON lines.

A world's module has `TASKS`, the tasks that it can make, `examples(config, task, split)
-> Iterator[Document]`, endless and deterministic, and `CLASSES`, the classes of its
masks. All else (real data sets; kinds of control without an extractor here: HED, poses,
normals) is read from `FOLDER/TASK.jsonl`, one example a line, files relative to FOLDER:

    {"id": "a", "fields": {"hed": "a.hed.png", "caption": "a red star",
                           "image": "a.png"}, "licence": "CC0-1.0"}

`fields` are those of `task_templates.TASKS`: texts, names of picture files (for a mask,
a palette or grey picture of labels), and for `objects` [[phrase, [x0, y0, x1, y1]], …]
in pixels of the picture as it is trained on. "wording" chooses a template, else the id
does (an unseen one never for training); everything else becomes metadata.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow

from cm3leon_jax.data import icon_tasks, shape_tasks, tasks
from cm3leon_jax.data.documents import Document, Image, Mask, Skipped
from cm3leon_jax.data.parts import FilesConfig, split_of
from cm3leon_jax.data.pictures import read_picture


@dataclass(frozen=True)
class World:
    """What a world can make: `examples(config, task, split)`, names of its classes."""

    tasks: tuple[str, ...]
    examples: Callable[[Any, str, str], Iterator[Document]]
    classes: tuple[str, ...] = ()


SOURCES: dict[str, World] = {
    "shapes": World(shape_tasks.TASKS, shape_tasks.examples, shape_tasks.CLASSES),
    "icons": World(icon_tasks.TASKS, icon_tasks.examples, icon_tasks.CLASSES),
}


@dataclass(frozen=True, kw_only=True)
class ExampleConfig:
    """The examples of one task: of the world `world` with its settings `source`, or of
    the folder `path`. `autoregressive`: texts come last."""

    world: str
    source: Any
    task: str
    path: str
    autoregressive: bool


def check(world: str, task: str, path: str) -> None:
    """ValueError or FileNotFoundError where nobody makes examples of a task."""
    own = SOURCES[world].tasks if world in SOURCES else ()
    if task in own:
        return
    if not path:
        raise ValueError(
            f"sft.tasks: the world {world!r} makes no examples of {task!r} (only of "
            f"{', '.join(own) or 'nothing'}): leave it out, or give sft.path, a folder "
            f"with {task}.jsonl"
        )
    if not (Path(path) / f"{task}.jsonl").is_file():
        raise FileNotFoundError(
            f"sft.path={path} has no {task}.jsonl, and the world {world!r} makes no "
            f"examples of {task!r}"
        )


def classes(world: str) -> tuple[str, ...]:
    """Names of the classes of a world's masks by label; () where it makes none."""
    return SOURCES[world].classes if world in SOURCES else ()


def documents(config: ExampleConfig, split: str) -> Iterator[Document | Skipped]:
    """Examples of a task, in a fixed order; endless where the world makes them."""
    world = SOURCES.get(config.world)
    found: Iterator[Document | Skipped]
    if world is not None and config.task in world.tasks:
        found = world.examples(config.source, config.task, split)
    else:
        size = config.source.image_size
        found = folder_examples(config.path, config.task, split, size)
    for document in found:
        if isinstance(document, Document) and config.autoregressive:
            document = reordered(document)
        yield document


def reordered(document: Document) -> Document:
    """An example with its text last: the order "autoregressive" of `tasks.fill`."""
    made_by_fill = ("task", "wording", "template", "answer")
    facts = {k: x for k, x in document.metadata.items() if k not in made_by_fill}
    task, template = (document.metadata[key] for key in ("task", "template"))
    fields = tasks.parse(task, document)
    order = "autoregressive"
    return tasks.fill(task, fields, template, order=order, id=document.id, **facts)


def folder_examples(
    path: str, task: str, split: str, image_size: int
) -> Iterator[Document | Skipped]:
    """The lines of `PATH/TASK.jsonl` whose id falls into the split (5 % validation, 5 %
    test); a line that cannot be used is `Skipped` and says why."""
    files = FilesConfig(path=path, image_size=image_size)
    with (Path(path) / f"{task}.jsonl").open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            name = f"{task}:{number}"
            if not line.strip():
                continue
            try:
                example = json.loads(line)
                name = str(example.pop("id", name))
                if split_of(name, files) == split:
                    yield _example(example, name, task, files, split)
            except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
                why = f"{type(error).__name__}: {error}"
                yield Skipped(name, f"line {number + 1} of {task}.jsonl: {why}")


def _example(
    example: dict[str, Any], name: str, task: str, files: FilesConfig, split: str
) -> Document:
    spec, fields = tasks.known(task), dict(example.pop("fields"))
    for key in fields.keys() & {*spec.images, *spec.masks}:
        data = (Path(files.path) / fields[key]).read_bytes()
        if key in spec.images:
            fields[key] = Image(read_picture(data, files.image_size))
        else:
            fields[key] = Mask(read_labels(data, files.image_size))
    wording = example.pop("wording", sum(name.encode()) % len(spec.templates))
    made = tasks.fill(task, fields, wording, id=name, **example)
    if split == "train" and made.metadata["wording"] == "unseen":
        raise ValueError(f"wording {wording} is one that training never uses")
    boxes = tasks.parse(task, made)["objects"] if "objects" in fields else ()
    if any(max(box) > (side := files.image_size) for _, box in boxes):
        raise ValueError(f"objects={boxes}: boxes lie inside {side}x{side} pixels")
    return made


def read_labels(data: bytes, size: int) -> np.ndarray:
    """A palette or grey picture of labels -> int32 [size, size]: its centred square."""
    picture = Pillow.open(io.BytesIO(data))
    if picture.mode not in ("P", "L", "1", "I", "I;16"):
        raise ValueError(
            f"a mask of mode {picture.mode}: save labels as a palette or grey picture"
        )
    labels = Pillow.fromarray(np.asarray(picture).astype(np.int32))
    side = min(labels.size)
    left, top = (labels.width - side) / 2, (labels.height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(labels.resize((size, size), Pillow.Resampling.NEAREST, box))
