"""Safetensors, read tensor by tensor from memory-mapped files and written in shards.

FOLDER/model.safetensors                 one file, or
FOLDER/model.safetensors.index.json      {"weight_map": {name: file}} and the files

A file is the length of its header (8 bytes), the header (JSON: dtype, shape and place
of every tensor) and the numbers. Nothing of it is run, and of a mapped file only those
pages are read that are looked at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from cm3leon_jax.config import read_json, write_whole
from cm3leon_jax.interop.packages import library

ARRAYS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
_PICKLES = ("pytorch_model*.bin*", "*.pth", "*.pt", "*.ckpt", "*.pkl")
_SHARD_BYTES = 2 << 30


class Place(NamedTuple):
    """Where a tensor lies."""

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]


class Shards:
    """The tensors of a folder by name. FileNotFoundError or ValueError, naming file and
    tensor, for a shard that is missing, cut short, damaged or no safetensors."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.places: dict[str, Place] = {}
        if (self.folder / INDEX).is_file():
            index = read_json(self.folder / INDEX, "download it again")
            files = index["weight_map"] if "weight_map" in index else None
            if not (files and isinstance(files, dict)) or not all(
                isinstance(file, str) for file in files.values()
            ):
                raise ValueError(
                    f'{self.folder / INDEX} has no "weight_map" of names and files: '
                    "download it again"
                )
            for name, file in files.items():
                path = self.folder / file
                if not path.is_file():
                    raise FileNotFoundError(
                        f"{path} does not exist, which holds {name} according to "
                        f"{INDEX}: download it"
                    )
            for file in sorted(set(files.values())):
                self.places |= _header(self.folder / file)
            for name, file in files.items():
                if name not in self.places:
                    raise ValueError(
                        f"{self.folder / file} has no tensor {name}, which {INDEX} "
                        "says it has: download it again"
                    )
        elif (self.folder / ARRAYS).is_file():
            self.places = _header(self.folder / ARRAYS)
        else:
            pickles = [p for kind in _PICKLES for p in self.folder.glob(kind)]
            if pickles:
                raise ValueError(
                    f"{pickles[0]} is a pickle, which can run anything when it is "
                    "read: only safetensors are, save the model again with "
                    "save_pretrained(..., safe_serialization=True)"
                )
            raise FileNotFoundError(f"{self.folder} has neither {ARRAYS} nor {INDEX}")

    def path(self, name: str) -> Path:
        """The file of a tensor; the folder where it has none of that name."""
        return self.places[name].path if name in self.places else self.folder

    def view(self, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """A tensor, mapped; ValueError where there is none of that name and shape."""
        if name not in self.places:
            raise ValueError(
                f"{self.folder} has no tensor {name}: another architecture"
            )
        place = self.places[name]
        if shape is not None and place.shape != shape:
            raise ValueError(
                f"{place.path}: tensor {name} is {list(place.shape)}, the settings say "
                f"{list(shape)}"
            )
        return np.memmap(
            place.path, place.dtype, "r", place.offset, place.shape or (1,)
        ).reshape(place.shape)


def _header(path: Path) -> dict[str, Place]:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(min(length, size)))
        header.pop("__metadata__", None)
        found, strange = {}, ""
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            if entry["dtype"] not in DTYPES:
                strange = f"{name} is {entry['dtype']}"
                continue
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            if stop - start != dtype.itemsize * math.prod(shape):
                raise ValueError(f"{name} has {stop - start} bytes")
            if 8 + length + stop > size:
                raise ValueError(f"{name} lies behind its end")
            found[name] = Place(path, 8 + length + start, dtype, shape)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged or no safetensors file ({error!r}): download it again"
        ) from error
    if strange:
        raise ValueError(f"{path}: tensor {strange}, only {', '.join(DTYPES)} are read")
    return found


def write(
    folder: Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    limit: int = _SHARD_BYTES,
) -> None:
    """Writes tensors as shards of about `limit` bytes, holding no more than one of
    them. The index comes last, so that what is half written is not seen as whole."""
    save_file = library("safetensors.numpy").save_file
    files, total, weight_map = 0, 0, {}
    for part in _parts(tensors, limit):
        files += 1
        path = folder / f"model-{files:05}.safetensors"
        save_file(part, path, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, path.name)
        total += sum(x.nbytes for x in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_whole(folder / INDEX, json.dumps(index, indent=1))


def _parts(
    tensors: Iterable[tuple[str, np.ndarray]], limit: int
) -> Iterator[dict[str, np.ndarray]]:
    part: dict[str, np.ndarray] = {}
    for name, x in tensors:
        if part and sum(y.nbytes for y in part.values()) + x.nbytes > limit:
            yield part
            part = {}
        part[name] = np.ascontiguousarray(x)
    yield part
