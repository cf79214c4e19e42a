"""AdamW with warm-up, decay and clipping (paper section 1.3: inferred, OPT's values).

Raw gradients are clipped to a global L2 norm, Adam's moments are float32 and lie where
the parameters lie, and decoupled weight decay touches matrices only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """`steps` updates in all, the first `warmup` of them rising linearly to `peak`.

    The last update uses `floor * peak`. `clip` is the global norm of the gradient.
    """

    peak: float
    warmup: int
    steps: int
    floor: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    schedule: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        if self.peak <= 0 or self.clip <= 0 or self.eps <= 0:
            raise ValueError(
                f"optimizer.peak={self.peak}, optimizer.clip={self.clip} and "
                f"optimizer.eps={self.eps} must be positive"
            )
        if self.steps < 1 or not 0 <= self.warmup <= self.steps:
            raise ValueError(
                f"optimizer.warmup={self.warmup} must lie between 0 and "
                f"optimizer.steps={self.steps}, which must be positive"
            )
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"optimizer.{name}={getattr(self, name)} is not in [0, 1)"
                )
        if not 0 <= self.floor <= 1 or self.weight_decay < 0:
            raise ValueError(
                f"optimizer.floor={self.floor} must be in [0, 1] and "
                f"optimizer.weight_decay={self.weight_decay} not negative"
            )
        if self.schedule not in ("linear", "cosine"):
            raise ValueError(
                f"optimizer.schedule={self.schedule!r}: choose 'linear' or 'cosine'"
            )


def learning_rate(config: OptimizerConfig, step: jax.typing.ArrayLike) -> jax.Array:
    """The rate of update `step` (0-based), float32.

    With n = step + 1: peak·n/warmup up to n = warmup, then down to floor·peak at
    n = steps, and constant after that. No update is wasted on a rate of zero.
    """
    n = jnp.asarray(step, jnp.float32) + 1.0
    rising = n / max(config.warmup, 1)
    progress = (n - config.warmup) / max(config.steps - config.warmup, 1)
    progress = jnp.clip(progress, 0.0, 1.0)
    if config.schedule == "cosine":
        progress = 0.5 - 0.5 * jnp.cos(jnp.pi * progress)
    falling = 1.0 - (1.0 - config.floor) * progress
    return config.peak * jnp.where(n < config.warmup, rising, falling)


def is_matrix(variable: Any) -> bool:
    """Whether a parameter gets weight decay: two or more axes besides `layers`.

    Blocks are stacked along `layers`, so a norm's scale has two dimensions there and
    is still a vector.
    """
    if not isinstance(variable, nnx.Variable):
        return variable.ndim >= 2
    names = variable.get_metadata("out_sharding", None) or ()
    return variable.get_value().ndim - names.count("layers") >= 2


def _decayed(params: Any) -> Any:
    def mark(node: Any) -> Any:
        return jax.tree.map(lambda _: is_matrix(node), node)

    return jax.tree.map(mark, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The optax transformation of `config`."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            lambda count: learning_rate(config, count),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=_decayed,
        ),
    )
