import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training as tiny
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cm3leon_jax.parallel.mesh import AXES
from cm3leon_jax.parallel.rules import (
    AxisTable,
    Rules,
    batch_sharding,
    row_share,
    shard_fn,
    shardings,
)
from cm3leon_jax.training.checkpoint import leaf_names


def placements(mesh):
    abstract = jax.eval_shape(tiny.init, jax.random.key(0))
    leaves = jax.tree.leaves(shardings(abstract, mesh, tiny.RULES))
    return dict(zip(leaf_names(abstract), leaves, strict=True))


def test_parameters_follow_the_table_and_moments_follow_the_parameters():
    specs = {name: s.spec for name, s in placements(tiny.mesh_of(2, 2, 2)).items()}
    assert specs["model.embed"] == P("tensor", "fsdp")
    assert specs["model.blocks.w_up"] == P(None, "fsdp", "tensor")
    assert specs["model.blocks.w_out"] == P(None, "tensor", None, "fsdp")
    assert specs["step"] == P()
    for name in [name for name in specs if name.startswith("model.")]:
        moments = [m for m in specs if m.endswith(name.removeprefix("model"))]
        assert len(moments) == 3  # the parameter, mu, nu
        assert {specs[moment] for moment in moments} == {specs[name]}


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (8, 1, 1)])
def test_initialisation_never_holds_the_whole_state_on_one_device(sizes):
    mesh = tiny.mesh_of(*sizes)
    abstract = jax.eval_shape(tiny.init, jax.random.key(0))
    placement = shardings(abstract, mesh, tiny.RULES)
    init = jax.jit(tiny.init, out_shardings=placement)
    state = init(jax.random.key(0))
    parts = sizes[1] * sizes[2]
    per_device = whole = 0
    for leaf in jax.tree.leaves(state.model):
        whole += leaf.nbytes
        per_device += leaf.addressable_shards[0].data.nbytes
    # Learned positions are split over fsdp only, everything else over both.
    assert per_device <= whole / parts * 1.1
    assert {s.device for s in state.model.embed[...].addressable_shards} == set(
        mesh.devices.flat
    )
    # Nor does the compiled program: all that it makes is made in parts. (A copy of
    # the whole would be counted among its temporaries or its outputs.)
    memory = init.lower(jax.random.key(0)).compile().memory_analysis()
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert memory.output_size_in_bytes < state_bytes / parts * 1.1 + 1024
    if parts == 8:
        assert memory.temp_size_in_bytes < whole


def test_the_initial_state_is_the_same_on_every_mesh():
    def initial(mesh):
        abstract = jax.eval_shape(tiny.init, jax.random.key(0))
        init = jax.jit(tiny.init, out_shardings=shardings(abstract, mesh, tiny.RULES))
        return jax.device_get(init(jax.random.key(3)).model)

    one, eight = initial(tiny.mesh_of(1, 1, 1)), initial(tiny.mesh_of(2, 2, 2))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        assert (a == b).all()


def test_activations_are_placed_by_the_computing_table():
    mesh = tiny.mesh_of(2, 2, 2)
    shard = shard_fn(mesh, tiny.RULES)
    x_BLF = jax.jit(lambda x: shard(x, ("batch", "length", "mlp")))(jnp.ones((8, 4, 6)))
    assert x_BLF.sharding.spec == P(("data", "fsdp"), None, "tensor")


