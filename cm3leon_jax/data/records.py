"""The token cache: shards of token records and an index of what packing must know.

The index of a split is memory-mapped, so planning an epoch reads no record.
`meta.json` beside the shards says which vocabulary and image grid they were made with.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cm3leon_jax.config import write_whole
from cm3leon_jax.data.documents import Document
from cm3leon_jax.data.shards import ShardReader, ShardWriter, shard_path
from cm3leon_jax.data.tokenization import (
    SCHEMA,
    Encoders,
    Record,
    from_bytes,
    to_bytes,
    tokenize,
)
from cm3leon_jax.tokenizers import regions
from cm3leon_jax.vocab import TEXT, Layout

_RECORDS_AT_ONCE = 4096  # indexed together
_FEWEST_SHARDS, _SHARD = 4, 65_536  # of a split, and the records of a larger one's


class Job(NamedTuple):
    """Which of the processes this is that share a work, and how they wait until all
    have come to the moment of some name."""

    process: int
    processes: int
    together: Callable[[str], None]


ALONE = Job(0, 1, lambda moment: None)


def shards_of(count: int) -> int:
    """How many shards a split of so many documents has: what a job shares out."""
    return max(_FEWEST_SHARDS, -(-count // _SHARD))


def index_dtype(regions_in_a_record: int, tasks: bool = False) -> np.dtype:
    """One row of the index: what a packing plan must know of a record.

    length: tokens. maskable: tokens that are not `<break>`. segments: how many are not
    empty. runs: spans of each region (0: there is none). text: that region's picture
    has a text before it. Where records are of tasks also task, its number, and answers:
    how many spans the task moves.
    """
    fields = [
        ("length", "<i4"),
        ("maskable", "<i4"),
        ("segments", "<u2"),
        ("runs", "<u2", (regions_in_a_record,)),
        ("text", "?", (regions_in_a_record,)),
    ]
    return np.dtype(fields + ([("task", "<u2"), ("answers", "<u2")] if tasks else []))


def text_before(record: Record, segment: int, layout: Layout) -> np.ndarray | None:
    """(start, stop) of the text just before a segment, None if there is none."""
    if segment == 0:
        return None
    start, stop = record.bounds[segment - 1]
    if start == stop or layout.modality(record.tokens[start : start + 1])[0] != TEXT:
        return None
    return record.bounds[segment - 1]


def index_of(
    records: Sequence[Record], layout: Layout, tasks: bool = False
) -> np.ndarray:
    """The index rows of some records."""
    most = max((len(record.regions) for record in records), default=0)
    index = np.zeros(len(records), index_dtype(most, tasks))
    for row, record in zip(index, records, strict=True):
        row["length"] = len(record.tokens)
        row["maskable"] = len(record.tokens) - (len(record.bounds) - 1)
        row["segments"] = (record.bounds[:, 1] > record.bounds[:, 0]).sum()
        for k, region in enumerate(record.regions):
            row["runs"][k] = len(regions.runs(region.cells))
            row["text"][k] = text_before(record, region.segment, layout) is not None
        if tasks:
            row["task"], row["answers"] = record.task, len(record.answers)
    return index


def write(
    records: Iterable[Record],
    directory: str | Path,
    split: str,
    shard: int,
    shards: int,
    layout: Layout,
    tasks: bool = False,
) -> int:
    """Write one shard of a split and its part of the index; how many records."""
    path = shard_path(directory, split, shard, shards)
    # An empty part knows the dtype too: a shard may have no records.
    parts, rows, stream = [index_of([], layout, tasks)], [slice(0)], iter(records)
    with ShardWriter(path) as writer:
        while chunk := list(itertools.islice(stream, _RECORDS_AT_ONCE)):
            rows.append(slice(writer.count, writer.count + len(chunk)))
            parts.append(index_of(chunk, layout, tasks))
            for record in chunk:
                writer.write(to_bytes(record))
    index = _merge(parts, rows)
    _save(path.with_suffix(".index.npy"), index)
    return len(index)


def build(
    documents: Sequence[Document],
    directory: str | Path,
    split: str,
    shards: int,
    *,
    encoders: Encoders,
    regions_per_image: int,
    seed: int,
    job: Job = ALONE,
) -> dict[str, Any]:
    """Tokenize a split into `directory`, keeping shards that are already there.

    The processes of a job share the shards out, and return together. The records and
    their order do not depend on `shards` or on the job; no process holds more than a
    few hundred documents at a time. Returns {"records", "tokens", "seconds",
    "records_per_second"}, the last of what was not there. Raises OSError on a full
    disk: what is finished stays and is not done again; ValueError where the folder
    holds tokens of another vocabulary or grid.
    """
    directory, start = Path(directory), time.monotonic()
    layout, tasks = encoders.layout, list(encoders.tasks)
    meta = {
        "schema": SCHEMA,
        "layout": layout.plain(),
        "grid": list(encoders.image.grid),
        "regions_per_image": regions_per_image,
        "seed": seed,
        **({"tasks": tasks} if tasks else {}),
    }
    meta_path = directory / "meta.json"
    if job.process == 0:
        directory.mkdir(parents=True, exist_ok=True)
        if meta_path.is_file():
            _check_meta(meta_path, meta)
        else:
            write_whole(meta_path, json.dumps(meta))
    parts = [
        shard_path(directory, split, k, shards).with_suffix(".index.npy")
        for k in range(shards)
    ]
    missing = [k for k in range(shards) if not parts[k].is_file()]  # none writes yet
    job.together(f"tokens of {split} begin")
    mine = range(job.process, shards, job.processes)
    total, done, made = sum(_count(documents, k, shards) for k in mine), 0, 0
    for shard in mine:
        if not parts[shard].is_file():
            chosen = (documents[i] for i in range(shard, len(documents), shards))
            records = tokenize(chosen, encoders, regions_per_image, seed)
            made += write(records, directory, split, shard, shards, layout, bool(tasks))
        done += _count(documents, shard, shards)
        rate = made / max(time.monotonic() - start, 1e-9)
        line = f"{done:,} of {total:,} documents, {rate:,.0f}/s"
        print(f"tokenize {split}: {line}", file=sys.stderr, flush=True)
    job.together(f"tokens of {split} made")
    if job.process == 0:
        _merge_index(directory, split, parts, len(documents))
    job.together(f"tokens of {split} indexed")
    index = np.load(directory / f"{split}-index.npy", mmap_mode="r")
    seconds = max(time.monotonic() - start, 1e-3)
    fresh = sum(_count(documents, k, shards) for k in missing)
    return {
        "records": len(index),
        "tokens": int(index["length"].sum(dtype=np.int64)),
        "seconds": round(seconds, 1),
        "records_per_second": round(fresh / seconds, 1),
    }


def _count(documents: Sequence[Document], shard: int, shards: int) -> int:
    return len(range(shard, len(documents), shards))


def _merge_index(directory: Path, split: str, paths: list[Path], count: int) -> None:
    shards = len(paths)
    parts = [np.load(path, mmap_mode="r") for path in paths]
    for shard, part in enumerate(parts):
        expected = len(range(shard, count, shards))
        if len(part) != expected:
            raise ValueError(
                f"{paths[shard]} is of {len(part)} documents instead of {expected}: "
                "the documents have changed, remove the folder and tokenize again"
            )
    index = _merge(parts, [slice(shard, None, shards) for shard in range(shards)])
    _save(directory / f"{split}-index.npy", index)


class TokenRecords:
    """Random access to the records of one split, and `index` over all of them.

    `layout` and `grid` are those that the records were made with; giving the ones that
    are expected raises ValueError at once if they differ. `tasks` are the names of the
    records' tasks 1, 2, …. Can be pickled.
    """

    def __init__(
        self,
        directory: str | Path,
        split: str,
        *,
        layout: Layout | None = None,
        grid: tuple[int, int] | None = None,
    ):
        self.directory, self.split = Path(directory), split
        meta_path = self.directory / "meta.json"
        self._index_path = self.directory / f"{split}-index.npy"
        for path in (meta_path, self._index_path):
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path} does not exist: split {split!r} is not tokenized; run the "
                    "tokenize_data stage"
                )
        expected: dict[str, Any] = {"schema": SCHEMA}
        if layout is not None:
            expected["layout"] = layout.plain()
        if grid is not None:
            expected["grid"] = list(grid)
        meta = _check_meta(meta_path, expected)
        self.layout = _layout_from_json(meta["layout"])
        self.grid = tuple(meta["grid"])
        self.tasks = tuple(meta["tasks"]) if "tasks" in meta else ()
        self.index = self._load_index()
        self._shards = ShardReader(directory, split, len(self.index))

    def _load_index(self) -> np.ndarray:
        try:
            index = np.load(self._index_path, mmap_mode="r")
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(
                f"{self._index_path} is damaged ({error}): remove the folder and run "
                "the tokenize_data stage again"
            ) from error
        return index

    def __getstate__(self):  # a pickled memory map would be a copy of the whole index
        return {key: value for key, value in vars(self).items() if key != "index"}

    def __setstate__(self, state):
        vars(self).update(state)
        self.index = self._load_index()

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> Record:
        return self.read([index])[0]

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Record]:
        """Several records at once, far cheaper than one by one."""
        found = []
        for index, data in zip(indices, self._shards.read(indices), strict=True):
            try:
                found.append(from_bytes(data))
            except ValueError as error:
                raise ValueError(f"{self._shards.where(index)}: {error}") from error
        return found


def _check_meta(path: Path, expected: dict[str, Any]) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_text())
        for key, value in expected.items():
            if meta[key] != value:
                raise ValueError(
                    f"{path.parent} was tokenized with {key} {meta[key]}, not {value}: "
                    "run the tokenize_data stage again (with --overwrite), or use the "
                    "config and tokenizers that it was made with"
                )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a token cache's ({error!r})") from error
    return meta


def _layout_from_json(fields: dict[str, Any]) -> Layout:
    values: dict[str, Any] = {
        key: range(*value) if isinstance(value, list) else value
        for key, value in fields.items()
    }
    return Layout(**values)


def _merge(parts: Sequence[np.ndarray], rows: Sequence[slice]) -> np.ndarray:
    """One index out of parts that may have room for fewer regions."""
    most = max((part.dtype["runs"].shape[0] for part in parts), default=0)
    ours = any("task" in (part.dtype.names or ()) for part in parts)
    tasks = ["task", "answers"] if ours else []
    index = np.zeros(sum(map(len, parts)), index_dtype(most, bool(tasks)))
    for part, where in zip(parts, rows, strict=True):
        target, own = index[where], part.dtype["runs"].shape[0]
        for name in ("length", "maskable", "segments", *tasks):
            target[name] = part[name]
        target["runs"][:, :own] = part["runs"]
        target["text"][:, :own] = part["text"]
    return index


def _save(path: Path, array: np.ndarray) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.save(file, array)
    partial.replace(path)
