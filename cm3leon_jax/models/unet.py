"""A U-Net (Ronneberger et al. 2015): pictures -> the class of every pixel.

Not a part of the system: the small specialised segmenter that class tokens are compared
with (`tests/benchmarks/segmentation.py`). Residual blocks instead of plain
convolutions, and zero padding, so that the answer has the picture's size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from cm3leon_jax.models.convolution import Conv, Norm, NormKind, ResBlock, upsample
from cm3leon_jax.models.layers import Shard, identity
from cm3leon_jax.models.vqgan import BATCH_YXC


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Level i has `channels * multipliers[i]` channels at 1/2^i of the picture's side.

    `classes` counts the background. `norm` "layer" keeps positions apart; "group" has
    one channel in a group up to 32 channels, and so makes noise of a channel that has
    nothing to say about a picture.
    """

    image_size: int
    classes: int
    channels: int = 16
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    norm: NormKind = "layer"
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.classes < 2 or self.channels < 1:
            raise ValueError(
                f"unet.classes={self.classes} must be at least 2 and unet.channels="
                f"{self.channels} positive"
            )
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(
                f"unet.multipliers={self.multipliers} must be positive, and one or more"
            )
        least = 1 << (len(self.multipliers) - 1)
        if self.image_size < 1 or self.image_size % least:
            raise ValueError(
                f"unet.image_size={self.image_size} is not a multiple of "
                f"2^(multipliers - 1) = {least}"
            )
        for key, choices in (
            ("norm", NormKind),
            ("dtype", Literal["float32", "bfloat16"]),
        ):
            if getattr(self, key) not in get_args(choices):
                raise ValueError(
                    f"unet.{key}={getattr(self, key)!r}: choose from "
                    f"{get_args(choices)}"
                )


class UNet(nnx.Module):
    """Down through the levels, up again, each level joined by what it was on the way
    down. Build under `nnx.use_eager_sharding(False)`.

    The last convolution starts at zero, so the first loss is ln(classes).
    """

    def __init__(self, config: UNetConfig, rngs: nnx.Rngs):
        self.config = config
        widths = [config.channels * m for m in config.multipliers]
        self.stem = Conv(3, widths[0], 3, rngs, axes=(None, "embed"))
        self.levels, self.down = nnx.List([]), nnx.List([])
        self.joined = nnx.List([])
        for i, width in enumerate(widths):
            self.levels.append(ResBlock(width, width, 3, config.norm, rngs))
            if i + 1 < len(widths):
                self.down.append(Conv(width, widths[i + 1], 3, rngs, stride=2))
        for i in reversed(range(len(widths) - 1)):
            both = widths[i + 1] + widths[i]
            self.joined.append(ResBlock(both, widths[i], 3, config.norm, rngs))
        self.norm = Norm(widths[0], config.norm)
        axes = ("embed", None)
        self.out = Conv(widths[0], config.classes, 1, rngs, gain=0.0, axes=axes)

    def __call__(self, images_BYXC: jax.Array, *, shard: Shard = identity) -> jax.Array:
        """Float pictures in [-1, 1] -> logits of the classes, float32 [B, Y, X, C]."""
        x_BYXC = self.stem(images_BYXC.astype(self.config.dtype))
        kept = []
        for i, level in enumerate(self.levels):
            x_BYXC = level(shard(x_BYXC, BATCH_YXC))
            if i < len(self.down):
                kept.append(x_BYXC)
                x_BYXC = self.down[i](x_BYXC)
        for block in self.joined:
            x_BYXC = jnp.concatenate([upsample(x_BYXC), kept.pop()], axis=-1)
            x_BYXC = block(shard(x_BYXC, BATCH_YXC))
        x_BYXC = self.out(jax.nn.silu(self.norm(x_BYXC)))
        return x_BYXC.astype(jnp.float32)


def build(config: UNetConfig, key: jax.Array) -> UNet:
    """A new U-Net with float32 parameters; for `jax.jit` and `jax.eval_shape`."""
    with nnx.use_eager_sharding(False):
        return UNet(config, nnx.Rngs(key))


def parameter_count(config: UNetConfig) -> int:
    made = jax.eval_shape(lambda key: build(config, key), jax.random.key(0))
    return sum(x.size for x in jax.tree.leaves(made))
