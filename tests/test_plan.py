"""What is counted in compiled programs, on simulated devices."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_topology
import tiny_training as tiny
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cm3leon_jax import planning
from cm3leon_jax.models.decoder import Decoder, DecoderConfig, parameter_count
from cm3leon_jax.parallel import compiled, plan, topologies
from cm3leon_jax.parallel.mesh import MeshConfig
from cm3leon_jax.parallel.rules import batch_sharding, shardings
from cm3leon_jax.system import System
from cm3leon_jax.training import state
from cm3leon_jax.training.flops import train_flops_per_token
from configs import shapes


def counted(function, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return compiled.count(jax.jit(function).lower(*arrays).compile().as_text(), 4)


def test_products_in_loops_count_as_often_as_they_run():
    def thrice(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=3)[0]

    assert counted(thrice, (64, 96), (96, 96)).flops == 3 * 2 * 64 * 96 * 96

    def convolved(x, w):
        return jax.lax.conv(x, w, (1, 1), "SAME")

    found = counted(convolved, (2, 8, 16, 16), (4, 8, 3, 3))
    inside = 3 * 16 - 2  # of a row's places and taps, two lie beside the picture
    assert found.flops == 2 * (2 * 4) * inside**2 * 8


def test_a_loop_without_a_known_end_counts_once_and_is_said():
    def count(ends, *shapes):
        def loop(n, x):
            return jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ x), x)

        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        if ends is not None:
            made = jax.jit(functools.partial(loop, ends)).lower(*arrays)
        else:
            made = jax.jit(loop).lower(jax.ShapeDtypeStruct((), jnp.int32), *arrays)
        return compiled.count(made.compile().as_text(), 4)

    once = 2 * 64**3
    assert (count(5, (64, 64)).flops, count(5, (64, 64)).unknown) == (5 * once, 0)
    assert (count(None, (64, 64)).flops, count(None, (64, 64)).unknown) == (once, 1)


def test_of_branches_the_costliest_counts():
    def branches(n, x):
        costs = [lambda x: x @ x, lambda x: jnp.tanh(x @ x) @ x, lambda x: x]
        return jax.lax.switch(n.astype(int), costs, x)

    def two(n, x):
        return jax.lax.cond(n > 0, lambda x: x @ x, lambda x: x, x)

    assert counted(branches, (), (64, 64)).flops == 2 * 2 * 64**3
    assert counted(two, (), (64, 64)).flops == 2 * 64**3


def test_traffic_is_what_is_made_written_and_read():
    found = counted(lambda x, w: jnp.tanh(x @ w), (64, 96), (96, 32))
    assert found.traffic == 2 * (2 * 4 * 64 * 32)  # the product, and its tanh
    text = """HloModule m
ENTRY %main (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0} parameter(0)
  %a = ((f32[8,128]{1,0}), f32[2,128]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%p)
  %b = f32[2,128]{1,0:S(1)} slice-done(%a)
  %c = (f32[8,128]{1,0}, f32[8,128]{1,0}, u32[]) copy-start(%p)
  ROOT %d = f32[8,128]{1,0} copy-done(%c)
}
"""
    # To the chip the slice alone; beside it a copy, written and read.
    assert compiled.count(text, 4).traffic == 4 * 2 * 128 + 2 * 4 * 8 * 128


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        ("dynamic-update-slice(%zeros, %p, %n)", "copy(%s)", "all-gather"),
        ("dynamic-update-slice(%old, %p, %n)", "copy(%s)", "all-reduce"),
        ("copy(%old)", "dynamic-slice(%s, %n), dynamic_slice_sizes={2}", "SCATTER"),
        ("copy(%old)", "dynamic-slice(%s, %n), dynamic_slice_sizes={4}", "all-reduce"),
    ],
)
def test_sums_are_gathers_only_of_zeros_and_scatters_only_of_shares(
    before, after, kind
):
    size = {"SCATTER": 2}.get(kind, 4 if "sizes" in after else 8)
    text = f"""HloModule m
