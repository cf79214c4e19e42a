import jax
import pytest
from jax.sharding import AxisType

from cm3leon_jax.parallel import distributed
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


@pytest.mark.parametrize("sizes", [{"data": 0}, {"tensor": -2}, {"data": -1}])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="mesh"):
        MeshConfig(**sizes)


def test_a_job_of_one_process_starts_nothing(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("must not be called")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    for name in ("JAX_COORDINATOR_ADDRESS", "SLURM_NTASKS", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    distributed.initialize()
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    distributed.initialize()


def test_a_job_of_several_joins_them(monkeypatch):
    calls = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *a, **k: calls.append((a, k))
    )
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1234")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES"):
        distributed.initialize()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    distributed.initialize()
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    distributed.initialize()
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS")
    monkeypatch.delenv("SLURM_STEP_ID")  # the shell of salloc: no others will come
    distributed.initialize()
    assert calls == [
        (("host:1234", 2, 1), {}),
        ((), {"coordinator_address": "host:1234"}),
    ]
