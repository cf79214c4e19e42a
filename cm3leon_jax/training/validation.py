"""Held-out loss: the numbers of `training/step.py` on rows never trained on."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cm3leon_jax.training.loss import means
from cm3leon_jax.training.step import Batch


def validator(
    sums_fn: Callable[[Any, Batch], dict[str, jax.Array]],
    batches: Callable[[], Iterator[Batch]],
) -> Callable[[Any], dict[str, float]]:
    """A function of a train state: loss and perplexity, in all and by group.

    `sums_fn(model, batch)` gives loss sums; `batches()` yields the same few batches
    every time, already on the devices. Every token counts once.
    """
    summed = jax.jit(sums_fn)

    def evaluate(state: Any) -> dict[str, float]:
        sums = [summed(state.model, batch) for batch in batches()]
        total = jax.tree.map(lambda *parts: jnp.stack(parts).sum(0), *sums)
        return {key: np.asarray(value).item() for key, value in means(total).items()}

    return evaluate
