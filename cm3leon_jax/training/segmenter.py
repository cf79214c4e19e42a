"""Training of the U-Net in the common loop: the segmenter to compare with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from cm3leon_jax.config import essential
from cm3leon_jax.models import unet
from cm3leon_jax.models.layers import Shard, identity
from cm3leon_jax.models.unet import UNet, UNetConfig
from cm3leon_jax.models.vqgan import to_float
from cm3leon_jax.parallel.rules import Rules, batch_sharding, row_share, shard_fn
from cm3leon_jax.training import loop, state
from cm3leon_jax.training.image_tokenizer import image_batches
from cm3leon_jax.training.metrics import Work
from cm3leon_jax.training.optimizer import OptimizerConfig, make_optimizer, updated
from cm3leon_jax.training.state import TrainState

_AT_ONCE = 64  # pictures of one call of `segment`


@dataclass(frozen=True, kw_only=True)
class SegmenterTrainConfig:
    """Settings of one run; `optimizer.steps` is its length."""

    BOOKKEEPING: ClassVar[tuple[str, ...]] = ("log_every", "checkpoint_every")

    optimizer: OptimizerConfig
    batch_size: int
    log_every: int = 50
    checkpoint_every: int = 1000

    def __post_init__(self) -> None:
        for key in ("batch_size", *self.BOOKKEEPING):
            if getattr(self, key) < 1:
                raise ValueError(
                    f"segmenter.{key}={getattr(self, key)} must be positive"
                )


def train(
    config: SegmenterTrainConfig,
    model_config: UNetConfig,
    *,
    images: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    directory: str | Path,
    mesh: Mesh,
    rules: Rules,
    seed: int = 0,
) -> UNet:
    """Trains, or goes on where `directory` left off.

    `images` is random access to uint8 [Y, X, 3] pictures, `masks` to the integer
    labels [Y, X] of their pixels, in [0, classes). Raises ValueError where they do not
    fit each other or the model, and what the loop raises.
    """
    side = model_config.image_size
    if not len(images) or len(images) != len(masks):
        raise ValueError(
            f"{len(masks)} masks for {len(images)} pictures: there must be some, and "
            "one for each"
        )
    if images[0].shape != (side, side, 3) or masks[0].shape != (side, side):
        raise ValueError(
            f"pictures of {list(images[0].shape)} and masks of {list(masks[0].shape)}: "
            f"the U-Net takes [{side}, {side}, 3] and [{side}, {side}] "
            "(unet.image_size)"
        )
    tx = make_optimizer(config.optimizer)

    final = loop.run(
        config=loop.LoopConfig(
            steps=config.optimizer.steps,
            log_every=config.log_every,
            checkpoint_every=config.checkpoint_every,
            seed=seed,
        ),
        step_fn=functools.partial(train_step, tx=tx, shard=shard_fn(mesh, rules)),
        init_fn=lambda key: state.create(unet.build(model_config, key), tx),
        batches=functools.partial(
            mask_batches,
            *(images, masks, config, model_config.classes, seed),
            share=row_share(batch_sharding(mesh, rules)),
        ),
        batch_size=config.batch_size,
        directory=directory,
        mesh=mesh,
        rules=rules,
        settings={
            "model": dataclasses.asdict(model_config),
            "training": essential(config),
            "seed": seed,
        },
        work=Work(unit="images", per_step=config.batch_size),
        name="segmenter",
    )
    return final.model


def mask_batches(
    images: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    config: SegmenterTrainConfig,
    classes: int,
    seed: int,
    start: int,
    share: tuple[int, int] = (0, 1),
) -> Iterator[dict[str, np.ndarray]]:
    """`image_batches`, a `share` of each, with the `masks` int32 [b, Y, X] of their
    pictures.

    Raises ValueError for a label without class.
    """
    steps, size = config.optimizer.steps, config.batch_size
    for batch in image_batches(
        images, start, batch=size, steps=steps, seed=seed, share=share
    ):
        labels = np.stack([masks[row] for row in batch["row"]]).astype(np.int32)
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(
                f"a mask has labels from {labels.min()} to {labels.max()}, "
                f"unet.classes={classes}"
            )
        yield batch | {"masks": labels}


def train_step(
    state: TrainState,
    batch: Mapping[str, jax.Array],
    *,
    tx: optax.GradientTransformation,
    shard: Shard = identity,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update on the mean cross-entropy over pixels; a pure function.

    The batch: `images` uint8 [B, Y, X, 3], `masks` int32 [B, Y, X]. Metrics: `loss`,
    `grad_norm`, and `accuracy`, the share of pixels that are right.
    """

    def objective(model: UNet) -> tuple[jax.Array, jax.Array]:
        logits_BYXC = model(to_float(batch["images"]), shard=shard)
        wanted_BYXC = jax.nn.one_hot(batch["masks"], logits_BYXC.shape[-1])
        loss_BYX = optax.softmax_cross_entropy(logits_BYXC, wanted_BYXC)
        return loss_BYX.mean(), (logits_BYXC.argmax(-1) == batch["masks"]).mean()

    gradient = jax.value_and_grad(objective, has_aux=True)
    (loss, accuracy), grads = gradient(state.model)
    model, opt = updated(tx, state.model, state.opt, grads)
    metrics = {"loss": loss, "accuracy": accuracy, "grad_norm": optax.tree.norm(grads)}
    return state.replace(step=state.step + 1, model=model, opt=opt), metrics


@jax.jit
def _labels(model: UNet, images_BYXC: jax.Array) -> jax.Array:
    return model(to_float(images_BYXC)).argmax(-1).astype(jnp.int32)


def segment(model: UNet, images_BYXC: np.ndarray) -> np.ndarray:
    """Uint8 pictures [B, Y, X, 3] -> the likeliest labels, int32 [B, Y, X].

    In batches of one size, so that no number of pictures compiles anew.
    """
    found = [np.zeros((0, *images_BYXC.shape[1:3]), np.int32)]
    for start in range(0, len(images_BYXC), _AT_ONCE):
        part = images_BYXC[start : start + _AT_ONCE]
        padding = [(0, _AT_ONCE - len(part))] + [(0, 0)] * 3
        found.append(np.asarray(_labels(model, np.pad(part, padding)))[: len(part)])
    return np.concatenate(found)
