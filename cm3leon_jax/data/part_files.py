"""What is kept of a part of one's own data until documents are chosen out of all.

000012.array_record     the documents that can be used, of all splits, in order
000012.npz              facts of each, and what was left out; written last
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image as Pillow

from cm3leon_jax.config import config_hash
from cm3leon_jax.data.documents import Skipped, to_bytes
from cm3leon_jax.data.duplicates import SIDE, fingerprint
from cm3leon_jax.data.filters import IngestConfig
from cm3leon_jax.data.parts import Found, Kind, Part, Raw, pairs, split_of
from cm3leon_jax.data.shards import ShardReader, ShardWriter, shard_path

_NUMBERS = {  # columns that are not texts
    **dict.fromkeys(("record", "characters", "width", "height"), np.int32),
    **{"key": np.uint64, "small": np.uint8},
}
FAULT, FILTER, DUPLICATE = "fault", "filter", "duplicate"  # why one was left out


class Rejected(NamedTuple):
    """A record that was left out. `record`: its number in the part."""

    split: str
    id: str
    reason: str
    kind: str
    record: int


class Fact(NamedTuple):
    """What is known of a document of a part. `record`: documents with the same picture
    have the same. `width`, `height`: before it was cut. `key`, `small`: fingerprint."""

    split: str
    id: str
    record: int
    characters: int
    width: int
    height: int
    licence: str
    source: str
    language: str
    key: int
    small: np.ndarray


class _Filtered(Exception):
    """A record that the settings do not want."""


@dataclass(frozen=True)
class Job:
    """How every part is made. Can be pickled."""

    kind: Kind
    config: Any
    settings: IngestConfig
    directory: Path

    def run(self, number: int, part: Part) -> None:
        """Writes the files of a part, unless they are there already. ValueError for the
        first fault, where faults are refused."""
        if self.is_done(number, part):
            return
        facts, rejected = [], []
        with ShardWriter(shard_path(self.directory, _split(number), 0, 1)) as writer:
            for record, raw in enumerate(self.kind.read(self.config, part)):
                name = raw.id if isinstance(raw, Skipped) else raw.name
                split = part.split or split_of(name, self.config)
                try:
                    for data, fact in self._made(raw, part, split, record):
                        writer.write(data)
                        facts.append(fact)
                except _Filtered as error:
                    reason = str(error)
                    rejected.append(Rejected(split, name, reason, FILTER, record))
                except (ValueError, OSError) as error:
                    if self.settings.faults == "refuse":
                        raise ValueError(
                            f"{name}: {error} (mend it, or leave such records out with "
                            "data.ingest.faults=skip)"
                        ) from None
                    reason = str(error)
                    rejected.append(Rejected(split, name, reason, FAULT, record))
        self._save(number, part, facts, rejected)

    def is_done(self, number: int, part: Part) -> bool:
        """Whether the files are there, of this part as it is now."""
        try:
            with np.load(self._facts(number)) as arrays:
                return str(arrays["stamp"]) == self._stamp(part)
        except (OSError, ValueError, KeyError, EOFError):
            return False

    def open(self, number: int) -> PartFile:
        """A part that is there."""
        return PartFile(self.directory, number)

    def _made(
        self, raw: Raw | Skipped, part: Part, split: str, record: int
    ) -> Iterator[tuple[bytes, Fact]]:
        """(bytes, facts) of each document of a record."""
        if isinstance(raw, Skipped):
            raise ValueError(raw.reason)
        found = raw.load()
        width, height = _size(found.picture)
        why = self.settings.refusal(width, height)
        if why:
            raise _Filtered(why)
        known = {"licence": self.settings.licence, "source": self.settings.origin}
        known["source"] = known["source"] or part.source or None
        metadata = {k: v for k, v in known.items() if v} | found.metadata
        side = self.config.image_size
        captions = tuple(text for text in found.captions if text.strip())
        reasons = [self.settings.caption_refusal(text) for text in captions]
        kept = [text for text, why in zip(captions, reasons, strict=True) if not why]
        if captions and not kept:
            raise _Filtered(str(reasons[0]))
        made = pairs(raw.name, Found(found.picture, tuple(kept), metadata), side)
        key, small = fingerprint(made[0].pictures[0])
        for document in made:
            text = document.texts[0]
            yield (
                to_bytes(document),
                Fact(
                    *(split, document.id, record, len(text), width, height),
                    *(metadata.get("licence", ""), metadata.get("source", "")),
                    *(language_reader()(text), key, small),
                ),
            )

    def _facts(self, number: int) -> Path:
        return self.directory / f"{_split(number)}.npz"

    def _stamp(self, part: Part) -> str:
        settings = [repr(self.config), repr(self.settings)]
        return config_hash({"part": [part.name, part.stamp], "settings": settings})

    def _save(
        self, number: int, part: Part, facts: list[Fact], rejected: list[Rejected]
    ) -> None:
        arrays = {"stamp": np.array(self._stamp(part))}
        for column in Fact._fields:
            values = [getattr(fact, column) for fact in facts]
            arrays[column] = np.array(values, _NUMBERS.get(column, np.str_))
        arrays["small"] = arrays["small"].reshape(-1, SIDE, SIDE, 3)  # of none too
        for column in Rejected._fields:
            values = [getattr(item, column) for item in rejected]
            arrays[f"rejected_{column}"] = np.array(
                values, _NUMBERS.get(column, np.str_)
            )
        partial = self._facts(number).with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        partial.replace(self._facts(number))


class PartFile:
    """The files of a part: `facts` is read whole, documents by number."""

    def __init__(self, directory: Path, number: int):
        self._directory, self._number = directory, number

    def facts(self, *columns: str) -> dict[str, np.ndarray]:
        """Some columns of `Fact`; of all documents."""
        with np.load(self._directory / f"{_split(self._number)}.npz") as arrays:
            return {name: arrays[name] for name in columns}

    def rejected(self) -> list[Rejected]:
        """What was left out."""
        names = [f"rejected_{name}" for name in Rejected._fields]
        columns = self.facts(*names)
        rows = zip(*(columns[name].tolist() for name in names), strict=True)
        return [Rejected(*row) for row in rows]

    def read(self, rows: Iterable[int]) -> list[bytes]:
        """Documents by their numbers."""
        count = len(self.facts("record")["record"])
        return ShardReader(self._directory, _split(self._number), count).read(rows)


@cache
def language_reader() -> Callable[[str], str]:
    """Guesses the language of a text, as a code; "" without the extra `languages`."""
    try:
        import py3langid
    except ImportError:
        return lambda text: ""
    return lambda text: py3langid.classify(text)[0]


def _split(number: int) -> str:
    return f"{number:06d}"


def _size(data: bytes) -> tuple[int, int]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures, which are refused
            return Pillow.open(io.BytesIO(data)).size
    except Exception as error:  # damaged files raise a dozen unrelated types
        raise ValueError(f"unusable picture: {error}") from None
