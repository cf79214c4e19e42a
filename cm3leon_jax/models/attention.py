"""Causal self-attention in plain XLA, for whole sequences (`cache.py` has that of one
query against a cache).

`xla_attention` is what every `attention` argument defaults to; the kernels of
`parallel/kernels.py` take its place on accelerators, and are compared with it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

# (q_BLHK, k_BLHK, v_BLHK, segments_BL or None) -> out_BLHK in the queries' dtype.
Attention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]

# A block of queries meets only the keys up to its end: with four blocks, 5/8 of all.
_BLOCKS = 4
_MIN_BLOCK = 32  # shorter ones take longer to compile than they save


def xla_attention(
    q_BLHK: jax.Array,
    k_BLHK: jax.Array,
    v_BLHK: jax.Array,
    segments_BL: jax.Array | None = None,
) -> jax.Array:
    """softmax(q·k / √K) v over earlier positions; scores and softmax in float32.

    With segment ids a token sees only earlier tokens of its own segment; padding
    (segment 0) sees padding, so that no row of the softmax is empty:

        segments  1 1 2 2 0        token 3 sees tokens 2 and 3

    Neighbouring heads of queries share a head of keys and values where there are fewer.
    """
    length, shared = q_BLHK.shape[1], q_BLHK.shape[2] // k_BLHK.shape[2]
    k_BLHK, v_BLHK = (jnp.repeat(x, shared, axis=2) for x in (k_BLHK, v_BLHK))
    # Heads before length: on a CPU a third faster than jax.nn.dot_product_attention.
    q_BHLK, k_BHLK, v_BHLK = (x.swapaxes(1, 2) for x in (q_BLHK, k_BLHK, v_BLHK))
    size = max(-(-length // _BLOCKS), _MIN_BLOCK)
    done = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        scores_BHQS = jnp.einsum(
            "BHQK,BHSK->BHQS",
            q_BHLK[:, :, start:stop],
            k_BHLK[:, :, :stop],
            preferred_element_type=jnp.float32,
        )
        seen = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)
        if segments_BL is not None:
            ids_B1L = segments_BL[:, None]
            seen &= ids_B1L[..., start:stop, None] == ids_B1L[..., None, :stop]
        scores_BHQS = jnp.where(
            seen, scores_BHQS * q_BLHK.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min
        )
        weights_BHQS = jax.nn.softmax(scores_BHQS).astype(v_BLHK.dtype)
        done.append(jnp.einsum("BHQS,BHSK->BHQK", weights_BHQS, v_BHLK[:, :, :stop]))
    return jnp.concatenate(done, axis=2).swapaxes(1, 2)
