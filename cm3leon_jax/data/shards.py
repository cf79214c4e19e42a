"""ArrayRecord shards that appear whole or not at all, read back in written order.

Item i of a split is item i // S of shard i % S, so the order of a split does not
depend on how many shards it was written to.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from array_record.python import (
    array_record_module,  # pyright: ignore[reportAttributeAccessIssue]  (compiled)
)


def shard_path(directory: str | os.PathLike, split: str, shard: int, shards: int):
    """Where shard number `shard` of `shards` of a split lives."""
    name = f"{split}-{shard:05d}-of-{shards:05d}.array_record"
    return Path(directory) / name


class ShardWriter:
    """A context that writes one file under a partial name and renames it at the end.

    An error inside, or a full disk (OSError), removes the partial file and leaves all
    finished shards as they are.
    """

    def __init__(self, path: Path):
        self.path = path
        self.count = 0
        self._partial = path.with_name(path.name + ".partial")
        path.parent.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> ShardWriter:
        self._writer = self._checked(
            lambda: array_record_module.ArrayRecordWriter(
                str(self._partial),
                "group_size:1",  # one record a chunk: random access reads no more
            )
        )
        return self

    def write(self, data: bytes) -> None:
        """Append one record; OSError if it cannot be written."""
        self._checked(lambda: self._writer.write(data))
        if not self._writer.ok():  # a failed write is silent until the file is closed
            self._checked(self._writer.close)
            raise OSError(f"cannot write {self.path}: free space and run again")
        self.count += 1

    def __exit__(self, kind, error, trace) -> None:
        try:
            if self._writer.is_open():
                self._checked(self._writer.close)
            if kind is None:
                self._partial.replace(self.path)
        finally:
            self._partial.unlink(missing_ok=True)

    def _checked(self, call):
        try:
            return call()
        except (RuntimeError, ValueError) as error:
            raise OSError(
                f"cannot write {self.path} ({error}): free space and run again, "
                "finished shards are kept"
            ) from error


class ShardReader(Sequence[bytes]):
    """Random access to the records of one split, in the order of the source.

    `count` is how many there must be: a truncated file looks empty to ArrayRecord.
    Can be pickled: every worker process opens the files for itself.
    """

    def __init__(self, directory: str | os.PathLike, split: str, count: int):
        self.directory, self.split = Path(directory), split
        found = sorted(self.directory.glob(f"{split}-*-of-*.array_record"))
        if not found:
            raise FileNotFoundError(
                f"no {split}-*.array_record in {self.directory}: run the stage that "
                "writes them"
            )
        shards = int(found[0].stem.rsplit("-", 1)[1])
        self.paths = [shard_path(directory, split, k, shards) for k in range(shards)]
        missing = sorted(set(self.paths) ^ set(found))
        if missing:
            raise ValueError(
                f"{self.directory} has {len(found)} files of split {split!r}, but not "
                f"one set of {shards} ({missing[0].name}): remove the folder and write "
                "it again"
            )
        self._count = count
        self._open()

    def _open(self) -> None:
        self._readers = []
        for shard, path in enumerate(self.paths):
            expected = len(range(shard, self._count, len(self.paths)))
            reader = array_record_module.ArrayRecordReader(str(path))
            if reader.num_records() != expected:
                raise ValueError(
                    f"{path} holds {reader.num_records()} records instead of "
                    f"{expected}: it is damaged, remove the folder and write it again"
                )
            self._readers.append(reader)

    def __getstate__(self):
        return {key: value for key, value in vars(self).items() if key != "_readers"}

    def __setstate__(self, state):
        vars(self).update(state)
        self._open()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> bytes:
        return self.read([index])[0]

    def read(self, indices: Iterable[int]) -> list[bytes]:
        """Several records at once, far cheaper than one by one."""
        indices = np.asarray(list(indices), np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < self._count:
            raise IndexError(f"record outside [0, {self._count}) of {self.split!r}")
        found: list[bytes] = [b""] * len(indices)
        for shard, reader in enumerate(self._readers):
            (mine,) = np.nonzero(indices % len(self._readers) == shard)
            if len(mine):
                positions = (indices[mine] // len(self._readers)).tolist()
                data = self._read(reader, shard, positions)
                for slot, record in zip(mine, data, strict=True):
                    found[slot] = record
        return found

    def _read(self, reader, shard: int, positions: list[int]) -> list[bytes]:
        try:
            return reader.read(positions)
        except RuntimeError as error:
            raise ValueError(f"{self.paths[shard]} is damaged: {error}") from error

    def where(self, index: int) -> str:
        """File and position of a record, for messages."""
        shards = len(self.paths)
        return f"{self.paths[index % shards]} record {index // shards}"
