"""What a training run carries from step to step."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cm3leon_jax.training.parts import EVERYTHING, Parts


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Updates done so far (int32 scalar), float32 master parameters, optimizer."""

    step: jax.Array
    model: Any  # an NNX module, which is a pytree of its parameters
    opt: optax.OptState  # of the trained parameters
    ema: Any = None  # the running average of these, where a run keeps one

    def replace(self, **changes: Any) -> TrainState:
        return dataclasses.replace(self, **changes)


def create(
    model: Any,
    tx: optax.GradientTransformation,
    *,
    parts: Parts = EVERYTHING,
    ema: float = 0.0,
) -> TrainState:
    """The state before the first update; call it under the loop's jitted init.

    `parts` are trained of `model`, which `parts.prepared` has made ready. `ema` is the
    decay of their running average; 0 keeps none.
    """
    if not 0 <= ema < 1:
        raise ValueError(f"ema={ema} must be in [0, 1)")
    trained = parts.take(model)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        model=model,
        opt=tx.init(trained),
        # Arrays of its own: a step consumes those of the model.
        ema=jax.tree.map(jnp.copy, trained) if ema else None,
    )
