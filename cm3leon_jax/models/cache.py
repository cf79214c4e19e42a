"""Keys and values of what was already read: prefill once, then one token a step.

A row of a batch decodes G streams (a prompt, and the same without its text, …) that
are all given the same sampled tokens. Its past has two parts:

    prefix    the prompt but for its last token, read at once by `prefill`. Rows that
              share it (the candidates of a prompt, or all rows where the stream is the
              same for every prompt) share one copy, which no step writes.
    written   one slot for each step: first the prompt's last token, then what was
              sampled. All rows take the same slot, so that a step writes one slice in
              place instead of scattering.

    row 0   prefix a b c   written d x y      position of y: 5
    row 1   prefix a b c   written d z w      (the next candidate of the same prompt)
    row 2   prefix e . .   written f x x      position of the second x: 3

Padding of a prefix and slots of rows that read nothing are never visible, and each row
counts its own positions. Each layer has its own buffers: a scan over stacked layers
would copy the whole cache every step. So would a product that sees a buffer in another
shape than the one that is written: where nothing splits the axes, B, G and H are one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from cm3leon_jax.models.attention import Attention, xla_attention
from cm3leon_jax.models.layers import Shard, identity
from cm3leon_jax.models.unrolled import Unrolled

# How keys and values are stored; None is the compute dtype.
CacheType = Literal["float32", "bfloat16", "int8"]
_LARGEST = 127.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Stored:
    """Vectors [..., K] as they are kept: `values` of any float dtype and no `scale`, or
    int8 with one scale a vector (its largest entry becomes 127): float32 [...]."""

    values: jax.Array
    scale: jax.Array | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Prefix:
    """What one stream has read before the steps: k, v UHLK per layer, `length_U`.

    Row b of a batch of B belongs to prefix b // (B / U)."""

    k: tuple[Stored, ...]
    v: tuple[Stored, ...]
    length_U: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Cache:
    """What `step` writes. Immutable; `step` returns a new one, in place under jit.

    `k`, `v`: BGHTK per layer, or [B · G · H, T, K] without a mesh. `visible_BGT` bool:
    the slots that later tokens see. `position_BG` int32: the position of the next
    token. `slot`: int32 scalar, the slot that it takes.
    """

    k: tuple[Stored, ...]
    v: tuple[Stored, ...]
    visible_BGT: jax.Array
    position_BG: jax.Array
    slot: jax.Array


def prefill(
    decoder: Unrolled,
    tokens_UL: jax.Array,
    length_U: jax.Array,
    *,
    cache: CacheType | None = None,
    shard: Shard = identity,
    attention: Attention = xla_attention,
) -> Prefix:
    """Reads the beginnings of prompts, padded on the right; `length_U` in [0, L]."""
    positions_UL = jnp.broadcast_to(jnp.arange(tokens_UL.shape[1]), tokens_UL.shape)
    names = ("batch", "heads", None, None)
    keys, values = [], []

    def attend(q_ULHK, k_ULHK, v_ULHK):
        # Causal masking is enough: padding comes after every real token.
        out_ULHK = attention(q_ULHK, k_ULHK, v_ULHK, None)
        return out_ULHK, tuple(
            _store(shard(x_ULHK.swapaxes(1, 2), names), cache)
            for x_ULHK in (k_ULHK, v_ULHK)
        )

    x_ULD = decoder.embeddings(tokens_UL, positions_UL, shard)
    for block in decoder.blocks:
        x_ULD, (k_UHLK, v_UHLK) = block(x_ULD, positions_UL, attend, shard)
        keys.append(k_UHLK)
        values.append(v_UHLK)
    return Prefix(k=tuple(keys), v=tuple(values), length_U=length_U.astype(jnp.int32))


