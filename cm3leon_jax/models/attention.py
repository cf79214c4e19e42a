"""Causal self-attention in plain XLA, for whole sequences (`cache.py` has that of one
query against a cache).

`xla_attention` is what every `attention` argument defaults to; the kernels of
`parallel/kernels.py` take its place on accelerators, and are compared with it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

# (q_BLHK, k_BLHK, v_BLHK, segments_BL or None) -> out_BLHK in the queries' dtype.
Attention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]


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
    """
    mask = None
    if segments_BL is not None:
        mask = segments_BL[:, None, :, None] == segments_BL[:, None, None, :]
    return jax.nn.dot_product_attention(
        q_BLHK, k_BLHK, v_BLHK, mask=mask, is_causal=True, implementation="xla"
    )
