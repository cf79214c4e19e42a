import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training as tiny
import tiny_vqgan
from flax import nnx

from cm3leon_jax.models import vqgan
from cm3leon_jax.models.decoder import Decoder, DecoderConfig
from cm3leon_jax.training.optimizer import (
    OptimizerConfig,
    is_matrix,
    learning_rate,
    make_optimizer,
)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedule_end_points(schedule):
    config = OptimizerConfig(
        peak=6e-4, warmup=1500, steps=10_000, floor=0.1, schedule=schedule
    )
    rate = [float(learning_rate(config, i)) for i in (0, 749, 1499, 9999, 20_000)]
    np.testing.assert_allclose(rate, [6e-4 / 1500, 3e-4, 6e-4, 6e-5, 6e-5], rtol=1e-5)
    rates = np.asarray(learning_rate(config, jnp.arange(10_000)))
    assert (np.diff(rates[:1500]) > 0).all() and (np.diff(rates[1499:]) <= 0).all()
    middle = (1500 + 10_000) // 2 - 1
    np.testing.assert_allclose(rates[middle], 0.55 * 6e-4, rtol=1e-4)


def test_linear_decay_is_straight_and_cosine_is_not():
    steps = jnp.arange(99, 1000)
    rates = {
        kind: np.asarray(
            learning_rate(
                OptimizerConfig(peak=1.0, warmup=100, steps=1000, schedule=kind), steps
            )
        )
        for kind in ("linear", "cosine")
    }
    np.testing.assert_allclose(rates["linear"], np.linspace(1.0, 0.1, 901), rtol=1e-5)
    angle = np.linspace(0, np.pi, 901)
    np.testing.assert_allclose(rates["cosine"], 0.55 + 0.45 * np.cos(angle), rtol=1e-5)


def test_no_warmup_starts_at_the_peak_end():
    config = OptimizerConfig(peak=1.0, warmup=0, steps=10)
    np.testing.assert_allclose(learning_rate(config, 0), 1 - 0.9 / 10, rtol=1e-6)


def test_only_matrices_decay():
    config = DecoderConfig(
        vocab=128, layers=2, width=16, heads=2, mlp=32, length=8,
        norm="rms", qk_norm=True,
    )  # fmt: skip
    optimizer = OptimizerConfig(peak=1e-2, warmup=0, steps=1, floor=1.0)
    tx = make_optimizer(optimizer)

    @jax.jit
    def update():
        model = jax.tree.map(jnp.ones_like, Decoder(config, nnx.Rngs(0)))
        zero = jax.tree.map(jnp.zeros_like, model)
        return tx.update(zero, tx.init(model), model)[0]

    updates = update()
    for name in ("w_q", "w_out", "w_up", "w_down"):
        update = getattr(updates.blocks, name)[...]
        np.testing.assert_allclose(update, -1e-2 * 0.1, rtol=1e-5)
    np.testing.assert_allclose(updates.embed[...], -1e-3, rtol=1e-5)
    # A norm's scale is [layers, width]: two dimensions, and still a vector.
    assert not updates.blocks.mlp_scale[...].any()
    assert not updates.blocks.q_scale[...].any()
    assert not updates.final_scale[...].any()
    assert is_matrix(jnp.ones((2, 2))) and not is_matrix(jnp.ones(2))


def test_first_update_is_adams_and_clipping_is_by_global_norm():
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    grads = jax.tree.map(lambda x: x * 100.0, params)
    tx = make_optimizer(
        OptimizerConfig(peak=1e-3, warmup=0, steps=1, floor=1.0, weight_decay=0.0)
    )
    updates, opt = tx.update(grads, tx.init(params), params)
    for update in jax.tree.leaves(updates):  # a first Adam step is the sign, times lr
        np.testing.assert_allclose(update, -1e-3, rtol=1e-4)
    moments = [x for x in jax.tree.leaves(opt) if x.ndim]
    first = [x for x in moments if float(x.reshape(-1)[0]) > 0.01]
    clipped = 1 / np.sqrt(6)  # six equal entries of norm 1 in all
    for mu in first:
        np.testing.assert_allclose(mu, 0.1 * clipped, rtol=1e-4)
    assert len(first) == 2


def test_moments_are_float32():
    opt = jax.eval_shape(tiny.init, jax.random.key(0)).opt
    kinds = {leaf.dtype for leaf in jax.tree.leaves(opt)}
    assert kinds == {jnp.dtype("float32"), jnp.dtype("int32")}


def test_muon_orthogonalises_the_blocks_and_leaves_the_rest_to_adam():
    model = Decoder(
        DecoderConfig(
            vocab=128, layers=2, width=16, heads=2, mlp=32, length=8, qk_norm=True
        ),
        nnx.Rngs(0),
    )
    keys = iter(jax.random.split(jax.random.key(1), 99))
    grads = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), model)

    def updates(kind):
        tx = make_optimizer(
            OptimizerConfig(
                kind=kind, peak=1.0, warmup=0, steps=1, floor=1.0, weight_decay=0.0
            )
        )
        return jax.jit(lambda: tx.update(grads, tx.init(model), model)[0])()

    muon, adam = updates("muon"), updates("adamw")
    shapes = {"w_q": (16, 16), "w_out": (16, 16), "w_up": (16, 32), "w_down": (32, 16)}
    for name, shape in shapes.items():
        for layer, gradient in zip(
            getattr(muon.blocks, name)[...],
            getattr(grads.blocks, name)[...],
            strict=True,
        ):
            matrix = -np.asarray(layer).reshape(shape)
            # Adam's size, and singular values as alike as five iterations make them.
            values = np.linalg.svd(matrix, compute_uv=False)
            assert values.min() > 0.5 * values.max()
            np.testing.assert_allclose(np.sqrt((matrix**2).mean()), 0.2, rtol=0.3)
            # The directions of the gradient are kept: U Vᵀ of U S Vᵀ.
            u, _, vt = np.linalg.svd(np.asarray(gradient).reshape(shape), False)
            cosine = (u @ vt * matrix).sum() / np.linalg.norm(u @ vt)
            assert cosine / np.linalg.norm(matrix) > 0.97
    for name in ("embed", "unembed"):  # a first step is Adam's, but for its momentum
        ours, theirs = (np.asarray(getattr(x, name)[...]) for x in (muon, adam))
        ratio = ours / theirs
        np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-3)


def test_muon_has_nothing_to_do_in_a_model_without_blocks():
    tx = make_optimizer(OptimizerConfig(kind="muon", peak=1e-3, warmup=0, steps=1))
    with pytest.raises(ValueError, match="choose 'adamw'"):
        tx.init(vqgan.abstract(tiny_vqgan.LOCAL))


@pytest.mark.parametrize(
    "wrong",
    [
        {"peak": 0.0},
        {"warmup": 11},
        {"steps": 0},
        {"b2": 1.0},
        {"floor": 1.5},
        {"schedule": "step"},
        {"kind": "sgd"},
        {"clip": 0.0},
    ],
)
def test_impossible_settings_are_named(wrong):
    settings = {"peak": 1e-3, "warmup": 1, "steps": 10} | wrong
    with pytest.raises(ValueError, match=f"optimizer.{next(iter(wrong))}"):
        OptimizerConfig(**settings)