def begin(
    decoder: Unrolled,
    prefixes: Sequence[Prefix],
    rows: int,
    slots: int,
    *,
    cache: CacheType | None = None,
    shard: Shard = identity,
) -> Cache:
    """The cache before the first step: nothing written yet.

    `rows` B must be a multiple of each prefix's U, `slots` T the number of steps.
    """
    config, streams = decoder.config, len(prefixes)
    lengths = [jnp.repeat(p.length_U, rows // len(p.length_U)) for p in prefixes]
    head = config.width // config.heads
    shape = (rows, streams, config.key_heads, slots, head)
    if shard is identity:
        shape = (math.prod(shape[:3]), slots, head)

    def empty() -> Stored:
        if cache == "int8":
            x_BGHTK = Stored(
                values=jnp.zeros(shape, jnp.int8),
                scale=jnp.zeros(shape[:-1], jnp.float32),
            )
        else:
            x_BGHTK = Stored(
                values=jnp.zeros(shape, cache or decoder.dtype), scale=None
            )
        return _place(x_BGHTK, shard)

    return Cache(
        k=tuple(empty() for _ in decoder.blocks),
        v=tuple(empty() for _ in decoder.blocks),
        visible_BGT=jnp.zeros((rows, streams, slots), bool),
        position_BG=jnp.stack(lengths, axis=1),
        slot=jnp.asarray(0, jnp.int32),
    )


def grow(cache: Cache, slots: int) -> Cache:
    """The cache with room for `slots` steps in all."""
    more = slots - cache.visible_BGT.shape[-1]

    def grown(stored: Stored) -> Stored:
        slots = stored.values.ndim - 2  # the axis of them

        def pad(x: jax.Array) -> jax.Array:  # […, T] or […, T, K]
            return jnp.pad(x, [(0, more * (n == slots)) for n in range(x.ndim)])

        return jax.tree.map(pad, stored)

    return Cache(
        k=tuple(map(grown, cache.k)),
        v=tuple(map(grown, cache.v)),
        visible_BGT=jnp.pad(cache.visible_BGT, ((0, 0), (0, 0), (0, more))),
        position_BG=cache.position_BG,
        slot=cache.slot,
    )


def step(
    decoder: Unrolled,
    token_BG: jax.Array,
    prefixes: Sequence[Prefix],
    cache: Cache,
    *,
    read_BG: jax.Array | None = None,
    shard: Shard = identity,
) -> tuple[jax.Array, Cache]:
    """Reads one more token a row and stream: logits_BGV float32 of what comes next.

    Where `read_BG` (bool) is False nothing is read: the slot stays invisible, the
    position does not advance, and the logits mean nothing. The caller sees to it that
    there is a free slot.
    """
    if read_BG is None:
        read_BG = jnp.ones(token_BG.shape, bool)
    at_T = jnp.arange(cache.visible_BGT.shape[-1]) == cache.slot
    # A row that reads nothing sees its own slot all the same: no softmax is empty.
    seen_BGT = cache.visible_BGT | at_T
    # It may have no position left; NaN in a hidden slot would spread.
    positions_BG = jnp.where(read_BG, cache.position_BG, 0)
    x_BGD = decoder.embeddings(token_BG, positions_BG, shard)
    keys, values = [], []
    for n, block in enumerate(decoder.blocks):

        def attend(q_BGHK, k_BGHK, v_BGHK, n=n):
            k_BGHTK = _place(_write(cache.k[n], k_BGHK, cache.slot), shard)
            v_BGHTK = _place(_write(cache.v[n], v_BGHK, cache.slot), shard)
            past = [(p.k[n], p.v[n], p.length_U) for p in prefixes]
            out_BGHK = _attend(q_BGHK, past, k_BGHTK, v_BGHTK, seen_BGT)
            return out_BGHK, (k_BGHTK, v_BGHTK)

        x_BGD, (k_BGHTK, v_BGHTK) = block(x_BGD, positions_BG, attend, shard)
        keys.append(k_BGHTK)
        values.append(v_BGHTK)
    return decoder.head(x_BGD, shard), Cache(
        k=tuple(keys),
        v=tuple(values),
        visible_BGT=jnp.where(at_T, read_BG[..., None], cache.visible_BGT),
        position_BG=cache.position_BG + read_BG,
        slot=cache.slot + 1,
    )


def _attend(
    q_BGHK: jax.Array,
    past: Sequence[tuple[Stored, Stored, jax.Array]],
    k_BGHTK: Stored,
    v_BGHTK: Stored,
    seen_BGT: jax.Array,
) -> jax.Array:
    """One query a row and stream against its prefix (`past`: k, v and length of each
    stream) and what was written since: one softmax over both, in float32."""
    (B, G, H, K), dtype = q_BGHK.shape, q_BGHK.dtype
    q_BGHK = q_BGHK * K**-0.5
    # Heads of queries that share keys are rows of one matrix.
    shared = (*k_BGHTK.values.shape[:-2], -1)
    own_BGHT = _scores(q_BGHK.reshape(*shared, K), k_BGHTK).reshape(B, G, H, -1)
    own_BGHT = jnp.where(seen_BGT[:, :, None], own_BGHT, -jnp.inf)
    before = []
    for g, (k_UHLK, _, length_U) in enumerate(past):
        U, keys, L, _ = k_UHLK.values.shape
        # So are the M rows that share a prefix.
        q_UHMK = q_BGHK[:, g].reshape(U, B // U, H, K).swapaxes(1, 2)
        padding_UL = jnp.arange(L) >= length_U[:, None]
        scores_UHML = _scores(q_UHMK.reshape(U, keys, -1, K), k_UHLK)
        scores_UHML = scores_UHML.reshape(U, H, -1, L)
        before.append(jnp.where(padding_UL[:, None, None], -jnp.inf, scores_UHML))

    def rows(each: Sequence[jax.Array]) -> jax.Array:
        """One [U, H, M, …] a stream -> [B, G, H, …]."""
        return jnp.stack(
            [x.swapaxes(1, 2).reshape(B, H, *x.shape[3:]) for x in each], axis=1
        )

    top_BGH = jnp.maximum(own_BGHT.max(-1), rows([s.max(-1) for s in before]))
    own_BGHT = jnp.exp(own_BGHT - top_BGH[..., None])
    T = own_BGHT.shape[-1]
    out_BGHK = _mixed(own_BGHT.reshape(*shared, T), v_BGHTK, dtype)
    out_BGHK = out_BGHK.reshape(B, G, H, K)
    sums, outs = [], []
    for g, (_, v_UHLK, _) in enumerate(past):
        (U, _, M, L), keys = before[g].shape, v_UHLK.values.shape[1]
        top_UHM = top_BGH[:, g].reshape(U, M, H).swapaxes(1, 2)
        weights_UHML = jnp.exp(before[g] - top_UHM[..., None])
        sums.append(weights_UHML.sum(-1))
        weights_UHML = weights_UHML.reshape(U, keys, -1, L)
        outs.append(_mixed(weights_UHML, v_UHLK, dtype).reshape(U, H, M, K))
    total_BGH = own_BGHT.sum(-1) + rows(sums)
    return ((out_BGHK + rows(outs)) / total_BGH[..., None]).astype(dtype)


def _scores(q_MK: jax.Array, k_SK: Stored) -> jax.Array:
    """q·k float32 [..., M, S] of queries and stored keys with equal leading axes."""
    scores_MS = jnp.einsum(
        "...MK,...SK->...MS",
        *_alike(q_MK, k_SK.values),
        preferred_element_type=jnp.float32,
    )
    return scores_MS if k_SK.scale is None else scores_MS * k_SK.scale[..., None, :]


def _mixed(weights_MS: jax.Array, v_SK: Stored, dtype) -> jax.Array:
    """Σ_s weight_s v_s, float32 [..., M, K]."""
    if v_SK.scale is not None:
        weights_MS = weights_MS * v_SK.scale[..., None, :]
    return jnp.einsum(
        "...MS,...SK->...MK",
        *_alike(weights_MS.astype(dtype), v_SK.values),
        preferred_element_type=jnp.float32,
    )


def _alike(x: jax.Array, stored: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two operands in one dtype: that of the cache, which is the larger one, unless it
    holds integers."""
    if stored.dtype == jnp.int8:
        return x, stored.astype(x.dtype)
    return x.astype(stored.dtype), stored


def _store(x: jax.Array, cache: str | None) -> Stored:
    """Vectors [..., K] as `cache`, a `CacheType` or None, wants them kept."""
    if cache != "int8":
        return Stored(values=x if cache is None else x.astype(cache), scale=None)
    largest = jnp.abs(x.astype(jnp.float32)).max(-1)
    scale = jnp.where(largest > 0, largest, 1.0) / _LARGEST
    values = jnp.round(x.astype(jnp.float32) / scale[..., None])
    return Stored(values=values.astype(jnp.int8), scale=scale)


def _write(old_BGHTK: Stored, new_BGHK: jax.Array, slot: jax.Array) -> Stored:
    """The cache with one more slot filled, in place where the old one is not kept."""
    cache = "int8" if old_BGHTK.scale is not None else str(old_BGHTK.values.dtype)
    new = _store(new_BGHK[:, :, :, None], cache)
    slots = old_BGHTK.values.ndim - 2  # the axis of them

    def update(old: jax.Array, new: jax.Array) -> jax.Array:
        shape = (*old.shape[:slots], 1, *old.shape[slots + 1 :])
        new = new.reshape(shape)
        return jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis=slots)

    return jax.tree.map(update, old_BGHTK, new)


def _place(x_BGHTK: Stored, shard: Shard) -> Stored:
    names = ("batch", None, "heads", None, None)
    if shard is identity:
        return x_BGHTK
    return jax.tree.map(lambda x: shard(x, names[: x.ndim]), x_BGHTK)
