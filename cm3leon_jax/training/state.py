"""What a training run carries from step to step."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Updates done so far (int32 scalar), float32 master parameters, optimizer."""

    step: jax.Array
    model: Any  # an NNX module, which is a pytree of its parameters
    opt: optax.OptState

    def replace(self, **changes: Any) -> TrainState:
        return dataclasses.replace(self, **changes)


def create(model: Any, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first update; call it under the loop's jitted init."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        model=model,
        opt=tx.init(model),
    )
