"""Cached decoding equals the full forward pass, whatever the prompt lengths."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.models.cache import prefill, step, unroll
from cm3leon_jax.models.decoder import DecoderConfig, abstract

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
LENGTH_B = np.array([6, 3, 1])
STEPS = 4


def random_model(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda w: jnp.asarray(rng.normal(0.2, 0.3, w.shape), w.dtype), abstract(config)
    )


@jax.jit
def decode(model, prompt_BL, length_B, tokens_TB, read_TB):
    """Logits_TBV after the prompt and after each further token."""
    logits_BV, cache = prefill(model, prompt_BL, length_B, size=prompt_BL.shape[1] + 6)
    decoder = unroll(model)

    def body(cache, inputs):
        token_B, read_B = inputs
        logits_BV, cache = step(decoder, token_B, cache, read_B=read_B)
        return cache, logits_BV

    cache, logits_TBV = jax.lax.scan(body, cache, (tokens_TB, read_TB))
    return jnp.concatenate([logits_BV[None], logits_TBV]), cache


def rows(seed=0):
    """Whole rows of tokens, the prompts cut from them, and what follows."""
    rng = np.random.default_rng(seed)
    full = [rng.integers(0, 32, n + STEPS) for n in LENGTH_B]
    prompt_BL = np.full((3, 8), 31)  # the padding is an ordinary token on purpose
    for b, n in enumerate(LENGTH_B):
        prompt_BL[b, :n] = full[b][:n]
    tokens_TB = np.stack([f[n:] for f, n in zip(full, LENGTH_B, strict=True)], axis=1)
    return full, prompt_BL, tokens_TB


@pytest.mark.parametrize("name", SETTINGS)
def test_cached_decoding_equals_the_full_forward_pass(name):
    model = random_model(SETTINGS[name])
    full, prompt_BL, tokens_TB = rows()
    read_TB = np.ones((STEPS, 3), bool)
    logits_TBV, cache = decode(model, prompt_BL, LENGTH_B, tokens_TB, read_TB)
    forward = jax.jit(lambda m, t: m(t))
    for b, n in enumerate(LENGTH_B):
        row = np.zeros(10, int)
        row[: n + STEPS] = full[b]
        expected_LV = forward(model, row[None])[0, n - 1 : n + STEPS]
        np.testing.assert_allclose(logits_TBV[:, b], expected_LV, atol=2e-5, rtol=2e-5)
    np.testing.assert_array_equal(cache.length_B, LENGTH_B + STEPS)
    assert int(cache.slot) == 8 + STEPS


def test_a_skipped_step_leaves_no_trace():
    model = random_model(TINY)
    _, prompt_BL, tokens_TB = rows()
    read_TB = np.ones((STEPS, 3), bool)
    plain, _ = decode(model, prompt_BL, LENGTH_B, tokens_TB, read_TB)
    # Row 1 skips a step after its second token, then goes on with the same tokens.
    gapped, skips = tokens_TB.copy(), read_TB.copy()
    gapped[2:, 1], skips[2, 1] = [31, tokens_TB[2, 1]], False
    logits_TBV, cache = decode(model, prompt_BL, LENGTH_B, gapped, skips)
    np.testing.assert_allclose(logits_TBV[4, 1], plain[3, 1], atol=1e-5)
    np.testing.assert_allclose(logits_TBV[:, [0, 2]], plain[:, [0, 2]], atol=1e-5)
    np.testing.assert_array_equal(cache.length_B, LENGTH_B + STEPS - [0, 1, 0])


def test_low_precision_decoding_stays_close():
    config = dataclasses.replace(TINY, dtype="bfloat16")
    full, prompt_BL, tokens_TB = rows()
    read_TB = np.ones((STEPS, 3), bool)
    exact, _ = decode(random_model(TINY), prompt_BL, LENGTH_B, tokens_TB, read_TB)
    low, cache = decode(random_model(config), prompt_BL, LENGTH_B, tokens_TB, read_TB)
    assert cache.k[0].dtype == jnp.bfloat16 and low.dtype == jnp.float32
    assert np.abs(low - exact).max() < 0.05 * np.abs(exact).max()


def test_the_cache_must_hold_the_prompt():
    model = random_model(TINY)
    with pytest.raises(ValueError, match="size=4 cannot hold 8 prompt tokens"):
        prefill(model, jnp.zeros((1, 8), int), jnp.ones(1, int), size=4)
