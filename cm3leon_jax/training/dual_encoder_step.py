"""One update of the dual encoder: contrastive over the whole batch of all devices.

Pictures against their texts as in CLIP (paper section 1.8). That loss has a reason to
keep of a text what its picture shows, and none to keep apart two names that training
has never seen; so a second term contrasts every text with a view of it that lacks some
of its words, the common ones most (as in DeCLIP, arXiv:2110.05208, with the
subsampling of word2vec, arXiv:1310.4546).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from cm3leon_jax.models.dual_encoder import (
    FIRST_SCALE,
    MAX_SCALE,
    DualEncoder,
    to_float,
)
from cm3leon_jax.models.layers import Shard, identity
from cm3leon_jax.training.optimizer import OptimizerConfig, make_optimizer, updated
from cm3leon_jax.training.state import TrainState

Metrics = dict[str, jax.Array]


@dataclass(frozen=True, kw_only=True)
class DualEncoderTrainConfig:
    """Settings of one run; `optimizer.steps` is its length.

    `first_scale` is where the learned scale of inner products starts; it moves little
    in a short run. The higher it is, the less of the space is taken by telling pictures
    from texts, and the more is left for telling texts apart, or pictures.
    `text_views` is the weight of the term between texts and their views, 0 for plain
    CLIP. `view_scale` multiplies the inner products there: the lower it is, the further
    apart texts must lie. A view keeps a word that is `f` of all words with probability
    sqrt(`rare` / f), at most 1, and is never empty. Pictures are moved by up to
    `shift` pixels each way, their edge repeated.
    """

    BOOKKEEPING: ClassVar[tuple[str, ...]] = (
        *("log_every", "validate_every", "checkpoint_every"),
    )

    optimizer: OptimizerConfig
    batch_size: int
    first_scale: float = FIRST_SCALE
    text_views: float = 0.0
    view_scale: float = 10.0
    rare: float = 1e-3
    shift: int = 0
    log_every: int = 50
    validate_every: int = 1000
    checkpoint_every: int = 1000

    def __post_init__(self) -> None:
        name = "dual_encoder.training"
        for key in self.BOOKKEEPING:
            if getattr(self, key) < 1:
                raise ValueError(f"{name}.{key}={getattr(self, key)} must be positive")
        if self.batch_size < 2:
            raise ValueError(
                f"{name}.batch_size={self.batch_size}: a pair is told from others, so "
                "there must be at least 2"
            )
        for key in ("text_views", "shift"):
            if getattr(self, key) < 0:
                raise ValueError(f"{name}.{key}={getattr(self, key)} is negative")
        if not 1 <= self.first_scale <= MAX_SCALE:
            raise ValueError(
                f"{name}.first_scale={self.first_scale} must be between 1 and "
                f"{MAX_SCALE:g}, which it never exceeds"
            )
        for key in ("view_scale", "rare"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{name}.{key}={getattr(self, key)} must be positive")

    @property
    def views(self) -> int:
        """Of a text in a batch: the whole of it, then what some words are left of."""
        return 2 if self.text_views else 1


def train_step(
    state: TrainState,
    batch: Mapping[str, jax.Array],
    *,
    config: DualEncoderTrainConfig,
    seed: int,
    shard: Shard = identity,
) -> tuple[TrainState, Metrics]:
    """Updates both towers; a pure function. `seed` draws the pictures' shifts.

    The batch is what `loss_terms` takes. Metrics are float32 scalars; `loss` is the
    weighted sum of the terms.
    """
    tx = make_optimizer(config.optimizer)
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    images_BYXC = shifted(batch["images"], config.shift, key)

    def objective(model: DualEncoder):
        return loss_terms(model, {**batch, "images": images_BYXC}, config, shard)

    (loss, metrics), grads = jax.value_and_grad(objective, has_aux=True)(state.model)
    model, opt = updated(tx, state.model, state.opt, grads)
    metrics |= {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    return state.replace(step=state.step + 1, model=model, opt=opt), metrics


def loss_terms(
    model: DualEncoder,
    batch: Mapping[str, jax.Array],
    config: DualEncoderTrainConfig,
    shard: Shard = identity,
) -> tuple[jax.Array, Metrics]:
    """The loss, and its terms with the share of pictures that find their text.

    The batch: `images` uint8 [B, Y, X, 3]; `ids` int32 [B, G, L] and `lengths` int32
    [B, G], the G views of every text (`config.views`). B is of all devices together.
    """
    ids_BGL, length_BG = batch["ids"], batch["lengths"]
    B, G, L = ids_BGL.shape
    t_BGE = model.text(
        ids_BGL.reshape(B * G, L), length_BG.reshape(B * G), shard=shard
    ).reshape(B, G, -1)
    i_BE = model.image(to_float(batch["images"]), shard=shard)
    scale = model.scale()
    loss, accuracy = contrast(i_BE, t_BGE[:, 0], scale, shard)
    metrics = {"image_text": loss, "accuracy": accuracy, "scale": scale}
    if config.text_views:
        views, metrics["view_accuracy"] = contrast(
            t_BGE[:, 0], t_BGE[:, 1], config.view_scale, shard
        )
        metrics["text_text"] = views
        loss += config.text_views * views
    return loss, metrics


def contrast(
    a_BE: jax.Array, b_BE: jax.Array, scale: jax.Array | float, shard: Shard
) -> tuple[jax.Array, jax.Array]:
    """Symmetric InfoNCE of rows that belong together, and how often a finds its b.

    Every row is compared with those of all devices: the compiler gathers them.
    """
    logits_BS = shard(scale * (a_BE @ b_BE.T), ("batch", None))
    right_B = jnp.arange(len(a_BE))
    forth = optax.softmax_cross_entropy_with_integer_labels(logits_BS, right_B)
    back = optax.softmax_cross_entropy_with_integer_labels(logits_BS.T, right_B)
    accuracy = jnp.mean(jnp.argmax(logits_BS, axis=1) == right_B)
    return (jnp.mean(forth) + jnp.mean(back)) / 2, accuracy


def shifted(images_BYXC: jax.Array, most: int, key: jax.Array) -> jax.Array:
    """Every picture moved by its own whole pixels, up to `most` each way."""
    if not most:
        return images_BYXC
    B, Y, X, _ = images_BYXC.shape
    move_B2 = jax.random.randint(key, (B, 2), -most, most + 1)
    y_BY = jnp.clip(jnp.arange(Y) + move_B2[:, :1], 0, Y - 1)
    x_BX = jnp.clip(jnp.arange(X) + move_B2[:, 1:], 0, X - 1)
    return jax.vmap(lambda image, y, x: image[y][:, x])(images_BYXC, y_BY, x_BX)
