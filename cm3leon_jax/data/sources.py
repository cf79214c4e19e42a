"""Where documents come from, and `prepare`, which stores them as ArrayRecord.

A source is a function `documents(config, split)` that yields documents in a fixed
order, with `Skipped` in place of each one that it cannot use. The split of a record
depends on its own name alone, so adding files moves no others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, overload

from cm3leon_jax.data import entities, icons, shapes
from cm3leon_jax.data.documents import (
    Document,
    Image,
    Skipped,
    Text,
    from_bytes,
    texts_from_bytes,
    to_bytes,
)
from cm3leon_jax.data.pictures import read_caption, read_picture
from cm3leon_jax.data.shards import ShardReader, ShardWriter, shard_path

SPLITS = ("train", "validation", "test")
ADDED = "new"  # a split of documents that a bank is given after training
SHARDS = 4  # of documents; enough to read in parallel, few enough for small sets
_PICTURES = (".jpg", ".jpeg", ".png", ".webp")
_SECONDS_BETWEEN_LINES = 5.0
_TEXTS_AT_ONCE = 1024  # records
ENOUGH = 10  # documents of a held-out split; fewer score nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderConfig(FilesConfig):
    """`path`: a folder, searched to any depth, of pictures with a .txt beside each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WebdatasetConfig(FilesConfig):
    """`path`: a .tar, or a folder of them, with KEY.jpg|png|webp and KEY.txt inside,
    in any order."""


def split_of(name: str, config: FilesConfig) -> str:
    """The split of a record, from a hash of its name."""
    digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8)
    percent = int.from_bytes(digest.digest(), "little") / 2**64 * 100
    if percent < config.test_percent:
        return "test"
    if percent < config.test_percent + config.validation_percent:
        return "validation"
    return "train"


def folder_documents(config: FolderConfig, split: str) -> Iterator[Document | Skipped]:
    """Pairs `text <break> image` of a folder, in order of their names."""
    root = Path(config.path)
    if not root.is_dir():
        raise FileNotFoundError(f"source.path={config.path} is not a folder")
    files = sorted(
        (path.relative_to(root).with_suffix("").as_posix(), path.suffix.lower(), path)
        for path in root.rglob("*")
        if path.suffix.lower() in (*_PICTURES, ".txt")
    )
    for name, group in itertools.groupby(files, key=lambda file: file[0]):
        if split_of(name, config) == split:
            parts = [(suffix, path.read_bytes) for _, suffix, path in group]
            yield _pair(name, parts, config.image_size)


def webdataset_documents(
    config: WebdatasetConfig, split: str
) -> Iterator[Document | Skipped]:
    """Pairs `text <break> image` of tars, in order of tar names and members."""
    root = Path(config.path)
    tars = sorted(root.glob("*.tar")) if root.is_dir() else [root]
    if not tars or not tars[0].is_file():
        raise FileNotFoundError(f"source.path={config.path}: no .tar files there")
    for path in tars:
        try:
            yield from _tar_documents(path, config, split)
        except (tarfile.TarError, OSError, EOFError) as error:
            yield Skipped(path.stem, f"the rest of {path.name} is damaged: {error}")


def _tar_documents(
    path: Path, config: WebdatasetConfig, split: str
) -> Iterator[Document | Skipped]:
    def key(member: tarfile.TarInfo) -> str:
        folder, _, file = member.name.rpartition("/")
        return f"{path.stem}/{folder}{'/' if folder else ''}{file.split('.')[0]}"

    with tarfile.open(path) as tar:
        # All headers first: a tar may hold all of its pictures before any caption.
        groups: dict[str, list[tarfile.TarInfo]] = {}
        damage = None
        try:
            for member in tar:
                if member.isfile() and split_of(key(member), config) == split:
                    groups.setdefault(key(member), []).append(member)
        except (tarfile.TarError, OSError, EOFError) as error:
            damage = error
        for name, members in groups.items():
            parts = [
                (
                    f".{member.name.rpartition('/')[2].partition('.')[2].lower()}",
                    lambda member=member: _member_bytes(tar, member),
                )
                for member in members
            ]
            yield _pair(name, parts, config.image_size)
        if damage:
            raise damage


def _member_bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    try:
        file = tar.extractfile(member)
        return file.read() if file else b""
    except (tarfile.TarError, EOFError) as error:
        raise OSError(f"{member.name} is damaged: {error}") from error


def _pair(
    name: str, parts: Iterable[tuple[str, Callable[[], bytes]]], size: int
) -> Document | Skipped:
    """One document out of (suffix, read) of the files that share a name."""
    pictures = [read for suffix, read in parts if suffix in _PICTURES]
    captions = [read for suffix, read in parts if suffix == ".txt"]
    for what, found in (("picture", pictures), ("caption", captions)):
        if len(found) != 1:
            return Skipped(name, f"{len(found) or 'no'} {what} files of this name")
    try:
        caption = read_caption(captions[0]())
        picture = read_picture(pictures[0](), size)
    except (ValueError, OSError) as error:
        return Skipped(name, str(error))
    return Document((Text(caption), Image(picture)), id=name)


SOURCES: dict[str, tuple[type, Callable[..., Iterator[Document | Skipped]]]] = {
    "shapes": (shapes.ShapesConfig, shapes.documents),
    "entities": (entities.EntitiesConfig, entities.documents),
    "icons": (icons.IconsConfig, icons.documents),
    "folder": (FolderConfig, folder_documents),
    "webdataset": (WebdatasetConfig, webdataset_documents),
}


