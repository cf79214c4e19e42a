"""Real programs compiled for pods and clusters that are not here: slow.

Need libtpu for TPUs; jax-cuda13-plugin and jax-cuda13-pjrt (no driver), and cuDNN, for
GPUs: `tests/run.sh all` has them in an environment of its own. What they tell of memory
is the compiler's prediction, no measurement.
"""

import dataclasses
import functools
import importlib.util
import math

import pytest

from cm3leon_jax import planning
from cm3leon_jax.parallel import compiled, plan, topologies
from cm3leon_jax.parallel.mesh import make_mesh
from cm3leon_jax.system import System
from configs import cm3leon_7b

pytestmark = pytest.mark.slow
GIB = 2**30
# MaxText 0.2.5's own compile of the same step (jax 0.12.0.1, libtpu 0.0.50.1).
MAXTEXT = {("v5p:4x4x4", 1): 4.18, ("v5e:16x16", 4): 10.35}


@functools.cache
def find(name):
    needed = "jax_plugins.xla_cuda13" if name[0] in "AH" else "libtpu"
    try:
        missing = importlib.util.find_spec(needed) is None
    except ModuleNotFoundError:
        missing = True
    if missing:
        pytest.skip(f"{needed} is not installed")
    return topologies.find(name)


def system(rows, devices, **decoder):
    """The 7B with so many rows a device, in one microbatch."""
    config = cm3leon_7b.get_config().to_dict()
    config["decoder"] |= decoder
    config["pretrain"] |= {"batch_size": rows * devices, "loss_blocks": 16}
    return System.make(config)


@functools.cache
def train_step(name, rows):
    topology = find(name)
    tied = system(rows, len(topology.devices), tie_embeddings=True)
    mesh = make_mesh(tied.mesh, topology.devices)
    program = planning.STAGES["pretrain"](tied, mesh, rows)
    return topology, program, plan.compile_program(program)


@pytest.mark.parametrize("name, rows", MAXTEXT)
def test_temporaries_are_far_below_maxtext(name, rows):
    _, _, executable = train_step(name, rows)
    temporaries = executable.memory_analysis().temp_size_in_bytes / GIB
    print(f"{name}, {rows} rows: {temporaries:.2f} GiB of temporaries")
    assert temporaries <= 0.8 * MAXTEXT[name, rows]


def test_the_7b_step_gathers_and_scatters_and_never_holds_a_whole_parameter():
    topology, program, executable = train_step("v5p:4x4x4", 1)
    text = executable.as_text()
    sent = compiled.count(text, topology.near).collectives
    n, config = len(topology.devices), cm3leon_7b.get_config().decoder
    weights = config.layers * (4 * config.width**2 + 2 * config.width * config.mlp)
    # Each weight is gathered forwards and backwards, its gradient scattered, 2 bytes.
    assert sent["all-gather"] == pytest.approx(2 * 2 * weights * (n - 1) / n, rel=0.2)
    assert sent["reduce-scatter"] >= 0.9 * 2 * weights * (n - 1) / n
    made = compiled.arrays(text)
    stacked = {
        tuple(leaf.shape)
        for leaf in planning.jax.tree.leaves(program.groups["parameters"])
        if math.prod(leaf.shape) * 4 > GIB // 2
    }
    assert stacked and not [array for array in made if array[1] in stacked]


@pytest.mark.parametrize("name", ["v5e:4x4", "H100:1x1x8"])
@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
def test_the_decode_step_at_7b_fits(name, cache):
    topology = find(name)
    config = cm3leon_7b.get_config().to_dict()
    config["mesh"] = {"data": 1, "fsdp": 1, "tensor": -1}
    served = System.make(config)
    mesh = make_mesh(served.mesh, topology.devices)
    program = planning.decode_step(served, mesh, 32, cache)
    memory = plan.compile_program(program).memory_analysis()
    # The donated cache is written in place.
    assert memory.alias_size_in_bytes > 0.2 * memory.argument_size_in_bytes
    new = memory.temp_size_in_bytes + memory.output_size_in_bytes
    total = memory.argument_size_in_bytes + new - memory.alias_size_in_bytes
    print(f"{total / GIB:.2f} GiB in all per device")
    assert total < 0.9 * topology.chip.memory


@pytest.mark.parametrize("name", ["2*v5e:4x4", "A100:2x4x8"])
def test_slices_share_out_the_axis_data(name):
    topology = find(name)
    small = system(1, len(topology.devices), layers=2, width=1024, heads=8, mlp=4096)
    with pytest.raises(ValueError, match="on 2 slices: choose a multiple of 2"):
        planning.plan(small, "pretrain", topology)
    spread = dataclasses.replace(small.mesh, data=2)
    found = planning.plan(dataclasses.replace(small, mesh=spread), "pretrain", topology)
    assert found["fits"] and found["collective_bytes"]
