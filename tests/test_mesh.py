import dataclasses

import jax
import pytest
from jax.sharding import AxisType

from cm3leon_jax.parallel.mesh import AXES, MeshConfig, make_mesh


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (1, 8, 1)),
        (MeshConfig(data=-1, fsdp=2, tensor=2), (2, 2, 2)),
        (MeshConfig(data=8, fsdp=1, tensor=1), (8, 1, 1)),
    ],
)
def test_one_axis_takes_the_devices_that_the_others_leave(config, shape):
    mesh = make_mesh(config)
    assert tuple(mesh.shape.items()) == tuple(zip(AXES, shape, strict=True))
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize("config", [{"fsdp": 3}, {"data": 3}, {"fsdp": 16}])
def test_sizes_that_do_not_cover_the_devices_are_named(config):
    with pytest.raises(ValueError, match="cannot cover 8 devices"):
        make_mesh(MeshConfig(**config))


@dataclasses.dataclass(frozen=True)
class Stub:
    platform: str
    slice_index: int
    id: int


def stubs(platform, slices=4, each=8):
    return [Stub(platform, n // each, n) for n in reversed(range(slices * each))]


def test_gpus_of_several_hosts_are_one_mesh_host_by_host():
    """XLA calls each host a slice where no NVLink leads out of it."""
    mesh = make_mesh(MeshConfig(tensor=2), stubs("gpu"))
    assert mesh.devices.shape == (1, 16, 2)
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert [device.id for device in mesh.devices.flat] == list(range(32))
    with pytest.raises(ValueError, match="mesh.data=1 on 4 slices"):
        make_mesh(MeshConfig(tensor=2), stubs("tpu"))


@pytest.mark.parametrize("sizes", [{"data": 0}, {"tensor": -2}, {"data": -1}])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="mesh"):
        MeshConfig(**sizes)
