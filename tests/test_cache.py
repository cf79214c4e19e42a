"""Cached decoding equals the full forward pass, whatever is shared or skipped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.models import cache as caches
from cm3leon_jax.models.cache import begin, grow, prefill, step
from cm3leon_jax.models.decoder import DecoderConfig, abstract
from cm3leon_jax.models.unrolled import unroll

TINY = DecoderConfig(vocab=32, layers=2, width=16, heads=2, mlp=24, length=16)
SETTINGS = {
    "paper": TINY,
    "tied": dataclasses.replace(TINY, tie_embeddings=True),
    "chameleon": dataclasses.replace(
        TINY,
        norm="rms",
        activation="swiglu",
        positions="rope",
        qk_norm=True,
        post_norm=True,
    ),
}
# Two prompts with two candidates each in the first stream, one for all in the second.
LENGTHS = (np.array([6, 3]), np.array([1]))
ROWS, STEPS = 4, 4


def random_model(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda w: jnp.asarray(rng.normal(0.2, 0.3, w.shape), w.dtype), abstract(config)
    )


def data(seed=0):
    """Prefixes (padded by an ordinary token on purpose) and the tokens after them."""
    rng = np.random.default_rng(seed)
    prefixes = []
    for length_U in LENGTHS:
        tokens_UL = np.full((len(length_U), 8), 31)
        for row, n in zip(tokens_UL, length_U, strict=True):
            row[:n] = rng.integers(0, 32, n)
        prefixes.append(tokens_UL)
    return tuple(prefixes), rng.integers(0, 32, (STEPS, ROWS, 2))


@jax.jit(static_argnames=("cache", "weights", "dtype"))
def decode(model, prefixes, tokens_TBG, read_TBG, cache=None, weights=None, dtype=None):
    """Logits [T, B, G, V] after each token, and the cache."""
    decoder = unroll(model, weights=weights, dtype=dtype)
    past = [
        prefill(decoder, tokens_UL, jnp.asarray(length_U), cache=cache)
        for tokens_UL, length_U in zip(prefixes, LENGTHS, strict=True)
    ]
    now = begin(decoder, past, ROWS, 2, cache=cache)
    logits = []
    for t, (token_BG, read_BG) in enumerate(zip(tokens_TBG, read_TBG, strict=True)):
        now = grow(now, STEPS + 2) if t == 2 else now
        logits_BGV, now = step(decoder, token_BG, past, now, read_BG=read_BG)
        logits.append(logits_BGV)
    return jnp.stack(logits), now


ALL = np.ones((STEPS, ROWS, 2), bool)


@pytest.mark.parametrize("name", SETTINGS)
def test_cached_decoding_equals_the_full_forward_pass(name):
    model = random_model(SETTINGS[name])
    prefixes, tokens_TBG = data()
    logits_TBGV, cache = decode(model, prefixes, tokens_TBG, ALL)
    rows, starts = [], []
    for b in range(ROWS):
        for g in range(2):
            u = b * len(LENGTHS[g]) // ROWS
            n = LENGTHS[g][u]
            ids = [*prefixes[g][u][:n], *tokens_TBG[:, b, g]]
            rows.append(ids + [0] * (12 - len(ids)))
            starts.append(n)
    full = jax.jit(lambda m, t: m(t))(model, jnp.asarray(rows))
    for i, n in enumerate(starts):
        found_TV = logits_TBGV[:, i // 2, i % 2]
        np.testing.assert_allclose(
            found_TV, full[i, n : n + STEPS], atol=2e-5, rtol=2e-5
        )
    np.testing.assert_array_equal(cache.position_BG.ravel(), np.add(starts, STEPS))
    assert int(cache.slot) == STEPS


def test_a_skipped_step_leaves_no_trace():
    model = random_model(TINY)
    prefixes, tokens_TBG = data()
    plain, _ = decode(model, prefixes, tokens_TBG, ALL)
    # Row 1 skips a step after its second token, then goes on with the same tokens.
    gapped, skips = tokens_TBG.copy(), ALL.copy()
    gapped[3:, 1], gapped[2, 1], skips[2, 1] = tokens_TBG[2:3, 1], 31, False
    logits, cache = decode(model, prefixes, gapped, skips)
    np.testing.assert_allclose(logits[3, 1], plain[2, 1], atol=1e-5)
    others = [0, 2, 3]
    np.testing.assert_allclose(logits[:, others], plain[:, others], atol=1e-5)
    np.testing.assert_array_equal(
        cache.position_BG[:, 0], np.repeat(LENGTHS[0], 2) + STEPS - [0, 1, 0, 0]
    )


@pytest.mark.parametrize(
    "how, bound",
    [
        (dict(cache="bfloat16"), 0.02),
        (dict(cache="int8"), 0.02),
        (dict(weights="int8"), 0.04),
        (dict(dtype="bfloat16"), 0.05),
    ],
    ids=lambda x: "-".join(x.values()) if isinstance(x, dict) else "",
)
def test_low_precision_stays_close(how, bound):
    """Largest error of any logit, as a share of the largest logit."""
    if "weights" in how:
        pytest.importorskip("qwix")
    model = random_model(TINY)
    prefixes, tokens_TBG = data()
    exact, _ = decode(model, prefixes, tokens_TBG, ALL)
    low, cache = decode(model, prefixes, tokens_TBG, ALL, **how)
    wanted = how.get("cache") or how.get("dtype") or "float32"
    assert cache.k[0].values.dtype == jnp.dtype(wanted) and low.dtype == jnp.float32
    error = np.abs(low - exact).max() / np.abs(exact).max()
    assert 0 < error < bound


def test_int8_vectors_are_rounded_to_their_own_scale():
    x = np.random.default_rng(0).normal(0, [[1e-3], [1.0], [50.0], [0.0]], (4, 64))
    kept = caches._store(jnp.asarray(x, jnp.float32), "int8")
    assert kept.scale is not None and kept.values.dtype == jnp.int8
    back = kept.values * kept.scale[:, None]
    assert (np.abs(back - x) <= 0.5001 * kept.scale[:, None]).all()
    np.testing.assert_allclose(kept.scale[:3] * 127, np.abs(x[:3]).max(1), rtol=1e-6)
