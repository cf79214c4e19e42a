"""How the next token is chosen: guidance, temperature, top-k, top-p (paper 1.11).

The order is that of the original's generator: guide, forbid what the script forbids,
divide by the temperature, cut the tail, draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A way of sampling; a value. Raises ValueError for settings out of range.

    `temperature` >= 0, 0 is greedy. `top_p` in (0, 1]: the smallest set of likeliest
    tokens with at least that probability. `top_k` >= 0: that many likeliest tokens, 0
    for all. `guidance` >= 0 is the weight of the prompt against its unconditional
    stream, 1 is none; of G streams, ordered from the full to the unconditional one,
    there are G - 1 scales, one for each step between neighbours: (7.5, 1.5) is
    u + 1.5 (image - u) + 7.5 (full - image).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    guidance: float | tuple[float, ...] = 1.0

    def __post_init__(self):
        scales = self.scales
        for name, good, allowed in (
            ("temperature", 0 <= self.temperature < np.inf, ">= 0 (0 is greedy)"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= 0 and self.top_k == int(self.top_k), "an int >= 0"),
            (
                "guidance",
                len(scales) > 0 and all(0 <= scale < np.inf for scale in scales),
                ">= 0 (1 is none), or a tuple of one such scale a step between streams",
            ),
        ):
            if not good:
                raise ValueError(
                    f"sampler.{name}={getattr(self, name)} must be {allowed}"
                )

    @property
    def scales(self) -> tuple[float, ...]:
        """`guidance` as a tuple: one scale for each step between streams."""
        return self.guidance if isinstance(self.guidance, tuple) else (self.guidance,)

    @property
    def streams(self) -> int:
        """How many streams a prompt must have: without guidance one is enough."""
        return 1 if all(s == 1 for s in self.scales) else len(self.scales) + 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Settings:
    """The samplers of a batch as arrays, one entry a row, so that another setting
    compiles nothing. `weight_GB` sums to 1 over the streams."""

    weight_GB: jax.Array
    temperature_B: jax.Array
    top_p_B: jax.Array
    top_k_B: jax.Array


def settings(samplers: Sequence[Sampler], streams: int) -> Settings:
    """Arrays of one sampler a row. Raises ValueError for guidance without a stream."""
    weight_BG = [_weights(sampler, streams) for sampler in samplers]
    return Settings(
        weight_GB=jnp.asarray(np.transpose(weight_BG), jnp.float32),
        temperature_B=jnp.asarray([s.temperature for s in samplers], jnp.float32),
        top_p_B=jnp.asarray([s.top_p for s in samplers], jnp.float32),
        top_k_B=jnp.asarray([s.top_k for s in samplers], jnp.int32),
    )


def _weights(sampler: Sampler, streams: int) -> np.ndarray:
    """What each stream counts: u + Σ_g s_g (stream_g − stream_{g+1}), resolved."""
    if sampler.streams == 1:
        return np.eye(streams)[0]
    if sampler.streams > streams == 1:
        raise ValueError(
            f"sampler.guidance={sampler.guidance} needs a prompt with an unconditional "
            "stream (guided=True); without it use guidance=1"
        )
    if sampler.streams != streams:
        raise ValueError(
            f"sampler.guidance={sampler.guidance} has {len(sampler.scales)} scales, "
            f"but a prompt of {streams} streams needs {streams - 1}: one for each step "
            "from the full stream to the unconditional one"
        )
    return np.diff([0.0, *sampler.scales, 1.0])


def guide(logits_GBV: jax.Array, weight_GB: jax.Array) -> jax.Array:
    """Classifier-free guidance, Σ_g w_g logits_g; of two streams it is u + s (c − u)
    (paper eq. 1, 2)."""
    # Not an einsum: accelerators would multiply at low precision.
    return jnp.sum(logits_GBV * weight_GB[..., None], axis=0)


def truncate(logits_BV: jax.Array, top_p_B: jax.Array, top_k_B: jax.Array) -> jax.Array:
    """Logits with −inf outside the top k and then outside the nucleus.

    A token stays if the likelier ones together have less than `top_p`; so one always
    stays. Equal logits stay or go together.
    """
    size = logits_BV.shape[-1]
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    k_B1 = jnp.where(top_k_B > 0, top_k_B, size)[:, None]
    keep_BV = jnp.arange(size) < k_B1
    p_BV = jax.nn.softmax(jnp.where(keep_BV, sorted_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
    top_p_B1 = top_p_B[:, None]
    # Rounding in the sum must not cut the tail when nothing is to be cut.
    keep_BV &= (before_BV < top_p_B1) | (top_p_B1 >= 1)
    kept_B1 = jnp.sum(keep_BV, axis=-1, keepdims=True)
    least_B1 = jnp.take_along_axis(sorted_BV, kept_B1 - 1, axis=-1)
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)


def draw(
    key_B: jax.Array, logits_BV: jax.Array, how: Settings, *, cut: bool
) -> jax.Array:
    """One token a row, int32, each row with its own key.

    `cut` says whether any row uses top-k or top-p: the sort is left out otherwise.
    """
    temperature_B1 = how.temperature_B[:, None]
    greedy_B1 = temperature_B1 == 0
    scores_BV = logits_BV / jnp.where(greedy_B1, 1.0, temperature_B1)
    if cut:
        scores_BV = truncate(scores_BV, how.top_p_B, how.top_k_B)
    shape = (logits_BV.shape[-1],)
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, shape))(key_B)
    scores_BV = scores_BV + jnp.where(greedy_B1, 0.0, noise_BV)
    return jnp.argmax(scores_BV, axis=-1).astype(jnp.int32)
