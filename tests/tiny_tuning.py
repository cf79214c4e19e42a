"""A tiny decoder tuned in part, shared by the tests of parts, low rank and averages."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny_training as tiny

from cm3leon_jax.models.decoder import Decoder, DecoderConfig, abstract
from cm3leon_jax.parallel.rules import shardings
from cm3leon_jax.training import state
from cm3leon_jax.training.checkpoint import leaf_names
from cm3leon_jax.training.parts import Parts, PartsConfig
from cm3leon_jax.training.state import TrainState

RANK, ALPHA, DECAY = 4, 6.0, 0.6
LOW_RANK = ("lora", "embed_class_rows", "head_class_rows", "head_image_rows")


def parts_of(*train: str) -> Parts:
    low_rank = {"rank": RANK, "alpha": ALPHA} if "lora" in train else {}
    return Parts(PartsConfig(train=train, **low_rank), tiny.LAYOUT)


def pretrained(config: DecoderConfig = tiny.DECODER) -> Decoder:
    """A decoder none of whose parameters is zero, so that all get gradients."""
    shapes, structure = jax.tree.flatten(abstract(config))
    rng = np.random.default_rng(2)
    arrays = [0.3 * rng.standard_normal(x.shape, np.float32) for x in shapes]
    return structure.unflatten([jnp.asarray(x) for x in arrays])


def by_name(tree: Any) -> dict[str, Any]:
    """Leaves on the host, by the names that they have in a checkpoint."""
    leaves = jax.device_get(jax.tree.leaves(tree))
    return dict(zip(leaf_names(tree), leaves, strict=True))


@functools.cache
def updates(
    train: tuple[str, ...], kind: Any, shape: tuple[int, int, int], ema: float = DECAY
) -> tuple[list[TrainState], list[dict[str, float]]]:
    """The initial state and those after three updates on a mesh, and their metrics."""
    parts, mesh = parts_of(*train), tiny.mesh_of(*shape)
    tx = tiny.optimizer(20, kind)

    def init(key: jax.Array) -> TrainState:
        model = parts.prepared(pretrained(), key)
        return state.create(model, tx, parts=parts, ema=ema)

    place = shardings(jax.eval_shape(init, jax.random.key(3)), mesh, tiny.RULES)
    one = functools.partial(tiny.step_fn(mesh, tx=tx), parts=parts, ema=ema)
    one = jax.jit(one, out_shardings=(place, None))
    states = [jax.jit(init, out_shardings=place)(jax.random.key(3))]
    metrics = []
    for t in range(3):
        after, measured = one(states[-1], tiny.device_batch(t))
        states.append(after)
        metrics.append(jax.tree.map(float, measured))
    return states, metrics
