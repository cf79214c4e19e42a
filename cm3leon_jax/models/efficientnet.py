"""EfficientNet-Lite0, whose features compare pictures as an eye would.

Tan and Le 2019 (arXiv:1905.11946), in the variant without squeeze-and-excitation and
with ReLU6. For inference only: batch normalisation, whose statistics are fixed then, is
folded into the convolution before it. `interop/efficientnet.py` reads ImageNet weights.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

# Repeats, kernel, stride of the first, expansion, channels out.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, HEAD = 32, 1280
STRIDES = (2, 4, 8, 16, 32)  # of the feature maps, pixels per position
MIN_SIDE = 32  # the last map then has one position


class Conv(nnx.Module):
    """A convolution and its folded normalisation, padded as TensorFlow's "SAME".

    With stride 2 and an even size that pads the far side only. `depthwise`: each
    channel has a kernel of its own.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        depthwise: bool = False,
    ):
        shape = (kernel, kernel, 1 if depthwise else inputs, outputs)
        self.kernel = nnx.Param(jnp.zeros(shape))
        self.bias = nnx.Param(jnp.zeros(outputs))
        self.stride = stride
        self.groups = inputs if depthwise else 1

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        y_BYXC = jax.lax.conv_general_dilated(
            x_BYXC,
            self.kernel[...],
            (self.stride, self.stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
        )
        return y_BYXC + self.bias[...]


class Block(nnx.Module):
    """Expand, filter each channel, project without activation; plus the input where the
    shapes are the same."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int
    ):
        width = inputs * expansion
        self.expand = Conv(inputs, width, 1) if expansion > 1 else None
        self.filter = Conv(width, width, kernel, stride=stride, depthwise=True)
        self.project = Conv(width, outputs, 1)
        self.residual = stride == 1 and inputs == outputs

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        y_BYXC = x_BYXC
        if self.expand is not None:
            y_BYXC = jax.nn.relu6(self.expand(y_BYXC))
        y_BYXC = self.project(jax.nn.relu6(self.filter(y_BYXC)))
        return x_BYXC + y_BYXC if self.residual else y_BYXC


class EfficientNetLite0(nnx.Module):
    """Pictures float32 [B, Y, X, 3] in [-1, 1], of at least 32x32 -> feature maps.

    The five maps have 16, 24, 40, 112 and 320 channels at `STRIDES` pixels a position
    (sides rounded up): the output of the last block of each resolution. Raises
    ValueError for smaller pictures.
    """

    def __init__(self):
        self.stem = Conv(3, STEM, 3, stride=2)
        self.blocks = nnx.List([])
        width = STEM
        for repeats, kernel, stride, expansion, outputs in STAGES:
            for i in range(repeats):
                now = stride if i == 0 else 1
                block = Block(width, outputs, kernel, now, expansion)
                self.blocks.append(block)
                width = outputs
        self.head = Conv(width, HEAD, 1)

    def __call__(self, images_BYXC: jax.Array) -> list[jax.Array]:
        if images_BYXC.ndim != 4 or images_BYXC.shape[-1] != 3:
            raise ValueError(
                f"EfficientNet-Lite0 takes pictures [B, Y, X, 3], not "
                f"{list(images_BYXC.shape)}"
            )
        if min(images_BYXC.shape[1:3]) < MIN_SIDE:
            raise ValueError(
                f"EfficientNet-Lite0 needs pictures of at least {MIN_SIDE}x{MIN_SIDE} "
                f"pixels, not {images_BYXC.shape[1]}x{images_BYXC.shape[2]}"
            )
        # Its training took (byte - 127) / 128.
        x_BYXC = (127.5 * images_BYXC + 0.5) / 128
        x_BYXC = jax.nn.relu6(self.stem(x_BYXC))
        maps = []
        for block in self.blocks:
            if block.filter.stride == 2:
                maps.append(x_BYXC)
            x_BYXC = block(x_BYXC)
        return [*maps, x_BYXC]

    def pooled(self, images_BYXC: jax.Array) -> jax.Array:
        """Features [B, 1280] of whole pictures: what the classifier would read."""
        last_BYXC = self(images_BYXC)[-1]
        return jax.nn.relu6(self.head(last_BYXC)).mean((1, 2))


def abstract() -> EfficientNetLite0:
    """The network with shapes and dtypes in place of parameters, for a reader."""
    return jax.eval_shape(EfficientNetLite0)
