"""The dual encoder of the retriever: CLIP's architecture (paper section 1.8).

A vision transformer and a text transformer whose outputs, projected and scaled to
length 1, can be compared: the score of two is their inner product. The tower of
pictures reads a class token and patches; the tower of texts is causal and is read at
the end-of-text token, so what stands behind that token changes nothing. As published
(Radford et al. 2021, arXiv:2103.00020): pre-norm with LayerNorm, biases everywhere but
in the patch embedding and the projections. `interop/clip.py` reads foreign weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from cm3leon_jax.models.layers import (
    Shard,
    cast,
    constant,
    identity,
    layer_norm,
    normal,
)

Activation = Literal["quick_gelu", "gelu"]
Dtype = Literal["float32", "bfloat16"]

NORM_EPS = 1e-5
FIRST_SCALE, MAX_SCALE = 1 / 0.07, 100.0  # of the inner products, as published
POSITION_STD = 0.5  # of patches: a run of minutes must learn where things are
# Of the pictures' channels, in [0, 1]: what CLIP's weights are made for.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class DualEncoderConfig:
    """Sizes of one dual encoder; ValueError for what cannot be built.

    Pictures are `image_size` pixels a side, cut into patches of `patch`. Texts are at
    most `text_length` ids of `text_vocab`, the end-of-text id among both. `embed` is
    the size of the common space. Parameters are float32, `dtype` is that of the
    computation inside the blocks.
    """

    image_size: int
    patch: int
    vision_layers: int
    vision_width: int
    vision_heads: int
    text_vocab: int
    text_length: int
    text_layers: int
    text_width: int
    text_heads: int
    embed: int
    mlp_ratio: int = 4
    activation: Activation = "quick_gelu"
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        name = "dual_encoder"
        for key, value in vars(self).items():
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name}.{key}={value} must be positive")
        for key, choices in (("activation", Activation), ("dtype", Dtype)):
            if getattr(self, key) not in get_args(choices):
                raise ValueError(
                    f"{name}.{key}={getattr(self, key)!r}: choose one of "
                    f"{', '.join(get_args(choices))}"
                )
        for tower in ("vision", "text"):
            width, heads = (getattr(self, f"{tower}_{x}") for x in ("width", "heads"))
            if width % heads:
                raise ValueError(
                    f"{name}.{tower}_heads={heads} does not divide {name}.{tower}_width"
                    f"={width}: choose a divisor of the width"
                )
        if self.image_size % self.patch:
            raise ValueError(
                f"{name}.patch={self.patch} does not divide {name}.image_size="
                f"{self.image_size}"
            )

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch) ** 2


VIT_B_32 = DualEncoderConfig(
    image_size=224,
    patch=32,
    vision_layers=12,
    vision_width=768,
    vision_heads=12,
    text_vocab=49_408,
    text_length=77,
    text_layers=12,
    text_width=512,
    text_heads=8,
    embed=512,
)


class Blocks(nnx.Module):
    """All layers of one tower, stacked on a leading axis; residual, pre-norm."""

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        config: DualEncoderConfig,
        rngs: nnx.Rngs,
    ):
        self.activation = config.activation
        N, D, H, F = layers, width, heads, width * config.mlp_ratio
        K = D // H
        # As published: residual branches start smaller the more there are of them.
        std_in, std_out = D**-0.5, (D * 2 * N) ** -0.5
        project = (N, D, H, K), ("layers", "embed", "heads", "head")
        per_head = (N, H, K), ("layers", "heads", "head")
        per_width = (N, D), ("layers", "embed")
        self.w_q, self.b_q = normal(rngs, *project, std_in), constant(0, *per_head)
        self.w_k, self.b_k = normal(rngs, *project, std_in), constant(0, *per_head)
        self.w_v, self.b_v = normal(rngs, *project, std_in), constant(0, *per_head)
        axes = ("layers", "heads", "head", "embed")
        self.w_out = normal(rngs, (N, H, K, D), axes, std_out)
        self.b_out = constant(0, *per_width)
        std_up = (2 * D) ** -0.5
        self.w_up = normal(rngs, (N, D, F), ("layers", "embed", "mlp"), std_up)
        self.b_up = constant(0, (N, F), ("layers", "mlp"))
        self.w_down = normal(rngs, (N, F, D), ("layers", "mlp", "embed"), std_out)
        self.b_down = constant(0, *per_width)
        self.scale_1, self.bias_1 = constant(1, *per_width), constant(0, *per_width)
        self.scale_2, self.bias_2 = constant(1, *per_width), constant(0, *per_width)

    def __call__(self, x_BLD: jax.Array, *, causal: bool, shard: Shard) -> jax.Array:
        def layer(x_BLD, block):
            return cast(block, x_BLD.dtype)._layer(x_BLD, causal, shard), None

        return jax.lax.scan(layer, x_BLD, self)[0]

    def _layer(self, x_BLD: jax.Array, causal: bool, shard: Shard) -> jax.Array:
        """One layer: `self` holds the weights of one, without the leading axis."""
        names = ("batch", "length", None)
        with jax.named_scope("attention"):
            y_BLD = layer_norm(x_BLD, NORM_EPS, self.scale_1[...], self.bias_1[...])
            q_BLHK, k_BLHK, v_BLHK = (
                jnp.einsum("BLD,DHK->BLHK", y_BLD, w[...]) + b[...]
                for w, b in (
                    (self.w_q, self.b_q),
                    (self.w_k, self.b_k),
                    (self.w_v, self.b_v),
                )
            )
            out_BLHK = jax.nn.dot_product_attention(
                q_BLHK, k_BLHK, v_BLHK, is_causal=causal, implementation="xla"
            )
            y_BLD = jnp.einsum("BLHK,HKD->BLD", out_BLHK, self.w_out[...])
            x_BLD = shard(x_BLD + y_BLD + self.b_out[...], names)
        with jax.named_scope("mlp"):
            y_BLD = layer_norm(x_BLD, NORM_EPS, self.scale_2[...], self.bias_2[...])
            h_BLF = jnp.einsum("BLD,DF->BLF", y_BLD, self.w_up[...]) + self.b_up[...]
            if self.activation == "quick_gelu":
                h_BLF = h_BLF * jax.nn.sigmoid(1.702 * h_BLF)
            else:
                h_BLF = jax.nn.gelu(h_BLF, approximate=False)
            h_BLF = shard(h_BLF, ("batch", "length", "mlp"))
            y_BLD = jnp.einsum("BLF,FD->BLD", h_BLF, self.w_down[...])
            return shard(x_BLD + y_BLD + self.b_down[...], names)


class Vision(nnx.Module):
    """Pictures -> [B, E], not yet of length 1."""

    def __init__(self, config: DualEncoderConfig, rngs: nnx.Rngs):
        self.config = config
        D, E, C = config.vision_width, config.embed, 3 * config.patch**2
        std, width = D**-0.5, ((D,), ("embed",))
        self.w_patch = normal(rngs, (C, D), (None, "embed"), C**-0.5)
        self.class_token = normal(rngs, *width, std)
        shape = (1 + config.patches, D)
        self.position = normal(rngs, shape, (None, "embed"), POSITION_STD)
        self.scale_first, self.bias_first = constant(1, *width), constant(0, *width)
        layers, heads = config.vision_layers, config.vision_heads
        self.blocks = Blocks(layers, D, heads, config, rngs)
        self.scale_last, self.bias_last = constant(1, *width), constant(0, *width)
        self.projection = normal(rngs, (D, E), ("embed", None), std)

    def __call__(self, images_BYXC: jax.Array, shard: Shard) -> jax.Array:
        side = self.config.image_size
        if images_BYXC.shape[1:] != (side, side, 3):
            raise ValueError(
                f"pictures {list(images_BYXC.shape)}: the dual encoder reads [B, "
                f"{side}, {side}, 3]"
            )
        patches_BLC = _patches(images_BYXC, self.config.patch)
        x_BLD = patches_BLC @ self.w_patch[...]
        class_B1D = jnp.broadcast_to(
            self.class_token[...], (len(x_BLD), 1, x_BLD.shape[-1])
        )
        x_BLD = jnp.concatenate([class_B1D, x_BLD], 1) + self.position[...]
        x_BLD = layer_norm(
            x_BLD, NORM_EPS, self.scale_first[...], self.bias_first[...]
        ).astype(self.config.dtype)
        x_BLD = shard(x_BLD, ("batch", "length", None))
        x_BLD = self.blocks(x_BLD, causal=False, shard=shard)
        x_BD = x_BLD[:, 0].astype(jnp.float32)
        x_BD = layer_norm(x_BD, NORM_EPS, self.scale_last[...], self.bias_last[...])
        return x_BD @ self.projection[...]


class Text(nnx.Module):
    """Ids with the end-of-text id at `length - 1` -> [B, E], not yet of length 1."""

    def __init__(self, config: DualEncoderConfig, rngs: nnx.Rngs):
        self.config = config
        D, E, width = config.text_width, config.embed, (config.text_width,)
        vocabulary = (config.text_vocab, D), ("vocab", "embed")
        self.embed = normal(rngs, *vocabulary, 0.02)
        self.position = normal(rngs, (config.text_length, D), (None, "embed"), 0.01)
        layers, heads = config.text_layers, config.text_heads
        self.blocks = Blocks(layers, D, heads, config, rngs)
        self.scale_last = constant(1, width, ("embed",))
        self.bias_last = constant(0, width, ("embed",))
        self.projection = normal(rngs, (D, E), ("embed", None), D**-0.5)

    def __call__(
        self, ids_BL: jax.Array, length_B: jax.Array, shard: Shard
    ) -> jax.Array:
        L = ids_BL.shape[1]
        if L > self.config.text_length:
            raise ValueError(
                f"texts of {L} ids: the dual encoder reads at most "
                f"dual_encoder.text_length={self.config.text_length}"
            )
        x_BLD = jnp.take(self.embed[...], ids_BL, axis=0) + self.position[:L]
        x_BLD = shard(x_BLD.astype(self.config.dtype), ("batch", "length", None))
        x_BLD = self.blocks(x_BLD, causal=True, shard=shard)
        last_B11 = (length_B - 1)[:, None, None]
        x_BD = jnp.take_along_axis(x_BLD, last_B11, axis=1)[:, 0].astype(jnp.float32)
        x_BD = layer_norm(x_BD, NORM_EPS, self.scale_last[...], self.bias_last[...])
        return x_BD @ self.projection[...]


class DualEncoder(nnx.Module):
    """Both towers and the learned scale of their products, at first `first_scale`."""

    def __init__(
        self,
        config: DualEncoderConfig,
        rngs: nnx.Rngs,
        first_scale: float = FIRST_SCALE,
    ):
        self.config = config
        with nnx.use_eager_sharding(False):  # names only; no mesh is needed to build
            self.vision = Vision(config, rngs)
            self.words = Text(config, rngs)
            self.logit_scale = constant(math.log(first_scale), (), ())

    def text(
        self, ids_BL: jax.Array, length_B: jax.Array, *, shard: Shard = identity
    ) -> jax.Array:
        """Ids int32 [B, L], of which the first `length_B` >= 1 count and the last of
        these is end-of-text -> float32 [B, E] of length 1."""
        return unit(self.words(ids_BL, length_B, shard))

    def image(self, images_BYXC: jax.Array, *, shard: Shard = identity) -> jax.Array:
        """What `to_float` made -> float32 [B, E] of length 1."""
        return unit(self.vision(images_BYXC, shard))

    def scale(self) -> jax.Array:
        """By how much inner products are multiplied in the contrastive loss."""
        return jnp.minimum(jnp.exp(self.logit_scale[...]), MAX_SCALE)


def _patches(images_BYXC: jax.Array, side: int) -> jax.Array:
    """[B, Y, X, C] -> [B, patches in reading order, side · side · C]."""
    B, Y, X, C = images_BYXC.shape
    x = images_BYXC.reshape(B, Y // side, side, X // side, side, C)
    return x.swapaxes(2, 3).reshape(B, -1, side * side * C)


def to_float(images_BYXC: jax.Array) -> jax.Array:
    """Uint8 pictures -> float32, each channel centred and scaled as CLIP's are."""
    x_BYXC = images_BYXC.astype(jnp.float32) / 255
    return (x_BYXC - jnp.asarray(PIXEL_MEAN)) / jnp.asarray(PIXEL_STD)


def unit(x_BE: jax.Array) -> jax.Array:
    """Scaled to length 1 along the last axis, with a finite gradient at zero."""
    square = jnp.sum(jnp.square(x_BE), -1, keepdims=True)
    return x_BE * jax.lax.rsqrt(square + 1e-12)


def abstract(config: DualEncoderConfig) -> DualEncoder:
    """The dual encoder with shapes instead of arrays, names of axes beside them."""
    return jax.eval_shape(lambda: DualEncoder(config, nnx.Rngs(0)))


def parameter_count(config: DualEncoderConfig) -> int:
    """Exact number of parameters, without allocating any."""
    return sum(math.prod(w.shape) for w in jax.tree.leaves(abstract(config)))
