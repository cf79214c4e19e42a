"""The report: complete when everything is there, standing when nothing is."""

import base64
import contextlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from cm3leon_jax.config import config_hash
from cm3leon_jax.evaluation import report
from cm3leon_jax.evaluation.chart import Series, chart
from cm3leon_jax.evaluation.page import cell
from cm3leon_jax.training import loss, metrics

VOID = {"meta", "img", "input", "line", "path"}
SAMPLES = "samples/quick.pretrain"
ATTACK = '<script>alert("x")</script>'


class Balanced(HTMLParser):
    """Collects tags and picture sources; every opened element must be closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.links = [], [], []
        self.feed(text)
        assert self.open == [] or self.open == ["html"]

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)


def put(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, list):
        path.write_text("\n".join(map(json.dumps, value)))
    else:
        path.write_text(json.dumps(value))


def train(folder):
    """Metrics as the trainer writes them, of 80 steps."""

    def means(value):
        groups = {f"nll/{group}": value for group in loss.GROUPS}
        counts = {f"count/{group}": 1.0 for group in loss.GROUPS}
        sums = {"nll": value, "count": 1.0, **groups, **counts}
        sums = {key: np.float32(x) for key, x in sums.items()}
        return {key: float(x) for key, x in loss.means(sums).items()}

    with contextlib.closing(metrics.MetricWriter(folder, 0)) as writer:
        for step in range(1, 81):
            writer.write(step, means(6.0 / step) | {"tokens_per_second": 2e4})
        validation = {f"validation/{key}": x for key, x in means(0.25).items()}
        writer.write(80, validation)


@pytest.fixture
def workdir(tmp_path):
    """A finished quick run, as its stages leave it."""
    root = tmp_path / "quick"
    put(root / "config.json", {"name": "shapes", "decoder": {"width": 128}})
    put(
        root / "pretrain" / "DONE.json",
        {"steps": 80, "seconds": 61.5, "tokens": 12345, "inputs_hash": "0123456789ab"},
    )
    train(root / "pretrain")
    put(root / "image_tokenizer" / "metrics.jsonl", [{"step": 1, "loss": 0.5}])
    score = {"value": 0.8125, "low": 0.79, "high": 0.83, "n": 321}
    decibels = {"value": 29.8, "low": 29.5, "high": 30.1, "n": 321}
    put(
        root / "eval" / "quick.pretrain.json",
        {
            **{"protocol": "quick", "checkpoint": "pretrain", "hardware": "2 cores"},
            **{"step": 80, "inputs_hash": "0123456789ab", "measured": "2026-02-02"},
            "scores": {"text_to_image/objects": score, "reconstruction/psnr": decibels},
        },
    )
    folder = root / SAMPLES / "text_to_image"
    pictures = {"sample": "0.png"}
    put(
        folder / "index.jsonl",
        [
            {"prompt": "a red circle", "pictures": pictures, "ok": True},
            {"prompt": ATTACK, "pictures": pictures, "ok": False, "note": "no circle"},
        ],
    )
    Image.fromarray(np.full((32, 32, 3), 200, np.uint8)).save(folder / "0.png")
    return root


def test_report_shows_every_part_and_needs_nothing_else(workdir):
    path = report.write(workdir)
    assert path == workdir / "report.html"
    text = path.read_text("utf-8")
    page = Balanced(text)
    assert all(link.startswith(("#", "data:image/")) for link in page.links)
    assert not re.search(r"https?://|@import|url\(", text)
    # Losses; by role, context and moved; tokens/s; the tokenizer's loss.
    assert page.tags.count("svg") == 5
    parts = ["results", "curves", "stages", "config"]
    assert all(f'<section id="{part}">' in text for part in parts)
    config = json.loads((workdir / "config.json").read_text())
    for shown in ("a red circle", "1 of 2 judged right", "0.812", "321", "2 cores"):
        assert shown in text
    for shown in ("1 min 02 s", "12,345", "29.8", config_hash(config), "no circle"):
        assert shown in text


def test_pictures_are_the_files(workdir):
    links = Balanced(report.write(workdir).read_text("utf-8")).links
    pictures = [link for link in links if link.startswith("data:")]
    data = (workdir / SAMPLES / "text_to_image" / "0.png").read_bytes()
    assert len(pictures) == 2
    assert base64.b64decode(pictures[0].partition("base64,")[2]) == data


def test_prompts_are_text_not_markup(workdir):
    text = report.write(workdir).read_text("utf-8")
    assert ATTACK not in text
    assert "&lt;script&gt;" in text


def test_pieces_that_are_missing_or_broken_are_left_out(workdir):
    folder = workdir / SAMPLES / "text_to_image"
    lines = [
        {"caption": "gone", "pictures": {"sample": "none.png"}},
        {"caption": "outside", "pictures": {"sample": "../../../secret.png"}},
        {"caption": "no pictures"},
    ]
    put(folder / "index.jsonl", lines)
    (folder / "0.png").rename(workdir / "secret.png")
    with (workdir / "pretrain" / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 80, "loss": NaN}\n{"step": 81, "lo')
    (workdir / "config.json").write_text("{")
    (workdir / "eval" / "torn.json").write_bytes(b"\xff\xfe")
    (workdir / "tokens").mkdir()
    put(workdir / "eval" / "other.json", {"scores": {"a/b": {"value": None}}})
    text = report.write(workdir).read_text("utf-8")
    page = Balanced(text)
    assert text.count(">missing</div>") == 2
    assert not [link for link in page.links if link.startswith("data:")]
    assert not re.search(r"\bnan\b", text, re.IGNORECASE)
    assert '<section id="config">' not in text
    assert "begun, not finished" in text  # tokens


def test_empty_work_directory_gives_a_page(tmp_path):
    text = report.write(tmp_path).read_text("utf-8")
    Balanced(text)
    assert "<section" not in text


def test_no_work_directory_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        report.write(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "values",
    [[3.0], [0.31] * 100, [0.0, 0.0], [-5.0, 5.0], [1e-9, 1e9], list(range(1, 5000))],
    ids=["one", "constant", "zeros", "negative", "wide", "long"],
)
@pytest.mark.parametrize("width", [300, 860])
def test_chart_stays_inside_its_box(values, width):
    points = [(float(i), float(value)) for i, value in enumerate(values)]
    svg = chart([Series("loss", points)], width, 200)
    Balanced(svg)
    lines = re.findall(r'<path class="[^"]*" d="M([^"]*)"', svg)
    assert lines
    for x, y in (map(float, p.split()) for line in lines for p in line.split("L")):
        assert 0 <= x <= width and 0 <= y <= 200
    assert len(svg) < 60_000
    assert len(re.findall("<text", svg)) <= 24


def test_validation_shares_the_chart_and_colour_of_training(workdir):
    text = report.write(workdir).read_text("utf-8")
    for colour in range(3):  # all, text, image
        assert f'class="line c{colour}"' in text
        assert f'class="line c{colour} dashed"' in text
    for name in ("loss/text", "loss/image", "validation/loss/text"):
        assert f"<title>{name}: " in text
    assert "perplexity" not in text


def test_results_show_their_own_samples_newest_first(workdir):
    old = json.loads((workdir / "eval" / "quick.pretrain.json").read_text())
    old |= {"measured": "2026-01-01", "checkpoint": "pretrain@40", "step": 40}
    old["scores"] = {"text_to_image/objects": {"value": 0.111}}
    put(workdir / "eval" / "quick.pretrain@40.json", old)
    put(
        workdir / "samples" / "quick.pretrain@40" / "caption" / "index.jsonl",
        [{"caption": "an early word"}],
    )
    text = report.write(workdir).read_text("utf-8")
    Balanced(text)
    new, old_part = text.split("<details class=result")[1:]
    assert new.startswith(" open>") and old_part.startswith(">")
    assert "a red circle" in new and "an early word" not in new
    assert "an early word" in old_part and "0.111" in old_part
    assert "stale" not in new + old_part
    tiles = text.partition("<nav>")[0]
    assert "0.812" in tiles and "0.111" not in tiles


def test_a_result_in_another_precision_is_not_the_one_that_counts(workdir):
    other = json.loads((workdir / "eval" / "quick.pretrain.json").read_text())
    other |= {"measured": "2099-01-01", "precision": "weights=int8"}
    other["scores"] = {"text_to_image/objects": {"value": 0.111}}
    put(workdir / "eval" / "quick.pretrain.weights-int8.json", other)
    text = report.write(workdir).read_text("utf-8")
    tiles = text.partition("<nav>")[0]
    assert "0.812" in tiles and "0.111" not in tiles
    new, plain = text.split("<details class=result")[1:]
    assert new.startswith(">") and plain.startswith(" open>")
    assert "of pretrain weights=int8" in new and "int8" not in plain


@pytest.mark.parametrize("change", [{"inputs_hash": "ffffffffffff"}, {"steps": 160}])
def test_results_of_an_overwritten_stage_are_marked(workdir, change):
    done = json.loads((workdir / "pretrain" / "DONE.json").read_text())
    put(workdir / "pretrain" / "DONE.json", done | change)
    text = report.write(workdir).read_text("utf-8")
    assert "<span class=stale>stale: pretrain" in text
    assert "<details class=result>" in text  # folded
    assert "0.812" not in text.partition("<nav>")[0]


def test_stages_and_trainings_of_any_name_are_shown(workdir):
    put(workdir / "retriever" / "DONE.json", {"rows": 4321})
    put(workdir / "retriever" / "metrics.jsonl", [{"step": 1, "loss": 0.5}])
    text = report.write(workdir).read_text("utf-8")
    assert "4321" in text and "<h3>Retriever</h3>" in text


def test_small_pictures_are_enlarged_without_blur(workdir):
    text = report.write(workdir).read_text("utf-8")
    assert '<img class=pixels style="width:128px"' in text
    assert ".pixels { image-rendering: pixelated; }" in text


def test_a_score_says_how_many_pictures_it_leaves_out():
    score = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 115, "left_out": 41}
    assert 'title="0.400 to 0.600, n = 115, 41 left out"' in cell(score)
    assert 'title="0.400 to 0.600, n = 115"' in cell(score | {"left_out": 0})
