"""Keeping a codebook alive: k-means++ to begin with, restarts of dead codes after.

Both choose latents with probability proportional to the squared distance to the code
that they would have, so rare content gets codes too (paper section 2.6).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cm3leon_jax.models.vqgan import distances, nearest

LLOYD_ITERATIONS = 10
DEAD = 0.01  # of a code's even share of use: below, it is moved elsewhere
USE_DECAY = 0.98  # of the running mean of use, per step


def kmeans(latents_NE: jax.Array, codes: int, key: jax.Array) -> jax.Array:
    """Codebook [Z, E] of `codes` centres: k-means++ seeding, then Lloyd's iterations.

    A centre that loses all its latents stays where it is.
    """
    key_first, key_rest = jax.random.split(key)
    count = latents_NE.shape[0]
    first_E = latents_NE[jax.random.randint(key_first, (), 0, count)]

    def squared(code_E: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(latents_NE - code_E), -1)

    def seed(i, carry):
        codes_ZE, error_N = carry
        chosen = _weighted(error_N, 1, jax.random.fold_in(key_rest, i))[0]
        code_E = latents_NE[chosen]
        return codes_ZE.at[i].set(code_E), jnp.minimum(error_N, squared(code_E))

    def lloyd(_, codes_ZE):
        code_N = nearest(latents_NE, codes_ZE)
        use_Z = jnp.zeros(codes).at[code_N].add(1.0)
        sum_ZE = jnp.zeros_like(codes_ZE).at[code_N].add(latents_NE)
        mean_ZE = sum_ZE / jnp.maximum(use_Z, 1.0)[:, None]
        return jnp.where(use_Z[:, None] > 0, mean_ZE, codes_ZE)

    codes_ZE = jnp.zeros((codes, latents_NE.shape[1])).at[0].set(first_E)
    codes_ZE, _ = jax.lax.fori_loop(1, codes, seed, (codes_ZE, squared(first_E)))
    return jax.lax.fori_loop(0, LLOYD_ITERATIONS, lloyd, codes_ZE)


def restart(
    codes_ZE: jax.Array, use_Z: jax.Array, latents_NE: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Moves dead codes onto badly served latents; their use starts at an even share.

    `use_Z` is the running mean of latents per step that chose each code. Returns the
    codebook and the use.
    """
    share = latents_NE.shape[0] / codes_ZE.shape[0]
    dead_Z = use_Z < DEAD * share
    count = min(len(latents_NE), len(codes_ZE))
    error_N = distances(latents_NE, codes_ZE).min(-1)
    error_N = jnp.maximum(error_N + jnp.sum(jnp.square(latents_NE), -1), 0.0)
    chosen = _weighted(error_N, count, key)
    rank_Z = jnp.cumsum(dead_Z) - 1  # the i-th dead code takes the i-th choice
    moved_Z = dead_Z & (rank_Z < count)
    fresh_ZE = latents_NE[chosen[jnp.clip(rank_Z, 0, count - 1)]]
    codes_ZE = jnp.where(moved_Z[:, None], fresh_ZE, codes_ZE)
    return codes_ZE, jnp.where(moved_Z, share, use_Z)


def _weighted(weight_N: jax.Array, count: int, key: jax.Array) -> jax.Array:
    """`count` different indices, drawn in proportion to the weights (Gumbel top-k)."""
    noise_N = jax.random.gumbel(key, weight_N.shape)
    score_N = jnp.log(weight_N + 1e-20) + noise_N
    if count == 1:
        return jnp.argmax(score_N, keepdims=True)
    return jax.lax.top_k(score_N, count)[1]
