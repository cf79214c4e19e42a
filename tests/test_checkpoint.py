import gc
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training as tiny

from cm3leon_jax.models.decoder import abstract
from cm3leon_jax.parallel.rules import shardings
from cm3leon_jax.training import checkpoint, metrics
from cm3leon_jax.training.checkpoint import Checkpoints, latest_step, load_model


def small(value: float) -> dict:
    return {"step": jnp.int32(value), "w": jnp.full((64, 64), float(value))}


ABSTRACT = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
    ),
    jax.eval_shape(lambda: small(0)),
)


def test_round_trip_keeps_the_newest_and_every_kind_of_leaf(tmp_path):
    state = {
        "key": jax.random.key(7),
        "pair": (jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3), jnp.int32(4)),
    }
    with Checkpoints(tmp_path, settings={"a": 1}, keep=2) as checkpoints:
        for step in (3, 6, 9):
            checkpoints.save(step, state, position=10 * step)
    with Checkpoints(tmp_path, settings={"a": 1}, keep=2) as checkpoints:
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        restored, position, *_ = checkpoints.restore_latest(shapes)
    assert position == 90 and latest_step(tmp_path) == 9
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["6", "9"]
    assert (
        jax.random.key_data(restored["key"]) == jax.random.key_data(state["key"])
    ).all()
    for a, b in zip(restored["pair"], state["pair"], strict=True):
        assert a.dtype == b.dtype and (a == b).all()


def test_names_are_plain_and_unique():
    names = checkpoint.leaf_names(jax.eval_shape(tiny.init, jax.random.key(0)))
    assert {"step", "model.embed", "model.blocks.w_up"} <= set(names)
    assert len(set(names)) == len(names)


def test_saved_on_one_mesh_goes_on_with_the_same_losses_on_others(tmp_path):
    whole = tmp_path / "whole"
    tiny.train(whole, tiny.mesh_of(2, 2, 2), 8)
    expected = [line["loss"] for line in metrics.read(whole)]
    shutil.rmtree(whole / "checkpoints" / "8")
    for sizes in ((1, 1, 1), (1, 8, 1)):
        other = tmp_path / str(sizes)
        shutil.copytree(whole, other)
        state = tiny.train(other, tiny.mesh_of(*sizes), 8)
        got = [line["loss"] for line in metrics.read(other)]
        assert got[:4] == expected[:4]
        np.testing.assert_allclose(got[4:], expected[4:], rtol=1e-5)
        assert state.model.embed[...].sharding.mesh.devices.size == np.prod(sizes)


def test_the_model_is_loaded_alone_and_where_it_is_wanted(tmp_path):
    mesh = tiny.mesh_of(1, 8, 1)
    state = tiny.train(tmp_path, mesh, 4)
    shapes = abstract(tiny.DECODER)
    model = load_model(tmp_path, shapes)
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(state.model), strict=True):
        assert len(a.sharding.device_set) == 1
        np.testing.assert_array_equal(a, b)
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        shardings(shapes, mesh, tiny.RULES),
    )
    model = load_model(tmp_path, placed, step=4)
    assert len(model.embed[...].sharding.device_set) == 8
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 5 .*\[4\]"):
        load_model(tmp_path, shapes, step=5)
    with pytest.raises(FileNotFoundError, match="train there first"):
        load_model(tmp_path / "elsewhere", shapes)
    assert not (tmp_path / "elsewhere").exists()
    wider = abstract(tiny.DecoderConfig(**vars(tiny.DECODER) | {"width": 32}))
    with pytest.raises(ValueError, match="of another model"):
        load_model(tmp_path, wider)


def test_a_model_of_the_same_shapes_but_other_settings_is_refused(tmp_path):
    settings = {"decoder": {"norm_eps": 1e-5, "heads": 2}, "seed": 0}
    with Checkpoints(tmp_path, settings=settings, keep=1) as checkpoints:
        checkpoints.save(1, {"model": small(1)}, position=1)
    same = {"decoder": {"norm_eps": 1e-5, "heads": 2}}
    assert load_model(tmp_path, ABSTRACT, settings=same)["step"] == 1
    for other, named in (
        ({"decoder": {"norm_eps": 1e-5, "heads": 4}}, "decoder.heads was 2, is 4"),
        ({"layout": {"size": 128}}, "layout was absent"),
    ):
        with pytest.raises(ValueError, match=named):
            load_model(tmp_path, ABSTRACT, settings=other)


