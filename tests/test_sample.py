"""`launch/sample.py`: every task from the shell, and what is refused before it runs."""

import json
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_api
import tiny_script
from absl import flags
from absl.testing import flagsaver
from PIL import Image as Pillow

from cm3leon_jax.api import CM3Leon
from cm3leon_jax.data.controls import class_colours
from cm3leon_jax.data.task_templates import TASKS
from cm3leon_jax.parallel import distributed
from cm3leon_jax.sampling.engine import Engine, Precision
from cm3leon_jax.sampling.sampler import Sampler

SIDE = tiny_api.SIDE


@pytest.fixture(scope="module")
def sample():
    """The script as a module, without running it."""
    with tiny_script.loaded("sample") as module:
        yield module


@pytest.fixture
def run(sample, tmp_path, monkeypatch):
    """Runs the script with flags, on a decoder that is never run."""
    written = tiny_api.spy(monkeypatch)
    model = tiny_api.model(400, tasks=TASKS)
    monkeypatch.setattr(CM3Leon, "load", lambda *_, **__: model)
    monkeypatch.setattr(distributed, "initialize", lambda: None)
    monkeypatch.chdir(tmp_path)
    Pillow.new("RGBA", (10, 12), (255, 0, 0, 128)).save("a.png")
    Pillow.new("L", (10, 12), 255).save("white.png")
    Path("prompts.txt").write_text("one\n\ntwo\n")

    def run(*arguments):
        written.clear()
        with flagsaver.flagsaver():
            flags.FLAGS(["sample.py", "--workdir", ".", *arguments])
            return sample.main(), written

    run.model = model
    return run


PICTURE = ("--image", "a.png")
BOTH = (*PICTURE, *PICTURE)
OUT, FOLDER = ("--out", "b.png"), ("--out", "made")
WORD, LIST = ("--prompt", "what is it?"), ("--prompts", "prompts.txt")
BOX = ("--box", "0,1,9,9")
ANSWER = ("--name", "answer", "--field", "image=a.png")
CHOICES = ("--choice", "this", "--choice", "that")


@pytest.mark.parametrize(
    "task, arguments, expected",
    [
        ("text_to_image", (*WORD, *OUT), {"pictures": ["b.png"]}),
        (
            "text_to_image",
            ("--prompts", "prompts.txt", *FOLDER),
            {"pictures": ["made/0000.png", "made/0001.png"]},
        ),
        ("caption", (*PICTURE, "--style", "long"), {"texts": ["hi"]}),
        ("caption", (*PICTURE, "--max_text", "2"), {"texts": ["hi…"]}),
        ("answer", (*BOTH, *WORD, *WORD), {"texts": ["hi", "hi"]}),
        ("science", (*PICTURE, *WORD, *CHOICES, "--context", "x"), {"texts": ["hi"]}),
        ("explain", (*PICTURE, *WORD, *CHOICES), {"texts": [["hi", ""]]}),
        ("infill", (*PICTURE, "--box", "0,1,9,9", *OUT), {"pictures": ["b.png"]}),
        (
            "infill",
            (*PICTURE, "--mask", "white.png", *WORD, *OUT),
            {"pictures": ["b.png"]},
        ),
        ("infill", ("--document", "a <mask> star"), {"texts": ["a hi star"]}),
        ("edit", (*PICTURE, *WORD, *OUT), {"pictures": ["b.png"]}),
        (
            "edit",
            (*PICTURE, *WORD, "--box", "0,1,9,9", *FOLDER),
            {"pictures": ["made/0000.png"]},
        ),
        ("control", (*PICTURE, "--kind", "edge", *OUT), {"pictures": ["b.png"]}),
        (
            "control",
            (*PICTURE, "--kind", "style", *WORD, "--strength", "0.3", *OUT),
            {"pictures": ["b.png"]},
        ),
        (
            "ground",
            (*WORD, "--object", "red@2,2,4,5", "--object", "@@0,0,8,8", *OUT),
            {"pictures": ["b.png"]},
        ),
        ("write", ("--prompt", "EXIT", *OUT), {"pictures": ["b.png"]}),
        ("variation", (*PICTURE, *OUT), {"pictures": ["b.png"]}),
        ("instruct", (*ANSWER, "--field", "question=why?"), {"texts": ["hi"]}),
        (
            "instruct",
            ("--name", "variation", "--field", "source=a.png", *OUT),
            {"pictures": ["b.png"]},
        ),
        ("reconstruct", (*PICTURE, *OUT), {"pictures": ["b.png"]}),
        (
            "generate",
            ("--document", "a", *PICTURE, *FOLDER),
            {"documents": [[{"text": "a"}, {"picture": "made/0000-1.png"}]]},
        ),
    ],
)
def test_every_task_from_the_shell(run, task, arguments, expected):
    found, _ = run("--task", task, *arguments)
    if task == "generate":
        assert found["documents"][0][2:] == [{"text": "hi"}]
        found = {"documents": [found["documents"][0][:2]]}
    assert found == expected and json.dumps(found)
    for path in found.get("pictures", ()):
        with Pillow.open(path) as picture:
            assert picture.size == (SIDE, SIDE)