def prepare(
    source_config: Any,
    documents_fn: Callable[..., Iterable[Document | Skipped]],
    directory: str | Path,
    splits: Mapping[str, int | None],
) -> dict[str, Any]:
    """Write `{split}-00000-of-00004.array_record` … for every split, and its faults.

    `splits` gives the greatest number of documents per split (None: all). Splits that
    an earlier run finished with the same settings are kept. Skipped records are named
    in `skipped.jsonl`. Returns {split: {"documents", "skipped", "seconds"}}. Raises
    OSError on a full disk, ValueError if the folder holds another source's documents
    or a split comes out empty (unless its limit is 0).
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    summary = {}
    for split, limit in splits.items():
        if split not in (*SPLITS, ADDED):
            known = ", ".join((*SPLITS, ADDED))
            raise ValueError(f"unknown split {split!r}: choose among {known}")
        made_from = json.loads(
            json.dumps([dataclasses.asdict(source_config), limit], default=str)
        )
        done = directory / f"{split}.json"
        if done.is_file():
            counts = json.loads(done.read_text())
            if counts.pop("made_from") != made_from:
                raise ValueError(
                    f"{directory} holds {split!r} documents made with other settings: "
                    "choose another folder or remove it"
                )
        else:
            found = documents_fn(source_config, split)
            counts, skipped = _write_split(found, directory, split, limit)
            _log_skipped(directory / "skipped.jsonl", split, skipped)
            _judge(directory, split, counts["documents"], limit, skipped)
            _write_json(done, counts | {"made_from": made_from})
        summary[split] = counts
    return summary


def _write_split(
    found: Iterable[Document | Skipped], directory: Path, split: str, limit: int | None
) -> tuple[dict[str, Any], list[Skipped]]:
    start = said = time.monotonic()
    count, skipped = 0, []
    with ExitStack() as stack:
        writers = [
            stack.enter_context(ShardWriter(shard_path(directory, split, k, SHARDS)))
            for k in range(SHARDS)
        ]
        for item in found if limit != 0 else ():
            if isinstance(item, Skipped):
                skipped.append(item)
            else:
                writers[count % SHARDS].write(to_bytes(item))
                count += 1
            now = time.monotonic()
            if now - said > _SECONDS_BETWEEN_LINES:
                said = now
                rate = count / (now - start)
                _say(f"{split}: {count:,} documents, {rate:,.0f}/s")
            if count == limit:
                break
    seconds = round(time.monotonic() - start, 1)
    _say(f"{split}: {count:,} documents, {len(skipped):,} skipped, {seconds} s")
    counts = {"documents": count, "skipped": len(skipped), "seconds": seconds}
    return counts, skipped


def _judge(
    directory: Path, split: str, count: int, limit: int | None, skipped: list[Skipped]
) -> None:
    """ValueError for a split without documents; a line where most were skipped for
    one reason, or too few to score with are left."""
    reasons = Counter(re.sub(r"\d+", "N", item.reason) for item in skipped)
    reason, most = reasons.most_common(1)[0] if reasons else ("", 0)
    why = f"; {most:,} of {len(skipped):,} skipped because: {reason}" if most else ""
    log = f" (see {directory / 'skipped.jsonl'})" if skipped else ""
    if split == "train":
        mend = "see that source.path holds pictures with captions"
    else:
        mend = f"raise source.{split}_percent, or bring more documents"
    if count == 0 and limit != 0:
        raise ValueError(f"split {split!r} has no documents{why}{log}: {mend}")
    if 2 * most > count + len(skipped):
        _say(f"{split}: WARNING, more than half left out{why}{log}")
    if split != "train" and count < min(ENOUGH, ENOUGH if limit is None else limit):
        _say(f"{split}: WARNING, {count} documents are too few to score with: {mend}")


def _say(line: str) -> None:
    print(f"prepare {line}", file=sys.stderr, flush=True)


def _log_skipped(path: Path, split: str, skipped: list[Skipped]) -> None:
    """Replace the lines of this split: an interrupted run may have left some."""
    lines = path.read_text().splitlines() if path.is_file() else []
    lines = [line for line in lines if json.loads(line)["split"] != split]
    lines += [json.dumps({"split": split, **vars(item)}) for item in skipped]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(line + "\n" for line in lines))
    partial.replace(path)


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value))
    partial.replace(path)


class StoredDocuments(Sequence[Document]):
    """Random access to the documents of one prepared split, in the source's order."""

    def __init__(self, directory: str | Path, split: str):
        done = Path(directory) / f"{split}.json"
        if not done.is_file():
            raise FileNotFoundError(
                f"{done} does not exist: split {split!r} is not prepared; run the "
                "prepare_data stage"
            )
        count = json.loads(done.read_text())["documents"]
        self._shards = ShardReader(directory, split, count)

    def __len__(self) -> int:
        return len(self._shards)

    @overload
    def __getitem__(self, index: int) -> Document: ...

    @overload
    def __getitem__(self, index: slice) -> list[Document]: ...

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        try:
            return from_bytes(self._shards[index])
        except ValueError as error:
            raise ValueError(f"{self._shards.where(index)}: {error}") from error


def read_texts(directory: str | Path, split: str) -> Iterator[str]:
    """Every text of a prepared split, in the source's order, without decoding any
    picture: what a text tokenizer learns from."""
    shards = StoredDocuments(directory, split)._shards
    for start in range(0, len(shards), _TEXTS_AT_ONCE):
        numbers = range(start, min(start + _TEXTS_AT_ONCE, len(shards)))
        for number, data in zip(numbers, shards.read(numbers), strict=True):
            try:
                yield from texts_from_bytes(data)
            except ValueError as error:
                raise ValueError(f"{shards.where(number)}: {error}") from error


def read_documents(directory: str | Path, split: str) -> StoredDocuments:
    """The documents that `prepare` wrote for a split; FileNotFoundError if it has not.

    A record of another schema raises ValueError naming its file and number on access.
    """
    return StoredDocuments(directory, split)
