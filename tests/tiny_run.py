"""A command that trains a tiny decoder on packed rows with retrieved documents: what
launch/pretrain.py does, for tests and benchmarks that start it many times.

    python tests/tiny_run.py --tokens DIR --workdir DIR --steps 20 --devices 4
"""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
for folder in (ROOT, ROOT / "launch", ROOT / "tests"):
    sys.path.insert(0, str(folder))

ROWS = 8


def train(tokens, directory, steps, mesh, every=4, delay=0.0):
    """Every process's part of the run; it goes on where it finds a checkpoint."""
    import functools

    import tiny_mixing
    from flax import nnx
    from tiny_data import LAYOUT

    from cm3leon_jax.data.pipeline import batches
    from cm3leon_jax.models.attention import xla_attention
    from cm3leon_jax.models.decoder import Decoder, DecoderConfig
    from cm3leon_jax.parallel.rules import Rules, batch_sharding, row_share, shard_fn
    from cm3leon_jax.training import loop, state, step
    from cm3leon_jax.training.metrics import Work
    from cm3leon_jax.training.optimizer import OptimizerConfig, make_optimizer

    rows = tiny_mixing.rows_of(Path(tokens), "first_fit")
    length = rows.packing.row_length
    index, count = row_share(batch_sharding(mesh, Rules()))
    config = DecoderConfig(
        vocab=LAYOUT.size, layers=2, width=32, heads=4, mlp=64, length=length
    )
    tx = make_optimizer(OptimizerConfig(peak=3e-3, warmup=4, steps=1000))

    def slowly(start):
        for batch in batches(
            rows,
            batch_size=ROWS,
            process_index=index,
            process_count=count,
            workers=0,
            start_step=start,
        ):
            time.sleep(delay)
            yield batch

    return loop.run(
        config=loop.LoopConfig(steps=steps, log_every=1, checkpoint_every=every),
        step_fn=functools.partial(
            step.train_step,
            tx=tx,
            layout=LAYOUT,
            config=step.StepConfig(segmented=True),
            shard=shard_fn(mesh, Rules()),
            attention=xla_attention,
        ),
        init_fn=lambda key: state.create(Decoder(config, nnx.Rngs(key)), tx),
        batches=slowly,
        batch_size=ROWS,
        directory=directory,
        mesh=mesh,
        rules=Rules(),
        settings={"rows": ROWS},
        work=Work(unit="tokens", per_step=ROWS * length),
    )


def main(given):
    import jax

    from cm3leon_jax.parallel import distributed
    from cm3leon_jax.parallel.mesh import MeshConfig, make_mesh

    jax.config.update("jax_num_cpu_devices", given.devices)
    distributed.initialize(shared=given.workdir)
    mesh = make_mesh(MeshConfig(tensor=given.tensor))
    done = train(
        *(given.tokens, given.workdir, given.steps, mesh, given.every, given.delay)
    )
    return {"steps": int(done.step)}


if __name__ == "__main__":
    import command
    from absl import flags

    flags.DEFINE_string("tokens", None, "Made by tiny_mixing.write.")
    flags.DEFINE_integer("steps", 20, "Updates.")
    flags.DEFINE_integer("devices", 1, "Simulated devices of this process.")
    flags.DEFINE_integer("tensor", 1, "Devices along the mesh axis `tensor`.")
    flags.DEFINE_integer("every", 4, "Updates between two checkpoints.")
    flags.DEFINE_float("delay", 0.0, "Seconds that a batch takes.")
    command.run(lambda: main(flags.FLAGS))
