"""The loss: next-token cross-entropy in float32 (paper sections 1.3, 1.7).

Everything is returned as *sums* and counts rather than means, so that sums over
microbatches, devices or evaluation batches give exactly the mean over all tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cm3leon_jax.models.layers import Shard, identity
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
    """Negative log-likelihood in nats and log Z of every token, both float32 [B, L].

    NaN for a target that is none of the V ids.
    """
    logits_BLV = logits_BLV.astype(jnp.float32)
    log_z_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
    logit_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
    logit_BL = jnp.where(targets_BL < 0, jnp.nan, logit_BL)  # not counted from the end
    return log_z_BL - logit_BL, log_z_BL


def blockwise_nll(
    w_DV: jax.Array,
    hidden_BLD: jax.Array,
    targets_BL: jax.Array,
    blocks: int = 1,
    shard: Shard = identity,
) -> tuple[jax.Array, jax.Array]:
    """`token_nll(hidden_BLD @ w_DV, targets_BL)` with V/blocks logits a token at once.

    At 65,536 ids the logits are the largest array of the step. Blocks are cut along the
    vocabulary, not the length: so each part of a sharded `w_DV` is gathered once in
    either pass, and its gradient is complete, and scattered, when its block is done.
    Backwards the logits are made again. Raises ValueError where `blocks` does not
    divide V.
    """
    hidden_BLD = shard(hidden_BLD, ("batch", "length", None))
    if blocks == 1:
        logits_BLV = jnp.einsum(
            "BLD,DV->BLV", hidden_BLD, w_DV, preferred_element_type=jnp.float32
        )
        return token_nll(shard(logits_BLV, ("batch", "length", "vocab")), targets_BL)
    width, size = w_DV.shape
    if size % blocks:
        raise ValueError(f"loss_blocks={blocks} does not divide the vocabulary {size}")
    # Block i has the ids i, i+blocks, …: every device cuts up the ids it holds.
    w_iVD = w_DV.T.reshape(size // blocks, blocks, width).swapaxes(0, 1)
    w_iVD = shard(w_iVD, (None, "vocab", "table"))
    return _nll_of_blocks(shard, hidden_BLD, w_iVD, targets_BL)


def _logits(x_BLD: jax.Array, w_VD: jax.Array, shard: Shard) -> jax.Array:
    w_VD = shard(w_VD, ("vocab", None))  # gathered here
    logits_BLV = jnp.einsum(
        "BLD,VD->BLV", x_BLD, w_VD, preferred_element_type=jnp.float32
    )
    return shard(logits_BLV, ("batch", "length", "vocab"))


def _is_target(shape: tuple[int, ...], targets_BL: jax.Array, i: Any, blocks: int):
    """Which logits of block i are those of the targets, bool [B, L, V/blocks]."""
    ids = jax.lax.broadcasted_iota(jnp.int32, shape, 2) * blocks + i
    return ids == targets_BL[..., None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nll_of_blocks(shard, x_BLD, w_iVD, targets_BL):
    return _forward(shard, x_BLD, w_iVD, targets_BL)[0]


def _forward(shard, x_BLD, w_iVD, targets_BL):
    blocks = len(w_iVD)

    def block(logit_BL, xs):
        i, w_VD = xs
        logits_BLV = _logits(x_BLD, w_VD, shard)
        hit_BLV = _is_target(logits_BLV.shape, targets_BL, i, blocks)
        logit_BL = logit_BL + jnp.sum(jnp.where(hit_BLV, logits_BLV, 0.0), axis=-1)
        return logit_BL, jax.nn.logsumexp(logits_BLV, axis=-1)

    zeros_BL = jnp.zeros(targets_BL.shape, jnp.float32)
    logit_BL, log_z_iBL = jax.lax.scan(block, zeros_BL, (jnp.arange(blocks), w_iVD))
    log_z_BL = jax.nn.logsumexp(log_z_iBL, axis=0)
    inside_BL = (targets_BL >= 0) & (targets_BL < blocks * w_iVD.shape[1])
    logit_BL = jnp.where(inside_BL, logit_BL, jnp.nan)  # as without blocks
    kept = (x_BLD, w_iVD, targets_BL, log_z_BL)
    return (log_z_BL - logit_BL, log_z_BL), kept


def _backward(shard, kept, cotangents):
    x_BLD, w_iVD, targets_BL, log_z_BL = kept
    of_nll_BL, of_log_z_BL = cotangents
    blocks = len(w_iVD)

    def block(dx_BLD, xs):
        i, w_VD = xs
        logits_BLV = _logits(x_BLD, w_VD, shard)
        p_BLV = jnp.exp(logits_BLV - log_z_BL[..., None])
        d_BLV = p_BLV * (of_nll_BL + of_log_z_BL)[..., None]
        hit_BLV = _is_target(p_BLV.shape, targets_BL, i, blocks)
        d_BLV = (d_BLV - jnp.where(hit_BLV, of_nll_BL[..., None], 0.0)).astype(
            x_BLD.dtype
        )
        dx_BLD = dx_BLD + jnp.einsum(
            "BLV,VD->BLD", d_BLV, w_VD, preferred_element_type=jnp.float32
        )
        dw_VD = jnp.einsum("BLV,BLD->VD", d_BLV, x_BLD)
        return dx_BLD, shard(dw_VD, ("vocab", "table"))

    zeros_BLD = jnp.zeros(x_BLD.shape, jnp.float32)
    dx_BLD, dw_iVD = jax.lax.scan(block, zeros_BLD, (jnp.arange(blocks), w_iVD))
    return dx_BLD.astype(x_BLD.dtype), dw_iVD, None


_nll_of_blocks.defvjp(_forward, _backward)


def next_token_loss(
    w_DV: jax.Array,
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
    shard: Shard = identity,
) -> Sums:
    """Weighted sums over all targets: `nll`, `z` (log² Z), `count`, and by group.

    Logits are `hidden_BLD @ w_DV`, `blocks` and `shard` those of `blockwise_nll`.
    `weights_BL` is 0 or 1 (whether it is a target at all), `moved_BL` and
    `retrieved_BL` bool. The first three are those of the objective, in which a token of
    a retrieved document counts `retrieved_weight` times. `nll/text`, `count/text`, …
    break the loss down by `GROUPS`: special tokens and classes are in neither modality,
    and every token is in one role; there every token counts once. `task_BL` numbers the
    targets' `tasks`, 1, 2, …, for the groups `task/NAME`. All float32 scalars.
    """
    nll_BL, log_z_BL = blockwise_nll(w_DV, hidden_BLD, targets_BL, blocks, shard)
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
