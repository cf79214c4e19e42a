"""Packages of extras, files that they carry (no code is run), and files of PyTorch."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def located(package: str, inside: str) -> Path | None:
    """Where an installed package keeps a file or folder; None without it."""
    try:
        found = importlib.metadata.distribution(package).locate_file(inside)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(found))
    return path if path.exists() else None


def library(name: str, extra: str = "foreign") -> Any:
    """A module of an extra; FileNotFoundError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            f"{name} is not installed: bash launch/setup.sh {extra}, or pip install "
            f"'cm3leon-jax[{extra}]'"
        ) from error


def torch_file(path: str | Path, *keys: str) -> dict[str, Any]:
    """The tensors by name that a PyTorch file holds, or has under the first of `keys`
    that is there; ValueError for a file of more than tensors and plain containers."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    torch = library("torch", "torch")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # among them the unpickler's own
        raise ValueError(
            f"{path} is damaged or holds more than tensors, which could run anything "
            "when it is read: save its state dict alone with torch.save and give that "
            f"file ({str(error).splitlines()[0]})"
        ) from error
    for key in keys:
        if isinstance(found, Mapping) and key in found:
            found = found[key]
            break
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} holds a {type(found).__name__}, no tensors by name")
    return {k: x for k, x in found.items() if isinstance(x, torch.Tensor)}
