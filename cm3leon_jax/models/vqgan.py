"""The VQGAN image tokenizer: pictures <-> a grid of codes (paper 1.4, 2.4 to 2.6).

The paper's tokenizer turns 256x256 pixels into 32x32 codes of 8,192 (f = 8). The same
module makes small ones: a patch-wise stem (space to depth) replaces the first levels,
and an encoder of kernel 1 gives *strictly local* codes, where the code of a cell
depends on the cell's own pixels only. Equal patches then have equal codes, and a
picture with a hidden region has the codes of the full picture everywhere else.

Codes are chosen by distance in float32 whatever the compute dtype. Module holds float
parameters only: statistics of the codebook's use live in the training state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from cm3leon_jax.models.convolution import (
    Attention,
    Conv,
    Norm,
    NormKind,
    ResBlock,
    depth_to_space,
    space_to_depth,
    upsample,
)
from cm3leon_jax.models.layers import Shard, identity

Middle = Literal["none", "attention"]
BATCH_YXC = ("batch", None, None, None)


@dataclass(frozen=True, kw_only=True)
class VQGANConfig:
    """Sizes and choices of one tokenizer; the defaults are the paper's shape.

    Level i has `channels * multipliers[i]` channels and `res_blocks` residual blocks
    (the decoder one more); between levels the side halves. `patch` pixels a side go
    into one position before the first level. `attention` lists the sides (in
    positions) of the levels whose blocks are followed by self-attention; `middle`
    "attention" is block, attention, block at the code grid. `kernel` is the encoder's:
    1 makes codes strictly local and rules out all that mixes positions there.
    `latent` is the width around the codes, `code_dim` that of a code;
    `normalize_codes` compares directions only (l2-normalised codes, paper 2.6); else
    latents have unit mean square, unless `free_latents` leaves them as they come (the
    published VQGANs).
    """

    image_size: int = 256
    patch: int = 1
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 4)
    res_blocks: int = 2
    attention: tuple[int, ...] = (32,)
    middle: Middle = "attention"
    kernel: int = 3
    norm: NormKind = "group"
    latent: int = 256
    codebook: int = 8192
    code_dim: int = 256
    normalize_codes: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    free_latents: bool = False

    def __post_init__(self) -> None:
        name = "image_tokenizer"
        if self.normalize_codes and self.free_latents:
            raise ValueError(
                f"{name}.normalize_codes and {name}.free_latents contradict each other"
            )
        for key in ("image_size", "patch", "channels", "latent", "code_dim"):
            if getattr(self, key) < 1:
                raise ValueError(f"{name}.{key}={getattr(self, key)} must be positive")
        if self.codebook < 2:
            raise ValueError(f"{name}.codebook={self.codebook} must be at least 2")
        if not self.multipliers or min(self.multipliers) < 1 or self.res_blocks < 1:
            raise ValueError(
                f"{name}.multipliers={self.multipliers} and {name}.res_blocks="
                f"{self.res_blocks} must be positive, with at least one multiplier"
            )
        if self.image_size % self.factor:
            raise ValueError(
                f"{name}.image_size={self.image_size} is not a multiple of patch x "
                f"2^(multipliers - 1) = {self.factor}"
            )
        if self.kernel not in (1, 3):
            raise ValueError(f"{name}.kernel={self.kernel}: choose 1 or 3")
        for key, choices in (
            ("middle", Middle),
            ("norm", NormKind),
            ("dtype", Literal["float32", "bfloat16"]),
        ):
            if getattr(self, key) not in get_args(choices):
                raise ValueError(
                    f"{name}.{key}={getattr(self, key)!r}: choose from "
                    f"{get_args(choices)}"
                )
        if self.kernel == 1 and (
            self.attention or self.middle != "none" or self.norm != "layer"
        ):
            raise ValueError(
                f"{name}.kernel=1 makes strictly local codes: it needs attention=(), "
                "middle='none' and norm='layer', which do not mix positions"
            )
        sides = {self.image_size // self.patch >> i for i in range(self.levels)}
        if set(self.attention) - sides:
            raise ValueError(
                f"{name}.attention={self.attention}: the levels have sides "
                f"{sorted(sides)}"
            )

    @property
    def essential(self) -> dict[str, Any]:
        """What finished work must agree with, which is older than `free_latents`."""
        return {k: x for k, x in vars(self).items() if k != "free_latents" or x}

    @property
    def levels(self) -> int:
        return len(self.multipliers)

    @property
    def factor(self) -> int:
        """Pixels per code along one side: the paper's f."""
        return self.patch << (self.levels - 1)

    @property
    def grid(self) -> int:
        """Codes along one side of a picture."""
        return self.image_size // self.factor

    def width(self, level: int) -> int:
        return self.channels * self.multipliers[level]

    def side(self, level: int) -> int:
        return self.image_size // self.patch >> level


