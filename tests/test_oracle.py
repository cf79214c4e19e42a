"""The oracle must be perfect on the truth and robust to a tokenizer's blur."""

import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageFilter

from cm3leon_jax.data import shapes
from cm3leon_jax.evaluation import oracle

WORLDS = [
    shapes.ShapesConfig(),
    shapes.ShapesConfig(image_size=32, layout=2),
    shapes.ShapesConfig(image_size=48, layout=3),
]


def scenes(config, count=200, split="test"):
    return [shapes.scene(config, split, seed) for seed in range(count)]


def score(config, wanted, pictures):
    counts = oracle.object_counts(
        [frozenset(s.objects) for s in wanted],
        [oracle.parse(config, p) for p in pictures],
    )
    return oracle.f1(counts)


@pytest.mark.parametrize("config", WORLDS, ids=lambda c: f"{c.image_size}px")
def test_perfect_on_rendered_truth(config):
    truth = scenes(config)
    pictures = [shapes.render(config, s) for s in truth]
    assert score(config, truth, pictures) == 1.0
    for s, picture in zip(truth, pictures, strict=True):
        assert oracle.background(config, picture) == s.background


@pytest.mark.parametrize("config", WORLDS, ids=lambda c: f"{c.image_size}px")
def test_survives_blur_and_noise(config):
    truth = scenes(config)
    rng = np.random.default_rng(0)
    pictures = []
    for s in truth:
        picture = Image.fromarray(shapes.render(config, s))
        blurred = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.6)), float)
        noisy = blurred + rng.normal(0, 8, blurred.shape)
        pictures.append(np.clip(noisy, 0, 255).astype(np.uint8))
    assert score(config, truth, pictures) >= 0.995


def test_perfect_in_the_large_world_under_a_mild_blur():
    config = WORLDS[0]
    assert (config.image_size, config.layout, len(config.backgrounds)) == (64, 3, 4)
    rng = np.random.default_rng(1)
    for s in scenes(config, 2000, "train"):
        picture = Image.fromarray(shapes.render(config, s))
        blurred = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.7)), float)
        noisy = np.clip(blurred + rng.normal(0, 6, blurred.shape), 0, 255)
        for shown in (np.asarray(picture), noisy.astype(np.uint8)):
            assert oracle.parse(config, shown) == frozenset(s.objects)
            assert oracle.background(config, shown) == s.background


@pytest.mark.parametrize("config", WORLDS, ids=lambda c: f"{c.image_size}px")
def test_boxes_and_pixels_of_objects(config):
    for s in scenes(config, 40):
        picture = shapes.render(config, s)
        boxes = oracle.boxes(config, picture)
        assert set(boxes) == set(s.objects)
        for (o, own), share in zip(
            oracle.covered(config, picture), shapes.coverage(config, s), strict=True
        ):
            assert (own == (share >= 0.48)).all()
            x0, y0, x1, y1 = boxes[o]
            inside = np.zeros_like(own)
            inside[y0:y1, x0:x1] = True
            assert not own[~inside].any()
            assert all(own[edge].any() for edge in ((y0,), (y1 - 1,)))
            assert own[:, x0].any() and own[:, x1 - 1].any()
    picture = np.full_like(picture, 255)
    picture[: config.image_size // config.layout : 2] = 77  # stripes
    assert oracle.UNKNOWN in {o.shape for o in oracle.boxes(config, picture)}


def test_pairs_of_a_text_are_counted():
    text = "a red circle, a red circle and a blue star; a red object, circles"
    found = oracle.parse_pairs(text)
    assert found == {("red", "circle"): 2, ("blue", "star"): 1}


def test_wrong_objects_are_never_right():
    config = WORLDS[1]
    truth = scenes(config)
    pictures = [shapes.render(config, s) for s in truth]
    assert score(config, truth, pictures[1:] + pictures[:1]) < 0.2


def test_smear_is_an_unknown_object():
    config = WORLDS[1]
    picture = np.full((32, 32, 3), 255, np.uint8)
    picture[:16:2, :16] = (220, 40, 40)  # stripes: no shape of this world
    (found,) = oracle.parse(config, picture)
    assert found.shape == oracle.UNKNOWN


def test_captions_parse_back():
    for config in WORLDS:
        for seed, s in enumerate(scenes(config)):
            text = shapes.caption(config, s, seed)
            assert oracle.parse_caption(config, text) == frozenset(s.objects), text


def test_caption_object_without_place_is_wrong():
    (found,) = oracle.parse_caption(WORLDS[0], "a small red circle and a cat")
    assert found.cell == -1


def test_scenes_are_pure_and_splits_disjoint():
    config = WORLDS[1]
    assert scenes(config) == scenes(config)
    train = {s.objects for s in scenes(config, 2000, "train")}
    test = {s.objects for s in scenes(config, 500)}
    assert not train & test


def test_held_out_pairs_occur_only_on_request():
    config = WORLDS[0]
    for seed in range(300):
        plain = shapes.scene(config, "train", seed)
        asked = shapes.scene(config, "test", seed, held_out=True)
        assert not {(o.colour, o.shape) for o in plain.objects} & shapes.HELD_OUT
        assert {(o.colour, o.shape) for o in asked.objects} & shapes.HELD_OUT


def test_scene_survives_json():
    for s in scenes(WORLDS[0], 20):
        assert shapes.Scene.from_json(s.to_json()) == s


@pytest.mark.parametrize(
    "wrong",
    [
        {"shapes": ("blob",)},
        {"colours": ()},
        {"layout": 4},
        {"max_objects": 0},
        {"image_size": 20},
    ],
)
def test_impossible_worlds_are_refused(wrong):
    with pytest.raises(ValueError, match=f"shapes.{next(iter(wrong))}"):
        dataclasses.replace(shapes.ShapesConfig(), **wrong)
