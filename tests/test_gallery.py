"""Long lists of prompts: what is finished is not drawn again."""

import numpy as np
import pytest
from PIL import Image

from cm3leon_jax import gallery

PROMPTS = [f"scene {i}" for i in range(7)]
SETTINGS = {"seed": 0, "checkpoint": "pretrain"}


class Painter:
    """Draws the number of the prompt, and stops after `calls` calls."""

    def __init__(self, calls=None):
        self.calls, self.drawn = calls, []

    def __call__(self, prompts, numbers):
        if self.calls == 0:
            raise KeyboardInterrupt
        self.calls = None if self.calls is None else self.calls - 1
        assert prompts == [PROMPTS[i] for i in numbers]
        self.drawn += numbers
        return [Image.new("RGB", (4, 4), (i, len(p), 0)) for i, p in enumerate(prompts)]


def fill(folder, painter, settings=SETTINGS, prompts=PROMPTS):
    return gallery.fill(folder, prompts, painter, settings=settings, batch=3)


def test_an_interrupted_list_goes_on_where_it_stopped(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, Painter(calls=1))
    assert sorted(p.name for p in tmp_path.glob("*.png")) == [
        "0000.png",
        "0001.png",
        "0002.png",
    ]
    before = (tmp_path / "0001.png").stat().st_mtime_ns
    painter = Painter()
    paths = fill(tmp_path, painter)
    assert painter.drawn == [3, 4, 5, 6]
    assert (tmp_path / "0001.png").stat().st_mtime_ns == before
    assert [path.name for path in paths] == [f"{i:04d}.png" for i in range(7)]
    assert all(np.asarray(Image.open(path)).shape == (4, 4, 3) for path in paths)
    assert not list(tmp_path.glob("*.part"))
    fill(tmp_path, Painter(calls=0))  # nothing is left to be drawn


def test_what_differs_is_drawn_again(tmp_path):
    fill(tmp_path, Painter())
    (tmp_path / "0005.png").unlink()
    changed = Painter()
    fill(tmp_path, changed)
    assert changed.drawn == [5]
    other = Painter()
    fill(tmp_path, other, settings=SETTINGS | {"seed": 1})
    assert other.drawn == [*range(7)]
    fill(tmp_path, Painter(calls=0), settings=SETTINGS | {"seed": 1})


def test_a_line_that_was_cut_short_counts_as_none(tmp_path):
    fill(tmp_path, Painter())
    log = tmp_path / gallery.LINES
    log.write_text(log.read_text()[:-20])
    painter = Painter()
    fill(tmp_path, painter)
    assert painter.drawn == [6]
    fill(tmp_path, Painter(calls=0))
