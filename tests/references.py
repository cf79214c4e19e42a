"""Reference implementations in PyTorch, for the tests of the extra `parity`."""

import importlib
import importlib.util
import warnings
from types import ModuleType

import pytest

WHY = "the extra `parity` is not installed"
# Operators that torchvision says something of on import, whether it has them or not.
_DECLARED = ("nms", "qnms")


def module(name: str) -> ModuleType:
    """A module of a package that imports torchvision; skips where it is not there.

    Torchvision's binaries may be of another build than PyTorch's (for CUDA beside one
    for the CPU), and its import then fails on operators that nobody uses here: a
    declaration without code will do.
    """
    for package in ("torch", "torchvision", name.partition(".")[0]):
        if importlib.util.find_spec(package) is None:
            pytest.skip(WHY)
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module("torchvision")
        except RuntimeError:
            for operator in _DECLARED:
                signature = "(Tensor boxes, Tensor scores, float overlap) -> Tensor"
                torch.library.define(f"torchvision::{operator}", signature)
        return importlib.import_module(name)
