"""A tiny system from pictures to answers: every task, every stage, every bad input."""

import json

import jax
import numpy as np
import pytest
import tiny_system
from PIL import Image as Pillow

from cm3leon_jax import CM3Leon, config, stages
from cm3leon_jax.codec import HOLE
from cm3leon_jax.data.documents import Document, Image, Text
from cm3leon_jax.data.sources import read_documents
from cm3leon_jax.evaluation import pairs, report, shapes
from cm3leon_jax.evaluation.protocol import Protocol
from cm3leon_jax.sampling.sampler import Sampler
from cm3leon_jax.training import checkpoint, metrics


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("system")
    stages.run(tiny_system.tiny_config(), path)
    return path


@pytest.fixture(scope="module")
def model(workdir):
    return CM3Leon.load(workdir)


@pytest.fixture(scope="module")
def documents(workdir):
    return read_documents(workdir / "documents", "test")[:4]


def pictures(documents):
    return [Pillow.fromarray(d.segments[1].array) for d in documents]


def test_a_finished_system_is_not_run_again(workdir):
    before = {p: p.stat().st_mtime_ns for p in workdir.glob("*/DONE.json")}
    assert len(before) == len(stages.STAGES)
    stages.run(tiny_system.tiny_config(), workdir)
    assert before == {p: p.stat().st_mtime_ns for p in workdir.glob("*/DONE.json")}


def test_changed_settings_are_refused(workdir):
    settings = tiny_system.tiny_config()
    settings["decoder"]["width"] = 64
    with pytest.raises(FileExistsError, match="decoder.width: 32 -> 64"):
        stages.run(settings, workdir)
    settings = tiny_system.tiny_config()
    settings["vocabulary"]["text"] = 380
    with pytest.raises(FileExistsError, match="text: 384 -> 380"):
        stages.run(settings, workdir)
    assert config.read(workdir)["vocabulary"]["text"] == 384


def test_metrics_have_the_loss_by_modality_and_role(workdir):
    lines = metrics.read(workdir / "pretrain")
    first = lines[0]
    for key in ("loss", "loss/text", "loss/image", "loss/context", "loss/moved"):
        assert np.isfinite(first[key])
    vocabulary = json.loads((workdir / "tokens" / "meta.json").read_text())["layout"]
    assert first["loss"] == pytest.approx(np.log(vocabulary["size"]), rel=1e-5)


def test_text_to_image(model):
    made = model.text_to_image(["a red circle", "a blue square"], seed=1)
    assert [picture.size for picture in made] == [(32, 32)] * 2
    same = model.text_to_image(["a red circle", "a blue square"], seed=1)
    other = model.text_to_image(["a red circle", "a blue square"], seed=2)
    assert np.array_equal(made, same) and not np.array_equal(made, other)


def test_a_prompt_does_not_depend_on_its_neighbours(model):
    sampler = Sampler(temperature=1.0)
    model_of_one = CM3Leon(model.system, model.decoder, model.codec, batch=2)
    prompts = ["a red circle", "a blue square", "a green cross"]
    many = model.text_to_image(prompts, sampler=sampler)
    few = model_of_one.text_to_image(prompts, sampler=sampler)
    assert np.array_equal(many, few)


def test_caption_and_reconstruct(model, documents):
    assert all(
        isinstance(text, str)
        for text in model.caption(pictures(documents), max_text=12)
    )
    again = model.reconstruct(pictures(documents))
    codes = model.codec.image.encode(model.codec.arrays(pictures(documents)))
    assert np.array_equal(again, model.codec.image.decode(codes))


def test_infill_keeps_what_is_outside_the_mask(model, documents):
    mask = np.zeros((32, 32), bool)
    mask[3:14, 5:9] = True  # touches cells of rows 0 to 3, columns 1 and 2
    inside = np.zeros((8, 8), bool)
    inside[0:4, 1:3] = True
    seen = []
    decode = model.codec.image.decode
    model.codec.image.decode = lambda codes: seen.append(codes) or decode(codes)
    try:
        model.infill(pictures(documents)[:1], [mask], ["a red circle"])
    finally:
        model.codec.image.decode = decode
    kept = model.codec.image.encode(model.codec.arrays(pictures(documents)[:1]))
    assert np.array_equal(seen[0][0][~inside], kept[0][~inside])


def test_pixels_under_the_mask_change_no_prompt_token(model, documents, monkeypatch):
    mask = np.zeros((32, 32), bool)
    mask[8:24, 8:24] = True
    prompts = []
    run = CM3Leon._run

    def spy(self, wanted, *rest):
        prompts.append([s.tolist() for p in wanted for s in p.streams])
        return run(self, wanted, *rest)

    monkeypatch.setattr(CM3Leon, "_run", spy)
    original = np.array(pictures(documents)[0])
    for fill in (0, 255):
        original[mask] = fill
        model.infill([original], [mask], ["a red circle"])
    assert prompts[0] == prompts[1]
    original[0, 0] = 255 - original[0, 0]
    original[:8, :8] = (220, 40, 40)
    model.infill([original], [mask], ["a red circle"])
    assert prompts[2] != prompts[0]


def test_infill_of_text(model):
    holes = Document((Text(f"a {HOLE} circle at the {HOLE}"),))
    (filled,) = model.infill([holes], max_text=4)
    text = filled.segments[0].text
    assert text.startswith("a ") and " circle at the " in text and HOLE not in text


