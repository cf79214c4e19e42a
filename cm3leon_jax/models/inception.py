"""Inception-v3 as it was released on 2015-12-05, whose features the FID is made of.

Szegedy et al. 2015 (arXiv:1512.00567), in the variant that TensorFlow's graph of that
day has, and which differs from later ones: 1,008 classes, average pooling that leaves
the padding out of the mean, and maximum pooling in the last block. For inference only:
batch normalisation is folded into the convolution before it. `interop/inception.py`
reads the weights.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

SIDE = 299  # pixels
WIDTH, CLASSES = 2048, 1008

Size = tuple[int, int]


class Conv(nnx.Module):
    """A convolution with its folded normalisation, then ReLU.

    Kernels of stride 1 keep the picture's size unless they are `valid`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | Size = 1,
        *,
        stride: int = 1,
        valid: bool = False,
    ):
        rows, columns = (kernel, kernel) if isinstance(kernel, int) else kernel
        self.kernel = nnx.Param(jnp.zeros((rows, columns, inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))
        self.stride = stride
        self.padding = "VALID" if valid or stride > 1 else "SAME"

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        y_BYXC = jax.lax.conv_general_dilated(
            x_BYXC,
            self.kernel[...],
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jax.nn.relu(y_BYXC + self.bias[...])


class Branches(nnx.Module):
    """Chains of convolutions side by side, their outputs one after the other.

    In a chain a pair of convolutions reads the same input and gives two outputs. The
    last branch pools first: "average" and "maximum" over 3x3 at stride 1, then one
    convolution; "stride" over 3x3 at stride 2, and no convolution.
    """

    def __init__(self, inputs: int, chains: dict[str, list], pool: str, pooled: int):
        # Lists, since their order is that of the channels.
        self.names, self.chains = tuple(chains), nnx.List([])
        self.outputs = 0
        for steps in chains.values():
            width, made = inputs, nnx.List([])
            for step in steps:
                if isinstance(step, list):
                    made.append(nnx.List([Conv(width, *s[:2]) for s in step]))
                    width = sum(s[0] for s in step)
                else:
                    stride = step[2] if len(step) > 2 else 1
                    made.append(Conv(width, *step[:2], stride=stride))
                    width = step[0]
            self.chains.append(made)
            self.outputs += width
        self.pool = pool
        self.branch_pool = Conv(inputs, pooled) if pooled else None
        self.outputs += pooled or inputs

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        made = []
        for chain in self.chains:
            y_BYXC = x_BYXC
            for step in chain:
                if isinstance(step, Conv):
                    y_BYXC = step(y_BYXC)
                else:
                    y_BYXC = jnp.concatenate([conv(y_BYXC) for conv in step], -1)
            made.append(y_BYXC)
        pooled_BYXC = _POOLS[self.pool](x_BYXC)
        if self.branch_pool is not None:
            pooled_BYXC = self.branch_pool(pooled_BYXC)
        return jnp.concatenate([*made, pooled_BYXC], -1)


class Inception(nnx.Module):
    """Pictures float32 [B, 299, 299, 3] in [-1, 1] -> features [B, 2048].

    They are the means of the last map over its positions, "pool3". Raises ValueError
    for pictures of another size.
    """

    def __init__(self):
        self.stem = nnx.List(
            [
                Conv(3, 32, 3, stride=2),
                Conv(32, 32, 3, valid=True),
                Conv(32, 64, 3),
                Conv(64, 80),
                Conv(80, 192, 3, valid=True),
            ]
        )
        self.blocks = nnx.List([])
        width = 192
        for chains, pool, pooled in BLOCKS.values():
            self.blocks.append(Branches(width, chains, pool, pooled))
            width = self.blocks[-1].outputs
        self.classify = nnx.Param(jnp.zeros((width, CLASSES)))

    def __call__(self, images_BYXC: jax.Array) -> jax.Array:
        if images_BYXC.ndim != 4 or images_BYXC.shape[1:] != (SIDE, SIDE, 3):
            raise ValueError(
                f"Inception takes pictures [B, {SIDE}, {SIDE}, 3], not "
                f"{list(images_BYXC.shape)}"
            )
        x_BYXC = images_BYXC
        for i, conv in enumerate(self.stem):
            x_BYXC = conv(x_BYXC)
            if i in (2, 4):
                x_BYXC = _stride(x_BYXC)
        for block in self.blocks:
            x_BYXC = block(x_BYXC)
        return x_BYXC.mean((1, 2))

    def logits(self, features_BE: jax.Array) -> jax.Array:
        """[B, 1008] without the bias, as the Inception score has always used them."""
        return features_BE @ self.classify[...]


def _reduce(x_BYXC: jax.Array, initial, function, stride: int, padding: str):
    window, strides = (1, 3, 3, 1), (1, stride, stride, 1)
    return jax.lax.reduce_window(x_BYXC, initial, function, window, strides, padding)


def _average(x_BYXC: jax.Array) -> jax.Array:
    ones_1YX1 = jnp.ones((1, *x_BYXC.shape[1:3], 1), x_BYXC.dtype)
    count_1YX1 = _reduce(ones_1YX1, 0.0, jax.lax.add, 1, "SAME")
    return _reduce(x_BYXC, 0.0, jax.lax.add, 1, "SAME") / count_1YX1


def _maximum(x_BYXC: jax.Array) -> jax.Array:
    return _reduce(x_BYXC, -jnp.inf, jax.lax.max, 1, "SAME")


def _stride(x_BYXC: jax.Array) -> jax.Array:
    return _reduce(x_BYXC, -jnp.inf, jax.lax.max, 2, "VALID")


_POOLS = {"average": _average, "maximum": _maximum, "stride": _stride}


def _mixed_35(pooled: int):
    chains = {
        "branch1x1": [(64, 1)],
        "branch5x5": [(48, 1), (64, 5)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
    }
    return chains, "average", pooled


def _mixed_17(width: int):
    row, column = (1, 7), (7, 1)
    chains = {
        "branch1x1": [(192, 1)],
        "branch7x7": [(width, 1), (width, row), (192, column)],
        "branch7x7dbl": [
            *[(width, 1), (width, column), (width, row), (width, column)],
            (192, row),
        ],
    }
    return chains, "average", 192


def _mixed_8(pool: str):
    both = [(384, (1, 3)), (384, (3, 1))]
    chains = {
        "branch1x1": [(320, 1)],
        "branch3x3": [(384, 1), both],
        "branch3x3dbl": [(448, 1), (384, 3), both],
    }
    return chains, pool, 192


# Name in TensorFlow's graph -> chains of (outputs, kernel, stride), pooling, its width.
BLOCKS = {
    "Mixed_5b": _mixed_35(32),
    "Mixed_5c": _mixed_35(64),
    "Mixed_5d": _mixed_35(64),
    "Mixed_6a": (
        {"branch3x3": [(384, 3, 2)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)]},
        "stride",
        0,
    ),
    "Mixed_6b": _mixed_17(128),
    "Mixed_6c": _mixed_17(160),
    "Mixed_6d": _mixed_17(160),
    "Mixed_6e": _mixed_17(192),
    "Mixed_7a": (
        {
            "branch3x3": [(192, 1), (320, 3, 2)],
            "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)],
        },
        "stride",
        0,
    ),
    "Mixed_7b": _mixed_8("average"),
    "Mixed_7c": _mixed_8("maximum"),
}


def abstract() -> Inception:
    """The network with shapes and dtypes in place of parameters, for a reader."""
    return jax.eval_shape(Inception)
