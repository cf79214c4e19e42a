"""The decoder-only transformer over text and image tokens (paper sections 1.1, 1.2).

As published: OPT-like, pre-norm, LayerNorm without parameters, no biases, no dropout,
ReLU, learned absolute positions. "Output layers" start at zero in both senses: the
residual branches' output matrices and an untied head, so the first loss is exactly
ln V at every width. Chameleon's choices (paper section 2.7) are settings of the same
module: RMSNorm, SwiGLU, rotary positions, QK-norm, re-ordered norms, shared keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from cm3leon_jax.models.attention import Attention, xla_attention
from cm3leon_jax.models.layers import (
    POSITION_RATIO,
    WEIGHT_STD,
    Shard,
    cast,
    constant,
    identity,
    layer_norm,
    normal,
    rms_norm,
    rotate,
)
from cm3leon_jax.models.quantized import product

Dtype = Literal["float32", "bfloat16"]
Norm = Literal["layer", "rms"]
Activation = Literal["relu", "swiglu"]
Positions = Literal["learned", "rope", "both"]
Remat = Literal["none", "dots", "full"]


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and choices of one decoder. Raises ValueError for what cannot be built.

    `mlp` is the inner width of the feed-forward, `length` the longest row (and the
    size of the table of learned positions). `dtype` is the compute dtype; parameters
    are always float32. `init_std` is that of every weight that does not start at zero;
    learned positions have 1/30 of it. `positions` "both" adds learned positions and
    turns queries and keys too. `norm="layer"` has no parameters, `"rms"` a
    scale. `post_norm` normalises each branch's output instead of its input. `qk_norm`
    is a LayerNorm with scale and bias per head. `remat` trades memory for recomputation
    in the backward pass: "dots" keeps the weight products, "full" only the blocks'
    inputs. With `kv_heads` so many heads of keys and values are shared by equally many
    heads of queries each; 0 is one for each.
    """

    vocab: int
    layers: int
    width: int
    heads: int
    mlp: int
    length: int
    dtype: Dtype = "float32"
    norm: Norm = "layer"
    norm_eps: float = 1e-5
    init_std: float = WEIGHT_STD
    activation: Activation = "relu"
    positions: Positions = "learned"
    qk_norm: bool = False
    post_norm: bool = False
    tie_embeddings: bool = False
    remat: Remat = "none"
    kv_heads: int = 0

    def __post_init__(self):
        for name in ("vocab", "layers", "width", "heads", "mlp", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"decoder.{name}={getattr(self, name)} must be >= 1")
        for name, choices in (
            ("dtype", Dtype),
            ("norm", Norm),
            ("activation", Activation),
            ("positions", Positions),
            ("remat", Remat),
        ):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"decoder.{name}={getattr(self, name)!r}: choose one of "
                    f"{', '.join(get_args(choices))}"
                )
        if self.width % self.heads:
            raise ValueError(
                f"decoder.heads={self.heads} does not divide decoder.width="
                f"{self.width}: choose a divisor of the width"
            )
        if self.kv_heads < 0 or self.heads % self.key_heads:
            raise ValueError(
                f"decoder.kv_heads={self.kv_heads} does not divide decoder.heads="
                f"{self.heads}: choose a divisor, or 0 for as many"
            )
        if self.positions != "learned" and (self.width // self.heads) % 2:
            raise ValueError(
                f"decoder.positions={self.positions!r} turns pairs of channels, but "
                f"decoder.width/decoder.heads={self.width // self.heads} is odd"
            )
        for name in ("norm_eps", "init_std"):
            if not getattr(self, name) > 0:
                raise ValueError(f"decoder.{name}={getattr(self, name)} must be > 0")

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads


class Block(nnx.Module):
    """All layers' attention and feed-forward weights, stacked on a leading axis.

    `jax.lax.scan` (or indexing with `jax.tree.map`) hands out one layer at a time; the
    call works on such a slice. `lora` is None, or the stacked low-rank changes of
    `training/lora.py`, sliced with the rest.
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        N, D, H, F = config.layers, config.width, config.heads, config.mlp
        K, std, keys = D // H, config.init_std, config.key_heads
        self.lora: Any = nnx.data(None)
        axes = ("layers", "embed", "heads", "head")
        self.w_q = normal(rngs, (N, D, H, K), axes, std)
        self.w_k = normal(rngs, (N, D, keys, K), axes, std)
        self.w_v = normal(rngs, (N, D, keys, K), axes, std)
        self.w_out = constant(0.0, (N, H, K, D), ("layers", "heads", "head", "embed"))
        self.w_up = normal(rngs, (N, D, F), ("layers", "embed", "mlp"), std)
        if config.activation == "swiglu":
            self.w_gate = normal(rngs, (N, D, F), ("layers", "embed", "mlp"), std)
        self.w_down = constant(0.0, (N, F, D), ("layers", "mlp", "embed"))
        if config.norm == "rms":
            self.attention_scale = constant(1.0, (N, D), ("layers", "embed"))
            self.mlp_scale = constant(1.0, (N, D), ("layers", "embed"))
        if config.qk_norm:
            q_of = (N, H, K), ("layers", "heads", "head")
            k_of = (N, keys, K), ("layers", "heads", "head")
            self.q_scale, self.q_bias = constant(1.0, *q_of), constant(0.0, *q_of)
            self.k_scale, self.k_bias = constant(1.0, *k_of), constant(0.0, *k_of)

    def __call__(
        self,
        x_BLD: jax.Array,
        positions_BL: jax.Array,
        attend: Callable[..., tuple[jax.Array, Any]],
        shard: Shard = identity,
    ) -> tuple[jax.Array, Any]:
        """One layer: residual attention, then residual feed-forward.

        `attend(q_BLHK, k_BLHK, v_BLHK) -> (out_BLHK, kept)` decides what a query sees;
        `kept` is handed through (the cache, when there is one).
        """
        with jax.named_scope("attention"):
            y_BLD, kept = self._attention(
                self._before(x_BLD, "attention_scale"), positions_BL, attend, shard
            )
            x_BLD = x_BLD + self._after(y_BLD, "attention_scale")
            x_BLD = shard(x_BLD, ("batch", "sequence", None))
        with jax.named_scope("mlp"):
            y_BLD = self._mlp(self._before(x_BLD, "mlp_scale"), shard)
            x_BLD = x_BLD + self._after(y_BLD, "mlp_scale")
            return shard(x_BLD, ("batch", "sequence", None)), kept

    def _before(self, x_BLD: jax.Array, scale: str) -> jax.Array:
        return x_BLD if self.config.post_norm else self._norm(x_BLD, scale)

    def _after(self, y_BLD: jax.Array, scale: str) -> jax.Array:
        return self._norm(y_BLD, scale) if self.config.post_norm else y_BLD

    def _norm(self, x_BLD: jax.Array, scale: str) -> jax.Array:
        if self.config.norm == "layer":
            return layer_norm(x_BLD, self.config.norm_eps)
        return rms_norm(x_BLD, self.config.norm_eps, getattr(self, scale)[...])

    def _map(self, equation: str, x: jax.Array, name: str) -> jax.Array:
        """x times a weight, and times the factors of its low-rank change."""
        y = product(equation, x, getattr(self, name)[...])
        return y if self.lora is None else y + self.lora(equation, x, name)

    def _attention(self, x_BLD, positions_BL, attend, shard):
        q_BLHK = self._map("BLD,DHK->BLHK", x_BLD, "w_q")
        k_BLHK = self._map("BLD,DHK->BLHK", x_BLD, "w_k")
        v_BLHK = self._map("BLD,DHK->BLHK", x_BLD, "w_v")
        if self.config.qk_norm:
            eps = self.config.norm_eps
            q_BLHK = layer_norm(q_BLHK, eps, self.q_scale[...], self.q_bias[...])
            k_BLHK = layer_norm(k_BLHK, eps, self.k_scale[...], self.k_bias[...])
        if self.config.positions != "learned":
            q_BLHK, k_BLHK = rotate(q_BLHK, positions_BL), rotate(k_BLHK, positions_BL)
        axes = ("batch", "length", "heads", "head")
        q_BLHK, k_BLHK, v_BLHK = (shard(a, axes) for a in (q_BLHK, k_BLHK, v_BLHK))
        out_BLHK, kept = attend(q_BLHK, k_BLHK, v_BLHK)
        return self._map("BLHK,HKD->BLD", out_BLHK, "w_out"), kept

    def _mlp(self, x_BLD, shard):
        hidden_BLF = self._map("BLD,DF->BLF", x_BLD, "w_up")
        if self.config.activation == "swiglu":
            gate_BLF = self._map("BLD,DF->BLF", x_BLD, "w_gate")
            hidden_BLF = hidden_BLF * jax.nn.silu(gate_BLF)
        else:
            hidden_BLF = jax.nn.relu(hidden_BLF)
        hidden_BLF = shard(hidden_BLF, ("batch", "length", "mlp"))
        return self._map("BLF,FD->BLD", hidden_BLF, "w_down")


class Decoder(nnx.Module):
    """Token ids -> logits of the next token (CM3Leon 2.3, paper section 1.2)."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        V, D = config.vocab, config.width
        with nnx.use_eager_sharding(False):  # names only; no mesh is needed to build
            self.embed = normal(rngs, (V, D), ("vocab", "embed"), config.init_std)
            if config.positions != "rope":
                self.position = normal(
                    rngs,
                    (config.length, D),
                    (None, "embed"),
                    config.init_std * POSITION_RATIO,
                )
            self.blocks = Block(config, rngs)
            if config.norm == "rms":
                self.final_scale = constant(1.0, (D,), ("embed",))
            if not config.tie_embeddings:
                self.unembed = constant(0.0, (D, V), ("embed", "vocab"))

    def __call__(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array | None = None,
        segments_BL: jax.Array | None = None,
        *,
        shard: Shard = identity,
        attention: Attention = xla_attention,
    ) -> jax.Array:
        """Ids int32 [B, L] -> logits float32 [B, L, V].

        `positions_BL` (default 0, 1, 2, …) must stay below `config.length`: logits are
        NaN where a learned position or an id does not exist. `segments_BL` separates
        packed documents; None lets every token see all earlier ones.
        """
        x_BLD = self.hidden(
            tokens_BL, positions_BL, segments_BL, shard=shard, attention=attention
        )
        return self.head(x_BLD, shard=shard)

    def hidden(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array | None = None,
        segments_BL: jax.Array | None = None,
        *,
        shard: Shard = identity,
        attention: Attention = xla_attention,
    ) -> jax.Array:
        """The normalised output of the last block, x_BLD in the compute dtype."""

        def attend(q_BLHK, k_BLHK, v_BLHK):
            return attention(q_BLHK, k_BLHK, v_BLHK, segments_BL), None

        return self.run(tokens_BL, positions_BL, attend, shard)[0]

    def run(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array | None,
        attend: Callable[..., tuple[jax.Array, Any]],
        shard: Shard = identity,
    ) -> tuple[jax.Array, Any]:
        """All blocks by `lax.scan`: (x_BLD, what `attend` kept in every layer)."""
        if positions_BL is None:
            positions_BL = jnp.broadcast_to(
                jnp.arange(tokens_BL.shape[1]), tokens_BL.shape
            )

        def layer(x_BLD, block):
            return block(x_BLD, positions_BL, attend, shard)

        x_BLD = self.embeddings(tokens_BL, positions_BL, shard)
        # Cast outside, so that the gradients of all layers are kept in that precision.
        blocks = cast(self.blocks, self.config.dtype)
        x_BLD, kept = jax.lax.scan(
            rematerialised(layer, self.config.remat), x_BLD, blocks
        )
        return self.final_norm(x_BLD), kept

    def embeddings(
        self, tokens_BL: jax.Array, positions_BL: jax.Array, shard: Shard = identity
    ) -> jax.Array:
        """What the first block reads: token plus position, summed in float32."""
        # Every device looks up its columns for the rows of all, then rows change hands:
        # less to send, and to hold, than the tables and their gradients.
        columns = ("replica", None, "table")
        tokens_BL = shard(tokens_BL, columns[:2])
        x_BLD = shard(jnp.take(self.embed[...], tokens_BL, axis=0), columns)
        if self.config.positions != "rope":
            positions_BL = shard(positions_BL, columns[:2])
            place_BLD = jnp.take(self.position[...], positions_BL, axis=0)
            x_BLD = x_BLD + shard(place_BLD, columns)
        x_BLD = shard(x_BLD.astype(self.config.dtype), columns)
        return shard(x_BLD, ("batch", "sequence", None))

    def final_norm(self, x_BLD: jax.Array) -> jax.Array:
        """The norm before the head."""
        if self.config.norm == "layer":
            return layer_norm(x_BLD, self.config.norm_eps)
        return rms_norm(x_BLD, self.config.norm_eps, self.final_scale[...])

    def head_weight(self) -> jax.Array:
        """The output matrix w_DV in the compute dtype."""
        tied = self.config.tie_embeddings
        w_DV = self.embed[...].T if tied else self.unembed[...]
        return w_DV.astype(self.config.dtype)

    def head(self, x_BLD: jax.Array, *, shard: Shard = identity) -> jax.Array:
        """Logits float32 [..., V] of what `hidden` returned."""
        with jax.named_scope("head"):
            logits_BLV = jnp.einsum(
                "BLD,DV->BLV",
                x_BLD,
                self.head_weight(),
                preferred_element_type=jnp.float32,
            )
            return shard(logits_BLV, ("batch", "length", "vocab"))


def rematerialised(layer: Callable, remat: Remat) -> Callable:
    """The layer function under a policy of what its backward pass keeps."""
    if remat == "none":
        return layer
    policy = {
        "full": jax.checkpoint_policies.nothing_saveable,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    }[remat]
    # Inside a scan the compiler cannot merge the recomputation with the first pass.
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)


def abstract(config: DecoderConfig) -> Decoder:
    """The decoder with shapes instead of arrays; names of axes in its metadata."""
    return jax.eval_shape(lambda: Decoder(config, nnx.Rngs(0)))


def parameter_count(config: DecoderConfig, *, embeddings: bool = True) -> int:
    """Exact number of parameters, without allocating any.

    `embeddings=False` leaves out the token, position and output tables: the figure of
    the paper's "non-embedding parameters" (section 1.1).
    """
    model = abstract(config)
    counted = model if embeddings else model.blocks
    return sum(math.prod(w.shape) for w in jax.tree.leaves(counted))
