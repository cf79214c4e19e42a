"""The page of launch/demo.py, its functions and in a real headless browser."""

import base64
import importlib.util
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import demo_page
import numpy as np
import pytest
from demo_page import Model, demo
from PIL import Image as Pillow

HERE = Path(__file__).parent
HOW = {"args": ["--no-sandbox"], "timeout": 600_000}


def _editor(background, strokes):
    layers = [Pillow.fromarray(stroke) for stroke in strokes]
    return {"background": background, "layers": layers, "composite": None}


def test_small_pictures_are_enlarged_by_a_whole_factor():
    small = Pillow.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    shown = demo.large(small)
    assert shown.size == (demo.SIDE, demo.SIDE)
    assert shown.resize((8, 8), Pillow.Resampling.NEAREST).tobytes() == small.tobytes()
    assert demo.large(Pillow.new("RGB", (900, 10))).size == (900, 10)


def test_what_was_painted_is_the_mask():
    stroke = np.zeros((6, 10, 4), np.uint8)
    stroke[2:4, 3:5] = 255
    other = np.zeros_like(stroke)
    other[5, 9, 3] = 1
    picture = Pillow.new("RGBA", (10, 6), "red")
    found, mask = demo.painted(_editor(picture, [stroke, other]))
    assert found.mode == "RGB" and found.size == (10, 6)
    wanted = np.zeros((6, 10), bool)
    wanted[2:4, 3:5] = wanted[5, 9] = True
    np.testing.assert_array_equal(mask, wanted)
    unpainted = _editor(picture, [np.zeros_like(stroke)])
    for editor in (None, _editor(None, []), _editor(picture, []), unpainted):
        with pytest.raises(ValueError, match="give a picture, and paint over"):
            demo.painted(editor)


