"""One's own data: records of strangers, in parts that are read apart from each other.

A kind of source says which parts there are (`parts`: a tar, some rows of a table, …)
and reads one (`read`). What a record is, which split it belongs to and what cannot be
used is decided here, for all kinds alike. The split of a record depends on its own name
alone, so adding files moves no others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from cm3leon_jax.data.documents import Document, Image, Skipped, Text
from cm3leon_jax.data.pictures import read_picture

RECORDS = 2_000  # of a part, where the kind can choose: redone after an interruption
# What others call the two facts that are kept of every record.
_FACTS = {
    "licence": ("licence", "license"),
    "source": ("source", "url", "original_url", "image_url"),
}


@dataclass(frozen=True, kw_only=True)
class FilesConfig:
    """Pictures of `image_size` pixels a side; percentages of the names per split."""

    path: str
    image_size: int
    validation_percent: float = 5.0
    test_percent: float = 5.0

    def __post_init__(self):
        if self.image_size < 1:
            raise ValueError(f"image_size={self.image_size} must be positive")
        low = min(self.validation_percent, self.test_percent)
        if low < 0 or self.validation_percent + self.test_percent > 100:
            raise ValueError(
                f"validation_percent={self.validation_percent} and test_percent="
                f"{self.test_percent} must be >= 0 and at most 100 together"
            )

    @property
    def percents(self) -> tuple[float, float]:
        """Of the names in `path` that are kept for validation and for test."""
        return self.validation_percent, self.test_percent


@dataclass(frozen=True, kw_only=True)
class FieldsConfig(FilesConfig):
    """`path` holds records with named fields; which of them are what.

    `image`: the picture. `captions`: fields of one text or a list of them; of all that
    are not empty, `take` the "first", or make one document of "each". `id`: a name that
    stays (default: file and row). `licence`, `origin`: fields that are kept with the
    record. `validation` and `test` name where these splits are, if they are apart.
    """

    image: str = "image"
    captions: tuple[str, ...] = ("caption",)
    take: Literal["first", "each"] = "first"
    id: str | None = None
    licence: str | None = None
    origin: str | None = None
    validation: str | None = None
    test: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.take not in ("first", "each"):
            raise ValueError(f"take={self.take!r}: choose first or each")

    @property
    def percents(self) -> tuple[float, float]:
        """As of any files, but for the splits that are elsewhere."""
        validation, test = super().percents
        return 0 if self.validation else validation, 0 if self.test else test

    @property
    def fields(self) -> tuple[str, ...]:
        """All that are looked at."""
        named = (self.image, *self.captions, self.id, self.licence, self.origin)
        return tuple(dict.fromkeys(name for name in named if name))


@dataclass(frozen=True)
class Part:
    """What is read at a time. `where`: for the kind that made it. `split`: that of all
    its records (None: by their names). `stamp`: changes when the files do. `source`:
    kept with the records that do not tell their own."""

    name: str
    where: tuple
    split: str | None = None
    stamp: str = ""
    source: str = ""


@dataclass(frozen=True)
class Found:
    """A record's content: the picture's file, captions, JSON-able facts."""

    picture: bytes
    captions: tuple[str, ...]
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Raw:
    """A record before it is judged; `load` reads it, or raises ValueError or OSError
    that says why it cannot be used."""

    name: str
    load: Callable[[], Found]


class Kind(NamedTuple):
    """A kind of own data: its settings, `parts(config)`, `read(config, part)`. What is
    `Skipped` there is damage that cost records."""

    config: type
    parts: Callable[[Any], Iterable[Part]]
    read: Callable[[Any, Part], Iterator[Raw | Skipped]]


def split_of(name: str, config: FilesConfig) -> str:
    """The split of a record, from a hash of its name."""
    digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8)
    percent = int.from_bytes(digest.digest(), "little") / 2**64 * 100
    validation, test = config.percents
    if percent < test:
        return "test"
    return "validation" if percent < test + validation else "train"


def documents(kind: Kind, config: Any, split: str) -> Iterator[Document | Skipped]:
    """Pairs `text <break> image` of a split, in the order of the parts."""
    for part in kind.parts(config):
        if part.split not in (None, split):
            continue
        for raw in kind.read(config, part):
            if isinstance(raw, Skipped):
                yield raw
            elif (part.split or split_of(raw.name, config)) == split:
                try:
                    found = raw.load()
                    yield from pairs(raw.name, found, config.image_size)
                except (ValueError, OSError) as error:
                    yield Skipped(raw.name, str(error))


def pairs(name: str, found: Found, size: int) -> list[Document]:
    """One document for each caption: `name`, `name#1`, …; ValueError where there is no
    caption, or no picture in the file."""
    captions = [caption.strip() for caption in found.captions if caption.strip()]
    if not captions:
        raise ValueError("empty caption")
    picture = Image(read_picture(found.picture, size))
    return [
        Document(
            (Text(caption), picture),
            id=f"{name}#{number}" if number else name,
            metadata=found.metadata,
        )
        for number, caption in enumerate(captions)
    ]


def facts(values: dict[str, Any]) -> dict[str, str]:
    """Licence and source among the fields of a record, by the names in use for them."""
    kept = {}
    for name, aliases in _FACTS.items():
        for value in (values.get(alias) for alias in aliases):
            if isinstance(value, bytes):
                value = value.decode(errors="replace")
            if value is not None and str(value).strip():
                kept[name] = str(value).strip()
                break
    return kept


def taken(config: FieldsConfig, values: dict[str, Any]) -> tuple[str, ...]:
    """The captions of a record: all texts in its caption fields, or the first one."""
    texts = []
    for name in config.captions:
        value = values[name]
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if text is None:
                continue
            if isinstance(text, bytes):
                text = text.decode()
            if not isinstance(text, str):
                raise ValueError(f"{name} is {type(text).__name__}, not text")
            if text.strip():
                texts.append(text)
    return tuple(texts[:1] if config.take == "first" else texts)
