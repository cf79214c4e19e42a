"""Long lists of prompts: what is finished is not drawn again."""

import io
import re
import sys

import pytest
from PIL import Image

from cm3leon_jax import gallery
from cm3leon_jax.sampling.rerank import Ranked

PROMPTS = [f"scene {i}" for i in range(7)]
KEY = "seed 0"


class Painter:
    """Draws the number of the prompt, and stops after `calls` calls."""

    def __init__(self, calls=None):
        self.calls, self.drawn = calls, []

    def __call__(self, numbers):
        if self.calls == 0:
            raise KeyboardInterrupt
        self.calls = None if self.calls is None else self.calls - 1
        self.drawn += numbers
        return [self.paint(i) for i in numbers]

    def paint(self, i):
        return Image.new("RGB", (4, 4), (i, 0, 0))


class Judge(Painter):
    """Draws two candidates of each, the second one the better."""

    def paint(self, i):
        one, two = (Image.new("RGB", (4, 4), (i, n, 0)) for n in range(2))
        return Ranked(
            outputs=(two, one), numbers=(1, 0), scores=(0.5, -i), parts={"gain": (1, 2)}
        )


def fill(folder, painter, key=KEY, prompts=PROMPTS):
    keys = [key] * len(prompts)
    return gallery.fill(folder, prompts, painter, keys=keys, batch=3)


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
    assert paths == [{"picture": str(tmp_path / f"{i:04d}.png")} for i in range(7)]
    assert [Image.open(x["picture"]).getpixel((0, 0))[0] for x in paths] == [*range(7)]
    assert not list(tmp_path.glob("*.part"))
    fill(tmp_path, Painter(calls=0))  # nothing is left to be drawn


def test_what_differs_is_drawn_again(tmp_path):
    fill(tmp_path, Painter())
    (tmp_path / "0005.png").unlink()
    changed = Painter()
    fill(tmp_path, changed)
    assert changed.drawn == [5]
    other = Painter()
    fill(tmp_path, other, key="seed 1")
    assert other.drawn == [*range(7)]
    fill(tmp_path, Painter(calls=0), key="seed 1")
    longer = Painter()
    fill(tmp_path, longer, key="seed 1", prompts=["new", *PROMPTS[1:], "last"])
    assert longer.drawn == [0, 7]


def test_candidates_with_their_scores_go_on_too(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, Judge(calls=1))
    judge = Judge()
    made = fill(tmp_path, judge)
    assert judge.drawn == [3, 4, 5, 6]
    paths = (str(tmp_path / f"0004-{rank:02d}.png") for rank in range(2))
    assert made[8:10] == [
        {"picture": next(paths), "score": 0.5, "number": 1, "gain": 1},
        {"picture": next(paths), "score": -4, "number": 0, "gain": 2},
    ]
    assert Image.open(made[8]["picture"]).getpixel((0, 0)) == (4, 1, 0)
    (tmp_path / "0002-01.png").unlink()
    once_more = Judge()
    assert fill(tmp_path, once_more) == made
    assert once_more.drawn == [2]


def test_off_a_terminal_every_batch_is_a_line(tmp_path, capfd):
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, Painter(calls=1))
    assert re.fullmatch(r"3/7 images, [\d.e+]+ images/s\n", capfd.readouterr().err)
    fill(tmp_path, Painter())
    first, last = capfd.readouterr().err.splitlines()
    assert first.startswith("3/4 images, ") and last.startswith("4/4 images, ")
    fill(tmp_path, Painter(calls=0))
    assert capfd.readouterr().err == ""


def test_on_a_terminal_there_is_one_bar_over_what_is_missing(tmp_path, monkeypatch):
    fill(tmp_path, Painter(), prompts=PROMPTS[:3])
    shown = io.StringIO()
    shown.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", shown)
    fill(tmp_path, Painter())
    assert "0/4" in shown.getvalue() and "4/4 [" in shown.getvalue()
    assert "image/s" in shown.getvalue() and "images, " not in shown.getvalue()


def test_a_line_that_was_cut_short_counts_as_none(tmp_path):
    fill(tmp_path, Painter())
    log = tmp_path / gallery.LINES
    log.write_text(log.read_text()[:-20])
    painter = Painter()
    fill(tmp_path, painter)
    assert painter.drawn == [6]
    fill(tmp_path, Painter(calls=0))
