"""Keys and values of what was already read: prefill once, then one token a step.

Rows of a batch have prompts of different lengths, padded on the right. Generated tokens
of all rows share the next free slot, so that a step writes one slice in place instead
of scattering; the gap after a short prompt is never visible, and each row counts its
own positions:

    slots     0 1 2 3 | 4 5 6      prompt bucket of 4, third token being read
    row 0     a b c d | x y z      visible 1 1 1 1 1 1 1    position of z: 6
    row 1     a b . . | x y z      visible 1 1 0 0 1 1 1    position of z: 4

Each layer has its own buffers: a scan over stacked layers would copy the whole cache
every step.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from cm3leon_jax.models.attention import Attention, cached_attention, xla_attention
from cm3leon_jax.models.decoder import Block, Decoder
from cm3leon_jax.models.layers import Shard, cast, identity


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Cache:
    """What `step` needs to know of the tokens before. Immutable; `step` returns a new
    one, in place under jit.

    `k`, `v`: a BHSK array per layer in the compute dtype. `visible_BS` bool: the slots
    that later tokens see. `length_B` int32: tokens read so far, the next position.
    `slot`: int32 scalar, the slot that the next token takes.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    visible_BS: jax.Array
    length_B: jax.Array
    slot: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Unrolled:
    """A decoder laid out for decoding: a list of layers and the head, in the compute
    dtype. Made once before a loop, so that no step slices or casts weights."""

    model: Decoder
    blocks: tuple[Block, ...]
    head_DV: jax.Array


def unroll(model: Decoder) -> Unrolled:
    """The decoder as `prefill` and `step` take it."""
    blocks = cast(model.blocks, model.config.dtype)
    return Unrolled(
        model=model,
        blocks=tuple(
            jax.tree.map(lambda w, i=i: w[i], blocks)
            for i in range(model.config.layers)
        ),
        head_DV=model.head_weight(),
    )


def prefill(
    model: Decoder,
    tokens_BL: jax.Array,
    length_B: jax.Array,
    *,
    size: int,
    shard: Shard = identity,
    attention: Attention = xla_attention,
) -> tuple[jax.Array, Cache]:
    """Reads prompts: logits_BV float32 after each row's last token, and the cache.

    `tokens_BL` is padded on the right, `length_B` in [1, L] counts the real tokens.
    `size` is the number of slots: L plus the steps that follow.
    """
    batch, length = tokens_BL.shape
    if size < length:
        raise ValueError(f"a cache of size={size} cannot hold {length} prompt tokens")

    def attend(q_BLHK, k_BLHK, v_BLHK):
        # Causal masking is enough: padding comes after every real token.
        out_BLHK = attention(q_BLHK, k_BLHK, v_BLHK, None)
        return out_BLHK, (_slots(k_BLHK, size), _slots(v_BLHK, size))

    x_BLD, (k_NBHSK, v_NBHSK) = model.run(tokens_BL, None, attend, shard)
    last_B1D = jnp.take_along_axis(x_BLD, (length_B - 1)[:, None, None], axis=1)
    cache = Cache(
        k=tuple(k_NBHSK[i] for i in range(model.config.layers)),
        v=tuple(v_NBHSK[i] for i in range(model.config.layers)),
        visible_BS=jnp.arange(size) < length_B[:, None],
        length_B=length_B.astype(jnp.int32),
        slot=jnp.asarray(length, jnp.int32),
    )
    return model.head(last_B1D, shard=shard)[:, 0], cache


def step(
    decoder: Unrolled,
    token_B: jax.Array,
    cache: Cache,
    *,
    read_B: jax.Array | None = None,
    shard: Shard = identity,
) -> tuple[jax.Array, Cache]:
    """Reads one more token a row: logits_BV float32 for the token after it.

    Rows where `read_B` (bool) is False read nothing: their slot stays invisible, their
    position does not advance, and their logits mean nothing. The caller sees to it that
    there is a free slot.
    """
    if read_B is None:
        read_B = jnp.ones(token_B.shape, bool)
    seen_BS = cache.visible_BS | (jnp.arange(cache.visible_BS.shape[1]) == cache.slot)
    # Rows that read nothing may have no position left; NaN in a hidden slot spreads.
    positions_B1 = jnp.where(read_B, cache.length_B, 0)[:, None]
    x_B1D = decoder.model.embeddings(token_B[:, None], positions_B1, shard)
    keys, values = [], []
    for block, k_BHSK, v_BHSK in zip(decoder.blocks, cache.k, cache.v, strict=True):

        def attend(q_B1HK, k_B1HK, v_B1HK, old=(k_BHSK, v_BHSK)):
            k_BHSK = _write(old[0], k_B1HK, cache.slot)
            v_BHSK = _write(old[1], v_B1HK, cache.slot)
            out_BHK = cached_attention(q_B1HK[:, 0], k_BHSK, v_BHSK, seen_BS)
            return out_BHK[:, None], (k_BHSK, v_BHSK)

        x_B1D, (k_BHSK, v_BHSK) = block(x_B1D, positions_B1, attend, shard)
        keys.append(k_BHSK)
        values.append(v_BHSK)
    x_BD = decoder.model.final_norm(x_B1D)[:, 0]
    logits_BV = jnp.einsum(
        "BD,DV->BV", x_BD, decoder.head_DV, preferred_element_type=jnp.float32
    )
    now_BS = jax.lax.dynamic_update_slice(
        cache.visible_BS, read_B[:, None], (0, cache.slot)
    )
    return shard(logits_BV, ("batch", "vocab")), Cache(
        k=tuple(keys),
        v=tuple(values),
        visible_BS=now_BS,
        length_B=cache.length_B + read_B,
        slot=cache.slot + 1,
    )


def _slots(x_BLHK: jax.Array, size: int) -> jax.Array:
    """A prompt's keys or values as the beginning of a cache, x_BHSK."""
    x_BHLK = x_BLHK.swapaxes(1, 2)
    return jnp.pad(x_BHLK, ((0, 0), (0, 0), (0, size - x_BHLK.shape[2]), (0, 0)))


def _write(old_BHSK: jax.Array, new_B1HK: jax.Array, slot: jax.Array) -> jax.Array:
    """The cache with one more slot filled, in place where the old one is not kept."""
    new_BH1K = new_B1HK.swapaxes(1, 2)
    return jax.lax.dynamic_update_slice(old_BHSK, new_BH1K, (0, 0, slot, 0))