class Level(nnx.Module):
    """Residual blocks of one resolution, each followed by attention where asked."""

    def __init__(
        self,
        config: VQGANConfig,
        widths: list[int],
        kernel: int,
        attention: bool,
        rngs: nnx.Rngs,
    ):
        self.blocks = nnx.List(
            ResBlock(a, b, kernel, config.norm, rngs)
            for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.attention = nnx.List(
            Attention(b, config.norm, rngs) for b in widths[1:] if attention
        )

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        for i, block in enumerate(self.blocks):
            x_BYXC = block(x_BYXC)
            if len(self.attention):
                x_BYXC = self.attention[i](x_BYXC)
        return x_BYXC


class Bottom(nnx.Module):
    """Block, attention, block at the resolution of the codes."""

    def __init__(self, config: VQGANConfig, rngs: nnx.Rngs):
        width = config.width(config.levels - 1)
        self.first = ResBlock(width, width, 3, config.norm, rngs)
        self.attention = Attention(width, config.norm, rngs)
        self.second = ResBlock(width, width, 3, config.norm, rngs)

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        return self.second(self.attention(self.first(x_BYXC)))


class Encoder(nnx.Module):
    """Pictures [B, Y, X, 3] in [-1, 1] -> latents [B, Yg, Xg, E] before quantisation.

    Latents have unit mean square per position, or unit length with `normalize_codes`:
    without a fixed scale (`free_latents`) the commitment term is cheapest to lower by
    shrinking them.
    """

    def __init__(self, config: VQGANConfig, rngs: nnx.Rngs):
        kernel, widths = config.kernel, [config.width(0)]
        self.config = config
        colours = 3 * config.patch**2
        self.stem = Conv(colours, widths[0], kernel, rngs, axes=(None, "embed"))
        self.levels, self.down = nnx.List([]), nnx.List([])
        for i in range(config.levels):
            widths = [widths[-1]] + [config.width(i)] * config.res_blocks
            attention = config.side(i) in config.attention
            self.levels.append(Level(config, widths, kernel, attention, rngs))
            if i + 1 < config.levels:
                side = 3 if kernel == 3 else 2  # 2: disjoint cells stay disjoint
                down = Conv(widths[-1], widths[-1], side, rngs, stride=2)
                self.down.append(down)
        self.bottom = Bottom(config, rngs) if config.middle == "attention" else None
        self.norm = Norm(widths[-1], config.norm)
        self.out = Conv(widths[-1], config.latent, kernel, rngs)
        axes = ("embed", None)
        self.to_code = Conv(config.latent, config.code_dim, 1, rngs, axes=axes)

    def __call__(self, images_BYXC: jax.Array, shard: Shard) -> jax.Array:
        x_BYXC = images_BYXC.astype(self.config.dtype)
        x_BYXC = self.stem(space_to_depth(x_BYXC, self.config.patch))
        for i, level in enumerate(self.levels):
            x_BYXC = level(shard(x_BYXC, BATCH_YXC))
            if i < len(self.down):
                x_BYXC = self.down[i](x_BYXC)
        if self.bottom is not None:
            x_BYXC = self.bottom(shard(x_BYXC, BATCH_YXC))
        x_BYXC = self.out(jax.nn.silu(self.norm(x_BYXC)))
        z_BYXE = self.to_code(x_BYXC).astype(jnp.float32)
        if self.config.free_latents:
            return z_BYXE
        scale = 1.0 if self.config.normalize_codes else self.config.code_dim**0.5
        return scale * unit(z_BYXE)


class Decoder(nnx.Module):
    """Quantised latents [B, Yg, Xg, E] -> pictures [B, Y, X, 3], about [-1, 1].

    `trunk` is everything but the last convolution `out`, whose gradients weigh the
    adversarial loss (paper section 2.5).
    """

    def __init__(self, config: VQGANConfig, rngs: nnx.Rngs):
        self.config = config
        widths = [config.width(config.levels - 1)]
        axes = (None, "embed")
        self.from_code = Conv(config.code_dim, config.latent, 1, rngs, axes=axes)
        self.stem = Conv(config.latent, widths[0], 3, rngs)
        self.bottom = Bottom(config, rngs) if config.middle == "attention" else None
        self.levels, self.up = nnx.List([]), nnx.List([])
        for i in reversed(range(config.levels)):
            widths = [widths[-1]] + [config.width(i)] * (config.res_blocks + 1)
            attention = config.side(i) in config.attention
            self.levels.append(Level(config, widths, 3, attention, rngs))
            if i:
                self.up.append(Conv(widths[-1], widths[-1], 3, rngs))
        self.norm = Norm(widths[-1], config.norm)
        colours, axes = 3 * config.patch**2, ("embed", None)
        self.out = Conv(widths[-1], colours, 3, rngs, gain=0.3, axes=axes)

    def trunk(self, z_BYXE: jax.Array, shard: Shard) -> jax.Array:
        x_BYXC = self.stem(self.from_code(z_BYXE.astype(self.config.dtype)))
        if self.bottom is not None:
            x_BYXC = self.bottom(shard(x_BYXC, BATCH_YXC))
        for i, level in enumerate(self.levels):
            x_BYXC = level(shard(x_BYXC, BATCH_YXC))
            if i < len(self.up):
                x_BYXC = self.up[i](upsample(x_BYXC))
        return jax.nn.silu(self.norm(x_BYXC))

    def paint(self, x_BYXC: jax.Array, out: Conv | None = None) -> jax.Array:
        """The last convolution, `self.out` unless another takes its place."""
        y_BYXC = (self.out if out is None else out)(x_BYXC)
        return depth_to_space(y_BYXC, self.config.patch).astype(jnp.float32)


class VQGAN(nnx.Module):
    """Encoder, codebook [Z, E], decoder. Build under `nnx.use_eager_sharding(False)`.

    `shard` places activations on a mesh; the identity is right on one device.
    """

    def __init__(self, config: VQGANConfig, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs)
        self.decoder = Decoder(config, rngs)
        shape = (config.codebook, config.code_dim)
        scale = 1 / config.codebook  # paper section 2.5
        codes = jax.random.uniform(rngs.params(), shape, minval=-scale, maxval=scale)
        self.codebook = nnx.Param(codes, out_sharding=("vocab", None))

    def codes_ZE(self) -> jax.Array:
        """The codebook as it is compared and decoded: unit length if normalised."""
        codes_ZE = self.codebook[...]
        return unit(codes_ZE) if self.config.normalize_codes else codes_ZE

    def latents(self, images_BYXC: jax.Array, *, shard: Shard = identity) -> jax.Array:
        """Float pictures in [-1, 1] -> float32 [B, Yg, Xg, E], not yet quantised."""
        return self.encoder(images_BYXC, shard)

    def encode(self, images_BYXC: jax.Array, *, shard: Shard = identity) -> jax.Array:
        """Float pictures in [-1, 1] -> codes, int32 [B, Yg, Xg] in [0, Z)."""
        return nearest(self.latents(images_BYXC, shard=shard), self.codes_ZE())

    def decode(self, codes_BYX: jax.Array, *, shard: Shard = identity) -> jax.Array:
        """Codes, int [B, Yg, Xg] -> float32 pictures [B, Y, X, 3], about [-1, 1]."""
        z_BYXE = self.codes_ZE()[codes_BYX]
        return self.decoder.paint(self.decoder.trunk(z_BYXE, shard))


def unit(x: jax.Array) -> jax.Array:
    """Scaled to length 1 along the last axis, with a finite gradient at zero."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), -1, keepdims=True) + 1e-12)


def distances(z_NE: jax.Array, codes_ZE: jax.Array) -> jax.Array:
    """Squared Euclidean distances [..., Z], up to |z|², which no comparison needs."""
    # Accelerators multiply float32 in fewer bits unless told not to.
    product_NZ = jnp.matmul(z_NE, codes_ZE.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(jnp.square(codes_ZE), -1) - 2 * product_NZ


def nearest(z_NE: jax.Array, codes_ZE: jax.Array) -> jax.Array:
    """Index of the nearest code, int32 [...]; the lowest index among equals."""
    return jnp.argmin(distances(z_NE, codes_ZE), axis=-1).astype(jnp.int32)


def build(config: VQGANConfig, key: jax.Array) -> VQGAN:
    """A new tokenizer with float32 parameters; for `jax.jit` and `jax.eval_shape`."""
    with nnx.use_eager_sharding(False):
        return VQGAN(config, nnx.Rngs(key))


def abstract(config: VQGANConfig) -> VQGAN:
    """The shapes of `build`, without allocating."""
    return jax.eval_shape(lambda key: build(config, key), jax.random.key(0))


def parameter_count(config: VQGANConfig) -> int:
    return sum(x.size for x in jax.tree.leaves(abstract(config)))


def to_float(images_BYXC: jax.Array) -> jax.Array:
    """Uint8 pictures -> float32 in [-1, 1]."""
    return images_BYXC.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(images_BYXC: jax.Array) -> jax.Array:
    """Float pictures, clipped to [-1, 1] -> uint8."""
    return jnp.round(jnp.clip(images_BYXC * 127.5 + 127.5, 0, 255)).astype(jnp.uint8)
