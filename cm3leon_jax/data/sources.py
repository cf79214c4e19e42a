"""Where documents come from, and `prepare`, which stores them as ArrayRecord.

A source is a function `documents(config, split)` that yields documents in a fixed
order, with `Skipped` in place of each one that it cannot use. The split of a record
depends on its own name alone, so adding files moves no others.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, overload

from cm3leon_jax.config import write_whole
from cm3leon_jax.data import entities, files, icons, parts, shapes, tables, tfds_sets
from cm3leon_jax.data.documents import (
    Document,
    Skipped,
    from_bytes,
    texts_from_bytes,
    to_bytes,
)
from cm3leon_jax.data.shards import ShardReader, ShardWriter, shard_path

SPLITS = ("train", "validation", "test")
ADDED = "new"  # a split of documents that a bank is given after training
SHARDS = 4  # of documents; enough to read in parallel, few enough for small sets
_SECONDS_BETWEEN_LINES = 5.0
_TEXTS_AT_ONCE = 1024  # records
ENOUGH = 10  # documents of a held-out split; fewer score nothing


# What people bring themselves, which `ingest.py` reads in parallel.
OWN: dict[str, parts.Kind] = {
    "folder": files.FOLDER,
    "webdataset": files.WEBDATASET,
    "table": tables.TABLE,
    "tfds": tfds_sets.TFDS,
}

SOURCES: dict[str, tuple[type, Callable[..., Iterator[Document | Skipped]]]] = {
    "shapes": (shapes.ShapesConfig, shapes.documents),
    "entities": (entities.EntitiesConfig, entities.documents),
    "icons": (icons.IconsConfig, icons.documents),
    **{
        name: (kind.config, partial(parts.documents, kind))
        for name, kind in OWN.items()
    },
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
        made_from = made_of(source_config, limit)
        done = directory / f"{split}.json"
        if done.is_file():
            counts = counts_of(done, made_from)
        else:
            found = documents_fn(source_config, split)
            counts, skipped = _write_split(found, directory, split, limit)
            log_skipped(directory / "skipped.jsonl", split, skipped)
            judge(directory, split, counts["documents"], limit, skipped)
            write_whole(done, json.dumps(counts | {"made_from": made_from}))
        summary[split] = counts
    return summary


def made_of(source_config: Any, limit: int | None, *more: Any) -> list:
    """What the documents of a split depend on, as it reads in its .json."""
    settings = [dataclasses.asdict(source_config), limit, *more]
    return json.loads(json.dumps(settings, default=str))


def counts_of(done: Path, made_from: list) -> dict[str, Any]:
    """The counts of a finished split; ValueError where it has other settings."""
    counts = json.loads(done.read_text())
    if counts.pop("made_from") != made_from:
        raise ValueError(
            f"{done.parent} holds {done.stem!r} documents made with other settings: "
            "choose another folder or remove it"
        )
    return counts


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
                say(f"{split}: {count:,} documents, {rate:,.0f}/s")
            if count == limit:
                break
    seconds = round(time.monotonic() - start, 1)
    say(f"{split}: {count:,} documents, {len(skipped):,} skipped, {seconds} s")
    counts = {"documents": count, "skipped": len(skipped), "seconds": seconds}
    return counts, skipped


def judge(
    directory: Path, split: str, count: int, limit: int | None, skipped: list[Skipped]
) -> None:
    """ValueError for a split without documents; a line where most were skipped for
    one reason, or too few to score with are left."""
    reasons = Counter(re.sub(r"\d+", "N", item.reason) for item in skipped)
    reason, most = reasons.most_common(1)[0] if reasons else ("", 0)
    why = f"; {most:,} of {len(skipped):,} skipped because: {reason}" if most else ""
    log = f" (see {directory / 'skipped.jsonl'})" if skipped else ""
    if split == "train":
        mend = "see that data.settings.path holds pictures with captions"
    else:
        mend = f"raise data.settings.{split}_percent, or bring more documents"
    if count == 0 and limit != 0:
        raise ValueError(f"split {split!r} has no documents{why}{log}: {mend}")
    if 2 * most > count + len(skipped):
        say(f"{split}: WARNING, more than half left out{why}{log}")
    if split != "train" and count < min(ENOUGH, ENOUGH if limit is None else limit):
        say(f"{split}: WARNING, {count} documents are too few to score with: {mend}")


def say(line: str) -> None:
    """A line about the progress of `prepare`."""
    print(f"prepare {line}", file=sys.stderr, flush=True)


def log_skipped(path: Path, split: str, skipped: list[Skipped]) -> None:
    """Replace the lines of this split: an interrupted run may have left some."""
    lines = path.read_text().splitlines() if path.is_file() else []
    lines = [line for line in lines if json.loads(line)["split"] != split]
    lines += [json.dumps({"split": split, **vars(item)}) for item in skipped]
    write_whole(path, "".join(line + "\n" for line in lines))


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
