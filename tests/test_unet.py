"""The U-Net that class tokens are compared with, and its training."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training

from cm3leon_jax.models import unet
from cm3leon_jax.models.unet import UNetConfig
from cm3leon_jax.parallel.rules import Rules
from cm3leon_jax.training import metrics, segmenter
from cm3leon_jax.training.optimizer import OptimizerConfig
from cm3leon_jax.training.segmenter import SegmenterTrainConfig

MODEL = UNetConfig(image_size=16, classes=3, channels=16, multipliers=(1, 2))
TRAINING = SegmenterTrainConfig(
    optimizer=OptimizerConfig(peak=1e-2, warmup=5, steps=60, weight_decay=0.0),
    batch_size=8,
    log_every=1,
    checkpoint_every=60,
)
PALETTE = np.array([[250, 250, 250], [40, 80, 220], [220, 40, 40]], np.uint8)


def abstract(config: UNetConfig) -> unet.UNet:
    return jax.eval_shape(lambda key: unet.build(config, key), jax.random.key(0))


def scenes(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pictures and masks of a square, blue and to be called 1, or red and to be 2."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, 16, 16), np.int32)
    for mask in masks:
        y, x = rng.integers(0, 9, 2)
        mask[y : y + 7, x : x + 7] = rng.integers(1, 3)
    return PALETTE[masks], masks


def run(directory, config=TRAINING, model=MODEL, data=None, mesh=(1, 1, 1)):
    images, masks = data or scenes(64)
    return segmenter.train(
        config,
        model,
        images=images,
        masks=masks,
        directory=directory,
        mesh=tiny_training.mesh_of(*mesh),
        rules=Rules(),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("unet")
    return directory, run(directory)


def test_every_pixel_has_logits():
    model = abstract(MODEL)
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    logits = jax.eval_shape(lambda model, x: model(x), model, images)
    assert (logits.shape, logits.dtype) == ((2, 16, 16, 3), jnp.float32)
    count = sum(x.size for x in jax.tree.leaves(model))
    assert count == unet.parameter_count(MODEL)


def test_training_learns_a_small_world(trained):
    directory, model = trained
    assert [line["step"] for line in metrics.read(directory)] == list(range(1, 61))
    images, masks = scenes(32, seed=1)
    assert (segmenter.segment(model, images) == masks).mean() > 0.99


def test_the_first_loss_is_that_of_a_guess(trained):
    """All classes are equally likely before the first update."""
    line = metrics.read(trained[0])[0]
    assert (line["step"], line["loss"]) == (1, pytest.approx(math.log(3), rel=1e-5))


def test_details_and_surroundings_both_reach_a_pixel(trained):
    """Its own colour does, and what lies farther than full resolution reaches: the
    five convolutions there see 5 pixels away."""
    _, model = trained
    images = np.zeros((3, 16, 16, 3), np.float32)
    images[1, 5, 5] = 1  # the pixel itself
    images[2, 5, 12] = 1
    logits = np.asarray(jax.jit(lambda model, x: model(x))(model, images))
    for other in (1, 2):
        assert np.abs(logits[other, 5, 5] - logits[0, 5, 5]).max() > 1e-4


def test_labels_do_not_depend_on_the_batch(trained):
    _, model = trained
    images, _ = scenes(3, seed=2)
    together = segmenter.segment(model, images)
    assert (together.dtype, together.shape) == (np.int32, (3, 16, 16))
    np.testing.assert_array_equal(segmenter.segment(model, images[1:2])[0], together[1])
    assert segmenter.segment(model, images[:0]).shape == (0, 16, 16)


def test_a_finished_run_is_not_run_again(trained):
    directory, model = trained
    again = run(directory)
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bfloat16_leaves_parameters_and_logits_in_float32():
    config = dataclasses.replace(MODEL, dtype="bfloat16")
    model = abstract(config)
    assert {x.dtype for x in jax.tree.leaves(model)} == {jnp.dtype("float32")}
    images = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    logits = jax.eval_shape(lambda model, x: model(x), model, images)
    assert logits.dtype == jnp.float32


@pytest.mark.slow
def test_every_mesh_learns_the_same(tmp_path):
    short = dataclasses.replace(TRAINING.optimizer, steps=8)
    config = dataclasses.replace(TRAINING, optimizer=short)
    losses = []
    for mesh in ((1, 1, 1), (2, 2, 2)):
        directory = tmp_path / f"mesh{mesh[0]}"
        run(directory, config, mesh=mesh)
        losses.append([line["loss"] for line in metrics.read(directory)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"image_size": 17}, "unet.image_size=17"),
        ({"classes": 1}, "unet.classes=1"),
        ({"channels": 0}, "unet.channels=0"),
        ({"multipliers": ()}, "unet.multipliers"),
        ({"norm": "batch"}, "unet.norm='batch'"),
        ({"dtype": "float16"}, "unet.dtype='float16'"),
    ],
)
def test_impossible_settings_are_named(change, named):
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(MODEL, **change)


@pytest.mark.parametrize(
    ("images", "masks", "named"),
    [
        (0, 0, "0 masks for 0 pictures"),
        (8, 7, "7 masks for 8 pictures"),
        ((8, 8, 8, 3), 8, r"\[8, 8, 3\]"),
        (8, (8, 8, 8), r"masks of \[8, 8\]"),
    ],
)
def test_what_cannot_be_learnt_from_is_named(tmp_path, images, masks, named):
    full = scenes(8)
    given = [
        np.zeros(x, np.uint8)
        if isinstance(x, tuple)
        else y[:x]
        if np.isscalar(x)
        else x
        for x, y in zip((images, masks), full, strict=True)
    ]
    with pytest.raises(ValueError, match=named):
        run(tmp_path, data=given)


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_without_a_class_are_named(label):
    images, masks = scenes(8)
    masks = masks + label * (np.arange(8) == 5)[:, None, None]
    first = segmenter.mask_batches(images, masks, TRAINING, 3, 0, 0)
    with pytest.raises(ValueError, match="unet.classes=3"):
        next(first)


def test_every_picture_comes_with_its_mask():
    images, masks = scenes(20)
    seen = []
    for batch in segmenter.mask_batches(images, masks, TRAINING, 3, 0, 57):
        np.testing.assert_array_equal(batch["images"], PALETTE[batch["masks"]])
        seen.append(len(batch["row"]))
    assert seen == [8, 8, 8]  # batches 57, 58 and 59 of 60


def test_settings_of_a_run_are_positive():
    with pytest.raises(ValueError, match="segmenter.batch_size=0"):
        dataclasses.replace(TRAINING, batch_size=0)
