r"""Tokens a second of one program on 8 simulated devices against 1.

    python tests/benchmarks/scaling.py [--rounds 5] [--meshes 1x8x1,8x1x1,2x2x2]

The same train step, batch and machine: simulated devices share the same cores, so a
ratio of 1 says that what sharding adds (collectives, smaller products, copies) costs
nothing. Every side runs in processes of its own, in turn. The last line is one JSON
object; `cpu_ratio` is of processor time and still tells something where others disturb.
"""

import argparse
import functools
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
WARM = 3


def side(given, mesh_sizes):
    import jax
    from flax import nnx

    from cm3leon_jax import vocab
    from cm3leon_jax.models.attention import xla_attention
    from cm3leon_jax.models.decoder import Decoder, DecoderConfig
    from cm3leon_jax.parallel.mesh import MeshConfig, make_mesh
    from cm3leon_jax.parallel.rules import Rules, batch_sharding, shard_fn, shardings
    from cm3leon_jax.training import state, step
    from cm3leon_jax.training.optimizer import OptimizerConfig, make_optimizer

    data, fsdp, tensor = mesh_sizes
    jax.config.update("jax_num_cpu_devices", data * fsdp * tensor)
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    layout, rules = vocab.build(text=512, image=256, classes=4, sentinels=4), Rules()
    config = DecoderConfig(
        vocab=layout.size,
        layers=given.layers,
        width=given.width,
        heads=8,
        mlp=4 * given.width,
        length=given.length,
    )
    tx = make_optimizer(OptimizerConfig(peak=1e-3, warmup=1, steps=10**6))

    def init(key):
        return state.create(Decoder(config, nnx.Rngs(key)), tx)

    abstract = jax.eval_shape(init, jax.random.key(0))
    placement = shardings(abstract, mesh, rules)
    current = jax.jit(init, out_shardings=placement)(jax.random.key(0))
    update = functools.partial(
        step.train_step,
        tx=tx,
        layout=layout,
        config=step.StepConfig(segmented=False),
        shard=shard_fn(mesh, rules),
        attention=xla_attention,
    )
    structure, leaves = jax.tree.structure(current), jax.tree.leaves(current)

    def on_leaves(leaves, batch):  # as in training/loop.py
        made, metrics = update(structure.unflatten(leaves), batch)
        return jax.tree.leaves(made), metrics["loss"]

    compiled = jax.jit(
        on_leaves,
        donate_argnums=0,
        out_shardings=(jax.tree.leaves(placement), None),
    )
    shape, rng = (given.rows, given.length + 1), np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(8, 700, shape).astype(np.int32),
        "segments": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy(),
        "moved": np.zeros(shape, bool),
    }
    batch = jax.device_put(batch, batch_sharding(mesh, rules))
    wall, cpu = [], []
    for _ in range(WARM + given.repeats):
        began, worked = time.perf_counter(), time.process_time()
        leaves, loss = compiled(leaves, batch)
        loss.block_until_ready()
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - worked)
    return {
        "wall": float(np.median(wall[WARM:])),
        "cpu": float(np.median(cpu[WARM:])),
        "loss": float(loss),
    }


def main(given):
    names = ["1x1x1", *given.meshes.split(",")]
    found = {name: [] for name in names}
    for turn in range(given.rounds):
        for name in names:
            command = [sys.executable, __file__, "--side", name]
            for key in ("layers", "width", "rows", "length", "repeats"):
                command += [f"--{key}", str(getattr(given, key))]
            done = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, check=True
            )
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {turn}: {name} {found[name][-1]}", flush=True)

    def ratio(name, clock):
        one = np.array([x[clock] for x in found["1x1x1"]])
        return round(float(np.median(one / [x[clock] for x in found[name]])), 3)

    tokens = given.rows * given.length
    result = {
        "ratio": {name: ratio(name, "wall") for name in names[1:]},
        "cpu_ratio": {name: ratio(name, "cpu") for name in names[1:]},
        "tokens_per_second": {
            name: round(tokens / float(np.median([x["wall"] for x in found[name]])))
            for name in names
        },
        "loss": {name: found[name][-1]["loss"] for name in names},
        "cores": os.cpu_count(),
        "machine": platform.machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--meshes", default="1x8x1,8x1x1,2x2x2")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        sizes = tuple(int(x) for x in options.side.split("x"))
        print(json.dumps(side(options, sizes)))
    else:
        main(options)
