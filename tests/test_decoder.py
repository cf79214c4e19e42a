"""The decoder: published sizes, first loss, causality, settings against oracles."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from cm3leon_jax.models.attention import xla_attention
from cm3leon_jax.models.decoder import (
    Decoder,
    DecoderConfig,
    abstract,
    parameter_count,
)
from cm3leon_jax.models.layers import layer_norm, rotate

TINY = DecoderConfig(vocab=32, layers=2, width=16, heads=2, mlp=24, length=12)
CHAMELEON = dataclasses.replace(
    TINY, norm="rms", activation="swiglu", positions="rope", qk_norm=True
)
SETTINGS = {
    "both_positions": dataclasses.replace(TINY, positions="both"),
    "paper": TINY,
    "tied": dataclasses.replace(TINY, tie_embeddings=True),
    "chameleon": CHAMELEON,
    "reordered": dataclasses.replace(CHAMELEON, post_norm=True),
    "reordered_layer_norm": dataclasses.replace(TINY, post_norm=True),
}
PAPER = {  # layers, width, heads, non-embedding parameters (paper section 1.1)
    "350m": (24, 1024, 16, 301_989_888),
    "760m": (24, 1536, 16, 679_477_248),
    "7b": (32, 4096, 32, 6_442_450_944),
}


def paper_config(name, **changes):
    layers, width, heads, _ = PAPER[name]
    sizes = dict(layers=layers, width=width, heads=heads, mlp=4 * width)
    return DecoderConfig(**(sizes | dict(vocab=65_536, length=4096) | changes))


def random_model(config, seed=0):
    """A decoder in which nothing is zero or one, so that every weight matters."""
    rng = np.random.default_rng(seed)

    def draw(w):
        return jnp.asarray(rng.normal(0.2, 0.3, w.shape), w.dtype)

    return jax.tree.map(draw, abstract(config))


forward = jax.jit(lambda model, *args: model(*args))


def run(model, *args, **kwargs):
    if kwargs:
        return jax.jit(lambda m, a: m(*a, **kwargs))(model, args)
    return forward(model, *args)


def random_tokens(config, batch=2, length=8, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, config.vocab, (batch, length)), jnp.int32)


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("tied", [False, True])
def test_parameter_counts_of_the_paper(name, tied):
    config = paper_config(name, tie_embeddings=tied)
    tables = (1 if tied else 2) * 65_536 * config.width + 4096 * config.width
    assert parameter_count(config, embeddings=False) == PAPER[name][3]
    assert parameter_count(config) == PAPER[name][3] + tables


def test_every_parameter_names_its_axes():
    def is_param(x):
        return isinstance(x, nnx.Param)

    for config in SETTINGS.values():
        for param in jax.tree.leaves(abstract(config), is_leaf=is_param):
            names = param.get_metadata()["out_sharding"]
            assert len(names) == len(param.shape)
            assert set(names) <= {
                None, "embed", "mlp", "heads", "head", "vocab", "layers"
            }  # fmt: skip


def test_initial_values_are_those_of_the_paper():
    config = dataclasses.replace(TINY, vocab=512, width=64, mlp=256, length=512)
    model = Decoder(config, nnx.Rngs(0))
    for w in (model.embed, model.blocks.w_q, model.blocks.w_up):
        w = np.asarray(w[...])
        assert abs(w).max() <= 3 * 0.006
        # The cut at three deviations takes 1.3 % off the standard deviation.
        np.testing.assert_allclose(w.std(), 0.006 * 0.9866, rtol=0.03)
    np.testing.assert_allclose(
        np.asarray(model.position[...]).std(), 0.0002 * 0.9866, rtol=0.03
    )
    for w in (model.unembed, model.blocks.w_out, model.blocks.w_down):
        assert not np.asarray(w[...]).any()
    assert not np.array_equal(model.blocks.w_q[0], model.blocks.w_q[1])
    assert not np.array_equal(model.blocks.w_q[...], model.blocks.w_k[...])


def first_loss(config):
    model = jax.jit(lambda: Decoder(config, nnx.Rngs(0)))()
    tokens_BL = random_tokens(config, 1, 9)
    logits_BLV = jax.jit(lambda m, t: m(t))(model, tokens_BL[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(
        logits_BLV, tokens_BL[:, 1:]
    ).mean()


@pytest.mark.parametrize("name", PAPER)
def test_first_loss_is_ln_v_at_every_width(name):
    # One layer; vocabulary, positions and feed-forward cut so that it is cheap.
    config = paper_config(name, layers=1, vocab=512, length=16, mlp=128)
    np.testing.assert_allclose(first_loss(config), math.log(512), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_first_loss_is_ln_v_with_the_whole_vocabulary(name):
    config = paper_config(name, layers=1)
    np.testing.assert_allclose(first_loss(config), math.log(65_536), rtol=1e-6)


@pytest.mark.parametrize("name", SETTINGS)
def test_causality_by_gradient(name):
    """The output at t depends on the inputs 0..t, on each of them, and on no other."""
    model = random_model(SETTINGS[name])

    def outputs(rows_LD):
        swapped = nnx.clone(model)
        swapped.embed = nnx.Param(rows_LD)  # row t is only used at position t
        return jnp.power(swapped.hidden(jnp.arange(6)[None]), 3).sum(-1)[0]

    jacobian_LSD = jax.jit(jax.jacobian(outputs))(model.embed[:6])
    depends_LS = np.abs(np.asarray(jacobian_LSD)).max(-1) > 0
    np.testing.assert_array_equal(depends_LS, np.tril(np.ones((6, 6), bool)))


@pytest.mark.parametrize("name", ["paper", "chameleon"])
def test_packed_segments_do_not_see_each_other(name):
    model = random_model(SETTINGS[name])
    one, two = random_tokens(TINY, 1, 5), random_tokens(TINY, 1, 3, seed=1)
    packed = jnp.concatenate([one, two, jnp.zeros((1, 2), jnp.int32)], axis=1)
    positions = jnp.asarray([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1]])
    segments = jnp.asarray([[1, 1, 1, 1, 1, 2, 2, 2, 0, 0]])
    logits = run(model, packed, positions, segments)
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits[:, :5], run(model, one), atol=2e-5)
    np.testing.assert_allclose(logits[:, 5:8], run(model, two), atol=2e-5)
    # And without segment ids they do: the paper's packing has no reset.
    assert np.abs(run(model, packed, positions) - logits)[:, 5:8].max() > 1e-2


def test_positions_are_explicit():
    model, tokens = random_model(TINY), random_tokens(TINY)
    shifted = jnp.arange(8)[None] + jnp.asarray([[0], [4]])
    logits, default = run(model, tokens, shifted), run(model, tokens)
    np.testing.assert_allclose(logits[0], default[0], atol=2e-5)
    assert np.abs(logits[1] - default[1]).max() > 1e-2
    assert np.isnan(run(model, tokens, shifted + 1)[1, -1]).all()  # position 12 of 12


def normalise(x, eps, rms=False):
    x = x if rms else x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def reference(model, tokens_L):
    """The decoder once more, float64 numpy, a loop per layer, head and position."""
    c, w = model.config, jax.tree.map(lambda w: np.asarray(w, np.float64), model)
    K, eps, L = c.width // c.heads, c.norm_eps, len(tokens_L)

    def norm(x, scale):
        return (
            normalise(x, eps) if c.norm == "layer" else normalise(x, eps, True) * scale
        )

    def turn(x, t):
        pairs = x[: K // 2] + 1j * x[K // 2 :]
        pairs = pairs * np.exp(1j * t * 10_000.0 ** (-2 * np.arange(K // 2) / K))
        return np.concatenate([pairs.real, pairs.imag])

    x = w.embed[...][tokens_L]
    if c.positions != "rope":
        x = x + w.position[:L]
    for i in range(c.layers):
        b = jax.tree.map(lambda p, i=i: p[i], w.blocks)
        scales = (None, None)
        if c.norm == "rms":
            scales = b.attention_scale[...], b.mlp_scale[...]
        y = x if c.post_norm else norm(x, scales[0])
        out = np.zeros_like(x)
        for h in range(c.heads):
            q, k, v = (y @ a[:, h] for a in (b.w_q, b.w_k, b.w_v))
            if c.qk_norm:
                q = normalise(q, eps) * b.q_scale[h] + b.q_bias[h]
                k = normalise(k, eps) * b.k_scale[h] + b.k_bias[h]
            if c.positions != "learned":
                q = np.stack([turn(q[t], t) for t in range(L)])
                k = np.stack([turn(k[t], t) for t in range(L)])
            for t in range(L):
                p = np.exp(q[t] @ k[: t + 1].T / np.sqrt(K))
                out[t] += (p / p.sum()) @ v[: t + 1] @ b.w_out[h]
        x = x + (norm(out, scales[0]) if c.post_norm else out)
        y = x if c.post_norm else norm(x, scales[1])
        hidden = y @ b.w_up[...]
        if c.activation == "swiglu":
            gate = y @ b.w_gate[...]
            hidden = hidden * gate / (1 + np.exp(-gate))
        else:
            hidden = np.maximum(hidden, 0)
        out = hidden @ b.w_down[...]
        x = x + (norm(out, scales[1]) if c.post_norm else out)
    x = norm(x, w.final_scale[...] if c.norm == "rms" else None)
    return x @ (w.embed[...].T if c.tie_embeddings else w.unembed[...])


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_against_numpy(name):
    model = random_model(SETTINGS[name])
    tokens_BL = random_tokens(model.config)
    logits_BLV = run(model, tokens_BL)
    assert logits_BLV.dtype == jnp.float32
    for row, expected in zip(np.asarray(logits_BLV), tokens_BL, strict=True):
        np.testing.assert_allclose(
            row, reference(model, np.asarray(expected)), atol=1e-4, rtol=1e-4
        )


def test_norms_and_attention_against_linen():
    key_x, key_p = jax.random.split(jax.random.key(0))
    x_BLD = jax.random.normal(key_x, (2, 7, 16)) * 3 + 1
    oracle = linen.LayerNorm(epsilon=1e-5, use_bias=False, use_scale=False)
    np.testing.assert_allclose(
        layer_norm(x_BLD, 1e-5), oracle.apply({}, x_BLD), atol=1e-5
    )
    attention = linen.MultiHeadDotProductAttention(num_heads=2, use_bias=False)
    mask = linen.make_causal_mask(jnp.ones((2, 7)))
    params = attention.init(key_p, x_BLD)
    kernels = {k: v["kernel"] for k, v in params["params"].items()}
    q, k, v = (
        jnp.einsum("BLD,DHK->BLHK", x_BLD, kernels[n])
        for n in ("query", "key", "value")
    )
    out = jnp.einsum("BLHK,HKD->BLD", xla_attention(q, k, v), kernels["out"])
    np.testing.assert_allclose(
        out, attention.apply(params, x_BLD, mask=mask), atol=1e-5
    )


def test_rotary_scores_depend_on_the_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def score(at, other):
        turned = rotate(q, jnp.asarray([[at]])), rotate(k, jnp.asarray([[other]]))
        return float((turned[0] * turned[1]).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(8, 3), abs=1e-2)
    np.testing.assert_allclose(rotate(q, jnp.asarray([[0]])), q)
    length = jnp.linalg.norm(rotate(q, jnp.asarray([[50]])))
    np.testing.assert_allclose(length, jnp.linalg.norm(q), rtol=1e-5)


def loss_and_gradient(config, **changes):
    model = random_model(dataclasses.replace(config, **changes))
    tokens_BL = random_tokens(config)

    def loss(model):
        return jax.nn.logsumexp(model(tokens_BL), axis=-1).mean()

    return jax.jit(jax.value_and_grad(loss))(model)


def test_remat_changes_nothing():
    loss, gradient = loss_and_gradient(CHAMELEON)
    for remat in ("dots", "full"):
        again, other = loss_and_gradient(CHAMELEON, remat=remat)
        np.testing.assert_allclose(loss, again, rtol=1e-6)
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_scan_equals_a_loop_over_layers():
    model, tokens = random_model(TINY), random_tokens(TINY)
    positions = jnp.broadcast_to(jnp.arange(8), (2, 8))
    x = model.embeddings(tokens, positions)
    for i in range(TINY.layers):
        block = jax.tree.map(lambda w, i=i: w[i], model.blocks)
        x, _ = block(x, positions, lambda q, k, v: (xla_attention(q, k, v), None))
    expected = model.head(model.final_norm(x))
    np.testing.assert_allclose(run(model, tokens), expected, atol=1e-5)


def test_bfloat16_computes_low_and_returns_float32():
    config = dataclasses.replace(TINY, dtype="bfloat16")
    low, high = random_model(config), random_model(TINY)
    tokens = random_tokens(config)
    assert abstract(config).embed.dtype == jnp.float32
    hidden = jax.eval_shape(lambda m: m.hidden(tokens), low)
    assert hidden.dtype == jnp.bfloat16
    logits, exact = run(low, tokens), run(high, tokens)
    assert logits.dtype == jnp.float32
    error = np.abs(logits - exact).max() / np.abs(exact).max()
    assert 0 < error < 0.05


def test_attention_and_shard_are_handed_in():
    seen = []

    def shard(x, names):
        assert len(names) == x.ndim
        seen.append(names)
        return x

    def nothing(q_BLHK, k_BLHK, v_BLHK, segments_BL):
        assert segments_BL is None
        return jnp.zeros_like(v_BLHK)

    model, tokens = random_model(TINY), random_tokens(TINY)
    logits = run(model, tokens, shard=shard, attention=nothing)
    # With attention that returns zeros a token is on its own.
    last = run(model, tokens[:, -1:], jnp.full((2, 1), 7), attention=nothing)
    np.testing.assert_allclose(logits[:, -1:], last, atol=1e-5)
    assert np.abs(logits - run(model, tokens))[:, -1].max() > 1e-3
    assert {"heads", "mlp", "vocab"} <= {name for names in seen for name in names}


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(heads=3), "decoder.heads=3 does not divide decoder.width=16"),
        (dict(norm="batch"), "decoder.norm='batch': choose one of layer, rms"),
        (dict(layers=0), "decoder.layers=0 must be >= 1"),
        (dict(heads=16, positions="rope"), "is odd"),
        (dict(norm_eps=0.0), "norm_eps"),
    ],
)
def test_impossible_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)
