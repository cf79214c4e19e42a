"""BERT (Devlin et al. 2018, arXiv:1810.04805) as an encoder of sentences.

For inference with foreign weights only (`interop/minilm.py`): post-norm blocks, exact
GELU, and the mean over a sentence's tokens as its vector (Reimers and Gurevych 2019,
arXiv:1908.10084).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from cm3leon_jax.models.layers import layer_norm


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Sizes of one BERT; `length` is the most ids of a text."""

    vocab: int
    length: int
    types: int
    layers: int
    width: int
    heads: int
    mlp: int
    norm_eps: float

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"bert.{key}={value} must be positive")
        if self.width % self.heads:
            raise ValueError(
                f"bert.heads={self.heads} does not divide bert.width={self.width}"
            )


class Norm(nnx.Module):
    def __init__(self, *shape: int):
        self.scale, self.bias = _zeros(*shape), _zeros(*shape)

    def __call__(self, x_BLD: jax.Array, eps: float) -> jax.Array:
        return layer_norm(x_BLD, eps, self.scale[...], self.bias[...])


class Blocks(nnx.Module):
    """All layers, stacked on a leading axis; a norm after each residual sum."""

    def __init__(self, config: BertConfig):
        self.config = config
        N, D, H, F = config.layers, config.width, config.heads, config.mlp
        K = D // H
        self.w_q, self.b_q = _zeros(N, D, H, K), _zeros(N, H, K)
        self.w_k, self.b_k = _zeros(N, D, H, K), _zeros(N, H, K)
        self.w_v, self.b_v = _zeros(N, D, H, K), _zeros(N, H, K)
        self.w_out, self.b_out = _zeros(N, H, K, D), _zeros(N, D)
        self.w_up, self.b_up = _zeros(N, D, F), _zeros(N, F)
        self.w_down, self.b_down = _zeros(N, F, D), _zeros(N, D)
        self.norm_1, self.norm_2 = Norm(N, D), Norm(N, D)

    def __call__(self, x_BLD: jax.Array, length_B: jax.Array) -> jax.Array:
        """One layer; `self` holds its weights without the leading axis."""
        eps = self.config.norm_eps
        q_BLHK, k_BLHK, v_BLHK = (
            jnp.einsum("BLD,DHK->BLHK", x_BLD, w[...]) + b[...]
            for w, b in (
                (self.w_q, self.b_q),
                (self.w_k, self.b_k),
                (self.w_v, self.b_v),
            )
        )
        out_BLHK = jax.nn.dot_product_attention(
            q_BLHK,
            k_BLHK,
            v_BLHK,
            key_value_seq_lengths=length_B.astype(jnp.int32),
            implementation="xla",
        )
        y_BLD = jnp.einsum("BLHK,HKD->BLD", out_BLHK, self.w_out[...])
        x_BLD = self.norm_1(x_BLD + y_BLD + self.b_out[...], eps)
        h_BLF = jnp.einsum("BLD,DF->BLF", x_BLD, self.w_up[...]) + self.b_up[...]
        h_BLF = jax.nn.gelu(h_BLF, approximate=False)
        y_BLD = jnp.einsum("BLF,FD->BLD", h_BLF, self.w_down[...]) + self.b_down[...]
        return self.norm_2(x_BLD + y_BLD, eps)


class Bert(nnx.Module):
    """Ids -> vectors. Parameters start at zero: a reader fills them."""

    def __init__(self, config: BertConfig):
        self.config = config
        D = config.width
        self.embed = _zeros(config.vocab, D)
        self.position = _zeros(config.length, D)
        self.types = _zeros(config.types, D)
        self.norm = Norm(D)
        self.blocks = Blocks(config)

    def hidden(self, ids_BL: jax.Array, length_B: jax.Array) -> jax.Array:
        """Ids int32 [B, L], of which the first `length_B` >= 1 count -> [B, L, D]."""
        L = ids_BL.shape[1]
        if L > self.config.length:
            raise ValueError(f"texts of {L} ids, bert.length={self.config.length}")
        x_BLD = jnp.take(self.embed[...], ids_BL, axis=0) + self.position[:L]
        x_BLD = self.norm(x_BLD + self.types[0], self.config.norm_eps)

        def layer(x_BLD, block):
            return block(x_BLD, length_B), None

        return jax.lax.scan(layer, x_BLD, self.blocks)[0]

    def text(self, ids_BL: jax.Array, length_B: jax.Array) -> jax.Array:
        """The mean over the tokens that count, [B, D], not yet of length 1."""
        x_BLD = self.hidden(ids_BL, length_B)
        counts_BL = jnp.arange(ids_BL.shape[1]) < length_B[:, None]
        return jnp.sum(x_BLD * counts_BL[..., None], 1) / length_B[:, None]


def _zeros(*shape: int) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape))


def abstract(config: BertConfig) -> Bert:
    """The network with shapes and dtypes in place of parameters, for a reader."""
    return jax.eval_shape(lambda: Bert(config))
