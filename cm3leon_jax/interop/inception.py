"""Reader of the Inception weights that the FID is made of -> `models/inception.py`.

`pytorch-fid` distributes them as pt_inception-2015-12-05-6726825d.pth, and
`torch-fidelity` as weights-inception-2015-12-05-6726825d.pth: the same bytes, under
torchvision's names. PyTorch reads the file (extra `torch`), restricted to tensors: no
pickle of a stranger runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from cm3leon_jax.interop.packages import torch_file
from cm3leon_jax.models import inception
from cm3leon_jax.models.inception import Conv, Inception

FILE = "pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
BATCH_NORM_EPS = 1e-3
_STEM = ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")


def load(path: str | Path) -> tuple[Inception, bool]:
    """The network of a file, and whether it is *the* published one, by its SHA-256.

    FileNotFoundError where there is no file or no PyTorch; ValueError for another's.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: put there {FILE}, which is published with the release "
            "`fid_weights` of pytorch-fid; no package registry has it"
        )
    model = from_arrays(read(path))
    with path.open("rb") as file:
        return model, hashlib.file_digest(file, "sha256").hexdigest() == SHA256


def read(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a PyTorch file of tensors alone."""
    return {name: tensor.numpy() for name, tensor in torch_file(path).items()}


def from_arrays(arrays: Mapping[str, np.ndarray]) -> Inception:
    """The network with the arrays of a state dict; ValueError where they don't fit."""
    model = inception.abstract()
    left = {name for name in arrays if not name.endswith("num_batches_tracked")}

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in arrays or arrays[name].shape != shape:
            found = list(arrays[name].shape) if name in arrays else "missing"
            raise ValueError(
                f"{name} is {found}, not {list(shape)}: these are not the weights of "
                "the Inception of 2015-12-05"
            )
        left.discard(name)
        return np.asarray(arrays[name], np.float64)

    for name, conv in _convolutions(model):
        rows, columns, inputs, outputs = conv.kernel.shape
        kernel_OIYX = take(f"{name}.conv.weight", (outputs, inputs, rows, columns))
        weight, bias, mean, variance = (
            take(f"{name}.bn.{part}", (outputs,))
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale_O = weight / np.sqrt(variance + BATCH_NORM_EPS)
        kernel_YXIO = (kernel_OIYX * scale_O[:, None, None, None]).transpose(2, 3, 1, 0)
        conv.kernel = nnx.Param(jnp.asarray(kernel_YXIO, jnp.float32))
        conv.bias = nnx.Param(jnp.asarray(bias - mean * scale_O, jnp.float32))
    weight = take("fc.weight", (inception.CLASSES, inception.WIDTH))
    model.classify = nnx.Param(jnp.asarray(weight.T, jnp.float32))
    take("fc.bias", (inception.CLASSES,))
    if left:
        raise ValueError(
            f"{sorted(left)[0]} has no place in the Inception of 2015-12-05"
        )
    return model


def _convolutions(model: Inception) -> Iterator[tuple[str, Conv]]:
    """Every convolution with its name in the file: of a chain of several each has its
    number, and of a pair a letter."""
    for name, conv in zip(_STEM, model.stem, strict=True):
        yield f"Conv2d_{name}", conv
    for block, branches in zip(inception.BLOCKS, model.blocks, strict=True):
        for chain, steps in zip(branches.names, branches.chains, strict=True):
            for i, step in enumerate(steps, 1):
                name = f"{block}.{chain}" + (f"_{i}" if len(steps) > 1 else "")
                if isinstance(step, Conv):
                    yield name, step
                else:
                    for letter, conv in zip("ab", step, strict=True):
                        yield name + letter, conv
        if branches.branch_pool is not None:
            yield f"{block}.branch_pool", branches.branch_pool
