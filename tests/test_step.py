import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training as tiny

from cm3leon_jax.parallel.rules import batch_sharding, shardings
from cm3leon_jax.training import step
from cm3leon_jax.training.loss import GROUPS, RETRIEVAL_GROUPS


@functools.cache
def losses(
    sizes: tuple[int, int, int], config: step.StepConfig, steps: int, kind="adamw"
):
    """The metrics of the first steps of the real decoder on a mesh."""
    mesh, tx = tiny.mesh_of(*sizes), tiny.optimizer(kind=kind)
    init = functools.partial(tiny.init, tx=tx)
    placement = shardings(jax.eval_shape(init, jax.random.key(0)), mesh, tiny.RULES)
    state = jax.jit(init, out_shardings=placement)(jax.random.key(0))
    update = jax.jit(
        tiny.step_fn(mesh, config, tx=tx),
        donate_argnums=0,
        out_shardings=(placement, None),
    )
    history = []
    for t in range(steps):
        batch = jax.device_put(tiny.device_batch(t), batch_sharding(mesh, tiny.RULES))
        state, metrics = update(state, batch)
        history.append(jax.device_get(metrics))
    assert int(state.step) == steps
    return {key: np.array([m[key] for m in history]) for key in history[0]}


def test_the_first_loss_is_ln_v_and_then_it_falls():
    metrics = losses((1, 1, 1), tiny.STEP, 20)
    assert metrics["loss"][0] == pytest.approx(math.log(tiny.LAYOUT.size), rel=1e-6)
    assert metrics["perplexity"][0] == pytest.approx(tiny.LAYOUT.size, rel=1e-5)
    assert metrics["loss"][-1] < metrics["loss"][0] - 0.3


@pytest.mark.parametrize(
    "sizes, kind",
    [
        ((8, 1, 1), "adamw"),
        ((1, 8, 1), "adamw"),
        ((2, 2, 2), "adamw"),
        ((2, 2, 2), "muon"),
    ],
)
def test_the_mesh_does_not_change_the_losses(sizes, kind):
    one = losses((1, 1, 1), tiny.STEP, 20, kind)
    many = losses(sizes, tiny.STEP, 20, kind)
    np.testing.assert_allclose(many["loss"], one["loss"], rtol=1e-5)
    for group in GROUPS:
        np.testing.assert_allclose(
            many[f"loss/{group}"], one[f"loss/{group}"], rtol=1e-5
        )


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 1)])
def test_accumulation_is_exact(sizes):
    # Each part has another number of tokens: a mean of means would be off.
    parts = step.StepConfig(segmented=True, microbatches=2, loss_blocks=4)
    whole, cut = losses((1, 1, 1), tiny.STEP, 20), losses(sizes, parts, 20)
    counts = [
        step.targets(jax.tree.map(lambda x, i=i: x[i::2], tiny.device_batch(0)))
        for i in range(2)
    ]
    assert counts[0].sum() != counts[1].sum()
    for key in whole:
        np.testing.assert_allclose(cut[key], whole[key], rtol=1e-5, err_msg=key)


def test_weights_leave_out_padding_and_the_first_token_of_a_sample():
    segments = jnp.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
    weights = step.targets({"segments": segments})
    np.testing.assert_array_equal(weights, [[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]])


def test_what_has_no_weight_has_no_influence():
    sums = jax.jit(
        functools.partial(
            step.loss_sums,
            layout=tiny.LAYOUT,
            config=tiny.STEP,
            shard=lambda x, names: x,
            attention=tiny.xla_attention,
        )
    )
    noise = np.random.default_rng(0)  # in place of the zeros of an untrained model
    state = jax.tree.map(
        lambda x: jnp.asarray(noise.normal(size=x.shape) * 0.3, x.dtype),
        jax.eval_shape(tiny.init, jax.random.key(0)),
    )
    batch = tiny.device_batch(3)
    padded = batch["segments"] == 0
    other = batch | {"tokens": jnp.where(padded, 77, batch["tokens"])}
    for key, value in sums(state.model, batch).items():
        np.testing.assert_allclose(sums(state.model, other)[key], value, rtol=1e-6)
    # Sample 2 of a row does not see sample 1 where rows are segmented.
    first = batch["segments"] == 1
    second = batch | {"moved": batch["segments"] == 2}
    changed = second | {"tokens": jnp.where(first, 77, batch["tokens"])}
    np.testing.assert_allclose(
        sums(state.model, changed)["nll/moved"],
        sums(state.model, second)["nll/moved"],
        rtol=1e-6,
    )


