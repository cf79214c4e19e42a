"""Plain attention against jax.nn's: it is computed in blocks of queries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.models.attention import xla_attention


def library(q_BLHK, k_BLHK, v_BLHK, segments_BL=None):
    mask = None
    if segments_BL is not None:
        mask = segments_BL[:, None, :, None] == segments_BL[:, None, None, :]
    return jax.nn.dot_product_attention(
        q_BLHK, k_BLHK, v_BLHK, mask=mask, is_causal=True, implementation="xla"
    )


def arrays(length, heads, shared, dtype=jnp.float32):
    rng = np.random.default_rng(length)
    return [
        jnp.asarray(rng.normal(size=(2, length, n, 16)), dtype)
        for n in (heads * shared, heads, heads, heads * shared)
    ]


def output_and_gradients(attention, q, k, v, weight, segments):
    def total(q, k, v):
        out = attention(q, k, v, segments)
        return jnp.sum(out * weight), out

    return jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(q, k, v)


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize("length", [1, 31, 33, 64, 130, 257])
def test_blocks_are_attention_over_the_whole_row(length, shared, segmented):
    q, k, v, weight = arrays(length, 2, shared)
    segments = None
    if segmented:  # two documents and padding, cut elsewhere in each row
        cuts = np.sort(np.random.default_rng(0).integers(0, length, (2, 2)))
        at = np.arange(length)
        segments = np.where(at < cuts[:, :1], 1, np.where(at < cuts[:, 1:], 2, 0))
        segments = jnp.asarray(segments, jnp.int32)
    found = output_and_gradients(xla_attention, q, k, v, weight, segments)
    oracle = output_and_gradients(library, q, k, v, weight, segments)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(oracle), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_bfloat16_has_scores_in_float32():
    q, k, v, _ = arrays(130, 2, 2, jnp.bfloat16)
    found = jax.jit(xla_attention)(q, k, v)
    exact = library(*(x.astype(jnp.float32) for x in (q, k, v)))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), exact, atol=0.03)