def test_only_damage_is_called_damage(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, settings={}, keep=1) as checkpoints:
        checkpoints.save(1, {"model": small(1)}, position=1)
    for error in (
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"),
        PermissionError(13, "Permission denied"),
        ValueError("UNAVAILABLE: no route to host"),
    ):

        def fail(*_, error=error, **__):
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(checkpoint.ocp.PyTreeCheckpointHandler, "restore", fail)
            with pytest.raises(type(error)) as caught:
                load_model(tmp_path, ABSTRACT)
        assert "damaged" not in str(caught.value)
    (tmp_path / "checkpoints" / "1" / "meta" / "metadata").unlink()
    with pytest.raises(ValueError, match="damaged"):
        load_model(tmp_path, ABSTRACT)


def test_other_settings_are_refused_by_name(tmp_path):
    old = {"decoder": {"width": 64, "layers": 2}, "gone": 1}
    with Checkpoints(tmp_path, settings=old, keep=1) as checkpoints:
        checkpoints.save(1, small(1), position=1)
    new = {"decoder": {"width": 128, "layers": 2}, "fresh": (1, 2)}
    with Checkpoints(tmp_path, settings=new, keep=1) as checkpoints:
        with pytest.raises(ValueError) as error:
            checkpoints.restore_latest(ABSTRACT)
    for part in ("decoder.width was 64, is 128", "gone was 1", "fresh was absent"):
        assert part in str(error.value)
    assert "layers" not in str(error.value)
    assert latest_step(tmp_path) == 1


# Orbax drops the coroutines of a read or write that failed, and other reads of the same
# checkpoint call back into its closed event loop; Python says so at a moment of its own
# choosing.
dropped_coroutines = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@dropped_coroutines
def test_a_truncated_checkpoint_is_named_with_its_mend(tmp_path):
    with Checkpoints(tmp_path, settings={}, keep=3) as checkpoints:
        for step in (1, 2):
            noise = jax.random.normal(jax.random.key(step), (64, 64))
            checkpoints.save(step, small(step) | {"w": noise}, position=step)
    files = [p for p in (tmp_path / "checkpoints" / "2").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    with Checkpoints(tmp_path, settings={}, keep=3) as checkpoints:
        with pytest.raises(ValueError, match=r"checkpoints/2 cannot be read.*Delete"):
            checkpoints.restore_latest(ABSTRACT)
    gc.collect()  # here, rather than in the test that comes next
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    with Checkpoints(tmp_path, settings={}, keep=3) as checkpoints:
        restored, position, *_ = checkpoints.restore_latest(ABSTRACT)
    assert position == 1 and restored["step"] == 1


@pytest.fixture
def no_room():
    """No file of this process can grow beyond 1,000 bytes: the kernel refuses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(on: bool):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if on else soft, hard))

    yield limit
    limit(False)


@dropped_coroutines
def test_a_full_disk_loses_no_checkpoint(tmp_path, no_room):
    noise = jax.random.normal(jax.random.key(0), (64, 64))
    checkpoints = Checkpoints(tmp_path, settings={}, keep=1)
    checkpoints.save(1, small(1), position=1)
    checkpoints.wait()
    no_room(True)
    with pytest.raises(OSError, match="step 1 is whole: make room"):
        checkpoints.save(2, small(2) | {"w": noise}, position=2)
        checkpoints.wait()
    no_room(False)
    checkpoints.manager.close()
    gc.collect()  # here, rather than in the test that comes next
    assert latest_step(tmp_path) == 1
    with Checkpoints(tmp_path, settings={}, keep=1) as checkpoints:
        restored, position, *_ = checkpoints.restore_latest(ABSTRACT)
        assert position == 1 and (restored["w"] == 1).all()
        checkpoints.save(2, small(2), position=2)  # goes on once there is room
    assert latest_step(tmp_path) == 2
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_another_process_that_is_lost_is_no_full_disk(tmp_path, monkeypatch):
    said = "UNKNOWN: Gloo AllGather failed: Connection closed by peer"

    def fail(*_, **__):
        raise ValueError(said)

    checkpoints = Checkpoints(tmp_path, settings={}, keep=1)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.manager, "save", fail)
        patched.setattr(checkpoints.manager, "wait_until_finished", fail)
        for call in (lambda: checkpoints.save(1, small(1), 1), checkpoints.wait):
            with pytest.raises(OSError, match="make room"):  # there is no other process
                call()
        patched.setattr(jax, "process_count", lambda: 2)
        for call in (lambda: checkpoints.save(1, small(1), 1), checkpoints.wait):
            with pytest.raises(ValueError, match=f"^{said}$"):
                call()
        patched.setattr(checkpoints, "wait", lambda: pytest.fail("would never end"))
        with pytest.raises(ValueError, match=said), checkpoints:
            fail()
    checkpoints.manager.close()
