"""The files of a memory bank's parts: vectors, signatures, ids, added documents."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from cm3leon_jax.config import read_json, write_whole
from cm3leon_jax.data.documents import Document, to_bytes
from cm3leon_jax.data.shards import ShardWriter, shard_path
from cm3leon_jax.retrieval.search import pack

MEND = "delete WORKDIR/bank, then run build_bank again"
_NAMED = 5  # ids that messages name


def is_whole(directory: Path, part: int) -> bool:
    """Whether a part has been written."""
    return (directory / _file("ids", part)).is_file()


def write_part(
    directory: Path,
    part: int,
    ids: list[str],
    vectors_ME: np.ndarray,
    signatures_ME: np.ndarray,
    storage: str,
) -> None:
    """The files of a part; the one with the ids, last, says that it is whole."""
    stored, scale = pack(vectors_ME, storage)
    if storage == "bfloat16":
        stored = stored.view(np.uint16)
    save(directory / _file("vectors", part), stored)
    if storage == "int8":
        save(directory / _file("scales", part), scale)
    save(directory / _file("signatures", part), signatures_ME.astype(np.float16))
    write_whole(directory / _file("ids", part), json.dumps(ids))


def _file(kind: str, part: int) -> str:
    return f"{kind}-{part:05d}.{'json' if kind == 'ids' else 'npy'}"


def save(path: Path, array: np.ndarray) -> None:
    """Writes an array so that its file is never seen in part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            np.save(file, array)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def checked(vectors_ME: np.ndarray, ids: Sequence[str], size: int) -> np.ndarray:
    vectors_ME = np.asarray(vectors_ME, np.float32)
    if vectors_ME.shape != (len(ids), size):
        raise ValueError(
            f"vectors are {list(vectors_ME.shape)}, {len(ids)} documents in a bank of "
            f"{size} numbers need [{len(ids)}, {size}]: another encoder made them"
        )
    bad = np.flatnonzero(~np.isfinite(vectors_ME).all(axis=1)).tolist()
    if len(bad):
        raise ValueError(
            f"the vectors of {len(bad)} documents are not finite numbers: "
            f"{some([ids[i] for i in bad])}"
        )
    return vectors_ME


def some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, names[:_NAMED])) + more


def read_array(
    directory: Path, kind: str, part: int, shape: tuple[int, ...], dtype: str
) -> np.ndarray:
    """Memory-maps an array of a part; ValueError where they are not as expected."""
    path = directory / _file(kind, part)
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged or gone ({error}): {MEND}") from error
    if array.dtype == np.uint16:  # numpy's files know no bfloat16
        array = array.view(jnp.bfloat16)
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(
            f"{path} is {array.dtype} {list(array.shape)}, not {dtype} {list(shape)}: "
            f"{MEND}"
        )
    return array


def finite(stored: np.ndarray) -> bool:
    """Whether vectors as they are stored are all numbers; int8 always are."""
    if stored.dtype == jnp.bfloat16:  # a float32's upper half: quicker than `isfinite`
        exponent = np.uint16(0x7F80)
        return not ((stored.view(np.uint16) & exponent) == exponent).any()
    return stored.dtype == np.int8 or bool(np.isfinite(stored).all())


def read_ids(directory: Path, part: int, count: int) -> list[str]:
    """The ids of a part's documents; ValueError where they are not so many."""
    path = directory / _file("ids", part)
    if not path.is_file():
        raise ValueError(f"{path} is gone: {MEND}")
    ids = read_json(path, MEND)
    if len(ids) != count:
        raise ValueError(f"{path} has {len(ids)} ids, not {count}: {MEND}")
    return ids


def store(documents: Sequence[Document], folder: Path, split: str) -> None:
    """Keeps documents where `data/sources.read_documents` finds them."""
    with ShardWriter(shard_path(folder, split, 0, 1)) as writer:
        for document in documents:
            writer.write(to_bytes(document))
    write_whole(folder / f"{split}.json", json.dumps({"documents": len(documents)}))
