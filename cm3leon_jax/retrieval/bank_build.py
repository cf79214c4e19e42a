"""Documents -> a memory bank: embedded by all processes of a job, resumable."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cm3leon_jax.config import read_json, write_whole
from cm3leon_jax.data.documents import Document
from cm3leon_jax.parallel.distributed import together
from cm3leon_jax.retrieval.bank import META, Bank, Encoder
from cm3leon_jax.retrieval.bank_files import (
    MEND,
    checked,
    is_whole,
    read_ids,
    some,
    store,
    write_part,
)
from cm3leon_jax.retrieval.search import STORAGES

PLAN = "plan.json"
PART_ROWS = 65_536
_AT_ONCE = 256  # documents embedded together


def build(
    directory: str | Path,
    encoder: Encoder,
    documents: Sequence[Document],
    *,
    storage: str = "float32",
    kept: tuple[str | Path, str] | None = None,
    part_rows: int = PART_ROWS,
) -> Bank:
    """Embeds documents into a bank, row i being document i.

    Every process of a job makes its share of the parts; parts that an earlier run has
    finished are kept. `kept` is (folder, split) where the documents can be read again;
    None keeps a copy in the bank. Raises ValueError for no documents, for vectors that
    are not finite, for two documents of one id, and where the folder was begun with
    another encoder, storage or number of documents.
    """
    directory, count = Path(directory), len(documents)
    if not count:
        raise ValueError(f"{directory}: a bank of no documents, there is nothing in it")
    if storage not in STORAGES:
        raise ValueError(f"retrieval.storage={storage!r}: choose from {STORAGES}")
    plan = {"encoder": encoder.name, "size": encoder.size, "storage": storage}
    plan |= {"documents": count, "part_rows": part_rows}
    first = jax.process_index() == 0
    if first:
        _begin(directory, plan)
    together("bank begins")
    _agree(directory / PLAN, plan)
    starts = range(0, count, part_rows)
    for part in range(jax.process_index(), len(starts), jax.process_count()):
        if not is_whole(directory, part):
            rows = range(starts[part], min(starts[part] + part_rows, count))
            _embed(directory, part, encoder, documents, rows, storage)
    together("bank embedded")
    _check_ids(directory, [min(part_rows, count - start) for start in starts])
    if first:
        if kept is None:
            store(documents, directory / "documents", "built")
            kept = directory / "documents", "built"
        where = os.path.relpath(kept[0], directory)
        parts = [
            {
                "count": min(part_rows, count - start),
                "documents": [where, kept[1], start],
            }
            for start in starts
        ]
        meta = {key: plan[key] for key in ("encoder", "size", "storage")}
        write_whole(
            directory / META, json.dumps(meta | {"parts": parts, "removed": []})
        )
    together("bank built")
    return Bank.load(directory, encoder)


def left(directory: str | Path, count: int, part_rows: int = PART_ROWS) -> int:
    """How many of so many documents are in no finished part of a bank."""
    starts = enumerate(range(0, count, part_rows))
    sizes = {part: min(part_rows, count - start) for part, start in starts}
    return sum(n for part, n in sizes.items() if not is_whole(Path(directory), part))


def _check_ids(directory: Path, counts: Sequence[int]) -> None:
    """ValueError where two documents have one id: neither could be removed alone."""
    seen: set[str] = set()
    twice: list[str] = []
    for part, size in enumerate(counts):
        for name in read_ids(directory, part, size):
            if name in seen:
                twice.append(name)
            seen.add(name)
    if twice:
        raise ValueError(
            f"{len(twice)} documents have the id of another: {some(twice)}; give each "
            f"its own, then {MEND}"
        )


def _begin(directory: Path, plan: Mapping[str, Any]) -> None:
    path = directory / PLAN
    if path.is_file():
        _agree(path, plan)
    else:
        write_whole(path, json.dumps(plan))


def _agree(path: Path, plan: Mapping[str, Any]) -> None:
    found = read_json(path, f"delete {path.parent} and build the bank again")
    other = [key for key in plan if found.get(key) != plan[key]]
    if other:
        changes = "; ".join(f"{k}: {found.get(k)} -> {plan[k]}" for k in other)
        raise ValueError(
            f"{path.parent} was begun with other settings ({changes}): delete it to "
            "build the bank anew"
        )


def _embed(
    directory: Path,
    part: int,
    encoder: Encoder,
    documents: Sequence[Document],
    rows: range,
    storage: str,
) -> None:
    ids: list[str] = []
    vectors, signatures = [], []
    for start in range(rows.start, rows.stop, _AT_ONCE):
        stop = min(start + _AT_ONCE, rows.stop)
        chunk = [documents[i] for i in range(start, stop)]
        names = [document.id for document in chunk]
        made = encoder.documents(chunk)
        for kind, found in zip((vectors, signatures), made, strict=True):
            kind.append(checked(found, names, encoder.size))
        ids += names
    write_part(
        *(directory, part, ids),
        *(np.concatenate(vectors), np.concatenate(signatures), storage),
    )
