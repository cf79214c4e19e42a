"""The smallest real training run, shared by the tests of the loop and of its parts."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from cm3leon_jax import vocab
from cm3leon_jax.models.attention import xla_attention
from cm3leon_jax.models.decoder import Decoder, DecoderConfig
from cm3leon_jax.parallel.mesh import MeshConfig, make_mesh
from cm3leon_jax.parallel.rules import Rules, shard_fn
from cm3leon_jax.training import loop, state, step
from cm3leon_jax.training.metrics import Work
from cm3leon_jax.training.optimizer import OptimizerConfig, make_optimizer

LAYOUT = vocab.build(text=60, image=48, classes=4, sentinels=4)
DECODER = DecoderConfig(
    vocab=LAYOUT.size, layers=2, width=16, heads=2, mlp=32, length=16
)
ROWS, RULES = 8, Rules()
STEP = step.StepConfig(segmented=True)


def mesh_of(data: int, fsdp: int, tensor: int) -> Mesh:
    devices = jax.devices()[: data * fsdp * tensor]
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices)


def batch(t: int) -> dict[str, np.ndarray]:
    """Batch t: two samples a row, padded at the end; ids that can be learnt."""
    rng = np.random.default_rng(t)
    length = DECODER.length + 1
    tokens = (rng.integers(8, 110, (ROWS, 1)) + np.arange(length)) % 120
    cut = rng.integers(5, 9, (ROWS, 1))
    segments = np.where(np.arange(length) < cut, 1, 2)
    end = length - rng.integers(1, 6, (ROWS, 1))
    segments[np.arange(length) >= end] = 0
    return {
        "tokens": np.where(segments == 0, LAYOUT.pad, tokens).astype(np.int32),
        "segments": segments.astype(np.int32),
        "positions": np.broadcast_to(
            np.arange(length, dtype=np.int32), tokens.shape
        ).copy(),
        "moved": rng.random(tokens.shape) < 0.3,
        "row": np.arange(t * ROWS, (t + 1) * ROWS),
    }


def batches(start: int) -> Iterator[dict[str, np.ndarray]]:
    t = start
    while True:
        yield batch(t)
        t += 1


def device_batch(t: int) -> dict[str, jax.Array]:
    return {key: jax.numpy.asarray(x) for key, x in batch(t).items() if key != "row"}


def optimizer(steps: int = 20, kind: Literal["adamw", "muon"] = "adamw"):
    return make_optimizer(OptimizerConfig(kind=kind, peak=3e-3, warmup=4, steps=steps))


def init(key: jax.Array, tx: Any = None) -> state.TrainState:
    return state.create(Decoder(DECODER, nnx.Rngs(key)), tx or optimizer())


def step_fn(
    mesh: Mesh, config: step.StepConfig = STEP, steps: int = 20, tx: Any = None
):
    return functools.partial(
        step.train_step,
        tx=tx or optimizer(steps),
        layout=LAYOUT,
        config=config,
        shard=shard_fn(mesh, RULES),
        attention=xla_attention,
    )


def train(directory: Path, mesh: Mesh, steps: int, **changes: Any) -> Any:
    """Runs the loop; the settings say nothing of the mesh."""
    arguments = {
        "config": loop.LoopConfig(steps=steps, log_every=1, checkpoint_every=4),
        "step_fn": step_fn(mesh),
        "init_fn": init,
        "batches": batches,
        "batch_size": ROWS,
        "settings": {"decoder": {"width": DECODER.width}, "rows": [ROWS]},
        "work": Work(unit="tokens", per_step=ROWS * DECODER.length),
        "rules": RULES,
    }
    arguments |= changes
    return loop.run(directory=directory, mesh=mesh, **arguments)