ENTRY %main (p: f32[2], n: s32[], old: f32[8]) -> f32[{size}] {{
  %p = f32[2]{{0}} parameter(0)
  %n = s32[] parameter(1)
  %old = f32[8]{{0}} parameter(2)
  %zero = f32[] constant(0)
  %zeros = f32[8]{{0}} broadcast(%zero), dimensions={{}}
  %whole = f32[8]{{0}} {before}
  %s = f32[8]{{0}} all-reduce(%whole), replica_groups=[1,4]<=[4], to_apply=%sum
  ROOT %r = f32[{size}]{{0}} {after}
}}
"""
    kind = "reduce-scatter" if kind == "SCATTER" else kind
    assert set(compiled.count(text, 4).collectives) == {kind}


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_what_collectives_send_follows_from_their_kind(devices):
    mesh = Mesh(np.asarray(jax.devices()[:devices]), ("x",))
    size, share = 4 * 1024 * 16, (devices - 1) / devices  # bytes of the whole array

    def sent(function, inside, outside):
        spread = jax.shard_map(
            function, mesh=mesh, in_specs=inside, out_specs=outside, check_vma=False
        )
        return counted(spread, (1024, 16))

    gathered = sent(lambda x: jax.lax.all_gather(x, "x", tiled=True), P("x"), P())
    assert gathered.collectives == {"all-gather": pytest.approx(size * share)}
    # Neighbours are four: the traffic of eight goes over one link for each of four.
    far = size * share / 4 if devices == 8 else 0
    assert (gathered.near, gathered.far) == (size * share, far)
    summed = sent(lambda x: jax.lax.psum(x, "x"), P(), P())
    assert summed.collectives == {"all-reduce": pytest.approx(2 * size * share)}
    scattered = sent(
        lambda x: jax.lax.psum_scatter(x, "x", tiled=True), P(None, None), P("x")
    )
    assert scattered.collectives == {"reduce-scatter": pytest.approx(size * share)}


def lowered(config, mesh, rows):
    """The real update, compiled for a mesh."""
    tx = tiny.optimizer()
    init = functools.partial(_init, config=config, tx=tx)
    abstract = jax.eval_shape(init, jax.random.key(0))
    placement = shardings(abstract, mesh, tiny.RULES)
    update = tiny.step_fn(mesh, tx=tx)
    spread = batch_sharding(mesh, tiny.RULES)
    batch = {
        name: jax.ShapeDtypeStruct((rows, config.length + 1), kind, sharding=spread)
        for name, kind in {
            **dict.fromkeys(("tokens", "segments", "positions"), jnp.int32),
            "moved": jnp.bool_,
        }.items()
    }
    placed = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        abstract,
        placement,
    )
    made = jax.jit(update, out_shardings=(placement, None), donate_argnums=0)
    return made.lower(placed, batch).compile().as_text()


def _init(key, config, tx):
    return state.create(Decoder(config, tiny.nnx.Rngs(key)), tx)


BASE = DecoderConfig(
    vocab=tiny.LAYOUT.size, layers=2, width=64, heads=2, mlp=256, length=64
)


@pytest.mark.parametrize(
    "changes",
    [{}, {"layers": 5}, {"width": 128, "mlp": 512}]
    # A sample with R retrieved documents is R+1 documents long.
    + [{"length": 64 * (1 + retrieved)} for retrieved in (1, 2, 3)],
    ids=str,
)
def test_compiled_flops_follow_the_formula(changes):
    config = dataclasses.replace(BASE, **changes)
    tokens = 4 * config.length
    # Plain attention makes scores of later tokens of a query's own block too, one of 2
    # or 4 blocks; the formula leaves all later ones out.
    blocks = min(config.length // 32, 4)
    later = 6.0 * config.layers * config.width * config.length / blocks
    formula = tokens * (train_flops_per_token(config, config.length) + later)
    flops = compiled.count(lowered(config, tiny.mesh_of(1, 1, 1), rows=4), 8).flops
    assert flops == pytest.approx(formula, rel=0.05)


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_collective_bytes_follow_the_number_of_devices(devices):
    # Copies: every gradient is summed over all of them, once.
    found = compiled.count(lowered(BASE, tiny.mesh_of(devices, 1, 1), rows=8), 8)
    formula = 2 * (devices - 1) / devices * 4 * parameter_count(BASE)
    assert found.collectives["all-reduce"] == pytest.approx(formula, rel=0.05)


def test_beside_split_products_the_length_is_split():
    """Sequence sharding: between a layer's products a device has a quarter of L."""
    config = dataclasses.replace(BASE, heads=4, length=96)
    text = lowered(config, tiny.mesh_of(1, 2, 4), rows=6)
    rows, length = 6 // 2, config.length // 4
    shapes = {shape for _, shape in compiled.arrays(text)}
    assert (rows, length, config.width) in shapes


def system(**changes):
    config = shapes.get_config("quick").to_dict()
    config["mesh"] = {"data": 1, "fsdp": -1, "tensor": 1}
    return dataclasses.replace(System.make(config), **changes)


