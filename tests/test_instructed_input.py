"""What tuned checkpoints are asked with: any picture is taken, bad input is named."""

import numpy as np
import pytest
import tiny_api
from PIL import Image as Pillow
from tiny_api import IMAGE_TOKENS, MASKS, SIDE
from tiny_data import LAYOUT

from cm3leon_jax.data.task_templates import TASKS
from cm3leon_jax.sampling import prompts
from cm3leon_jax.sampling.sampler import Sampler

LIMIT = 400
RNG = np.random.default_rng(0)
ONE, TWO = RNG.integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)
BOX, REGION = (1, 2, 5, 6), np.zeros((SIDE, SIDE), bool)
REGION[2:6, 1:5] = True
LABELS = RNG.integers(0, len(MASKS.classes), (SIDE, SIDE))
WHY, EDIT = ["why?"], ["make it blue"]
PLACED = {"caption": "a", "objects": "red star at (0, 0) -> (9, 9)"}


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "1", "I;16", "CMYK"])
@pytest.mark.parametrize("size", [(1, 1), (10_000, 2), (13, 40)])
def test_pictures_of_any_mode_and_size_are_taken(mode, size, monkeypatch):
    written = tiny_api.spy(monkeypatch)
    model = tiny_api.model(LIMIT, tasks=TASKS)
    picture, box = Pillow.new(mode, size), (0, 0, *size)
    model.edit([picture], ["make it blue"])
    model.edit([picture], ["make it blue"], regions=[box])
    model.segment([picture])
    model.control([picture], "segmentation", ["a"])
    assert len(model.answer([picture], ["why?"])) == 1
    for (prompt,) in written:
        codes = prompts.inside(prompt.streams[0], LAYOUT.image).sum()
        assert codes and codes % IMAGE_TOKENS == 0


def test_transparent_pictures_lie_on_white(monkeypatch):
    written = tiny_api.spy(monkeypatch)
    model = tiny_api.model(LIMIT, tasks=TASKS)
    clear = Pillow.new("RGBA", (SIDE, SIDE), (255, 0, 0, 0))
    model.variation([clear, Pillow.new("RGB", (SIDE, SIDE), "white")])
    first, second = written.pop()
    assert first.streams[0].tolist() == second.streams[0].tolist()


