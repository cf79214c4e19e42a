"""The dual encoder: sizes, lengths, padding, the contrastive loss on any mesh."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cm3leon_jax.models import dual_encoder
from cm3leon_jax.models.dual_encoder import VIT_B_32, DualEncoder, DualEncoderConfig
from cm3leon_jax.models.layers import identity
from cm3leon_jax.parallel.rules import Rules, batch_sharding, shard_fn, shardings
from cm3leon_jax.training import dual_encoder as training
from cm3leon_jax.training import dual_encoder_step as step
from cm3leon_jax.training.dual_encoder_step import DualEncoderTrainConfig
from cm3leon_jax.training.optimizer import OptimizerConfig, make_optimizer
from tests.tiny_training import mesh_of

CONFIG = DualEncoderConfig(
    image_size=8,
    patch=4,
    vision_layers=1,
    vision_width=16,
    vision_heads=2,
    text_vocab=30,
    text_length=12,
    text_layers=2,
    text_width=16,
    text_heads=2,
    embed=8,
)
TRAINING = DualEncoderTrainConfig(
    optimizer=OptimizerConfig(peak=1e-2, warmup=2, steps=40, weight_decay=0.0),
    batch_size=16,
    text_views=1.0,
    rare=0.05,
    shift=1,
    log_every=20,
)
COLOURS = {"red": (200, 20, 20), "blue": (20, 20, 200), "green": (20, 200, 20)}


def encode(text: str) -> list[int]:
    """Letters as pieces 0 to 25, other characters as 26."""
    return [ord(c) - 97 if "a" <= c <= "z" else 26 for c in text]


@functools.cache
def model() -> DualEncoder:
    return jax.jit(lambda key: DualEncoder(CONFIG, nnx.Rngs(key)))(jax.random.key(0))


def texts_of(*lengths: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    ids_BL = rng.integers(0, 29, (len(lengths), CONFIG.text_length)).astype(np.int32)
    return ids_BL, np.array(lengths, np.int32)


def pictures(count: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)


def batch(count: int) -> dict[str, np.ndarray]:
    ids_BL, length_B = texts_of(*np.resize([3, 12, 7, 5], 2 * count))
    return {
        "images": pictures(count),
        "ids": ids_BL.reshape(count, 2, -1),
        "lengths": length_B.reshape(count, 2),
    }


# ------------------------------------------------------------------ the model


def test_preset_has_the_published_number_of_parameters():
    assert dual_encoder.parameter_count(VIT_B_32) == 151_277_313


def test_scale_starts_where_it_is_told():
    build = functools.partial(DualEncoder, CONFIG, nnx.Rngs(0))
    np.testing.assert_allclose(build().scale(), 1 / 0.07, rtol=1e-5)
    np.testing.assert_allclose(build(80.0).scale(), 80, rtol=1e-5)
    wild = build(80.0)
    wild.logit_scale[...] = jnp.float32(9)
    assert wild.scale() == dual_encoder.MAX_SCALE


def test_embeddings_have_length_one():
    t_BE = model().text(*texts_of(1, 5, 12))
    i_BE = model().image(dual_encoder.to_float(jnp.asarray(pictures(3))))
    for x_BE in (t_BE, i_BE):
        assert x_BE.shape == (3, CONFIG.embed) and x_BE.dtype == jnp.float32
        np.testing.assert_allclose(np.linalg.norm(x_BE, axis=1), 1, rtol=1e-5)


def test_what_stands_behind_a_text_changes_nothing():
    ids_BL, length_B = texts_of(3, 7)
    other_BL = ids_BL.copy()
    for row, length in zip(other_BL, length_B, strict=True):
        row[length:] = (row[length:] + 11) % 30
    found = model().text(ids_BL, length_B)
    np.testing.assert_array_equal(found, model().text(other_BL, length_B))
    short = model().text(ids_BL[:, :7], length_B)  # as does the room there is
    np.testing.assert_allclose(found, short, rtol=1e-5, atol=1e-6)


def test_every_id_of_a_text_and_every_pixel_count():
    ids_BL, length_B = texts_of(*[6] * 7)
    ids_BL[:] = ids_BL[0]
    ids_BL[np.arange(6), np.arange(6)] += 1  # the seventh text stays as it was
    vectors = model().text(ids_BL, length_B)
    assert (np.asarray(vectors @ vectors.T) > 1 - 1e-6).sum() == 7
    image = dual_encoder.to_float(jnp.asarray(pictures(1)))
    pull = jax.grad(lambda x: model().image(x)[0, 0])(image)
    assert (np.abs(pull).max(-1) > 0).all()


def test_half_precision_is_close():
    low = dataclasses.replace(CONFIG, dtype="bfloat16")
    there = jax.tree.structure(dual_encoder.abstract(low))
    half = there.unflatten(jax.tree.leaves(model()))
    ids_BL, length_B = texts_of(4, 9)
    a_BE, b_BE = model().text(ids_BL, length_B), half.text(ids_BL, length_B)
    assert (jnp.sum(a_BE * b_BE, -1) > 0.999).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 3}, r"dual_encoder\.patch=3 does not divide .*image_size=8"),
        ({"text_heads": 3}, r"text_heads=3 does not divide .*text_width=16"),
        ({"embed": 0}, r"dual_encoder\.embed=0 must be positive"),
        ({"activation": "relu"}, r"activation='relu': choose one of quick_gelu"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="reads at most dual_encoder.text_length=12"):
        model().text(np.zeros((1, 13), np.int32), np.array([13]))
    with pytest.raises(ValueError, match=r"reads \[B, 8, 8, 3\]"):
        model().image(jnp.zeros((1, 9, 8, 3)))


# ------------------------------------------------------------------ the loss


def test_loss_is_that_of_the_definition():
    t = np.float64(model().text(*texts_of(3, 9, 5, 4)))
    i = np.float64(model().image(dual_encoder.to_float(jnp.asarray(pictures(4)))))
    loss, accuracy = step.contrast(jnp.asarray(i), jnp.asarray(t), 7.0, identity)
    logits = 7 * i @ t.T
    forth = -np.diag(logits - np.log(np.exp(logits).sum(1, keepdims=True)))
    back = -np.diag(logits - np.log(np.exp(logits).sum(0, keepdims=True)))
    np.testing.assert_allclose(loss, (forth.mean() + back.mean()) / 2, rtol=1e-5)
    assert accuracy == np.mean(logits.argmax(1) == np.arange(4))


def test_first_loss_is_that_of_guessing_among_all():
    """Of the global batch: 16, not the 2 of a device."""
    config = dataclasses.replace(TRAINING, text_views=0.0)
    alike = batch(16) | {"images": np.repeat(pictures(1), 16, 0)}
    alike["ids"] = np.repeat(alike["ids"][:1, :1], 16, 0)
    alike["lengths"] = np.full((16, 1), 5, np.int32)
    loss, _ = step.loss_terms(model(), alike, config)
    np.testing.assert_allclose(loss, np.log(16), rtol=1e-5)


def test_loss_over_a_sharded_batch_is_that_of_one_device():
    def loss(model, batch, shard=identity):
        return step.loss_terms(model, batch, TRAINING, shard)

    def gradient(**options):
        wanted = jax.value_and_grad(functools.partial(loss, **options), has_aux=True)
        return jax.jit(wanted)

    mesh, rules = mesh_of(2, 2, 2), Rules()
    placed = jax.device_put(model(), shardings(model(), mesh, rules))
    sent = jax.device_put(batch(16), batch_sharding(mesh, rules))
    one = gradient()(model(), batch(16))
    many = gradient(shard=shard_fn(mesh, rules))(placed, sent)
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max() + 1e-6)


def test_shifted_pictures_keep_their_edge():
    images = pictures(64)
    moved = np.asarray(step.shifted(jnp.asarray(images), 2, jax.random.key(0)))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    places = set()
    for one, wide in zip(moved, padded, strict=True):
        here = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if (one == wide[y : y + 8, x : x + 8]).all()
        ]
        assert here
        places.add(here[0])
    assert len(places) > 15


# ------------------------------------------------------------------ views of texts


def test_views_keep_rare_words_and_lose_common_ones():
    texts = [f"a {name} at the top" for name in "zu ba to ki mo".split()]
    keep = training.keep_words(texts, 0.05)
    assert keep["zu"] == 1 and keep["the"] == pytest.approx(0.05**0.5 / 0.2**0.5)
    random = np.random.default_rng(0).random
    views = [
        training.view(texts[0], keep, lambda n: random(len(n))) for _ in range(200)
    ]
    assert all("zu" in view.split() for view in views)
    share = np.mean(["the" in view.split() for view in views])
    assert abs(share - keep["the"]) < 0.12
    order = texts[0].split()
    assert all([w for w in order if w in v.split()] == v.split() for v in views)


def test_views_are_never_empty_and_unknown_words_stay():
    never = dict.fromkeys("abc", 1e-9)
    draws = np.array([0.9, 0.2, 0.5])
    assert training.view("a b c", never, lambda n: draws[n]) == " b"
    assert training.view("a new c", never, lambda n: draws[n]) == " new"
    assert training.view("", never, lambda n: draws[n]) == ""


def test_text_ids_end_and_are_cut():
    ids_BL, length_B = training.text_ids(["ab", "", "z" * 40], encode, CONFIG)
    assert ids_BL[0].tolist() == [0, 1, *[29] * 10] and length_B.tolist() == [3, 1, 12]
    assert ids_BL[2].tolist() == [25] * 11 + [29]
    texts = ["ab", "z" * 40, "", "z" * 40]
    assert training._cut(texts, encode, CONFIG) == 0.5
    longest = "z" * (CONFIG.text_length - 1)
    assert len(encode(longest)) == CONFIG.text_length - 1
    assert training._cut([longest], encode, CONFIG) == 0.0


# ------------------------------------------------------------------ a whole run


def pairs(count: int, seed: int) -> training.Pairs:
    rng = np.random.default_rng(seed)
    names = rng.choice(list(COLOURS), count).tolist()
    ground = rng.integers(0, 40, (count, 8, 8, 3))
    images = (ground + np.array([COLOURS[n] for n in names])[:, None, None]).astype(
        np.uint8
    )
    return [f"a {n} one" for n in names], images


def run(directory, **changes):
    arguments = {
        "pairs": pairs(200, 0),
        "validation": pairs(48, 1),
        "encode": encode,
        "mesh": mesh_of(1, 1, 1),
        "rules": Rules(),
    }
    config = changes.pop("config", TRAINING)
    return training.train(config, CONFIG, directory=directory, **(arguments | changes))


def test_training_learns(tmp_path):
    scores = run(tmp_path / "whole")
    # Three colours in a batch of 16: what can be known leaves ln(16/3) to guess.
    assert scores["image_text"] < 2.0 < np.log(16)
    assert scores["steps"] == 40 and scores["parameters"] > 5000
    assert scores["cut_texts"] == 0.0
    sizes = json.loads((tmp_path / "whole" / training.SETTINGS).read_text())
    assert DualEncoderConfig(**sizes) == CONFIG


def test_batches_are_a_function_of_their_number():
    options = {
        "steps": 6,
        "keep": training.keep_words(pairs(40, 0)[0], 0.05),
        "encode": encode,
        "model_config": CONFIG,
        "config": TRAINING,
        "seed": 0,
    }
    all_ = list(training.pair_batches(pairs(40, 0), 0, **options))
    late = list(training.pair_batches(pairs(40, 0), 4, **options))
    assert len(all_) == 6 and len(late) == 2
    for key in all_[4]:
        np.testing.assert_array_equal(all_[4][key], late[0][key])
    shares = [
        training.pair_batches(pairs(40, 0), 0, **options, share=(k, 2))
        for k in range(2)
    ]
    for batch, *parts in zip(all_, *shares, strict=True):
        for key, value in batch.items():
            joined = np.concatenate([part[key] for part in parts])
            np.testing.assert_array_equal(value, joined)
    rows = np.concatenate([batch["row"] for batch in all_[:5]])
    assert (np.bincount(rows) == 2).all()  # two epochs
    whole, view = all_[0]["lengths"].T
    assert (view <= whole).all() and (view < whole).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": (["a"] * 9, pictures(9))}, "9 training pairs do not fill a batch"),
        ({"validation": pairs(3, 0)}, "3 validation pairs do not fill"),
        ({"pairs": (["a"] * 20, pictures(19))}, "20 training texts for 19 pictures"),
        (
            {"pairs": (["a"] * 20, np.zeros((20, 9, 9, 3), np.uint8))},
            r"takes uint8 \[8, 8, 3\]",
        ),
        ({"encode": lambda text: [29]}, "has piece 29: dual_encoder.text_vocab=30"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 1}, "batch_size=1: .* at least 2"),
        ({"text_views": -1.0}, "text_views=-1.0 is negative"),
        ({"rare": 0.0}, "rare=0.0 must be positive"),
        ({"first_scale": 300.0}, "first_scale=300.0 must be between 1 and 100"),
        ({"log_every": 0}, "log_every=0 must be positive"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TRAINING, **change)


def test_only_matrices_decay():
    decayed = dataclasses.replace(
        TRAINING.optimizer, weight_decay=1.0, warmup=0, peak=1.0
    )
    tx = make_optimizer(decayed)
    zero = jax.tree.map(jnp.zeros_like, model())
    updates, _ = tx.update(zero, tx.init(model()), model())
    assert jnp.abs(updates.vision.blocks.w_q[...]).max() > 0
    assert not updates.words.blocks.scale_1[...].any()
    assert not updates.logit_scale[...].any()
    assert optax.tree.norm(updates) > 0