def test_the_gradient_is_of_mean_nll_plus_z_loss():
    def sums_fn(model, part):
        return {"nll": jnp.sum(model), "z": jnp.sum(model**2)}

    model, batch = jnp.array([2.0, 3.0]), tiny.device_batch(0)
    config = step.StepConfig(segmented=True, z_loss=0.5)
    grads, sums = step.gradients(sums_fn, model, batch, config, shard=None)
    tokens = float(step.targets(batch).sum())
    np.testing.assert_allclose(grads, (1 + 0.5 * 2 * model) / tokens, rtol=1e-6)
    assert sums["z"] == 13.0


def test_impossible_settings_are_named():
    with pytest.raises(ValueError, match="step.microbatches=0"):
        step.StepConfig(segmented=True, microbatches=0)
    config = step.StepConfig(segmented=True, microbatches=3)
    abstract = jax.eval_shape(tiny.init, jax.random.key(0))
    with pytest.raises(ValueError, match="step.microbatches=3 does not divide the 8"):
        jax.eval_shape(
            tiny.step_fn(tiny.mesh_of(1, 1, 1), config), abstract, tiny.device_batch(0)
        )


def _retrieved(batch):
    """The first sample of every row has come with a retrieved document."""
    return batch | {"retrieved": batch["segments"] == 1}


def test_the_gradient_weighs_retrieved_tokens_in_any_number_of_parts():
    batch = _retrieved(tiny.device_batch(0))
    model = jax.tree.map(
        lambda x: 0.05 * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype),
        jax.eval_shape(tiny.init, jax.random.key(0)).model,
    )

    @functools.partial(jax.jit, static_argnames="config")
    def gradient(model, config):
        options = {"layout": tiny.LAYOUT, "config": config}
        options |= {"shard": lambda x, names: x, "attention": tiny.xla_attention}
        sums_fn = functools.partial(step.loss_sums, **options)
        return step.gradients(sums_fn, model, batch, config, options["shard"])

    def objective(model, weight):
        """The same by hand, through the logits."""
        logits = model(
            *(batch[key][:, :-1] for key in ("tokens", "positions", "segments"))
        )
        log_p = jax.nn.log_softmax(logits)
        targets = batch["tokens"][:, 1:, None]
        nll = -jnp.take_along_axis(log_p, targets, axis=-1)[..., 0]
        weights = jnp.where(batch["retrieved"][:, 1:], weight, 1.0)
        weights = weights * step.targets(batch)
        return jnp.sum(nll * weights) / jnp.sum(weights)

    for weight in (1.0, 0.1, 0.0):
        whole = step.StepConfig(segmented=True, retrieved_weight=weight)
        parts = step.StepConfig(segmented=True, retrieved_weight=weight, microbatches=2)
        grads, sums = gradient(model, whole)
        oracle = jax.jit(jax.grad(objective))(model, weight)
        pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(oracle), strict=True)
        for found, expected in pairs:
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
        cut, cut_sums = gradient(model, parts)
        pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(cut), strict=True)
        for found, expected in pairs:
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(cut_sums["count"], sums["count"], rtol=1e-6)


def test_metrics_of_rows_with_retrieved_documents():
    config = step.StepConfig(segmented=True, retrieved_weight=0.1)
    mesh = tiny.mesh_of(1, 1, 1)
    batch = _retrieved(tiny.device_batch(0))
    state = tiny.init(jax.random.key(0))
    _, metrics = jax.jit(tiny.step_fn(mesh, config))(state, batch)
    assert metrics["tokens"] == step.targets(batch).sum()
    for group in RETRIEVAL_GROUPS:
        assert metrics[f"loss/{group}"] == pytest.approx(math.log(tiny.LAYOUT.size))
    _, plain = jax.eval_shape(tiny.step_fn(mesh, config), state, tiny.device_batch(0))
    assert set(metrics) - set(plain) == {
        f"{kind}/{group}"
        for kind in ("loss", "perplexity")
        for group in RETRIEVAL_GROUPS
    }
    with pytest.raises(ValueError, match="step.retrieved_weight=-1"):
        step.StepConfig(segmented=True, retrieved_weight=-1.0)
