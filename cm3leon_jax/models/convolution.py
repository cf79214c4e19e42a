"""The parts of the image tokenizer: convolutions, norms, residual and attention blocks.

Pictures and feature maps are [B, Y, X, C], kernels [Y, X, in, out]. A kernel is sharded
along one of its axes only, the logical "embed": with both channel axes on a mesh of
2x2x2 devices XLA (jaxlib 0.10.2, CPU) gave wrong gradients of a convolution's input.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from cm3leon_jax.models.layers import constant, layer_norm

NormKind = Literal["group", "layer"]
NORM_EPS = 1e-6
MAX_GROUPS = 32  # paper section 2.5


class Conv(nnx.Module):
    """A convolution with bias, zero-padded to keep the size (divided by `stride`).

    `axes` names the kernel's channel axes (in, out): None where a side is too small to
    shard, as the three colours are. `gain` scales the initial weights.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        rngs: nnx.Rngs,
        *,
        stride: int = 1,
        gain: float = 1.0,
        axes: tuple[str | None, str | None] = ("embed", None),
    ):
        shape = (kernel, kernel, inputs, outputs)
        std = gain / math.sqrt(kernel * kernel * inputs)
        w = std * jax.random.truncated_normal(rngs.params(), -3.0, 3.0, shape)
        self.kernel = nnx.Param(w, out_sharding=(None, None, *axes))
        self.bias = constant(0.0, (outputs,), (None,))
        self.stride = stride

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(x_BYXC.dtype)
        side = kernel.shape[0]
        if side == self.stride == 1:
            y_BYXC = x_BYXC @ kernel[0, 0]
        else:
            # An even kernel or stride pads on the far side, as the published models do.
            total = side - self.stride
            y_BYXC = jax.lax.conv_general_dilated(
                x_BYXC,
                kernel,
                (self.stride, self.stride),
                [(total // 2, total - total // 2)] * 2,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        return y_BYXC + self.bias[...].astype(x_BYXC.dtype)


class Norm(nnx.Module):
    """GroupNorm over positions and channel groups, or LayerNorm over channels.

    Only the latter keeps positions apart. Statistics in float32.
    """

    def __init__(self, width: int, kind: NormKind):
        self.scale = constant(1.0, (width,), (None,))
        self.bias = constant(0.0, (width,), (None,))
        self.kind = kind

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        scale, bias = self.scale[...], self.bias[...]
        if self.kind == "layer":
            return layer_norm(x_BYXC, NORM_EPS, scale, bias)
        B, Y, X, C = x_BYXC.shape
        groups = math.gcd(C, MAX_GROUPS)
        x = x_BYXC.astype(jnp.float32).reshape(B, Y, X, groups, C // groups)
        x = x - x.mean((1, 2, 4), keepdims=True)
        variance = jnp.square(x).mean((1, 2, 4), keepdims=True)
        x = (x * jax.lax.rsqrt(variance + NORM_EPS)).reshape(x_BYXC.shape)
        return (x * scale + bias).astype(x_BYXC.dtype)


class ResBlock(nnx.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), projected where widths differ.

    The branch starts small, so that a new block is nearly the identity.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, norm: NormKind, rngs: nnx.Rngs
    ):
        self.norm1 = Norm(inputs, norm)
        self.conv1 = Conv(inputs, outputs, kernel, rngs, gain=math.sqrt(2))
        self.norm2 = Norm(outputs, norm)
        self.conv2 = Conv(outputs, outputs, kernel, rngs, gain=0.3)
        self.shortcut = Conv(inputs, outputs, 1, rngs) if inputs != outputs else None

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        y_BYXC = self.conv1(jax.nn.silu(self.norm1(x_BYXC)))
        y_BYXC = self.conv2(jax.nn.silu(self.norm2(y_BYXC)))
        skip = x_BYXC if self.shortcut is None else self.shortcut(x_BYXC)
        return skip + y_BYXC


class Attention(nnx.Module):
    """Self-attention of all positions with one head (paper section 2.5)."""

    def __init__(self, width: int, norm: NormKind, rngs: nnx.Rngs):
        self.norm = Norm(width, norm)
        self.query = Conv(width, width, 1, rngs)
        self.key = Conv(width, width, 1, rngs)
        self.value = Conv(width, width, 1, rngs)
        self.out = Conv(width, width, 1, rngs, gain=0.3)

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        B, Y, X, C = x_BYXC.shape
        h_BYXC = self.norm(x_BYXC)
        q, k, v = (
            part(h_BYXC).reshape(B, Y * X, 1, C)
            for part in (self.query, self.key, self.value)
        )
        y_BYXC = jax.nn.dot_product_attention(q, k, v).reshape(x_BYXC.shape)
        return x_BYXC + self.out(y_BYXC)


def space_to_depth(x_BYXC: jax.Array, patch: int) -> jax.Array:
    """[B, Y, X, C] -> [B, Y/patch, X/patch, patch²·C]; the inverse of the next."""
    B, Y, X, C = x_BYXC.shape
    x = x_BYXC.reshape(B, Y // patch, patch, X // patch, patch, C)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, Y // patch, X // patch, -1)


def depth_to_space(x_BYXC: jax.Array, patch: int) -> jax.Array:
    """[B, Y, X, patch²·C] -> [B, Y·patch, X·patch, C]."""
    B, Y, X, _ = x_BYXC.shape
    x = x_BYXC.reshape(B, Y, X, patch, patch, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, Y * patch, X * patch, -1)


def upsample(x_BYXC: jax.Array) -> jax.Array:
    """Nearest neighbour, twice the side."""
    return x_BYXC.repeat(2, axis=1).repeat(2, axis=2)
