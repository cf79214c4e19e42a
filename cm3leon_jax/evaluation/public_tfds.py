"""Public sets as TensorFlow Datasets prepares them, in place of their unpacked files.

Of the sets that protocols need TFDS 4.9.10 has one: `coco_captions/2014`, COCO's
pictures with their captions in Karpathy's splits, of which val, test and restval are
val2014. It stores pictures as the files that they are and captions with COCO's numbers,
so its examples, and the hash of the data, are those of the unpacked files. It has no
VQA v2, OK-VQA, VizWiz, image paragraphs or VisDial, and of COCO's classes of stuff no
map: these come in the folders that `public_sets.SETS` names.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cm3leon_jax.data import tfds_sets
from cm3leon_jax.data.tfds_sets import TfdsConfig

NAME = "coco_captions/2014"
SPLITS = {"coco_prompts": "val+test+restval", "coco_karpathy": "test"}


@dataclass(frozen=True)
class Captioned:
    """A picture of COCO, the bytes of its file, its captions by their numbers."""

    key: int
    file: str
    size: int
    captions: tuple[tuple[int, str], ...]


def there(name: str, folder: Path) -> bool:
    """Whether TFDS has prepared the set in a folder: its `data_dir`, or the set's."""
    info = "dataset_info.json"
    return name in SPLITS and any(
        next(folder.glob(place), None) for place in (info, f"{NAME}/*/{info}")
    )


def captioned(name: str, folder: Path) -> Iterator[Captioned]:
    """All pictures of a set."""
    source, _ = _opened(name, folder)
    for number in range(len(source)):
        example = source[number]
        numbers, texts = (
            tfds_sets.value_of(example, f"captions/{key}") for key in ("id", "text")
        )
        yield Captioned(
            int(tfds_sets.value_of(example, "image/id")),
            _file(example),
            len(example["image"]),
            tuple(zip(numbers, map(_text, texts), strict=True)),
        )


def picture(name: str, folder: Path, file: str) -> bytes:
    """The file of a picture; FileNotFoundError where the set has none of that name."""
    source, numbers = _opened(name, folder)
    if file not in numbers:
        raise FileNotFoundError(f"{folder / file} does not exist, nor has TFDS it")
    return source[numbers[file]]["image"]


@functools.cache
def _opened(name: str, folder: Path) -> tuple[Any, dict[str, int]]:
    """The examples of a set, and the number of every file's."""
    split = SPLITS[name]
    config = TfdsConfig(path=str(folder), name=NAME, image_size=8, train=split)
    config = tfds_sets.resolved(config)
    source = tfds_sets.source_of(tfds_sets.builder_of(config), config, split)
    return source, {_file(source[i]): i for i in range(len(source))}


def _file(example: Any) -> str:
    """As it lies beside the unpacked files."""
    name = _text(tfds_sets.value_of(example, "image/filename"))
    return f"{name.split('_')[1] if '_' in name else 'val2014'}/{name}"


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
