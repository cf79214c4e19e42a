"""The patch-wise discriminator of the image tokenizer (paper section 2.5)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from cm3leon_jax.models.convolution import Conv, Norm


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """`layers` convolutions halve the side; widths double from `channels`, at most x8.

    The published models use 64 channels and 3 layers.
    """

    channels: int = 64
    layers: int = 3

    def __post_init__(self) -> None:
        if self.channels < 1 or self.layers < 1:
            raise ValueError(
                f"discriminator.channels={self.channels} and discriminator.layers="
                f"{self.layers} must be positive"
            )


class Discriminator(nnx.Module):
    """Pictures [B, Y, X, 3] in [-1, 1] -> float32 logits [B, Y', X'], one per patch.

    GroupNorm stands where the published one has BatchNorm: it keeps no statistics and
    is the same on every mesh.
    """

    def __init__(self, config: DiscriminatorConfig, rngs: nnx.Rngs):
        widths = [config.channels * min(2**i, 8) for i in range(config.layers + 1)]
        self.stem = Conv(3, widths[0], 4, rngs, stride=2, axes=(None, "embed"))
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        strides = [2] * (len(pairs) - 1) + [1]
        self.convs = nnx.List(
            Conv(a, b, 4, rngs, stride=stride)
            for (a, b), stride in zip(pairs, strides, strict=True)
        )
        self.norms = nnx.List(Norm(b, "group") for _, b in pairs)
        self.out = Conv(widths[-1], 1, 4, rngs, axes=("embed", None))

    def __call__(self, images_BYXC: jax.Array) -> jax.Array:
        x_BYXC = jax.nn.leaky_relu(self.stem(images_BYXC), 0.2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x_BYXC = jax.nn.leaky_relu(norm(conv(x_BYXC)), 0.2)
        return self.out(x_BYXC)[..., 0].astype(jnp.float32)


def hinge(real_BYX: jax.Array, fake_BYX: jax.Array) -> jax.Array:
    """The discriminator's loss: logits of real patches above 1, of made ones below -1.

    1 for a discriminator that always says 0; 0 at best.
    """
    return 0.5 * (jax.nn.relu(1 - real_BYX).mean() + jax.nn.relu(1 + fake_BYX).mean())


def build(config: DiscriminatorConfig, key: jax.Array) -> Discriminator:
    """A new discriminator with float32 parameters."""
    with nnx.use_eager_sharding(False):
        return Discriminator(config, nnx.Rngs(key))
