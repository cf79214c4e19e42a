"""Control pictures: where their lines are, and that they are the same every time."""

import sys

import numpy as np
import pytest

from cm3leon_jax.data import controls


def square_on(ground, colour, size=32):
    picture = np.full((size, size, 3), ground, np.uint8)
    picture[8:24, 8:24] = colour
    return picture


# Equal means: no edge in grey, but one in every channel that differs.
@pytest.mark.parametrize(
    "pair", [((255, 255, 255), (0, 0, 0)), ((200, 0, 0), (0, 200, 0))]
)
def test_edges_are_the_border_and_nothing_else(pair):
    pytest.importorskip("skimage")
    lines = controls.edges(square_on(*pair))
    assert lines.dtype == np.uint8 and set(np.unique(lines)) == {0, 255}
    assert (lines == lines[..., :1]).all()
    found = lines[..., 0] > 0
    near = np.zeros((32, 32), bool)
    near[6:26, 6:26], near[10:22, 10:22] = True, False
    assert not found[~near].any()
    assert (found[7:25, 12:20].sum(0) >= 2).all()  # above and below
    assert not controls.edges(np.full((32, 32, 3), 77, np.uint8)).any()


@pytest.mark.parametrize("size", [16, 32, 96])
def test_scribbles_stray_from_the_border_and_depend_on_the_seed(size):
    pytest.importorskip("skimage")
    picture = np.full((size, size, 3), 255, np.uint8)
    quarter = size // 4
    picture[quarter:-quarter, quarter:-quarter] = (0, 0, 120)
    first, again, other = (controls.scribble(picture, seed) for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()
    assert first.any() and set(np.unique(first)) == {0, 255}
    middle = slice(quarter * 7 // 4, -(quarter * 7 // 4))
    assert not first[middle, middle].any()
    assert not first[0].any() and not first[:, 0].any()


def test_class_colours_tell_labels_apart_and_stay():
    colours = controls.class_colours(16).astype(int)
    apart = np.abs(colours[:, None] - colours[None]).max(-1)
    assert apart[~np.eye(16, dtype=bool)].min() >= 25
    assert (controls.class_colours(5) == colours[:5]).all()
    assert not colours[0].any()
    mask = np.arange(16).reshape(4, 4)
    assert (controls.class_picture(mask, 16) == colours[mask]).all()
    with pytest.raises(ValueError, match="labels 0 … 15, there are 15 classes"):
        controls.class_picture(mask, 15)


def test_missing_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ModuleNotFoundError, match=r'"cm3leon-jax\[controls\]"'):
        controls.edges(square_on(0, 255))
