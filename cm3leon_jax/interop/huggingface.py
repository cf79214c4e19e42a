"""Folders as Hugging Face lays them out: arrays, settings and tokenizer, read safely.

FOLDER/config.json          sizes
FOLDER/model.safetensors    arrays by PyTorch's names: numbers only, no pickle
FOLDER/tokenizer.json       text -> ids
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from cm3leon_jax.config import read_json
from cm3leon_jax.interop.packages import library

SETTINGS, ARRAYS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"


def settings(folder: str | Path, file: str = SETTINGS) -> dict[str, Any]:
    """A JSON file of the folder; FileNotFoundError or ValueError where it is none."""
    return read_json(_file(folder, file), "download it again")


def arrays(folder: str | Path) -> dict[str, np.ndarray]:
    """All arrays of the folder by name, as float32 where they are numbers of fewer
    bits. ValueError for a file that is damaged or cut short."""
    path = _file(folder, ARRAYS)
    safetensors = library("safetensors")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): download it again") from error
    return {
        name: x.astype(np.float32) if x.dtype.kind not in "iub" else x
        for name, x in found.items()
    }


def tokenizer(
    folder: str | Path, length: int
) -> Callable[[list[str]], list[list[int]]]:
    """Texts -> ids, the special ones among them, at most `length` of them."""
    path = _file(folder, TOKENIZER)
    try:
        made = library("tokenizers").Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"{path} is no tokenizer: {error}") from error
    made.no_padding()
    made.enable_truncation(length)
    return lambda texts: [encoding.ids for encoding in made.encode_batch(texts)]


class Reader:
    """Takes arrays one by one, so that shapes are checked and none is forgotten."""

    def __init__(self, folder: str | Path, found: Mapping[str, np.ndarray]):
        self.folder, self.found = folder, dict(found)

    def take(self, name: str) -> np.ndarray:
        """An array, float32; ValueError where there is none of that name."""
        if name not in self.found:
            raise ValueError(f"{self.folder} has no array {name}: another architecture")
        return self.found.pop(name).astype(np.float32)

    def stack(self, name: str, count: int, turn: Callable = lambda x: x) -> np.ndarray:
        """The arrays `name` of all layers, "{}" standing for the number."""
        return np.stack([turn(self.take(name.format(i))) for i in range(count)])

    def put(self, module: nnx.Module, name: str, value: np.ndarray) -> None:
        """Makes `value` a parameter, in the shape of the one it replaces."""
        old = getattr(module, name)
        if np.size(value) != old.get_value().size:
            raise ValueError(
                f"{self.folder} has {list(value.shape)} for {name}, its settings say "
                f"{list(old.get_value().shape)}"
            )
        value = value.reshape(old.get_value().shape)
        setattr(module, name, nnx.Param(jnp.asarray(value, jnp.float32)))

    def finish(self, *ignored: str) -> None:
        """ValueError where arrays are left that no ending in `ignored` explains."""
        left = [name for name in self.found if not name.endswith(ignored)]
        if left:
            raise ValueError(
                f"{self.folder} has arrays that this architecture does not: "
                f"{', '.join(sorted(left)[:5])}"
            )


def _file(folder: str | Path, name: str) -> Path:
    path = Path(folder) / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: give a folder with {SETTINGS}, {ARRAYS} and "
            f"{TOKENIZER}"
        )
    return path
