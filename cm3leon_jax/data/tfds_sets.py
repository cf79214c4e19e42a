"""Sets of TensorFlow Datasets with pictures and texts; TensorFlow is not needed.

A set is read by record number, so it must be stored as ArrayRecord. Whoever prepares it
chooses that: `tfds build NAME --file_format=array_record`, which needs TensorFlow for
some sets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cm3leon_jax.data.parts import (
    RECORDS,
    FieldsConfig,
    Found,
    Kind,
    Part,
    Raw,
    facts,
    taken,
)

# What a set's features are called; anything that the settings give goes before it.
PRESETS: dict[str, dict[str, Any]] = {
    "coco_captions": {
        "captions": ("captions/text",),
        "id": "image/id",
        "validation": "val",
        "test": "test",
    },
    "ai2dcaption": {"id": "image_filename", "train": "gpt4v", "test": "test"},
    "laion400m": {"licence": "license", "origin": "url"},
}
_PREPARED = "**/dataset_info.json"


@dataclass(frozen=True, kw_only=True)
class TfdsConfig(FieldsConfig):
    """`path`: the folder that TFDS keeps its sets in (its `data_dir`). `name`: a set,
    "coco_captions" or "name/config:version". `train`, `validation` and `test`: splits
    of it, slices like "train[:90%]" too.

    Features inside others are named "captions/text". For the sets in `PRESETS` all
    fields may be left out.
    """

    name: str
    train: str = "train"


def resolved(config: TfdsConfig) -> TfdsConfig:
    """With the names of a preset where the settings leave them out."""
    usual = {field.name: field.default for field in dataclasses.fields(config)}
    preset = PRESETS.get(config.name.partition("/")[0].partition(":")[0], {})
    left = {k: v for k, v in preset.items() if getattr(config, k) == usual[k]}
    return dataclasses.replace(config, **left)


def parts(config: TfdsConfig) -> Iterator[Part]:
    """Some examples at a time. ValueError where the set is not there, not ArrayRecord,
    or without a split or feature that is named."""
    wanted = resolved(config)
    builder = builder_of(wanted)
    known = _names(builder.info.features)
    for feature in wanted.fields:
        if feature not in known:
            raise ValueError(
                f"{wanted.name} has no feature {feature!r}, it has "
                f"{', '.join(sorted(known))}: name those to use in data.settings "
                "(image, captions, id, …)"
            )
    stamp = builder.info.full_name
    named = (("validation", wanted.validation), ("test", wanted.test))
    for split, asked in ((None, wanted.train), *named):
        if asked is None:
            continue
        try:
            count = builder.info.splits[asked].num_examples
        except (KeyError, ValueError):
            there = ", ".join(builder.info.splits)
            raise ValueError(
                f"{wanted.name} has no split {asked!r}, it has {there}: see "
                f"data.settings.{split or 'train'}"
            ) from None
        for first in range(0, count, RECORDS):
            place = asked, first, min(first + RECORDS, count)
            made_of = f"{stamp} {count}"
            yield Part(f"{asked}/{first}", place, split, made_of, f"tfds {stamp}")


def read(config: TfdsConfig, part: Part) -> Iterator[Raw]:
    """The records of some examples, named by their `id`, or split and number."""
    wanted = resolved(config)
    asked, first, stop = part.where
    builder = builder_of(wanted)
    source = source_of(builder, wanted, asked)
    for number in range(first, stop):
        values = {name: value_of(source[number], name) for name in wanted.fields}
        name = f"{asked}/{number}"
        if wanted.id:
            known = values[wanted.id]
            name = known.decode() if isinstance(known, bytes) else str(known)
        yield Raw(name, partial(_load, wanted, values))


def builder_of(config: TfdsConfig) -> Any:
    """FileNotFoundError where the set is not there, ValueError where it is stored in a
    form that has no numbers; both say how to prepare it."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.read_only_builder import builder_from_files

    root = Path(config.path)
    try:
        # From its files alone: the code of some sets needs TensorFlow to be imported.
        if (root / "dataset_info.json").is_file():
            builder = tfds.builder_from_directory(str(root))
        else:
            builder = builder_from_files(config.name, data_dir=str(root))
    except (tfds.core.DatasetNotFoundError, ValueError, ImportError) as error:
        names = {path.parent.relative_to(root) for path in root.glob(_PREPARED)}
        there = ", ".join(sorted(map(str, names))) or "none"
        raise FileNotFoundError(
            f"data.settings.name={config.name}: no such set in {root} (there: {there}; "
            f"{str(error).partition('. ')[0].partition(chr(10))[0]}). To prepare it: "
            f"tfds build {config.name} --data_dir={root} --file_format=array_record, "
            "which for some sets needs TensorFlow"
        ) from None
    kind = builder.info.file_format
    if kind is None or kind.value != "array_record":
        raise ValueError(
            f"{config.name} in {root} is stored as {kind.value if kind else '?'}, "
            "which cannot be read by number: prepare it again with "
            f"tfds build {config.name} --data_dir=FOLDER --file_format=array_record"
        )
    return builder


def source_of(builder: Any, config: TfdsConfig, split: str) -> Any:
    """Examples by number; their pictures are files, not decoded."""
    import tensorflow_datasets as tfds

    feature = builder.info.features[config.image]
    undecoded = isinstance(feature, tfds.features.Image)
    decoders = {config.image: tfds.decode.SkipDecoding()} if undecoded else None
    return builder.as_data_source(split=split, decoders=decoders)


def _names(features: Any, prefix: str = "") -> set[str]:
    names = set()
    inner = getattr(features, "feature", features)  # of a Sequence
    for name in inner if hasattr(inner, "keys") else ():
        names |= {prefix + name, *_names(inner[name], f"{prefix}{name}/")}
    return names


def value_of(example: Any, name: str) -> Any:
    """A feature of an example as plain Python; some names have slashes of their own."""
    if name in example:
        value = example[name]
        return value.tolist() if hasattr(value, "tolist") else value
    for at in (i for i, letter in enumerate(name) if letter == "/"):
        inside = example.get(name[:at]) if isinstance(example, Mapping) else None
        if isinstance(inside, Mapping):
            return value_of(inside, name[at + 1 :])
    raise ValueError(f"no feature {name!r} in this example")


def _load(config: TfdsConfig, values: dict[str, Any]) -> Found:
    chosen = {"licence": config.licence, "source": config.origin}
    named = {key: values[feature] for key, feature in chosen.items() if feature}
    picture = values[config.image]
    if not isinstance(picture, bytes):
        raise ValueError(f"{config.image} holds no picture's file")
    return Found(picture, taken(config, values), facts(named))


TFDS = Kind(TfdsConfig, parts, read)