def test_generate_writes_whole_pictures_only(model):
    begun = [Document((Text("a red circle"),)), Document((Text("a blue square"),))]
    for document in model.generate(begun, images=1, max_text=16, seed=3):
        assert document.segments[0].text.startswith(("a red", "a blue"))
        for segment in document.segments[1:]:
            if isinstance(segment, Image):
                assert segment.codes.shape == (8, 8)
                assert segment.array.shape == (32, 32, 3)


def test_log_likelihood_is_that_of_the_plain_model(model, documents):
    (score,) = model.log_likelihood([documents[0]])
    layout = model.layout
    ids = [layout.eos, *model.codec.ids(documents[0]), layout.eos]
    logits = model.decoder(np.array([ids[:-1]], np.int32))
    log_p = jax.nn.log_softmax(logits)[0, np.arange(len(ids) - 1), ids[1:]]
    assert score == pytest.approx(float(log_p.sum()), rel=1e-5)
    assert model.log_likelihood(documents)[0] == pytest.approx(score, rel=1e-5)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "I;16", "1"])
@pytest.mark.parametrize("size", [(1, 1), (3, 200), (640, 480)])
def test_pictures_of_any_mode_and_size_are_taken(model, mode, size):
    array = model.codec.arrays([Pillow.new("RGB", size).convert("L").convert("RGB")])
    assert array.shape == (1, 32, 32, 3)
    picture = Pillow.new(mode, size)
    assert model.codec.arrays([picture]).shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m.text_to_image([]), "prompts is a list with at least one"),
        (lambda m: m.text_to_image("a red circle"), "prompts is a list"),
        (lambda m: m.text_to_image([3]), r"prompts\[0\] is int, not str"),
        (lambda m: m.text_to_image(["  "]), "prompt 0 is empty"),
        (lambda m: m.text_to_image(["word " * 200]), "shorten the text"),
        (lambda m: m.caption([]), "images is a list"),
        (lambda m: m.caption([np.zeros((4, 4))]), "picture 0 is float64"),
        (lambda m: m.infill([Pillow.new("RGB", (32, 32))]), "as many masks"),
        (
            lambda m: m.infill([Pillow.new("RGB", (32, 32))], [np.ones((8, 8), bool)]),
            r"mask 0 is bool \[8, 8\]",
        ),
        (
            lambda m: m.infill(
                [Pillow.new("RGB", (32, 32))], [np.zeros((32, 32), bool)]
            ),
            "mask 0 is empty",
        ),
        (lambda m: m.infill([Document((Text("no hole"),))]), "has no <mask>"),
        (lambda m: m.generate([Document((Text(HOLE),))]), "is for `infill`"),
        (
            lambda m: m.log_likelihood([Document((Text("word " * 200),))]),
            "more than the context",
        ),
    ],
)
def test_bad_input_is_one_clear_message(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


def test_a_missing_or_foreign_work_directory_is_named(workdir, tmp_path):
    with pytest.raises(FileNotFoundError, match="not a work directory"):
        CM3Leon.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        CM3Leon.load(workdir, "sft")
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 3"):
        CM3Leon.load(workdir, "pretrain@3")
    with pytest.raises(ValueError, match="step is not a number"):
        CM3Leon.load(workdir, "pretrain@last")
    other = tiny_system.tiny_config()
    other["decoder"]["width"] = 64
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for path in workdir.iterdir():
        if path.is_dir():
            (mixed / path.name).symlink_to(path)
    config.write(mixed, other)
    with pytest.raises(ValueError):
        CM3Leon.load(mixed)
    other = tiny_system.tiny_config()
    other["vocabulary"]["text"] = 400
    config.write(mixed, other)
    with pytest.raises(ValueError):
        CM3Leon.load(mixed)


@pytest.mark.parametrize(
    "world, tasks", [("shapes", shapes.TASKS), ("pairs", pairs.TASKS)]
)
def test_protocols_leave_results_samples_and_a_report(workdir, world, tasks):
    protocol = Protocol(
        name=f"{world}:tiny",
        world=world,
        split="test",
        documents=6,
        tasks=tuple(tasks),
        shown=2,
        seed=0,
    )
    result = stages.evaluate(workdir, protocol, "pretrain")
    path = workdir / "eval" / f"{world}-tiny.pretrain.json"
    assert json.loads(path.read_text()) == result
    assert result["step"] == checkpoint.latest_step(workdir / "pretrain") == 4
    for score in result["scores"].values():
        assert score["low"] <= score["value"] <= score["high"] and score["n"] > 0
    again = stages.evaluate(workdir, protocol, "pretrain")
    assert again["scores"] == result["scores"]
    page = report.write(workdir).read_text()
    for task in tasks:
        assert (workdir / "samples" / task).exists() or task == "likelihood"
    assert "data:image/png" in page and f"{world}:tiny" in page


def test_a_protocol_of_another_world_is_refused(workdir):
    settings = {"split": "test", "documents": 6, "shown": 2, "seed": 0}
    with pytest.raises(ValueError, match="world='coco': choose from shapes, pairs"):
        stages.evaluate(
            workdir,
            Protocol(name="x", world="coco", tasks=("caption",), **settings),
            "pretrain",
        )
    with pytest.raises(ValueError, match="no task 'draw'"):
        stages.evaluate(
            workdir,
            Protocol(name="x", world="shapes", tasks=("draw",), **settings),
            "pretrain",
        )
    settings["documents"] = 999
    with pytest.raises(ValueError, match="needs 999 test documents"):
        stages.evaluate(
            workdir,
            Protocol(name="x", world="shapes", tasks=("caption",), **settings),
            "pretrain",
        )
