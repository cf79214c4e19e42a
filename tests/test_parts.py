"""What is trained changes, by the same gradients; what is not stays to the bit."""

import jax
import numpy as np
import pytest
import tiny_training as tiny
import tiny_tuning as tuning

from cm3leon_jax import vocab
from cm3leon_jax.models.decoder import DecoderConfig, abstract
from cm3leon_jax.training import step
from cm3leon_jax.training.checkpoint import leaf_names
from cm3leon_jax.training.parts import EVERYTHING, Parts, PartsConfig

ONE, EIGHT = (1, 1, 1), (2, 2, 2)
ATTENTION = {f"blocks.w_{name}" for name in ("q", "k", "v", "out")}
LOW_RANK = {
    f"blocks.lora.w_{name}.{factor}"
    for name in ("q", "k", "v", "out", "up", "down")
    for factor in "ab"
}
IMAGE, CLASSES = set(tiny.LAYOUT.image), set(tiny.LAYOUT.classes)
# Trained parts and optimizer -> the parameters that may change, and ids of tables.
FEW = ("attention", "head_image_rows"), "adamw"
MANY = tuning.LOW_RANK, "muon"
RUNS = {
    FEW: (ATTENTION | {"unembed"}, {"unembed": IMAGE}),
    MANY: (
        LOW_RANK | {"embed", "unembed"},
        {"embed": CLASSES, "unembed": IMAGE | CLASSES},
    ),
}


@pytest.mark.parametrize("run", RUNS)
def test_frozen_parameters_stay_to_the_bit(run):
    states, metrics = tuning.updates(*run, ONE)
    before, after = (tuning.by_name(states[i].model) for i in (0, 3))
    changed = {name for name in before if (before[name] != after[name]).any()}
    trained, tables = RUNS[run]
    assert changed == trained
    for name, ids in tables.items():
        moved = (before[name] != after[name]).any(1 if name == "embed" else 0)
        assert set(np.flatnonzero(moved)) == ids
    assert metrics[0]["loss"] > 0 and states[3].step == 3


def test_eight_devices_give_the_same_numbers():
    one, ones = tuning.updates(*MANY, ONE)
    eight, eights = tuning.updates(*MANY, EIGHT)
    for name, wanted in tuning.by_name(one[3]).items():
        found = tuning.by_name(eight[3])[name]
        np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-5, err_msg=name)
    for found, wanted in zip(eights, ones, strict=True):
        for key in ("loss", "grad_norm"):
            np.testing.assert_allclose(found[key], wanted[key], rtol=1e-4)
    frozen = set(tuning.by_name(one[0].model)) - RUNS[MANY][0]
    for name in frozen:
        np.testing.assert_array_equal(
            tuning.by_name(eight[3].model)[name], tuning.by_name(one[0].model)[name]
        )


def test_gradients_are_those_of_the_whole_model():
    parts = tuning.parts_of("attention", "head_image_rows", "embed_class_rows")
    model, batch = tuning.pretrained(), tiny.device_batch(0)
    # Class ids among the tokens: their embeddings must get gradients.
    batch["tokens"] = batch["tokens"].at[:, 3].set(tiny.LAYOUT.classes[1])
    options = tiny.step_fn(tiny.mesh_of(*ONE)).keywords
    del options["tx"]

    @jax.jit
    def both(model):
        def loss(model):
            return step.loss_sums(model, batch, **options)["nll"]

        whole = parts.take(jax.grad(loss)(model))
        taken = parts.take(model)
        return whole, jax.grad(lambda taken: loss(parts.put(model, taken)))(taken)

    whole, part = both(model)
    assert set(part) == ATTENTION | {"unembed.image", "embed.classes"}
    for name, wanted in tuning.by_name(whole).items():
        assert np.abs(wanted).max() > 0
        found = tuning.by_name(part)[name]
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_put_is_the_inverse_of_take():
    model = tuning.pretrained()
    for train in (("all",), ("head", "embed"), ("head_image_rows", "attention")):
        parts = tuning.parts_of(*train)
        again = tuning.by_name(parts.put(model, parts.take(model)))
        for name, wanted in tuning.by_name(model).items():
            np.testing.assert_array_equal(again[name], wanted)


def test_frozen_parameters_have_no_optimizer_state():
    for train, kind in RUNS:
        parts = tuning.parts_of(*train)
        states, _ = tuning.updates(train, kind, ONE)
        taken = sum(x.size for x in jax.tree.leaves(parts.take(states[0].model)))
        moments = sum(x.size for x in jax.tree.leaves(states[0].opt) if x.ndim)
        assert moments <= 2 * taken, train
        if kind == "adamw":
            assert moments == 2 * taken
    image = len(tiny.LAYOUT.image)
    states, _ = tuning.updates(*FEW, ONE)
    shapes = {x.shape for x in jax.tree.leaves(states[0].opt) if x.ndim == 2}
    assert shapes == {(tiny.DECODER.width, image)}  # of all tables, these columns


def test_a_state_without_these_settings_is_as_it_was():
    """Checkpoints of runs that train everything are read by these names."""
    state = jax.eval_shape(tiny.init, jax.random.key(0))
    weights = ["w_down", "w_k", "w_out", "w_q", "w_up", "w_v"]
    model = [f"blocks.{name}" for name in weights] + ["embed", "position", "unembed"]
    wanted = ["step", *(f"model.{name}" for name in model), "opt.1.count"]
    wanted += [f"opt.1.{moment}.{name}" for moment in ("mu", "nu") for name in model]
    assert sorted(leaf_names(state)) == sorted([*wanted, "opt.3.count"])
    assert EVERYTHING.take(state.model) is state.model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": "head"}, "give a tuple"),
        ({"train": ()}, "give a tuple"),
        ({"train": ("tail",)}, "no part 'tail'"),
        ({"train": ("all", "head")}, "twice"),
        ({"train": ("head", "head")}, "twice"),
        ({"train": ("head", "head_image_rows")}, "head and head_image_rows"),
        ({"train": ("attention", "lora"), "rank": 2, "alpha": 1.0}, "twice"),
        ({"train": ("lora",)}, "parts.rank=0"),
        ({"train": ("lora",), "rank": 4}, "parts.alpha=0.0"),
        ({"train": ("head",), "rank": 4}, "are lora's"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        PartsConfig(**settings)


def test_parts_that_a_model_lacks_are_named():
    layout = vocab.build(text=72, image=48, classes=0, sentinels=4)  # no spare ids
    with pytest.raises(ValueError, match="no classes"):
        Parts(PartsConfig(train=("head_class_rows",)), layout)
    tied = DecoderConfig(
        vocab=128, layers=1, width=8, heads=1, mlp=8, length=4, tie_embeddings=True
    )
    with pytest.raises(ValueError, match="tie_embeddings"):
        tuning.parts_of("head").take(abstract(tied))
