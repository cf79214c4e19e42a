"""One update of CM3Leon, from a batch of token rows to new parameters.

A row holds L+1 tokens of documents that `data/infill.py` has already masked and
rotated (paper section 1.7); the model reads the first L and predicts the last L. The
objective is the plain next-token loss on every token: context, sentinels and moved
spans alike, by default with no weighting of any document (paper section 1.7, change
(a)); RA-CM3 gave those of retrieved documents a tenth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cm3leon_jax.parallel.rules import Shard
from cm3leon_jax.training.loss import Sums, discounted, means, next_token_loss
from cm3leon_jax.training.optimizer import updated
from cm3leon_jax.training.parts import EVERYTHING, Parts, averaged
from cm3leon_jax.training.state import TrainState
from cm3leon_jax.vocab import Layout

Batch = dict[str, jax.Array]


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """How a step is computed, not what it computes, but for `segmented`, `z_loss` and
    `retrieved_weight`.

    `segmented`: rows hold whole samples that must not see each other (first_fit
    packing) rather than a cut stream. `microbatches`: parts into which the batch is
    cut to save memory. `loss_blocks`: parts into which the vocabulary is cut when the
    logits are made.
    `retrieved_weight`: of the loss of a token that came with a retrieved document.
    `tasks`: names of the tasks 1, 2, … of rows that have any, for the metrics.
    """

    segmented: bool
    microbatches: int = 1
    loss_blocks: int = 1
    z_loss: float = 0.0
    retrieved_weight: float = 1.0
    tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.microbatches < 1 or self.loss_blocks < 1:
            raise ValueError(
                f"step.microbatches={self.microbatches} and step.loss_blocks="
                f"{self.loss_blocks} must be positive"
            )
        if self.z_loss < 0 or self.retrieved_weight < 0:
            raise ValueError(
                f"step.z_loss={self.z_loss} and step.retrieved_weight="
                f"{self.retrieved_weight} must not be negative"
            )


def targets(batch: Batch) -> jax.Array:
    """1.0 for each target that its context can predict, float32 [B, L].

    Padding (segment 0) is no target, nor is the first token of a sample, which would
    have to be predicted from another sample:

        segments  1 1 1 2 2 0        targets    . b c d e .
        tokens    a b c d e <pad>    weights      1 1 0 1 0
    """
    segments = batch["segments"]
    same_BL = segments[:, 1:] == segments[:, :-1]
    return (same_BL & (segments[:, 1:] != 0)).astype(jnp.float32)


def loss_weights(batch: Batch, config: StepConfig) -> jax.Array:
    """What each target counts in the objective, float32 [B, L]."""
    weights_BL = targets(batch)
    if "retrieved" not in batch:
        return weights_BL
    return discounted(weights_BL, batch["retrieved"][:, 1:], config.retrieved_weight)


def loss_sums(
    model: Any,
    batch: Batch,
    *,
    layout: Layout,
    config: StepConfig,
    shard: Shard,
    attention: Callable[..., jax.Array],
) -> Sums:
    """Forward pass: sums of NLL (nats), of log² Z, and of tokens, in all and by group.

    `batch` holds `tokens`, `segments`, `positions` (int32) and `moved` (bool), each
    [B, L+1], `retrieved` (bool) where rows have retrieved documents, and `task` (int32)
    where they have tasks.
    """
    retrieved_BL = batch["retrieved"][:, 1:] if "retrieved" in batch else None
    hidden_BLD = model.hidden(
        batch["tokens"][:, :-1],
        batch["positions"][:, :-1],
        batch["segments"][:, :-1] if config.segmented else None,
        shard=shard,
        attention=attention,
    )
    with jax.named_scope("loss"):
        return next_token_loss(
            model.head_weight(),
            hidden_BLD,
            batch["tokens"][:, 1:],
            targets(batch),
            batch["moved"][:, 1:],
            layout=layout,
            retrieved_BL=retrieved_BL,
            retrieved_weight=config.retrieved_weight,
            task_BL=batch["task"][:, 1:] if "task" in batch else None,
            tasks=config.tasks,
            blocks=config.loss_blocks,
            shard=shard,
        )


def gradients(
    sums_fn: Callable[[Any, Batch], Sums],
    model: Any,
    batch: Batch,
    config: StepConfig,
    shard: Shard,
) -> tuple[Any, Sums]:
    """Gradient of the mean loss over all the batch's tokens, and the loss sums.

    Each microbatch's sum is divided by the weights' sum of the *whole* batch, known
    before the forward pass, so the parts add up to exactly the loss of the batch in
    one piece, however the tokens are spread over the parts.
    """
    weight = jnp.sum(loss_weights(batch, config))
    # All of it can only be 0 together with every gradient.
    weight = jnp.where(weight > 0, weight, 1.0)

    def objective(model: Any, part: Batch) -> tuple[jax.Array, Sums]:
        sums = sums_fn(model, part)
        return (sums["nll"] + config.z_loss * sums["z"]) / weight, sums

    gradient = jax.grad(objective, has_aux=True)
    if config.microbatches == 1:
        return gradient(model, batch)

    def accumulate(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(model, part)), None

    parts = {name: _split(x, config.microbatches, shard) for name, x in batch.items()}
    shapes = jax.eval_shape(gradient, model, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(accumulate, zeros, parts)
    return total


def _split(x_BL: jax.Array, parts: int, shard: Shard) -> jax.Array:
    """[B, L] -> [parts, B/parts, L]; part i takes rows i, i+parts, i+2·parts, ….

    Strided, so that each device cuts up the rows it already holds.
    """
    rows, length = x_BL.shape
    if rows % parts:
        raise ValueError(f"step.microbatches={parts} does not divide the {rows} rows")
    x = x_BL.reshape(rows // parts, parts, length).swapaxes(0, 1)
    return shard(x, (None, "batch", "length"))


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    tx: optax.GradientTransformation,
    layout: Layout,
    config: StepConfig,
    shard: Shard,
    attention: Callable[..., jax.Array],
    parts: Parts = EVERYTHING,
    ema: float = 0.0,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the CM3 objective; a pure function, jitted by the loop.

    `parts` and `ema` as the state was created with: what of the model is trained, and
    the decay of its running average.
    Metrics are float32 scalars: `loss` (nats per token) and `perplexity`, each also
    by modality and role (`loss/image`, `loss/moved`, …), `grad_norm` before clipping,
    and `tokens`, the number of targets. With tasks also `loss/task/NAME` and
    `tokens/task/NAME`.
    """

    def sums_fn(trained: Any, part: Batch) -> Sums:
        model = parts.put(state.model, trained)
        return loss_sums(
            model, part, layout=layout, config=config, shard=shard, attention=attention
        )

    trained = parts.take(state.model)
    grads, sums = gradients(sums_fn, trained, batch, config, shard)
    trained, opt = updated(tx, trained, state.opt, grads)
    average = averaged(state.ema, trained, ema) if ema else None
    model = parts.put(state.model, trained)
    metrics = {
        **means(sums),
        "grad_norm": optax.tree.norm(grads),
        "tokens": sums["count/context"] + sums["count/moved"],
        **{f"tokens/task/{name}": sums[f"count/task/{name}"] for name in config.tasks},
    }
    state = state.replace(step=state.step + 1, model=model, opt=opt, ema=average)
    return state, metrics