def test_a_plan_adds_up_and_is_called_predicted():
    found = planning.plan(system(), "pretrain", tiny_topology.CPU)
    assert found["predicted"] and found["fits"] and found["devices"] == 8
    assert found["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    whole = 4 * parameter_count(system().decoder_config)
    assert found["parameters_bytes"] == pytest.approx(whole / 8, rel=0.1)
    parts = ("parameters_bytes", "optimizer_bytes", "batch_bytes")
    assert sum(found[part] for part in parts) == pytest.approx(
        found["arguments_bytes"], rel=0.01
    )
    seconds = found["seconds_at_least"]
    assert seconds["step"] == seconds[found["bound"]] == max(seconds.values())
    assert json.loads(json.dumps(found, allow_nan=False))["mfu_at_most"] > 0
    text = plan.table(found)
    assert text.startswith("predicted for 8 devices of cpu")
    assert "data=1 fsdp=8 tensor=1" in text
    small = dataclasses.replace(tiny_topology.CPU.chip, memory=1e6)
    assert not planning.plan(
        system(), "pretrain", dataclasses.replace(tiny_topology.CPU, chip=small)
    )["fits"]


def test_what_has_no_formula_has_a_report_that_is_json():
    found = planning.plan(system(), "tokenize", tiny_topology.CPU, rows=1)
    assert json.loads(json.dumps(found, allow_nan=False))["pictures"] == 340_000_000
    assert "mfu_at_most" not in found and "model_flops" not in found
    assert plan.table(found)


def test_chips_are_those_of_the_data_sheets():
    """bfloat16 TFLOP/s without sparsity; GB/s of memory."""
    sheets = {
        **{"v4": (275, 1228), "v5e": (197, 819), "v5p": (459, 2765)},
        **{"v6e": (918, 1640), "A100": (312, 2039), "H100": (989, 3352)},
        "H200": (989, 4800),
    }
    chips = topologies._TPU | topologies._GPU
    assert {
        name: (chip.flops / 1e12, chip.bandwidth / 1e9) for name, chip in chips.items()
    } == sheets


def test_what_cannot_be_planned_is_named():
    two = dataclasses.replace(tiny_topology.CPU, slices=2)
    with pytest.raises(ValueError, match="mesh.data=1 on 2 slices: choose a multiple"):
        planning.plan(system(), "pretrain", two)
    with pytest.raises(ValueError, match="stage='dance': choose from pretrain, sft"):
        planning.plan(system(), "dance", tiny_topology.CPU)
    with pytest.raises(ValueError, match="rows_per_device=3 on 8 devices"):
        planning.plan(system(), "pretrain", tiny_topology.CPU, rows=3)
    with pytest.raises(ValueError, match="heads=4 cannot be split over 8 devices"):
        planning.plan(
            system(mesh=MeshConfig(fsdp=1, tensor=8)), "pretrain", tiny_topology.CPU
        )
    with pytest.raises(ValueError, match="tensor=3 cannot cover 8 devices"):
        planning.plan(system(mesh=MeshConfig(tensor=3)), "pretrain", tiny_topology.CPU)
    with pytest.raises(ValueError, match="has no section sft"):
        planning.plan(system(sft=None), "sft", tiny_topology.CPU)
    odd = dataclasses.replace(tiny_topology.CPU, devices=tiny_topology.CPU.devices[:3])
    with pytest.raises(ValueError, match="does not divide among the 3 devices"):
        planning.plan(system(), "pretrain", odd)
    for name in (
        "H100:1x0x8",
        "v5p-128",
        "v9:2x2",
        "H100:8",
        "v5p",
        "B1:1x1x1",
        "0*v5p:4x4x4",
    ):
        with pytest.raises(ValueError, match=r"topology=.*give TPUs as v5p:4x4x4"):
            topologies.find(name)


def test_a_search_goes_from_fast_to_frugal_and_leaves_out_what_cannot_fit():
    tried = list(planning.candidates(system(), "pretrain", tiny_topology.CPU))
    assert [s.decoder["remat"] for s in tried][0] == "none"
    assert [s.mesh.tensor for s in tried] == sorted(s.mesh.tensor for s in tried)
    tight = dataclasses.replace(tiny_topology.CPU.chip, memory=4e6)
    fewer = list(
        planning.candidates(
            system(), "pretrain", dataclasses.replace(tiny_topology.CPU, chip=tight)
        )
    )
    assert len(fewer) < len(tried)
    with pytest.raises(ValueError, match="--search is for pretrain and sft"):
        next(planning.candidates(system(), "decode", tiny_topology.CPU))
