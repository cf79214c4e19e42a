"""A tiny world of tasks over the shapes, and a system that is tuned on it."""

import itertools
from collections.abc import Iterator

import numpy as np
import tiny_system

from cm3leon_jax.data import shapes, tasks
from cm3leon_jax.data.documents import Document, Image, Mask
from cm3leon_jax.data.task_sources import World

CLASSES = ("background", "dark", "bright")
NAMES = ("answer", "caption_short", "edit", "infill", "segment")


def examples(config: shapes.ShapesConfig, task: str, split: str) -> Iterator[Document]:
    """Of two scenes each: what is asked, told, or made of the first."""
    for number in itertools.count():
        for first, second in itertools.pairwise(shapes.documents(config, split)):
            (caption,), (picture,) = first.texts, first.pictures
            light = picture.astype(int).sum(axis=2)
            mask = np.digitize(light, (250, 500)).astype(np.int32)
            fields = {
                "answer": {"question": "what is there?", "answer": caption},
                "caption_short": {"caption": caption},
                "edit": {"source": Image(second.pictures[0]), "instruction": caption},
                "infill": {"caption": caption},
                "segment": {"mask": Mask(mask)},
            }[task] | {"image": Image(picture)}
            yield tasks.fill(task, fields, 0, id=f"{task} {number} {first.id}")


WORLD = World(tasks=NAMES, examples=examples, classes=CLASSES)


def tiny_config():
    c = tiny_system.tiny_config()
    c["vocabulary"]["classes"] = 4
    c["sft"] = {
        "tasks": {"edit": 2.0, "answer": 1.0, "caption_short": 1, "infill": 1.0}
        | {"segment": 1.0},
        "examples": {"train": 24, "validation": 8, "test": 8},
        "tokenizers": ("edit", "answer"),
        "infill": c["pretrain"]["infill"],
        "packing": {"kind": "first_fit", "row_length": 128},
        "batch_size": 16,
        "optimizer": {"peak": 1e-3, "warmup": 1, "steps": 4},
        "log_every": 1,
        "checkpoint_every": 2,
        "validation_batches": 1,
    }
    return c
