"""How the next token is chosen (paper 1.11): guidance or contrast, temperature, top-k,
top-p, and the draw.

The order is that of the original's generator: forbid what the script forbids, guide (or
contrast), divide by the temperature, cut the tail, draw. Every setting is an array, so
that one program serves all samplers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True, kw_only=True)
class ContrastiveTopK:
    """Contrastive decoding, CD-K (paper eq. 3); a value.

    The score of a token is log p_expert - log p_amateur, and -inf unless p_expert >=
    `alpha` in (0, 1] times the `k`-th largest p_expert; k >= 1, and 1 is the original
    CD (arXiv:2210.15097). The expert reads the full prompt, the amateur the one without
    its text, or it is a smaller model. `amateur_temperature` > 0 divides the amateur's
    logits: below 1 it punishes what the amateur is sure of more.
    """

    alpha: float
    k: int = 1
    amateur_temperature: float = 1.0

    def __post_init__(self):
        _check(
            "sampler.contrastive",
            self,
            alpha=(_real(self.alpha) and 0 < self.alpha <= 1, "in (0, 1]"),
            k=(_whole(self.k) and self.k >= 1, "an int >= 1 (1 is plain CD)"),
            amateur_temperature=(
                _real(self.amateur_temperature) and self.amateur_temperature > 0,
                "> 0",
            ),
        )


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A way of sampling; a value. Raises ValueError for settings out of range.

    `temperature` >= 0, 0 is greedy. `top_p` in (0, 1]: the smallest set of likeliest
    tokens with at least that probability. `top_k` >= 0: that many likeliest tokens, 0
    for all.

    `guidance` >= 0 is the weight of the prompt against its unconditional stream, 1 is
    none. Of G streams, ordered from the full to the unconditional one, there may be
    G - 1 scales, one for each step between neighbours: (7.5, 1.5) is
    u + 1.5 (image - u) + 7.5 (full - image); a single scale is for all steps.
    `schedule` are factors >= 0 of guidance - 1 at evenly spaced positions of what is
    written, from the first to the last token, linear in between; () is constant.

    `contrastive` draws from softmax(score / temperature) of CD-K instead, without
    guidance.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    guidance: float | tuple[float, ...] = 1.0
    schedule: tuple[float, ...] = ()
    contrastive: ContrastiveTopK | None = None

    def __post_init__(self):
        _check(
            "sampler",
            self,
            temperature=(_real(self.temperature), ">= 0 (0 is greedy)"),
            top_p=(_real(self.top_p) and 0 < self.top_p <= 1, "in (0, 1]"),
            top_k=(_whole(self.top_k), "an int >= 0"),
            guidance=(
                len(self.scales) > 0 and all(map(_real, self.scales)),
                ">= 0 (1 is none), or a tuple of one such scale a step between streams",
            ),
            schedule=(
                isinstance(self.schedule, tuple)
                and len(self.schedule) != 1
                and all(map(_real, self.schedule)),
                "two or more factors >= 0, from the first token to the last, a tuple",
            ),
            contrastive=(
                isinstance(self.contrastive, ContrastiveTopK | None),
                "None or a ContrastiveTopK",
            ),
        )
        if self.contrastive is not None and self.guided:
            raise ValueError(
                f"sampler.guidance={self.guidance} and sampler.contrastive do not go "
                "together: CD-K draws without guidance; use guidance=1, or a tuple of "
                "two samplers, one of each"
            )

    @property
    def scales(self) -> tuple[float, ...]:
        """`guidance` as a tuple."""
        return self.guidance if isinstance(self.guidance, tuple) else (self.guidance,)

    @property
    def guided(self) -> bool:
        return any(scale != 1 for scale in self.scales)

    @property
    def streams(self) -> int:
        """How many streams a prompt must have: the full one, and what guidance, or an
        amateur that is the model itself, reads beside it."""
        if self.contrastive is not None:
            return 2
        return len(self.scales) + 1 if self.guided else 1


def _real(value: Any) -> bool:
    """A finite number that is not negative."""
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return number and bool(0 <= value < np.inf)


def _whole(value: Any) -> bool:
    return _real(value) and value == int(value)


def _check(name: str, values: object, **rules: tuple[bool, str]) -> None:
    for key, (good, allowed) in rules.items():
        if not good:
            raise ValueError(f"{name}.{key}={getattr(values, key)!r} must be {allowed}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Settings:
    """The samplers of a batch as arrays, one entry a row, so that another setting
    compiles nothing. `weight_GBT` sums to 1 over the streams."""

    weight_GBT: jax.Array
    temperature_B: jax.Array
    top_p_B: jax.Array
    top_k_B: jax.Array
    contrastive_B: jax.Array  # bool: the settings below are in use
    alpha_B: jax.Array
    k_B: jax.Array
    amateur_temperature_B: jax.Array


def settings(
    samplers: Sequence[Sampler], script_GBT: np.ndarray, *, amateur: bool = False
) -> Settings:
    """Arrays of one sampler a row, for scripts whose negative ids are sampled.

    Rows are the prompts, or equally many candidates of each prompt in turn. `amateur`
    says that another model reads the last stream, which guidance has to leave out.
    Raises ValueError for guidance or contrast without the stream that they need.
    """
    streams, prompts, steps = script_GBT.shape
    if not samplers or len(samplers) % prompts:
        raise ValueError(
            f"{prompts} prompts need as many samplers, or so many for each candidate, "
            f"got {len(samplers)}"
        )
    sampled_BT = np.repeat(script_GBT[0] < 0, len(samplers) // prompts, axis=0)
    weight_GBT = np.zeros((streams, len(samplers), steps), np.float32)
    for b, sampler in enumerate(samplers):
        if sampler.contrastive is not None and streams == 1:
            raise ValueError(
                "sampler.contrastive needs a prompt with an unconditional stream for "
                "the amateur to read (guided=True), or a smaller model as amateur"
            )
        weight_G = _weights(sampler, streams - amateur)
        none_G = np.eye(len(weight_G))[0]
        factor_T = _factors(sampler.schedule, sampled_BT[b])
        change_GT = (weight_G - none_G)[:, None] * factor_T
        weight_GBT[: len(weight_G), b] = none_G[:, None] + change_GT
    contrasts = [s.contrastive or ContrastiveTopK(alpha=1.0) for s in samplers]

    def floats(values: list[float]) -> jax.Array:
        return jnp.asarray(values, jnp.float32)

    return Settings(
        weight_GBT=jnp.asarray(weight_GBT),
        temperature_B=floats([s.temperature for s in samplers]),
        top_p_B=floats([s.top_p for s in samplers]),
        top_k_B=jnp.asarray([s.top_k for s in samplers], jnp.int32),
        contrastive_B=jnp.asarray([s.contrastive is not None for s in samplers]),
        alpha_B=floats([c.alpha for c in contrasts]),
        k_B=jnp.asarray([c.k for c in contrasts], jnp.int32),
        amateur_temperature_B=floats([c.amateur_temperature for c in contrasts]),
    )


def _weights(sampler: Sampler, streams: int) -> np.ndarray:
    """What each stream counts: u + Σ_g s_g (stream_g - stream_{g+1}), resolved."""
    if not sampler.guided:
        return np.eye(streams)[0]
    if streams == 1:
        raise ValueError(
            f"sampler.guidance={sampler.guidance} needs a prompt with an unconditional "
            "stream (guided=True); without it use guidance=1"
        )
    single = not isinstance(sampler.guidance, tuple)
    scales = sampler.scales * (streams - 1) if single else sampler.scales
    if len(scales) != streams - 1:
        raise ValueError(
            f"sampler.guidance={sampler.guidance} has {len(scales)} scales, but a "
            f"prompt of {streams} streams needs {streams - 1}: one for each step from "
            "the full stream to the unconditional one"
        )
    return np.diff([0.0, *scales, 1.0])


def _factors(schedule: tuple[float, ...], sampled_T: np.ndarray) -> np.ndarray:
    """What the schedule says at each position; those that are forced do not count."""
    if not schedule:
        return np.ones(len(sampled_T))
    number_T = np.cumsum(sampled_T) - 1
    knots_S = np.linspace(0, max(number_T[-1], 1), len(schedule))
    return np.interp(number_T, knots_S, schedule)


def token_scores(
    logits_GBV: jax.Array, allowed_BV: jax.Array, how: Settings, t: jax.Array
) -> jax.Array:
    """What token number `t` is drawn from: scores_BV, of which the softmax is the
    distribution and the maximum the greedy choice; -inf for what may not come.

    The first stream is the expert's and the last the amateur's.
    """
    weight_GB = jax.lax.dynamic_index_in_dim(how.weight_GBT, t, 2, keepdims=False)
    scores_BV = jnp.where(allowed_BV, guide(logits_GBV, weight_GB), -jnp.inf)
    if len(logits_GBV) > 1:
        # Under a condition, here and below: what no row asks for costs nothing.
        scores_BV = jax.lax.cond(
            how.contrastive_B.any(),
            _contrasted,
            lambda scores_BV, *_: scores_BV,
            scores_BV,
            jnp.where(allowed_BV, logits_GBV[0], -jnp.inf),
            logits_GBV[-1],
            how,
        )
    temperature_B1 = how.temperature_B[:, None]
    scores_BV = scores_BV / jnp.where(temperature_B1 == 0, 1.0, temperature_B1)
    return jax.lax.cond(
        ((how.top_p_B < 1) | (how.top_k_B > 0)).any(),
        truncate,
        lambda scores_BV, *_: scores_BV,
        *(scores_BV, how.top_p_B, how.top_k_B),
    )


def draw(key_B: jax.Array, scores_BV: jax.Array, temperature_B: jax.Array) -> jax.Array:
    """One token a row of `token_scores`, int32, each row with its own key; the maximum
    where the temperature is 0."""
    shape = (scores_BV.shape[-1],)
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, shape))(key_B)
    scores_BV = scores_BV + jnp.where(temperature_B[:, None] == 0, 0.0, noise_BV)
    return jnp.argmax(scores_BV, axis=-1).astype(jnp.int32)


def guide(logits_GBV: jax.Array, weight_GB: jax.Array) -> jax.Array:
    """Classifier-free guidance, Σ_g w_g logits_g; of two streams it is u + s (c - u)
    (paper eq. 1, 2)."""
    # Not an einsum: accelerators would multiply at low precision.
    return jnp.sum(logits_GBV * weight_GB[..., None], axis=0)


def contrast(
    expert_BV: jax.Array,
    amateur_BV: jax.Array,
    alpha_B: jax.Array,
    k_B: jax.Array,
    amateur_temperature_B: jax.Array,
) -> jax.Array:
    """The score of CD-K from logits (paper eq. 3), up to a constant of each row.

    Tokens whose expert's logit is -inf are not among the k-th largest, and stay out.
    """
    ordered_BV = _ordered(expert_BV)
    count_B = jnp.minimum(k_B, expert_BV.shape[-1])
    ones_BV = jnp.ones(expert_BV.shape, jnp.int32)
    kth_BV = ordered_BV >= _threshold(ordered_BV, ones_BV, count_B)[:, None]
    kth_B = jnp.min(jnp.where(kth_BV, expert_BV, jnp.inf), axis=-1)
    # p >= α p_k without the normaliser, which is the same for all tokens.
    kept_BV = expert_BV >= (kth_B + jnp.log(alpha_B))[:, None]
    kept_BV &= expert_BV > -jnp.inf
    score_BV = expert_BV - amateur_BV / amateur_temperature_B[:, None]
    return jnp.where(kept_BV, score_BV, -jnp.inf)


def truncate(logits_BV: jax.Array, top_p_B: jax.Array, top_k_B: jax.Array) -> jax.Array:
    """Logits with -inf outside the top k and then outside the nucleus.

    A token stays if the likelier ones together have less than `top_p`; so one always
    stays. Equal logits stay or go together.
    """
    size = logits_BV.shape[-1]
    ordered_BV = _ordered(logits_BV)

    def top(ordered_BV: jax.Array) -> jax.Array:
        count_B = jnp.where(top_k_B > 0, jnp.minimum(top_k_B, size), size)
        ones_BV = jnp.ones(logits_BV.shape, jnp.int32)
        return ordered_BV >= _threshold(ordered_BV, ones_BV, count_B)[:, None]

    whole = functools.partial(jnp.ones_like, dtype=bool)
    keep_BV = jax.lax.cond((top_k_B > 0).any(), top, whole, ordered_BV)
    p_BV = jax.nn.softmax(jnp.where(keep_BV, logits_BV, -jnp.inf), axis=-1)
    nucleus_BV = ordered_BV >= _threshold(ordered_BV, p_BV, top_p_B)[:, None]
    # Rounding in the sum must not cut the tail when nothing is to be cut.
    keep_BV &= nucleus_BV | (top_p_B[:, None] >= 1)
    return jnp.where(keep_BV, logits_BV, -jnp.inf)


def _contrasted(
    scores_BV: jax.Array, expert_BV: jax.Array, amateur_BV: jax.Array, how: Settings
) -> jax.Array:
    """The scores of CD-K in the rows that ask for it."""
    score_BV = contrast(
        expert_BV, amateur_BV, how.alpha_B, how.k_B, how.amateur_temperature_B
    )
    return jnp.where(how.contrastive_B[:, None], score_BV, scores_BV)


def _ordered(x_BV: jax.Array) -> jax.Array:
    """Floats as uint32 in the same order."""
    bits_BV = jax.lax.bitcast_convert_type(jnp.where(x_BV == 0, 0.0, x_BV), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits_BV >= sign, ~bits_BV, bits_BV | sign)


def _threshold(
    ordered_BV: jax.Array, weight_BV: jax.Array, least_B: jax.Array
) -> jax.Array:
    """The largest value, uint32, such that all that is not smaller weighs `least_B`.

    Found bit by bit. Sorting, which tells the same, takes ten times as long and more,
    and would gather a vocabulary that lies on several devices.
    """

    def bit(i: jax.Array, low_B: jax.Array) -> jax.Array:
        trial_B = low_B | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        weight_B = jnp.sum(jnp.where(ordered_BV >= trial_B[:, None], weight_BV, 0), -1)
        return jnp.where(weight_B >= least_B, trial_B, low_B)

    return jax.lax.fori_loop(0, 32, bit, jnp.zeros(len(ordered_BV), jnp.uint32))