@pytest.mark.parametrize(
    "ask, message",
    [
        (lambda m: m.caption([ONE], style="terse"), "style='terse': choose from short"),
        (lambda m: m.caption([ONE], wording=9), "wordings 0 … 2, not 9"),
        (lambda m: m.answer([ONE], []), "questions is a list with at least one"),
        (lambda m: m.answer([ONE], "why?"), "questions is a list"),
        (lambda m: m.answer([ONE], [" "]), "question 0 is empty"),
        (lambda m: m.answer([ONE, TWO], WHY), "2 images need as many questions, not 1"),
        (lambda m: m.answer([], WHY), "images is a list"),
        (lambda m: m.answer([ONE], ["word " * 300]), "shorten the text"),
        (lambda m: m.answer([ONE], WHY, candidates=0), "candidates=0"),
        (lambda m: m.science([ONE], WHY, [[]]), r"choices\[0\] is a list"),
        (lambda m: m.science([ONE], WHY, []), "as many choices"),
        (lambda m: m.science([ONE], WHY, [["a"] * 27]), r"choices\[0\] has 27: give"),
        (lambda m: m.science([ONE], WHY, [["a"]], contexts=[""]), "context 0 is empty"),
        (lambda m: m.edit([ONE], ["word " * 300]), "shorten the text"),
        (lambda m: m.edit([ONE], [""]), "instruction 0 is empty"),
        (lambda m: m.edit([ONE], EDIT, regions=[]), "1 images need as many regions"),
        (lambda m: m.edit([ONE], EDIT, regions=[None]), "box 0=None"),
        (lambda m: m.edit([ONE], EDIT, regions=[(5, 2, 1, 6)]), "x0 < x1 and y0 < y1"),
        (lambda m: m.edit([ONE], EDIT, regions=[(0, 0, 9, 9)]), "inside 8x8 pixels"),
        (lambda m: m.edit([ONE], EDIT, regions=[(-1, 0, 4, 4)]), "inside 8x8 pixels"),
        (lambda m: m.edit([ONE], EDIT, regions=[(0, 0, 4)]), "give four whole pixels"),
        (lambda m: m.edit([ONE], EDIT, regions=[(0, 0, 4, 3.5)]), "four whole pixels"),
        (lambda m: m.edit([ONE], EDIT, regions=["0,0,4,4"]), "four whole pixels"),
        (lambda m: m.edit([ONE], EDIT, regions=[REGION[:4]]), r"bool \[4, 8\]: give"),
        (lambda m: m.edit([ONE], EDIT, regions=[REGION & False]), "mask 0 is empty"),
        (
            lambda m: m.edit([ONE[:, :4]], EDIT, regions=[(0, 0, 4, 1)]),
            "outside the centre square",
        ),
        (lambda m: m.control([ONE], "lines", ["a"]), "kind='lines': choose from edge"),
        (lambda m: m.control([ONE], "edge", ["a", "b"]), "1 images need as many pro"),
        (
            lambda m: m.control([ONE], "edge", ["a"], strength=0.5),
            "strength=0.5 is for",
        ),
        (lambda m: m.control([ONE], "style", ["a"], strength=0), r"within \(0, 1\]"),
        (lambda m: m.control([LABELS + 3], "segmentation", ["a"]), "picture 0: class"),
        (lambda m: m.ground(["a"], []), "1 prompts need as many lists of boxes"),
        (lambda m: m.ground(["a"], [[]]), r"boxes\[0\] is a list"),
        (lambda m: m.ground(["a"], [["b"]]), r"boxes\[0\]\[0\]='b': give \(phrase"),
        (lambda m: m.ground(["a"], [[("b", (0, 0, 9, 9))]]), r"boxes\[0\]\[0\]=\(0, "),
        (lambda m: m.ground(["a"], [[("b", (4, 0, 4, 4))]]), "x0 < x1 and y0 < y1"),
        (lambda m: m.ground(["a"], [[("", BOX)]]), "says nothing"),
        (lambda m: m.write([]), "contents is a list"),
        (lambda m: m.instruct("draw", [{}]), "no task 'draw': choose from"),
        (lambda m: m.instruct("edit", [{"source": ONE}]), "takes the fields source, i"),
        (lambda m: m.instruct("edit", []), "fields is a list"),
        (
            lambda m: m.instruct("edit", [{"source": ONE, "instruction": None}]),
            "needs instruction, not None",
        ),
        (
            lambda m: m.instruct("ground", [{"objects": "a", "caption": None}]),
            "needs caption, not None",
        ),
        (lambda m: m.instruct("infill", [{"caption": "a"}]), "ask `infill` for it"),
        (lambda m: m.instruct("ground", [PLACED | {"objects": 5}]), "objects is a l"),
        (lambda m: m.instruct("ground", [PLACED | {"objects": "a"}]), "PHRASE at"),
        (lambda m: m.instruct("ground", [PLACED | {"objects": [("a",)]}]), "give .phr"),
        (lambda m: m.instruct("ground", [PLACED]), "inside 8x8 pixels"),
        (lambda m: m.edit([ONE], EDIT, wording="a"), "wordings 0 … 1, not 'a'"),
        (lambda m: m.edit([ONE], EDIT, wording=0.0), "wordings 0 … 1, not 0.0"),
        (lambda m: m.control([ONE], "style", ["a"], strength="no"), "strength='no'"),
        (lambda m: m.edit([ONE], EDIT, regions=[ONE]), r"mask 0 is bool \[8, 8, 3\]"),
        (lambda m: m.variation([np.zeros((4, 4, 2), np.uint8)]), "picture 0 is uint8"),
        (lambda m: m.variation([np.zeros((0, 4, 3), np.uint8)]), "picture 0 is uint8"),
        (lambda m: m.segment(["a.png"]), "picture 0 is 'a.png': open it"),
        (lambda m: m.segment([ONE], sampler=Sampler(guidance=2.0)), "segmentation"),
        (lambda m: m.edit([ONE], EDIT, retrieve=2), "no memory to retrieve from"),
    ],
)
def test_bad_input_is_one_clear_message(ask, message, monkeypatch):
    tiny_api.spy(monkeypatch)
    with pytest.raises(ValueError, match=message):
        ask(tiny_api.model(LIMIT, tasks=TASKS))


def test_an_unknown_option_is_refused(monkeypatch):
    tiny_api.spy(monkeypatch)
    with pytest.raises(TypeError, match="tempreture"):
        tiny_api.model(LIMIT, tasks=TASKS).edit([ONE], EDIT, tempreture=1.0)
