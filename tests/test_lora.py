"""Low-rank changes against dense ones, written out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training as tiny
import tiny_tuning as tuning
from flax import nnx

from cm3leon_jax.models.decoder import Decoder, DecoderConfig
from cm3leon_jax.parallel.rules import shardings
from cm3leon_jax.training import lora

# Everything that a block can hold: seven matrices, of which w_gate is SwiGLU's.
CONFIG = DecoderConfig(
    vocab=128, layers=2, width=16, heads=2, mlp=32, length=12,
    norm="rms", activation="swiglu", positions="rope", qk_norm=True,
)  # fmt: skip
SCALE = tuning.ALPHA / tuning.RANK
# How A and B make the weight, per matrix and layer.
DENSE = {
    **dict.fromkeys(("w_q", "w_k", "w_v"), "ndr,nrhk->ndhk"),
    "w_out": "nhkr,nrd->nhkd",
    **dict.fromkeys(("w_up", "w_gate"), "ndr,nrf->ndf"),
    "w_down": "nfr,nrd->nfd",
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 128, (2, 12)), jnp.int32)


@pytest.fixture(scope="module")
def plain() -> Decoder:
    return tuning.pretrained(CONFIG)


@pytest.fixture(scope="module")
def fresh(plain) -> Decoder:
    key = jax.random.key(4)
    return jax.jit(lora.adapted, static_argnums=(1, 2))(
        plain, tuning.RANK, tuning.ALPHA, key
    )


@pytest.fixture(scope="module")
def tuned(fresh) -> Decoder:
    """With a B that is not zero."""

    def change(path, w):
        return np.asarray(w) + 0.1 if "lora" in jax.tree_util.keystr(path) else w

    return jax.tree_util.tree_map_with_path(change, fresh)


@pytest.fixture(scope="module")
def dense(plain, tuned) -> Decoder:
    """The plain decoder with weights W + A·B·alpha/r."""
    model = jax.tree.map(lambda w: w, plain)
    for name, equation in DENSE.items():
        factors = getattr(tuned.blocks.lora, name)
        change = np.einsum(equation, factors.a[...], factors.b[...]) * SCALE
        weight = getattr(model.blocks, name)
        add = functools.partial(np.add, change.astype(np.float32))
        setattr(model.blocks, name, jax.tree.map(add, weight))
    return model


@jax.jit
def value_and_gradient(model):
    def objective(model):
        logits = model(TOKENS)
        return jnp.sum(jnp.sin(logits)), logits

    return jax.grad(objective, has_aux=True)(model)


def test_outputs_and_gradients_are_those_of_dense_weights(tuned, dense):
    gradient, logits = value_and_gradient(tuned)
    wanted, wanted_logits = value_and_gradient(dense)
    np.testing.assert_allclose(logits, wanted_logits, rtol=1e-4, atol=1e-4)
    assert set(vars(tuned.blocks.lora)) >= set(DENSE)
    for name, equation in DENSE.items():
        factors = getattr(tuned.blocks.lora, name)
        change = np.asarray(getattr(wanted.blocks, name)[...])
        ours = getattr(gradient.blocks.lora, name)
        pair, out = equation.split("->")
        a, b = pair.split(",")
        # d(A·B) by A is the change's gradient times Bᵀ, and the other way round.
        for grad, left, right, spec in (
            (ours.a[...], change, factors.b[...], f"{out},{b}->{a}"),
            (ours.b[...], change, factors.a[...], f"{out},{a}->{b}"),
        ):
            oracle = np.einsum(spec, left, right) * SCALE
            np.testing.assert_allclose(grad, oracle, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(
            getattr(gradient.blocks, name)[...], change, rtol=2e-3, atol=2e-3
        )


def test_a_fresh_change_is_none(plain, fresh):
    logits = jax.jit(Decoder.__call__)
    np.testing.assert_array_equal(logits(plain, TOKENS), logits(fresh, TOKENS))
    for name in DENSE:
        factors = getattr(fresh.blocks.lora, name)
        assert not factors.b[...].any()
        spread = float(np.std(factors.a[...]))
        inputs = factors.a[...][0, ..., 0].size
        np.testing.assert_allclose(spread, inputs**-0.5, rtol=0.3)


def test_merged_is_a_plain_decoder_with_the_dense_weights(plain, tuned, dense):
    merged = jax.jit(lora.merged)(tuned)
    assert jax.tree.structure(merged) == jax.tree.structure(plain)
    for found, wanted in zip(
        jax.tree.leaves(merged), jax.tree.leaves(dense), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert lora.merged(plain) is plain and plain.blocks.lora is None
    assert tuned.blocks.lora is not None  # nothing is changed in place
    with pytest.raises(ValueError, match="merge them first"):
        lora.adapted(tuned, 4, 4.0, jax.random.key(0))


def test_in_low_precision_the_factors_are_cast_too():
    config = DecoderConfig(
        vocab=128, layers=2, width=16, heads=2, mlp=32, length=12, dtype="bfloat16"
    )

    def hidden():
        model = Decoder(config, nnx.Rngs(0))
        return lora.adapted(model, 4, 8.0, jax.random.key(0)).hidden(TOKENS)

    assert jax.eval_shape(hidden).dtype == jnp.bfloat16


def test_factors_lie_where_their_matrices_lie():
    shapes = jax.eval_shape(
        lambda: lora.adapted(tuning.pretrained(), 4, 8.0, jax.random.key(0))
    )
    place = shardings(shapes, tiny.mesh_of(2, 2, 2), tiny.RULES).blocks.lora
    f, t = ("fsdp",), ("tensor",)
    wanted = {
        "w_q": ((None, f, None), (None, None, t, None)),
        "w_out": ((None, t, None, None), (None, None, f)),
        "w_up": ((None, f, None), (None, None, t)),
        "w_down": ((None, t, None), (None, None, f)),
    }
    for name, specs in wanted.items():
        factors = getattr(place, name)
        for variable, spec in zip((factors.a, factors.b), specs, strict=True):
            assert jax.tree.leaves(variable)[0].spec == jax.sharding.PartitionSpec(
                *spec
            )
