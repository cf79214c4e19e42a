"""The running average of what is trained: in the state, on disk and at inference."""

import jax
import numpy as np
import pytest
import tiny_training as tiny
import tiny_tuning as tuning

from cm3leon_jax.models.decoder import abstract
from cm3leon_jax.training import lora
from cm3leon_jax.training.checkpoint import Checkpoints, load_model
from cm3leon_jax.training.parts import load_finished

RUNS = {"all": (("all",), "adamw"), "parts": (tuning.LOW_RANK, "muon")}
MESH = (2, 2, 2)


@pytest.fixture(params=RUNS)
def run(request):
    train, kind = RUNS[request.param]
    shape = MESH if request.param == "parts" else (1, 1, 1)
    states, _ = tuning.updates(train, kind, shape)
    return tuning.parts_of(*train), states


def average(parts, states) -> dict[str, np.ndarray]:
    """The recursion in numpy, in double precision."""
    taken = [tuning.by_name(parts.take(state.model)) for state in states]
    mean = {name: np.asarray(x, np.float64) for name, x in taken[0].items()}
    for now in taken[1:]:
        for name in mean:
            mean[name] = tuning.DECAY * mean[name] + (1 - tuning.DECAY) * now[name]
    return mean


def test_average_is_the_recursion_by_hand(run):
    parts, states = run
    wanted = average(parts, states)
    found = tuning.by_name(states[3].ema)
    assert set(found) == set(wanted)
    moved = False
    for name, mean in wanted.items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], mean, rtol=1e-5, atol=1e-6)
        last = tuning.by_name(parts.take(states[3].model))[name]
        moved |= float(np.abs(last - mean).max()) > 1e-4
    assert moved  # it is an average, not the last weights


def test_checkpoints_keep_it_and_inference_chooses(run, tmp_path):
    parts, states = run
    state = states[3]
    with Checkpoints(tmp_path, settings={"decoder": 1}, keep=1) as checkpoints:
        checkpoints.save(3, state, position=3)
        checkpoints.wait()
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        found = checkpoints.restore_latest(shapes)
    assert found is not None and found[1] == 3
    for name, wanted in tuning.by_name(state).items():
        np.testing.assert_array_equal(tuning.by_name(found[0])[name], wanted)

    plain = jax.tree.structure(abstract(tiny.DECODER))
    for ema, shape in ((False, (1, 1, 1)), (True, MESH)):
        model = load_finished(
            tmp_path, tiny.DECODER, parts, ema=ema,
            mesh=tiny.mesh_of(*shape), rules=tiny.RULES, settings={"decoder": 1},
        )  # fmt: skip
        assert jax.tree.structure(model) == plain
        trained = state.ema if ema else parts.take(state.model)
        wanted = lora.merged(parts.put(state.model, trained))
        loaded = tuning.by_name(model)
        for name, value in tuning.by_name(wanted).items():
            np.testing.assert_allclose(loaded[name], value, rtol=1e-6, atol=1e-7)
        assert len(model.embed[...].sharding.device_set) == np.prod(shape)
    if "lora" in parts.config.train:  # never half of it by mistake
        with pytest.raises(ValueError, match=r"blocks\.lora\..* absent here"):
            load_model(tmp_path, abstract(tiny.DECODER))
