"""Tables of pictures and texts: parquet and JSON lines, as Hugging Face keeps them."""

from __future__ import annotations

import base64
import binascii
import glob
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cm3leon_jax.data.documents import Skipped
from cm3leon_jax.data.files import stamp_of
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

_ROWS_AT_ONCE = 64  # with their pictures in memory


@dataclass(frozen=True, kw_only=True)
class TableConfig(FieldsConfig):
    """`path`, and where they are apart `validation` and `test`: a .parquet or .jsonl
    file, a folder of them, or a pattern like "data/train-*.parquet".

    A picture is its file's bytes, {"bytes", "path"}, base64 (as a "data:" address or in
    {"bytes"} of JSON), or a path under `root` (default: the folder of the table).
    """

    root: str | None = None


def parts(config: TableConfig) -> Iterator[Part]:
    """Some rows at a time. ValueError where a table lacks a column that is named."""
    given = ((None, config.path), ("validation", config.validation))
    for split, where in (*given, ("test", config.test)):
        if where is None:
            continue
        base, files = _files(where, split or "path")
        for file in files:
            name = file.relative_to(base).with_suffix("").as_posix()
            name = name if split is None else f"{split}:{name}"
            cut = _parquet_parts if file.suffix == ".parquet" else _lines_parts
            for first, place in cut(file, config):
                place, stamp = (file, *place), stamp_of(file)
                yield Part(f"{name}/{first}", place, split, stamp, file.name)


def read(config: TableConfig, part: Part) -> Iterator[Raw | Skipped]:
    """The records of some rows. A row's name is its `id`, or file and number."""
    name, _, first = part.name.rpartition("/")
    file = part.where[0]
    rows = _parquet_rows if file.suffix == ".parquet" else _lines_rows
    try:
        for number, row in enumerate(rows(config, *part.where), int(first)):
            if row is None:
                continue
            known = row.get(config.id) if config.id and isinstance(row, dict) else None
            if known is not None and str(known).strip():
                yield Raw(str(known), partial(_load, config, file, row))
            elif config.id and isinstance(row, dict):
                yield Skipped(f"{name}/{number}", f"no {config.id!r} to be named by")
            else:
                yield Raw(f"{name}/{number}", partial(_load, config, file, row))
    except (ValueError, OSError) as error:
        yield Skipped(part.name, f"the rest of {file.name} is damaged: {error}")


def _files(where: str, setting: str) -> tuple[Path, list[Path]]:
    path = Path(where)
    if path.is_dir():
        found = sorted(
            file for kind in ("parquet", "jsonl") for file in path.rglob(f"*.{kind}")
        )
        base = path
    else:
        found = sorted(Path(name) for name in glob.glob(where) if Path(name).is_file())
        base = Path(glob.escape(where) if path.is_file() else where).parent
        while glob.has_magic(str(base)):
            base = base.parent
    strange = [file.name for file in found if file.suffix not in (".parquet", ".jsonl")]
    if not found or strange:
        raise FileNotFoundError(
            f"data.settings.{setting}={where}: "
            + (f"{strange[0]} is neither" if strange else "no")
            + " .parquet or .jsonl there"
        )
    return base, found


def _lines_parts(
    file: Path, config: TableConfig
) -> Iterator[tuple[int, tuple[int, int]]]:
    """(first row, (its offset, rows))."""
    with file.open("rb") as lines:
        _check_lines(file, itertools.islice(lines, RECORDS), config)
        lines.seek(0)
        first, offset = 0, 0
        while sizes := [len(line) for line in itertools.islice(lines, RECORDS)]:
            yield first, (offset, len(sizes))
            first, offset = first + len(sizes), offset + sum(sizes)


def _check_lines(file: Path, lines: Iterable[bytes], config: TableConfig) -> None:
    """A column that none of the first rows has is a wrong setting, not a bad row."""
    known: set[str] = set()
    for line in lines:
        try:
            known |= set(json.loads(line))
        except (ValueError, TypeError):
            continue
    if known:
        _check_columns(file, known, config)


def _check_columns(file: Path, known: Iterable[str], config: TableConfig) -> None:
    for column in config.fields:
        if column not in known:
            raise ValueError(
                f"{file} has no column {column!r}, it has {', '.join(sorted(known))}: "
                "name those to use in data.settings (image, captions, id, …)"
            )


def _lines_rows(config: TableConfig, file: Path, offset: int, count: int) -> Iterator:
    with file.open("rb") as lines:
        lines.seek(offset)
        for line in itertools.islice(lines, count):
            if not line.strip():
                yield None
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                row = f"not JSON: {error}"
            yield row


def _parquet_parts(file: Path, config: TableConfig) -> Iterator[tuple[int, tuple]]:
    """(first row, numbers of its row groups); one of damage for a file that cannot be
    read."""
    reader = _reader(file)
    try:
        table = reader(file)
        columns = table.schema_arrow.names
        sizes = [
            table.metadata.row_group(k).num_rows
            for k in range(table.metadata.num_row_groups)
        ]
    except (ValueError, OSError):  # pyarrow's errors are these; `read` tells of it
        yield 0, ()
        return
    _check_columns(file, columns, config)
    first, groups, rows = 0, [], 0
    for number, size in enumerate(sizes):
        groups.append(number)
        rows += size
        if rows >= RECORDS or number == len(sizes) - 1:
            yield first, tuple(groups)
            first, groups, rows = first + rows, [], 0


def _parquet_rows(config: TableConfig, file: Path, *groups: int) -> Iterator:
    batches = _reader(file)(file).iter_batches(
        batch_size=_ROWS_AT_ONCE, row_groups=list(groups), columns=list(config.fields)
    )
    for batch in batches:
        # Row by row: one that is not UTF-8 costs itself alone.
        for number in range(len(batch)):
            try:
                yield batch.slice(number, 1).to_pylist()[0]
            except ValueError as error:
                yield f"unreadable row: {error}"


def _reader(file: Path) -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError(
            f"{file} needs pyarrow: bash launch/setup.sh parquet, or pip install "
            "'cm3leon-jax[parquet]'"
        ) from None
    return parquet.ParquetFile


def _load(config: TableConfig, file: Path, row: Any) -> Found:
    if not isinstance(row, dict):
        raise ValueError(row if isinstance(row, str) else "a row is no object")
    for column in (config.image, *config.captions):
        if column not in row:
            raise ValueError(f"no column {column!r} in this row")
    captions = taken(config, row)
    root = Path(config.root) if config.root else file.parent
    picture = _picture(row[config.image], root)
    chosen = {"licence": config.licence, "source": config.origin}
    named = {key: row.get(column) for key, column in chosen.items() if column}
    return Found(picture, captions, facts(named))


def _picture(value: Any, root: Path) -> bytes:
    if isinstance(value, dict):
        inside = value.get("bytes")
        if isinstance(inside, str):
            return _base64(inside)
        value = value.get("path") if inside is None else inside
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise ValueError("no picture in this row")
    if value.startswith("data:"):
        return _base64(value.partition(",")[2])
    if "://" in value:
        raise ValueError(
            f"the picture is on the web ({value[:80]}): download the set first, for "
            "example with img2dataset"
        )
    path = (root / value).resolve()
    if not path.is_relative_to(root.resolve()):
        raise ValueError(f"{value} is outside of {root}: set data.settings.root")
    if not path.is_file():
        raise ValueError(f"no file {value} in {root}: see data.settings.root")
    return path.read_bytes()


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"the picture is no base64: {error}") from None


TABLE = Kind(TableConfig, parts, read)
