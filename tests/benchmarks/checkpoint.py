r"""What a checkpoint costs training: written in the background, and if it were not.

    python tests/benchmarks/checkpoint.py [--width 512] [--layers 8] [--rounds 5]

The loop's own `Checkpoints` on a train state with two moments in float32, while the
compiled step goes on. In turn, a window of updates with one save at its beginning and
one without; the last line is one JSON object:

extra_seconds        what a save adds to the training that goes on beside it
held_up_seconds      of these, those for which `save` itself holds up the loop
cost_every_5_minutes extra_seconds / 300
blocking_seconds     a save that is waited for: what the background hides
"""

import argparse
import functools
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[2]))

from cm3leon_jax import vocab
from cm3leon_jax.models.attention import xla_attention
from cm3leon_jax.models.decoder import Decoder, DecoderConfig
from cm3leon_jax.models.layers import identity
from cm3leon_jax.training import state, step
from cm3leon_jax.training.checkpoint import Checkpoints
from cm3leon_jax.training.optimizer import (
    OptimizerConfig,
    make_optimizer,
)


def main(given):
    layout = vocab.build(text=1024, image=1024, classes=4, sentinels=4)
    config = DecoderConfig(
        vocab=layout.size,
        layers=given.layers,
        width=given.width,
        heads=8,
        mlp=4 * given.width,
        length=given.length,
    )
    tx = make_optimizer(OptimizerConfig(peak=1e-3, warmup=1, steps=10**6))
    begin = jax.jit(lambda key: state.create(Decoder(config, nnx.Rngs(key)), tx))
    update = jax.jit(
        functools.partial(
            step.train_step,
            tx=tx,
            layout=layout,
            config=step.StepConfig(segmented=False),
            shard=identity,
            attention=xla_attention,
        ),
        donate_argnums=0,
    )
    shape, rng = (given.rows, given.length + 1), np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(8, 2000, shape).astype(np.int32),
        "segments": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        "moved": np.zeros(shape, bool),
    }
    batch = jax.device_put(batch)
    current = begin(jax.random.key(0))
    size = sum(x.nbytes for x in jax.tree.leaves(current))

    def learn(seconds):
        """Updates for so long; how many."""
        nonlocal current
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            current, made = update(current, batch)
            jax.block_until_ready(made)
            done += 1
        return done, time.perf_counter() - began

    learn(1.0)
    found = {"extra": [], "held": [], "blocking": []}
    with tempfile.TemporaryDirectory() as name:
        with Checkpoints(name, settings={}, keep=1) as checkpoints:
            number = 0
            for turn in range(given.rounds + 1):
                done, seconds = learn(given.window)
                pace = seconds / done
                number += 1
                began = time.perf_counter()
                checkpoints.save(number, current, number)
                held = time.perf_counter() - began
                done, _ = learn(given.window)
                checkpoints.wait()
                extra = time.perf_counter() - began - done * pace
                number += 1
                began = time.perf_counter()
                checkpoints.save(number, current, number)
                checkpoints.wait()
                blocking = time.perf_counter() - began
                if turn:  # the first one makes folders and threads
                    for key, value in zip(found, (extra, held, blocking), strict=True):
                        found[key].append(value)
                print(
                    f"round {turn}: step {pace:.3f} s, extra {extra:.2f} s, held up "
                    f"{held:.2f} s, waited for {blocking:.2f} s",
                    flush=True,
                )
    extra, held, blocking = (float(np.median(found[key])) for key in found)
    print(
        json.dumps(
            {
                "extra_seconds": round(extra, 3),
                "held_up_seconds": round(held, 3),
                "blocking_seconds": round(blocking, 3),
                "cost_every_5_minutes": round(extra / 300, 5),
                "megabytes": round(size / 1e6, 1),
                "rounds": {k: [round(x, 3) for x in v] for k, v in found.items()},
                "cores": os.cpu_count(),
                "machine": platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--window", type=float, default=10.0)
    main(parser.parse_args())
