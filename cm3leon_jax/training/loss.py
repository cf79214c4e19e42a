"""The loss: next-token cross-entropy in float32 (paper sections 1.3, 1.7).

Everything is returned as *sums* and counts rather than means, so that sums over
microbatches, devices or evaluation batches give exactly the mean over all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from cm3leon_jax.vocab import IMAGE, TEXT, Layout

Sums = dict[str, jax.Array]

# What the loss is broken down by: the modality of the target token, and whether it
# belongs to a moved span (with its sentinel and <eoss>) or to the context.
GROUPS = ("text", "image", "context", "moved")
# With retrieved documents also: what they stand before, they themselves, and the codes
# of the query's pictures, which they are there to make easier.
RETRIEVAL_GROUPS = ("query", "retrieved", "query_image")
TASK_GROUP = "task/"  # and the task's name


def token_nll(
    logits_BLV: jax.Array, targets_BL: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood in nats and log Z of every token, both float32 [B, L]."""
    logits_BLV = logits_BLV.astype(jnp.float32)
    log_z_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
    logit_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
    return log_z_BL - logit_BL, log_z_BL


def blockwise_nll(
    head: Callable[[jax.Array], jax.Array],
    hidden_BLD: jax.Array,
    targets_BL: jax.Array,
    blocks: int,
) -> tuple[jax.Array, jax.Array]:
    """`token_nll(head(hidden_BLD), targets_BL)` with only L/blocks logits at a time.

    At 65,536 ids the logits are the largest array of the step; here they are made
    again in the backward pass, block by block along the length, which no mesh axis
    splits. Raises ValueError where `blocks` does not divide L.
    """
    if blocks == 1:
        return token_nll(head(hidden_BLD), targets_BL)
    length = targets_BL.shape[1]
    if length % blocks:
        raise ValueError(f"loss_blocks={blocks} does not divide the length {length}")

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], blocks, length // blocks, *x.shape[2:])
        return x.swapaxes(0, 1)

    def block(_: None, xs: tuple[jax.Array, jax.Array]):
        hidden, targets = xs
        return None, token_nll(head(hidden), targets)

    _, stacked = jax.lax.scan(
        jax.checkpoint(block), None, (split(hidden_BLD), split(targets_BL))
    )
    nll_BL, log_z_BL = (x.swapaxes(0, 1).reshape(targets_BL.shape) for x in stacked)
    return nll_BL, log_z_BL


def next_token_loss(
    head: Callable[[jax.Array], jax.Array],
    hidden_BLD: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    moved_BL: jax.Array,
    *,
    layout: Layout,
    retrieved_BL: jax.Array | None = None,
    retrieved_weight: float = 1.0,
    task_BL: jax.Array | None = None,
    tasks: Sequence[str] = (),
    blocks: int = 1,
) -> Sums:
    """Weighted sums over all targets: `nll`, `z` (log² Z), `count`, and by group.

    `weights_BL` is 0 or 1 (whether it is a target at all), `moved_BL` and
    `retrieved_BL` bool. The first three are those of the objective, in which a token of
    a retrieved document counts `retrieved_weight` times. `nll/text`, `count/text`, …
    break the loss down by `GROUPS`: special tokens and classes are in neither modality,
    and every token is in one role; there every token counts once. `task_BL` numbers the
    targets' `tasks`, 1, 2, …, for the groups `task/NAME`. All float32 scalars.
    """
    nll_BL, log_z_BL = blockwise_nll(head, hidden_BLD, targets_BL, blocks)
    modality_BL = layout.modality(targets_BL)
    image_BL = modality_BL == IMAGE
    members = [modality_BL == TEXT, image_BL, ~moved_BL, moved_BL]
    objective_BL, groups = weights_BL, GROUPS
    if retrieved_BL is not None:
        objective_BL = discounted(weights_BL, retrieved_BL, retrieved_weight)
        members += [~retrieved_BL, retrieved_BL, image_BL & ~retrieved_BL]
        groups += RETRIEVAL_GROUPS
    sums = {
        "nll": jnp.sum(nll_BL * objective_BL),
        "z": jnp.sum(jnp.square(log_z_BL) * objective_BL),
        "count": jnp.sum(objective_BL),
    }
    for name, member_BL in zip(groups, members, strict=True):
        sums[f"nll/{name}"] = jnp.sum(nll_BL * weights_BL * member_BL)
        sums[f"count/{name}"] = jnp.sum(weights_BL * member_BL)
    if task_BL is not None:
        member_BLT = task_BL[..., None] == jnp.arange(1, 1 + len(tasks))
        for kind, values_BL in (("nll", nll_BL * weights_BL), ("count", weights_BL)):
            sums_T = jnp.sum(values_BL[..., None] * member_BLT, axis=(0, 1))
            for name, total in zip(tasks, sums_T, strict=True):
                sums[f"{kind}/{TASK_GROUP}{name}"] = total
    return sums


def discounted(
    weights_BL: jax.Array, retrieved_BL: jax.Array, weight: float
) -> jax.Array:
    """Weights of the objective: those of retrieved documents times `weight`."""
    return weights_BL * jnp.where(retrieved_BL, weight, 1.0)


def means(sums: Sums) -> dict[str, jax.Array]:
    """Sums -> `loss` and `perplexity`, overall and as `loss/text`, `loss/image`, …; of
    tasks the loss only.

    A group without tokens is NaN, which the metric writer leaves out.
    """
    metrics: dict[str, jax.Array] = {}
    groups = [key.removeprefix("count") for key in sums if key.startswith("count/")]
    for name in ("", *groups):
        count = sums[f"count{name}"]
        mean = sums[f"nll{name}"] / jnp.where(count > 0, count, jnp.nan)
        metrics[f"loss{name}"] = mean
        if not name.startswith(f"/{TASK_GROUP}"):
            metrics[f"perplexity{name}"] = jnp.exp(mean)
    return metrics
