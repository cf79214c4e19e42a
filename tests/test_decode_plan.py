"""The decode step at 7B compiled ahead of time for hardware that is not here.

Needs `libtpu` for the TPU, `jax-cuda13-plugin` and `jax-cuda13-pjrt` (no driver) for
the GPUs. What it tells of memory is the compiler's prediction, no measurement.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from cm3leon_jax.models import cache as caches
from cm3leon_jax.models.decoder import abstract
from cm3leon_jax.models.unrolled import _unroll
from cm3leon_jax.parallel.mesh import AXES
from cm3leon_jax.parallel.rules import Rules, shard_fn, shardings
from cm3leon_jax.system import System
from configs import cm3leon_7b

ROWS, STREAMS, PREFIX, WRITTEN = 32, 2, 3072, 1024  # the whole context of 4,096
GIB = 2**30
# XLA's GpuTargetConfigProto of an H100 SXM, from its data sheet.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def tpu():
    pytest.importorskip("libtpu")
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE="v5litepod-16",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4")


def gpu():
    pytest.importorskip("jax_plugins.xla_cuda13")
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name="1x1x8",
        topology="1x1x8",
        target_config=H100,
    )


def compiled_step(topology, cache):
    devices = np.asarray(topology.devices)
    mesh = Mesh(devices.reshape(1, 1, -1), AXES)
    rules = Rules()
    shard = shard_fn(mesh, rules)
    config = System.make(cm3leon_7b.get_config().to_dict()).decoder_config

    def placed(shape, names):
        sharding = NamedSharding(mesh, rules.compute.spec(names))
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    def stored(tree):
        """Keys and values: [U, H, L(, K)] of a prefix, [B, G, H, T(, K)] of steps."""

        def leaf(path, x):
            name = jax.tree_util.keystr(path)
            if ".k" not in name and ".v" not in name or "visible" in name:
                return placed(x, (None,) * x.ndim)
            extra = 1 if x.shape[1] == STREAMS else 0
            names = ("batch", *(None,) * extra, "heads", None, None)
            return placed(x, names[: x.ndim])

        return jax.tree_util.tree_map_with_path(leaf, tree)

    decoder = jax.eval_shape(
        lambda model: _unroll(model, "bfloat16", None, lambda x, names: x),
        abstract(config),
    )
    serving = Rules(store=rules.compute)
    decoder = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        decoder,
        shardings(decoder, mesh, serving),
    )

    def begin(decoder):
        K = config.width // config.heads
        zeros = jnp.zeros((ROWS, config.heads, PREFIX, K), jnp.bfloat16)
        vectors = (caches._store(zeros, cache),) * config.layers
        prefix = caches.Prefix(k=vectors, v=vectors, length_U=jnp.zeros(ROWS, int))
        past = (prefix,) * STREAMS
        return past, caches.begin(decoder, past, ROWS, WRITTEN, cache=cache)

    past, now = jax.eval_shape(begin, decoder)
    token_BG = jax.ShapeDtypeStruct((ROWS, STREAMS), jnp.int32)

    def step(decoder, token_BG, past, now):
        return caches.step(decoder, token_BG, past, now, shard=shard)

    return (
        jax.jit(step, donate_argnames="now")
        .lower(decoder, placed(token_BG, ("batch", None)), stored(past), stored(now))
        .compile()
    )


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
@pytest.mark.parametrize(
    "target, gibibytes", [(tpu, 16), (gpu, 79)], ids=["v5e:4x4", "8xH100"]
)
def test_the_decode_step_at_7b_fits(target, gibibytes, cache):
    memory = compiled_step(target(), cache).memory_analysis()
    arguments = memory.argument_size_in_bytes / GIB
    new = memory.temp_size_in_bytes + memory.output_size_in_bytes
    total = arguments + (new - memory.alias_size_in_bytes) / GIB
    print(f"{arguments:.2f} GiB of arguments, {total:.2f} GiB in all per device")
    # The donated cache is written in place.
    assert memory.alias_size_in_bytes > 0.2 * memory.argument_size_in_bytes
    assert total < 0.9 * gibibytes