def test_every_task_has_its_flags(sample):
    assert set(sample.READS) == set(sample.NEEDS) == set(sample._CALLS)
    assert all(
        set(sample.NEEDS[task]) <= set(sample.READS[task]) for task in sample.READS
    )


def test_class_maps_can_be_read_again(run):
    found, _ = run("--task", "segment", *PICTURE, *OUT)
    assert found["classes"] == list(tiny_api.MASKS.classes)
    with Pillow.open("b.png") as picture:
        assert picture.mode == "P" and (np.asarray(picture) == 1).all()
        colours = np.asarray(picture.convert("RGB"))
    assert (colours == class_colours(3)[1]).all()
    control = ("--task", "control", "--kind", "segmentation", "--out", "c.png")
    run(*control, "--image", "b.png")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((*ANSWER, "--field", "why?"), "--field why.: give each field once"),
        ((*ANSWER, "--field", "image=b.png"), "give each field once, FIELD=VALUE"),
        (ANSWER, "takes the fields"),
        ((*ANSWER, *OUT), "--out is not for --name answer, which makes a text"),
        (("--name", "draw", "--field", "a=b"), "no task 'draw': choose from"),
        (("--name", "variation", "--field", "source=a.png"), "needs --out FILE.png"),
        (("--name", "ground", "--field", "objects=x", *OUT), "objects"),
        (("--name", "edit"), "--task instruct needs --field"),
    ],
)
def test_instructions_that_nobody_can_follow(run, arguments, message):
    with pytest.raises(ValueError, match=message):
        run("--task", "instruct", *arguments)


def test_flags_change_the_sampler_of_the_task(run):
    for guidance, streams in (("1", 1), ("3", 2), ("7.5,1.5", 3)):
        _, ((prompt,),) = run(
            *("--task", "edit", *PICTURE, *WORD, *OUT, "--guidance", guidance)
        )
        assert len(prompt.streams) == streams
    _, ((prompt,),) = run(*WORD, *OUT, "--temperature", "0")
    assert len(prompt.streams) == 2  # the config's guidance


def test_another_wording_of_an_instruction(run):
    edit = ("--task", "edit", *PICTURE, *WORD, *OUT)
    _, ((usual,),) = run(*edit)
    _, ((other,),) = run(*edit, "--wording", "1")
    assert usual.streams[0].tolist() != other.streams[0].tolist()
    with pytest.raises(ValueError, match="wordings 0 … 1, not 2"):
        run(*edit, "--wording", "2")
    with pytest.raises(ValueError, match="--wording is not for --task text_to_image"):
        run(*WORD, *OUT, "--wording", "1")


