"""A decoder laid out for decoding: a list of layers in the compute dtype.

Made once, so that no step slices, casts or gathers weights. On a mesh the weights lie
as activations are computed (`rules.compute`): split over `tensor`, whole along `fsdp`,
from which training gathers them at every use.

Weights may be int8 (`qwix`, Apache-2.0): one scale for each output channel, products in
the compute dtype. A step reads every weight once, so that halves its time where memory
is the limit, and the memory everywhere. What it costs in quality is in the README.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from cm3leon_jax.models.decoder import Block, Decoder, DecoderConfig, Dtype
from cm3leon_jax.models.layers import Axes, Shard, cast, identity
from cm3leon_jax.models.quantized import product, quantized

Weights = Literal["int8"]
# How many leading axes a product with each weight sums over.
_SUMMED = {
    "w_q": 1,
    "w_k": 1,
    "w_v": 1,
    "w_out": 2,
    "w_up": 1,
    "w_gate": 1,
    "w_down": 1,
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Unrolled:
    """What `prefill` and `step` take in place of a decoder. The blocks' weights and
    `head_DV` are parameters with the names of their axes, or int8 arrays."""

    model: Decoder  # for its embeddings and norms
    blocks: tuple[Block, ...]
    head_DV: Any
    dtype: Dtype = field(metadata={"static": True})

    @property
    def config(self) -> DecoderConfig:
        return self.model.config

    def embeddings(
        self, tokens_BL: jax.Array, positions_BL: jax.Array, shard: Shard = identity
    ) -> jax.Array:
        """What the first block reads, in the compute dtype."""
        return self.model.embeddings(tokens_BL, positions_BL, shard).astype(self.dtype)

    def head(self, x_BLD: jax.Array, shard: Shard = identity) -> jax.Array:
        """Logits float32 of the last block's output, of the ids that `narrow` left."""
        with jax.named_scope("head"):
            logits_BLV = product(
                "BLD,DV->BLV",
                self.model.final_norm(x_BLD),
                self.head_DV[...],
                preferred_element_type=jnp.float32,
            )
            return shard(logits_BLV, ("batch", "length", "vocab"))

    def narrow(self, ids: range) -> Unrolled:
        """The same for a run that can only write ids of one range."""
        head_DV = jax.tree.map(lambda w: w[:, ids.start : ids.stop], self.head_DV)
        return dataclasses.replace(self, head_DV=head_DV)


def unroll(
    model: Decoder,
    *,
    dtype: Dtype | None = None,
    weights: Weights | None = None,
    shard: Shard = identity,
) -> Unrolled:
    """A decoder for decoding; `dtype` None is its own compute dtype.

    `weights` "int8" leaves embeddings and norms as they are. ImportError without qwix.
    """
    return _unroll(model, dtype or model.config.dtype, weights, shard)


@partial(jax.jit, static_argnames=("dtype", "weights", "shard"))
def _unroll(
    model: Decoder, dtype: Dtype, weights: Weights | None, shard: Shard
) -> Unrolled:
    def layer(n: int) -> Block:
        block = cast(jax.tree.map(lambda w: w[n], model.blocks), dtype)
        for name, param in list(vars(block).items()):
            if isinstance(param, nnx.Param):  # that of a layer has one axis fewer
                _, *names = getattr(model.blocks, name).get_metadata("out_sharding")
                made = weight(param[...], _SUMMED.get(name), tuple(names))
                setattr(block, name, made)
        return block

    def weight(w: jax.Array, summed: int | None, names: Axes) -> Any:
        w = shard(w, names)
        if weights and summed is not None:
            return quantized(w, summed)
        with nnx.use_eager_sharding(False):  # the names only
            return nnx.Param(w, out_sharding=names)

    head_DV = model.head_weight().astype(dtype)
    return Unrolled(
        model=model,
        blocks=tuple(layer(n) for n in range(model.config.layers)),
        head_DV=weight(head_DV, 1, ("embed", "vocab")),
        dtype=dtype,
    )