def test_every_function_of_the_page_asks_the_model_what_it_should():
    tasks = demo.Tasks(Model())
    drawn, found = tasks.draw("a red star", 3, 2, 5)
    corners = [picture.getpixel((0, 0))[0] for picture in drawn]
    assert corners == [5, 6, 7] and drawn[0].getpixel((100, 100)) == (255, 0, 0)
    assert [text for _, text in found] == ["near a red star 0", "near a red star 1"]
    assert tasks.draw("a red star", 1, 0, 0)[1] == []
    stroke = np.zeros((20, 20, 4), np.uint8)
    stroke[:10] = 255
    editor = _editor(Pillow.new("RGB", (20, 20), "red"), [stroke])
    filled = tasks.fill(editor, "a blue sky", 0)
    assert filled.getpixel((0, 0)) == (0, 0, 255)
    assert filled.getpixel((0, filled.height - 1)) == (255, 0, 0)
    assert tasks.fill(editor, " ", 0).getpixel((0, 0)) == (255, 255, 255)
    picture = Pillow.new("RGB", (24, 16), "red")
    assert tasks.describe(picture, "", 0) == "a caption of 24x16"
    with pytest.raises(ValueError, match="not tuned on answer"):
        tasks.describe(picture, "what is it?", 0)
    assert tasks.edit(picture, "make it blue", 0).getpixel((9, 60)) == (0, 0, 255)
    shown, ((area, name),) = tasks.segment(picture, 0)
    assert name == "left half" and area.shape == shown.size[::-1]
    assert area[:, : shown.width // 2].all() and not area[:, shown.width // 2 :].any()
    for wrong, words in (
        (lambda: tasks.draw(" ", 1, 0, 0), "say what to draw"),
        (lambda: tasks.edit(None, "x", 0), "give a picture"),
        (lambda: tasks.edit(picture, "", 0), "say what to change"),
        (lambda: tasks.segment(None, 0), "give a picture"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()


def test_without_a_system_the_command_says_what_to_do(tmp_path):
    command = [sys.executable, "launch/demo.py", "--workdir", str(tmp_path / "none")]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert "not a work directory" in last or "setup.sh demo" in last


# ------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("bash launch/setup.sh browser")
    log = tmp_path_factory.mktemp("page") / "log"
    with log.open("w") as errors:
        served = subprocess.Popen(
            [sys.executable, demo_page.__file__],
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd=HERE,
            text=True,
        )
        try:
            assert served.stdout
            line = served.stdout.readline()
            assert line, log.read_text()[-3000:]
            yield json.loads(line)["url"]
        finally:
            served.terminate()
            served.communicate()


@pytest.fixture(scope="module")
def browser():
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("bash launch/setup.sh browser")
    from playwright.sync_api import Error, sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    own = next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as play:
        try:
            found = play.chromium.launch(executable_path=own, **HOW)
        except Error:
            pytest.skip("no Chromium: apt-get install chromium, or playwright install")
        yield found
        found.close()


@pytest.fixture
def page(browser, url):
    opened = browser.new_page(viewport={"width": 1200, "height": 1000})
    opened.set_default_timeout(600_000)  # against hanging alone
    outside = []

    def local(route):
        if route.request.url.startswith((url, "data:", "blob:")):
            route.continue_()
        else:
            outside.append(route.request.url)
            route.abort()

    opened.route("**/*", local)
    opened.goto(url, timeout=600_000)
    opened.get_by_role("button", name="Draw", exact=True).wait_for()
    yield opened
    opened.close()
    assert not outside, outside


def _tab(page, name):
    page.get_by_role("tab", name=name, exact=True).click()


def _press(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def _upload(page, name, colour="red"):
    """Puts a picture into a field."""
    file = io.BytesIO()
    Pillow.new("RGB", (64, 64), colour).save(file, "PNG")
    payload = {"name": "a.png", "mimeType": "image/png", "buffer": file.getvalue()}
    page.locator(f'#{name} input[type="file"]').set_input_files(payload)
    page.locator(f"#{name} img").first.wait_for()


def _shown(page, name, number=0):
    """A picture in the output of that name, once it is there."""
    picture = page.locator(f"#{name} img").nth(number)
    picture.wait_for()
    return _pixels(picture)


def _pixels(picture):
    data = picture.evaluate(
        """async image => {
            await image.decode();
            const canvas = document.createElement("canvas");
            canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
            canvas.getContext("2d").drawImage(image, 0, 0);
            return canvas.toDataURL("image/png").split(",")[1];
        }"""
    )
    return np.asarray(Pillow.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


@pytest.mark.slow
def test_drawing_painting_and_filling_in_by_hand(page):
    page.get_by_label("Prompt", exact=True).fill("a red star")
    page.get_by_label("Retrieved documents").first.fill("2")
    _press(page, "Draw")
    page.get_by_text("near a red star 1").first.wait_for()
    assert page.locator("#drawn img").count() == 4
    assert page.locator("#found img").count() == 2
    assert _shown(page, "drawn")[-1, -1].tolist() == [255, 0, 0]
    _press(page, "Fill in the first of them")
    _tab(page, "Fill in")
    canvas = page.locator("#editor canvas").first
    canvas.wait_for()
    whole = page.get_by_label("Prompt for the whole picture")
    page.wait_for_function("field => field.value", arg=whole.element_handle())
    assert whole.input_value() == "a red star"
    whole.fill("a blue bar")
    page.wait_for_timeout(2000)  # the picture is laid on the canvas by an animation
    box = canvas.bounding_box()
    across, down = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(across - 60, down)
    page.mouse.down()
    page.mouse.move(across + 60, down, steps=12)
    page.mouse.up()
    _press(page, "Fill in")
    filled = _shown(page, "filled").astype(int)
    blue = (filled == (0, 0, 255)).all(-1)
    middle = slice(*(np.array([0.4, 0.6]) * len(filled)).astype(int))
    assert blue[middle, middle].mean() > 0.3  # painted over in the middle
    assert 0.01 < blue.mean() < 0.5 and not blue[: len(blue) // 5].any()
    assert (filled[-1, -1] == (255, 0, 0)).all()  # and kept elsewhere


@pytest.mark.slow
def test_describing_editing_and_segmenting(page):
    _tab(page, "Describe")
    page.get_by_text("not tuned on questions").wait_for()
    _upload(page, "to_describe")
    _press(page, "Describe")
    said = page.get_by_label("Description")
    page.wait_for_function("field => field.value", arg=said.element_handle())
    assert said.input_value() == "a caption of 64x64"
    page.get_by_label("Question").fill("what is it?")
    _press(page, "Describe")
    page.get_by_text("it was not tuned on answer").first.wait_for()
    _tab(page, "Edit")
    _upload(page, "to_edit")
    page.get_by_label("Instruction").fill("make it blue")
    _press(page, "Edit")
    assert _shown(page, "edited")[-1, -1].tolist() == [0, 0, 255]
    _tab(page, "Segment")
    _upload(page, "to_segment")
    _press(page, "Segment")
    page.get_by_text("left half").first.wait_for()


@pytest.mark.slow
def test_mistakes_are_told_in_the_page(page):
    _press(page, "Draw")
    page.get_by_text("say what to draw").first.wait_for()
    page.get_by_label("Prompt", exact=True).fill("nothing")
    _press(page, "Draw")
    page.get_by_text("too long for this model").first.wait_for()
    _tab(page, "Fill in")
    _press(page, "Fill in")
    page.get_by_text("and paint over").first.wait_for()