def test_candidates_are_written_best_first_with_their_scores(run, monkeypatch):
    monkeypatch.setattr(
        Engine, "score", lambda _, rows, counted: [n % 3 for n in range(len(rows))]
    )
    mixed = ("--alpha", "0.1", "--k", "3", "--mix", "--rerank", "gain=2")
    result, ((*prompts,),) = run(
        *(*WORD, "--out", "d", "--candidates", "4", "--scores"), *mixed
    )
    assert [len(prompt.streams) for prompt in prompts] == [2] * 4
    # Gains: 0 - 1, 1 - 2, 2 - 0, 0 - 1.
    made = [(x["number"], x["score"], x["gain"]) for x in result["pictures"]]
    assert made == [(2, 4.0, 2.0), (0, -2.0, -1.0), (1, -2.0, -1.0), (3, -2.0, -1.0)]
    assert all(Path(x["picture"]).is_file() for x in result["pictures"])
    best, _ = run(*WORD, *OUT, "--candidates", "4", "--rerank", "gain=2")
    assert best == {"pictures": ["b.png"]}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((*WORD, *OUT, "--k", "3"), "needs --alpha"),
        ((*WORD, *OUT, "--alpha", "2"), "contrastive.alpha=2.0 must be"),
        ((*WORD, *OUT, "--alpha", "0.1", "--guidance", "3"), "do not go together"),
        ((*WORD, *OUT, "--rerank", "gain"), "give NAME=WEIGHT"),
        ((*WORD, *OUT, "--rerank", "beauty=1"), "unknown setting rerank.beauty"),
        ((*WORD, *OUT, "--scores"), "a folder for several"),
        (("--task", "caption", *PICTURE, "--rerank", "gain=1"), "--rerank is not for"),
        (("--task", "caption"), "--task caption needs --image"),
        (("--task", "caption", *PICTURE, *WORD), "--prompt is not for --task caption"),
        (("--task", "caption", *PICTURE, "--strength", "1.0"), "--strength is not for"),
        (("--task", "answer", *PICTURE), "needs --prompt or --prompts"),
        (("--task", "science", *PICTURE, *WORD), "needs --choice"),
        (("--task", "edit", *PICTURE, *OUT), "needs --prompt"),
        (("--task", "edit", *PICTURE, *WORD), "needs --out FILE.png"),
        (("--task", "edit", *PICTURE, *WORD, *OUT, "--kind", "edge"), "--kind is not"),
        (("--task", "edit", *PICTURE, *WORD, *OUT, "--box", "1,2"), "give four pixels"),
        (
            ("--task", "edit", *PICTURE, *WORD, *OUT, "--box", "0,0,11,4"),
            "inside 10x12",
        ),
        (("--task", "infill", *PICTURE, *OUT), "needs --mask or --box"),
        (
            ("--task", "infill", *PICTURE, *OUT)
            + ("--box", "0,0,2,2", "--mask", "white.png"),
            "--mask or --box, not both",
        ),
        (
            ("--task", "infill", "--document", "a <mask>", *OUT),
            "--out is not for --task infill a document",
        ),
        (("--task", "control", *PICTURE, *OUT), "needs --kind"),
        (("--task", "control", *PICTURE, *OUT, "--kind", "x"), "choose from edge"),
        (("--task", "ground", *WORD, *OUT), "needs --object"),
        (
            ("--task", "ground", *WORD, *OUT, "--object", "red 1,2,3,4"),
            "give PHRASE@x0,y0,x1,y1",
        ),
        (("--task", "reconstruct", *PICTURE, *OUT, "--seed", "1"), "--seed is not for"),
        (("--task", "edit", *BOTH, *WORD, *WORD, *OUT), "a folder for several"),
        (("--task", "write", *WORD, "--out", "a.jpg"), "give a .png"),
        (("--task", "write", *WORD, *OUT, "--guidance", "x"), "--guidance"),
        (("--task", "write", *WORD, *OUT, "--guidance", "-1"), "sampler.guidance=-1.0"),
        (("--task", "caption", "--image", "prompts.txt"), "is not a picture"),
        (("--task", "answer", *BOTH, *WORD), "2 images need as many questions"),
        (("--task", "edit", *BOTH, *WORD, *FOLDER), "2 images need as many instr"),
        (("--task", "edit", *BOTH, *LIST, *FOLDER, *BOX), "2 images need as many reg"),
        (("--task", "infill", *BOTH, *FOLDER, *BOX), "2 pictures need as many masks"),
        (
            ("--task", "control", "--kind", "edge", *BOTH, *WORD, *FOLDER),
            "2 images need as many prompts",
        ),
    ],
)
def test_mistakes_are_named(run, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(*arguments)


def test_a_picture_of_too_many_pixels_is_named(run, monkeypatch):
    monkeypatch.setattr(Pillow, "MAX_IMAGE_PIXELS", 9)
    with pytest.raises(ValueError, match="a.png is not a picture .* exceeds limit"):
        run("--task", "segment", *PICTURE, *OUT)


BOXES = (*BOX, "--box", "2,2,7,7")


@pytest.mark.parametrize(
    "task, arguments",
    [
        ("text_to_image", LIST),
        ("infill", (*BOTH, *BOXES)),
        ("edit", (*BOTH, *LIST, *BOXES)),
        ("control", (*BOTH, *LIST, "--kind", "edge")),
        ("ground", (*WORD, *WORD, "--object", "red@2,2,4,5")),
        ("write", LIST),
        ("variation", (*BOTH, "--candidates", "2", "--scores", "--rerank", "gain=1")),
        ("segment", BOTH),
    ],
)
def test_every_list_goes_on_where_it_stopped(run, task, arguments, monkeypatch):
    monkeypatch.setattr(Engine, "score", lambda _, rows, *__: [0.0] * len(rows))
    made = 2 if "--scores" in arguments else 1
    what = ("--task", task, "--out", "many", *arguments)
    found, written = run(*what)
    assert [len(call) for call in written] == [2 * made]
    first, *_, last = sorted(Path("many").glob("*.png"))
    assert len(found["pictures"]) == 2 * made and first.name[:4] == "0000"
    last.unlink()
    before = first.stat().st_mtime_ns
    again, written = run(*what)
    assert again == found and [len(call) for call in written] == [made]
    assert last.is_file() and first.stat().st_mtime_ns == before
    again, written = run(*what)
    assert (again, written) == (found, [])
    _, written = run(*what, "--seed", "1")  # another seed, another picture
    assert len(written[0]) == 2 * made


def test_each_batch_is_written_as_it_finishes(run, monkeypatch):
    run.model.engine.batch, drawn = 1, Engine.write

    def write(self, *given, numbers, **more):
        assert len(list(Path("many").glob("*.png"))) == numbers[0]
        return drawn(self, *given, numbers=numbers, **more)

    monkeypatch.setattr(Engine, "write", write)
    _, written = run("--task", "variation", *BOTH, "--out", "many")
    assert [len(call) for call in written] == [1, 1]


def test_a_prompt_that_leaves_no_room_is_named_before_anything_is_drawn(run):
    run.model.engine.batch = 1
    room = 400 - run.model.codec.image_tokens - 2
    for length, fits in ((room, True), (room + 1, False)):
        Path("prompts.txt").write_text(f"one\n{'x' * length}\n")
        if fits:
            run(*LIST, *FOLDER)
            continue
        with pytest.raises(ValueError, match=f"prompt 1 has {length} .* most {room}"):
            run(*LIST, "--out", "none")
    assert not Path("none").exists()


def test_another_picture_or_region_is_drawn_anew(run):
    Pillow.new("RGB", (10, 12), (1, 2, 3)).save("b.png")
    what = ("--task", "infill", "--out", "many", "--box", "0,1,9,9")
    both = (*PICTURE, "--image", "b.png", "--box")
    run(*what, *PICTURE, "--box", "2,2,7,7", *PICTURE)
    for arguments in ((*both, "2,2,7,7"), (*both, "3,2,7,7")):
        _, written = run(*what, *arguments)
        assert [len(call) for call in written] == [1]
    palette = Pillow.new("P", (10, 12), 1)
    for colour in ([255, 0, 0], [0, 255, 0]):
        palette.putpalette([0, 0, 0, *colour])
        palette.save("p.png")
        _, written = run("--task", "variation", "--image", "p.png", "--out", "other")
        assert [len(call) for call in written] == [1]


CHANGES = {
    "precision": lambda m: setattr(m.engine, "precision", Precision(cache="int8")),
    "sampling": lambda m: setattr(m.system.sampling, "caption", Sampler(top_p=0.5)),
    "decoder": lambda m: setattr(m.engine, "decoder", [jnp.full(3, 2.0)]),
    "amateur": lambda m: setattr(m.engine, "amateur", [jnp.full(3, 2.0)]),
    "image tokenizer": lambda m: setattr(m.codec.image, "model", jnp.full(3, 2.0)),
    "encoder": lambda m: setattr(m.memory.embedder, "name", "other"),
    "threshold": lambda m: setattr(m.memory, "skip_above", 0.5),
    "removed": lambda m: setattr(m.memory, "ids", ["a"]),
    "vectors": lambda m: setattr(m.memory.bank, "vectors", np.ones((2, 3))),
}


@pytest.mark.parametrize("what", CHANGES)
def test_all_that_changes_pictures_is_in_the_key(sample, what):
    def made():
        names = types.SimpleNamespace
        bank = Vectors(ids=["a", "b"], vectors=np.zeros((2, 3)))
        memory = names(
            embedder=names(name="tiny"), skip_above=0.9, ids=["a", "b"], bank=bank
        )
        model = tiny_api.model(400, memory=memory)
        model.engine.decoder = model.engine.amateur = [jnp.ones(3)]
        model.codec = types.SimpleNamespace(image=names(model=jnp.ones(3)))
        return model

    key = sample.outputs.key
    model, how = made(), {"retrieve": 1}
    assert key(model, how) == key(made(), how) != key(model, {"retrieve": 2})
    CHANGES[what](model)
    assert key(model, how) != key(made(), how)
    found = key(model, {"retrieve": 0}) == key(made(), {"retrieve": 0})
    assert found == (what in ("threshold", "removed", "vectors"))


class Vectors(types.SimpleNamespace):
    def __getitem__(self, rows):
        return self.vectors[rows]


def test_weights_and_cache_may_be_kept_in_fewer_bits(run, monkeypatch):
    model, kept = tiny_api.model(400, tasks=TASKS), []
    monkeypatch.setattr(
        CM3Leon, "load", lambda *_, precision, **__: kept.append(precision) or model
    )
    run("--prompt", "a", "--out", "b.png", "--cache", "int8")
    run("--prompt", "a", "--out", "c.png", "--weights", "int8")
    assert kept == [Precision(cache="int8"), Precision(weights="int8")]