def test_the_optimizer_in_the_memory_of_the_hosts_does_the_same(tmp_path):
    """Bit by bit, and a run may go on with or without it."""
    mesh, away = tiny.mesh_of(2, 2, 2), Rules(offload=True)
    here = tiny.train(tmp_path / "here", mesh, 8)
    tiny.train(tmp_path / "there", mesh, 4, rules=away)
    there = tiny.train(tmp_path / "there", mesh, 8, rules=away)
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(there.opt) if x.ndim}
    assert kinds == {"pinned_host"}
    assert there.model.embed[...].sharding.memory_kind != "pinned_host"
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_array_equal(a, jax.device_get(b))
    back = tiny.train(tmp_path / "there", mesh, 10)
    for a, b in zip(
        jax.tree.leaves(tiny.train(tmp_path / "here", mesh, 10)),
        jax.tree.leaves(back),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_what_cannot_be_placed_is_named(monkeypatch):
    mesh = tiny.mesh_of(1, 8, 1)
    with pytest.raises(ValueError, match="'bogus'.*not one of"):
        tiny.RULES.store.spec(("embed", "bogus"))
    with pytest.raises(ValueError, match="mesh axis twice"):
        AxisTable(embed=("fsdp",), mlp=("fsdp",)).spec(("embed", "mlp"))
    with pytest.raises(ValueError, match="no axis of the mesh"):
        AxisTable(embed=("model",))
    rules = Rules(store=AxisTable(layers=("fsdp",)))
    abstract = jax.eval_shape(tiny.init, jax.random.key(0))
    names = leaf_names(abstract)
    small = dict(
        zip(names, jax.tree.leaves(shardings(abstract, mesh, rules)), strict=True)
    )
    assert not any(small["model.blocks.w_up"].spec)  # a copy on every device
    monkeypatch.setattr("cm3leon_jax.parallel.rules.LARGE", 1000)
    with pytest.raises(ValueError, match=r"blocks.*dimension of 2 .* 8 devices"):
        shardings(abstract, mesh, rules)


@dataclasses.dataclass(frozen=True)
class Device:
    process_index: int
    id: int


def shares(monkeypatch, sizes, processes, rules=tiny.RULES):
    """What each process reads, if these are the processes of the mesh's devices."""
    devices = [Device(process, n) for n, process in enumerate(processes)]
    mesh = Mesh(np.array(devices, object).reshape(sizes), AXES)
    found = []
    for process in range(max(processes) + 1):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        found.append(row_share(batch_sharding(mesh, rules)))
    return found


@pytest.mark.parametrize(
    ("sizes", "processes", "expected"),
    [
        ((1, 4, 1), [0] * 4, [(0, 1)]),
        ((1, 4, 1), [0, 0, 1, 1], [(0, 2), (1, 2)]),
        ((1, 4, 1), [1, 1, 0, 0], [(1, 2), (0, 2)]),  # by rows, not by process
        ((1, 2, 2), [0, 0, 1, 1], [(0, 2), (1, 2)]),
        ((1, 1, 4), [0, 0, 1, 1], [(0, 1), (0, 1)]),
        ((1, 2, 2), [0, 1, 2, 3], [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ((2, 2, 2), [0, 1, 0, 1, 2, 3, 2, 3], [(0, 2), (0, 2), (1, 2), (1, 2)]),
        # Slices of TPUs go round: 0, 1, 6 and 15 of 16 chips may be a host's.
        ((1, 8, 1), [0, 0, 1, 1, 1, 1, 0, 0], [(0, 2), (1, 2)]),
    ],
)
def test_processes_with_the_same_rows_read_the_same(
    monkeypatch, sizes, processes, expected
):
    assert shares(monkeypatch, sizes, processes) == expected


def test_rows_that_lie_on_no_axis_are_everybodys(monkeypatch):
    rules = Rules(compute=AxisTable())
    assert shares(monkeypatch, (1, 4, 1), [0, 0, 1, 1], rules) == [(0, 1), (0, 1)]


@pytest.mark.parametrize(
    ("sizes", "processes"),
    [
        ((1, 3, 2), [0, 0, 0, 1, 1, 1]),  # both hold the second third
        ((1, 4, 1), [0, 0, 0, 1]),
        ((1, 6, 1), [0, 0, 1, 1, 1, 2]),
    ],
)
def test_processes_that_share_some_rows_are_refused(monkeypatch, sizes, processes):
    with pytest.raises(ValueError, match="equal shares .*: choose a mesh.tensor that"):
        shares(monkeypatch, sizes, processes)
