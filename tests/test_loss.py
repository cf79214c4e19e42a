import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_training as tiny

from cm3leon_jax.training.loss import blockwise_nll, means, next_token_loss, token_nll

B, L, D, V = 3, 8, 5, tiny.LAYOUT.size


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    return {
        "hidden": jnp.asarray(rng.normal(size=(B, L, D)), jnp.float32),
        "w": jnp.asarray(rng.normal(size=(D, V)), jnp.float32),
        "targets": jnp.asarray(rng.integers(0, V, (B, L)), jnp.int32),
        "weights": jnp.asarray(rng.random((B, L)) < 0.7, jnp.float32),
        "moved": jnp.asarray(rng.random((B, L)) < 0.4),
    }


def test_nll_is_optax_cross_entropy_even_for_large_bfloat16_logits(case):
    for dtype, scale in ((jnp.float32, 1.0), (jnp.bfloat16, 300.0)):
        logits = (case["hidden"] @ case["w"] * scale).astype(dtype)
        nll, log_z = token_nll(logits, case["targets"])
        oracle = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), case["targets"]
        )
        assert nll.dtype == log_z.dtype == jnp.float32
        np.testing.assert_allclose(nll, oracle, rtol=1e-5, atol=1e-5)


def test_sums_and_groups_against_numpy(case):
    sums = next_token_loss(
        case["w"],
        case["hidden"],
        case["targets"],
        case["weights"],
        case["moved"],
        layout=tiny.LAYOUT,
    )
    logits = np.asarray(case["hidden"] @ case["w"], np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    targets, weights = np.asarray(case["targets"]), np.asarray(case["weights"]) > 0
    nll = log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    moved = np.asarray(case["moved"])
    members = {
        "": np.ones_like(moved),
        "/text": np.isin(targets, tiny.LAYOUT.text),
        "/image": np.isin(targets, tiny.LAYOUT.image),
        "/context": ~moved,
        "/moved": moved,
    }
    metrics = means(sums)
    for name, member in members.items():
        chosen = nll[member & weights]
        np.testing.assert_allclose(sums[f"nll{name}"], chosen.sum(), rtol=1e-5)
        assert sums[f"count{name}"] == chosen.size > 0
        np.testing.assert_allclose(metrics[f"loss{name}"], chosen.mean(), rtol=1e-5)
        np.testing.assert_allclose(
            metrics[f"perplexity{name}"], np.exp(chosen.mean()), rtol=1e-5
        )
    np.testing.assert_allclose(sums["z"], (log_z[weights] ** 2).sum(), rtol=1e-5)


def test_a_group_without_tokens_has_no_loss(case):
    sums = next_token_loss(
        case["w"],
        case["hidden"],
        jnp.full((B, L), tiny.LAYOUT.text.start),
        case["weights"],
        jnp.zeros((B, L), bool),
        layout=tiny.LAYOUT,
    )
    metrics = means(sums)
    assert np.isnan(metrics["loss/image"]) and np.isnan(metrics["loss/moved"])
    assert metrics["loss/text"] == metrics["loss/context"] == metrics["loss"]


def test_blocks_change_neither_loss_nor_gradient(case):
    def total(hidden, w, blocks):
        nll, log_z = blockwise_nll(w, hidden, case["targets"], blocks)
        return jnp.sum(nll * case["weights"]) + 1e-2 * jnp.sum(log_z**2)

    def result(blocks):
        f = jax.value_and_grad(functools.partial(total, blocks=blocks), (0, 1))
        return f(case["hidden"], case["w"])

    for a, b in zip(
        jax.tree.leaves(result(1)), jax.tree.leaves(result(4)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="loss_blocks=3 does not divide"):
        result(3)


@pytest.mark.parametrize("blocks", [1, 4])
def test_a_target_that_is_no_id_has_no_loss(case, blocks):
    wrong = np.array(case["targets"])
    wrong[0, :4] = (-1, V, -V, 2 * V)
    nll, log_z = blockwise_nll(case["w"], case["hidden"], jnp.asarray(wrong), blocks)
    lost = np.zeros((B, L), bool)
    lost[0, :4] = True
    np.testing.assert_array_equal(np.isnan(nll), lost)
    assert np.isfinite(log_z).all()


def test_blocks_change_little_in_bfloat16(case):
    def result(blocks):
        def total(hidden, w):
            nll, log_z = blockwise_nll(w, hidden, case["targets"], blocks)
            return jnp.sum(nll * case["weights"]) + 1e-2 * jnp.sum(log_z**2)

        half = (case[name].astype(jnp.bfloat16) for name in ("hidden", "w"))
        value, gradients = jax.value_and_grad(total, (0, 1))(*half)
        assert {x.dtype for x in gradients} == {jnp.dtype(jnp.bfloat16)}
        return [np.asarray(x, np.float32) for x in (value, *gradients)]

    for a, b in zip(result(4), result(1), strict=True):
        # Of sums of L or V terms, the last of bfloat16's 8 bits.
        np.testing.assert_allclose(a, b, rtol=2**-7, atol=2**-7 * np.abs(b).max())


def test_in_blocks_the_logits_are_never_whole(case):
    def total(hidden, w, blocks):
        nll, log_z = blockwise_nll(w, hidden, case["targets"], blocks)
        return jnp.sum(nll + log_z)

    def text(blocks):
        f = jax.grad(functools.partial(total, blocks=blocks), (0, 1))
        return str(jax.make_jaxpr(f)(case["hidden"], case["w"]))

    assert f"[{B},{L},{V}]" in text(1)
    assert f"[{B},{L},{V}]" not in text(4) and f"[{B},{L},{V // 4}]" in text(4)


@pytest.mark.parametrize("weight", [1.0, 0.1, 0.0])
def test_the_weight_is_on_retrieved_tokens_only_and_groups_count_every_token(
    case, weight
):
    retrieved = np.arange(B * L).reshape(B, L) % 3 == 0
    arguments = (case["w"], case["hidden"], case["targets"])
    plain = next_token_loss(
        *arguments, case["weights"], case["moved"], layout=tiny.LAYOUT
    )
    sums = next_token_loss(
        *arguments,
        case["weights"],
        case["moved"],
        layout=tiny.LAYOUT,
        retrieved_BL=jnp.asarray(retrieved),
        retrieved_weight=weight,
    )
    nll, log_z = token_nll(case["hidden"] @ case["w"], case["targets"])
    targets, used = np.asarray(case["targets"]), np.asarray(case["weights"]) > 0
    counted = np.where(retrieved, weight, 1.0) * used
    for key, of in (("nll", nll), ("z", np.square(log_z)), ("count", np.ones((B, L)))):
        np.testing.assert_allclose(sums[key], (of * counted).sum(), rtol=1e-5)
    image = np.isin(targets, tiny.LAYOUT.image)
    for name, member in {
        "query": ~retrieved,
        "retrieved": retrieved,
        "query_image": image & ~retrieved,
    }.items():
        chosen = np.asarray(nll)[member & used]
        assert sums[f"count/{name}"] == len(chosen) > 0
        np.testing.assert_allclose(sums[f"nll/{name}"], chosen.sum(), rtol=1e-5)
        np.testing.assert_allclose(
            means(sums)[f"loss/{name}"], chosen.mean(), rtol=1e-5
        )
    for name in ("text", "image", "context", "moved"):  # whatever the weight
        assert sums[f"nll/{name}"] == plain[f"nll/{name}"]
    if weight == 1:
        assert all(sums[key] == plain[key] for key in ("nll", "z", "count"))
