"""A tiny system from pictures to answers: every task, every stage, every bad input."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny_system
import tiny_tasks
from PIL import Image as Pillow

from cm3leon_jax import CM3Leon, config, stages
from cm3leon_jax.codec import HOLE, Codec
from cm3leon_jax.data import task_sources
from cm3leon_jax.data.documents import Document, Image, Text
from cm3leon_jax.data.sources import read_documents
from cm3leon_jax.evaluation import pairs, report, shapes
from cm3leon_jax.evaluation.protocol import Protocol, result_file
from cm3leon_jax.inputs import touched
from cm3leon_jax.models import vqgan
from cm3leon_jax.sampling import engine
from cm3leon_jax.sampling.sampler import Sampler
from cm3leon_jax.tokenizers import regions
from cm3leon_jax.tokenizers.image import ImageTokenizer
from cm3leon_jax.training import checkpoint, metrics


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("system")
    stages.run(tiny_system.tiny_config(), path)
    return path


@pytest.fixture(scope="module")
def loaded(workdir):
    """As users load it: over all eight devices."""
    return CM3Leon.load(workdir)


@pytest.fixture(scope="module")
def model(loaded):
    decoder = jax.device_put(loaded.decoder, jax.devices()[0])
    return CM3Leon(loaded.system, decoder, loaded.codec)


@pytest.fixture(scope="module")
def documents(workdir):
    return read_documents(workdir / "documents", "test")[:4]


@pytest.fixture
def written(monkeypatch):
    """The ids of all prompts that the model is given, call by call."""
    calls = []
    write = engine.Engine.write

    def spy(self, wanted, *rest, **options):
        calls.append([[stream.tolist() for stream in p.streams] for p in wanted])
        return write(self, wanted, *rest, **options)

    monkeypatch.setattr(engine.Engine, "write", spy)
    return calls


def pictures(documents):
    return [Pillow.fromarray(d.segments[1].array) for d in documents]


def test_a_finished_system_is_not_run_again(workdir):
    before = {p: p.stat().st_mtime_ns for p in workdir.glob("*/DONE.json")}
    assert len(before) == len(stages.STAGES) - 5  # no retrieval, no tasks
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


def test_eight_devices_write_what_one_writes(loaded, model, documents):
    assert len(loaded.decoder.embed.get_value().sharding.device_set) == 8
    wanted = ["a red circle", "a blue square"]
    assert np.array_equal(loaded.text_to_image(wanted), model.text_to_image(wanted))
    many, one = (m.log_likelihood(documents) for m in (loaded, model))
    np.testing.assert_allclose(many, one, rtol=1e-5)


def test_a_prompt_does_not_depend_on_its_neighbours(model):
    sampler = Sampler(temperature=1.0)
    model_of_two = CM3Leon(model.system, model.decoder, model.codec, batch=2)
    wanted = ["a red circle", "a blue square", "a green cross"]
    many = model.text_to_image(wanted, sampler=sampler)
    few = model_of_two.text_to_image(iter(wanted), sampler=sampler)
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
    mask[3:14, 5:9] = True
    inside = regions.cells(mask, model.codec.image.grid)
    seen = []
    decode = model.codec.image.decode
    model.codec.image.decode = lambda codes: seen.append(codes) or decode(codes)
    try:
        model.infill(pictures(documents)[:1], [mask], ["a red circle"])
    finally:
        model.codec.image.decode = decode
    kept = model.codec.image.encode(model.codec.arrays(pictures(documents)[:1]))
    assert np.array_equal(seen[0][0][~inside], kept[0][~inside])


@pytest.mark.parametrize("size", [32, 50])
def test_pixels_under_the_mask_change_no_prompt_token(model, written, size):
    # An encoder that looks around: its visible codes depend on hidden pixels.
    config = dataclasses.replace(
        model.codec.image.config, kernel=3, middle="attention", channels=32
    )
    image = ImageTokenizer(config, vqgan.build(config, jax.random.key(0)))
    codec = Codec(model.layout, model.codec.text, image)
    around = CM3Leon(model.system, model.decoder, codec)
    mask = np.zeros((size, size), bool)
    mask[size // 4 : 3 * size // 4, size // 4 : 3 * size // 4] = True
    visible = ~touched(mask, image.grid)
    rng = np.random.default_rng(0)
    original = rng.integers(0, 256, (size, size, 3), np.uint8)
    other = np.where(mask[..., None], rng.integers(0, 256, 3, np.uint8), original)
    plain = image.encode(codec.arrays([original, other]))
    assert (plain[0] != plain[1])[visible].any()
    moved = np.where(mask[..., None], original, 255 - original)
    for picture in (original, other, moved):
        around.infill([picture], [mask], ["a red circle"])
    assert written[0] == written[1] != written[2]


def test_infill_of_text(model):
    holes = Document((Text(f"a {HOLE} circle at the {HOLE}"),))
    (filled,) = model.infill([holes], max_text=4)
    text = filled.segments[0].text
    assert text.startswith("a ") and " circle at the" in text and HOLE not in text


def test_generate_keeps_what_is_given_and_writes_whole_pictures_only(model, documents):
    given = documents[0].segments
    begun = [
        Document((Text("a red "),), "open", {"licence": "x"}),
        Document((*given, Text("")), "after a picture"),
        Document(given, "ends in a picture"),
        Document(()),
    ]
    made = model.generate(begun, images=1, max_text=16, seed=3)
    for before, after in zip(begun, made, strict=True):
        assert (after.id, after.metadata) == (before.id, before.metadata)
        new = after.segments[len(before.segments) :]
        if before.segments and isinstance(before.segments[-1], Text):
            new = after.segments[len(before.segments) - 1 :]
        for kept, segment in zip(before.segments, after.segments, strict=False):
            assert segment is kept or segment in new
        for segment in new:
            if isinstance(segment, Image):
                assert segment.codes.shape == model.codec.image.grid
                assert segment.array.shape == (32, 32, 3)
    assert made[0].segments[0].text.startswith("a red")
    assert "  " not in made[0].segments[0].text


def test_a_system_may_be_kept_in_fewer_bits(workdir):
    int8 = engine.Precision(weights="int8")
    assert CM3Leon.load(workdir, precision=int8).engine.precision == int8


def test_log_likelihood_is_that_of_the_plain_model(model, documents, monkeypatch):
    (score,) = model.log_likelihood([documents[0]])
    layout = model.layout
    ids = [layout.eos, *model.codec.ids(documents[:1])[0], layout.eos]
    logits = model.decoder(np.array([ids[:-1]], np.int32))
    log_p = jax.nn.log_softmax(logits)[0, np.arange(len(ids) - 1), ids[1:]]
    assert score == pytest.approx(float(log_p.sum()), rel=1e-5)
    assert model.log_likelihood(documents)[0] == pytest.approx(score, rel=1e-5)
    # With few logits at a time.
    monkeypatch.setattr(engine, "_LOGITS", 10_000)
    (blockwise,) = model.log_likelihood([documents[0]])
    assert blockwise == pytest.approx(score, rel=1e-5)


def test_all_pictures_are_encoded_together_and_few_programs_compiled(
    model, documents, monkeypatch
):
    calls = []
    encode = ImageTokenizer.encode
    monkeypatch.setattr(
        ImageTokenizer, "encode", lambda s, x: calls.append(len(x)) or encode(s, x)
    )
    compiled = engine._row_nll._cache_size()
    for count in (1, 2, 3, 4):
        model.log_likelihood([documents[0]] * count)
    assert engine._row_nll._cache_size() <= compiled + 1
    assert calls == [1, 2, 3, 4]


RED, ALL = Pillow.new("RGB", (32, 32), "red"), np.ones((32, 32), bool)
OPEN, GUIDED = Document((Text(HOLE),)), Sampler(guidance=3.0)


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
        (lambda m: m.infill([RED]), "as many masks"),
        (lambda m: m.infill([RED], [ALL[:8, :8]]), r"mask 0 is bool \[8, 8\]"),
        (lambda m: m.infill([RED], [~ALL]), "mask 0 is empty"),
        (lambda m: m.caption(np.zeros((4, 4, 3), np.uint8)), "images is a list"),
        (lambda m: m.caption([RED], max_text=0), "max_text=0"),
        (lambda m: m.infill([RED], [ALL], sampler=GUIDED), "nothing to guide in infil"),
        (lambda m: m.infill([RED], [ALL], ["x", "y"]), "as many prompts"),
        (lambda m: m.infill([RED], [ALL], "x"), "prompts is a list"),
        (lambda m: m.infill([OPEN], sampler=GUIDED), "nothing to guide in infilling"),
        (lambda m: m.infill([OPEN], [ALL]), "masks and prompts are for pictures"),
        (lambda m: m.infill([OPEN], prompts=["x"]), "masks and prompts are for pict"),
        (
            lambda m: m.infill([OPEN, RED]),
            r"images_or_documents\[1\] is Image, not Doc",
        ),
        (lambda m: m.generate([OPEN], images=-1), "images=-1 and max_text=64"),
        (lambda m: m.generate([OPEN], images=0, max_text=0), "not both 0"),
        (
            lambda m: m.generate([Document((Text("word " * 200),))]),
            "document 0 has .* which fill the context",
        ),
        (
            lambda m: m.log_likelihood(
                [Document((Image(codes=np.eye(3, dtype=np.int32)),))]
            ),
            r"document 0 has codes of grid \(3, 3\)",
        ),
        (
            lambda m: CM3Leon(m.system, m.decoder, m.codec, batch=0),
            "batch=0 must be at least 1",
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


def test_guidance_of_the_config_is_for_prompts(model):
    assert model.system.sampling.infill.guidance != 1
    model.infill([RED], [ALL])
    assert HOLE not in model.infill([OPEN], max_text=4)[0].segments[0].text


def test_an_image_tokenizer_of_another_size_is_refused(model):
    config = dataclasses.replace(model.codec.image.config, image_size=64)
    image = ImageTokenizer(config, model.codec.image.model)
    codec = Codec(model.layout, model.codec.text, image)
    with pytest.raises(ValueError, match=r"\(64, .* the config \(32, "):
        CM3Leon(model.system, model.decoder, codec)


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
    for section, key, value, named in (
        ("vocabulary", "text", 400, "layout.text"),
        ("vocabulary", "sentinels", 20, "layout.sentinels"),  # all shapes are the same
        ("decoder", "norm_eps", 1e-3, "decoder.norm_eps"),
        ("decoder", "post_norm", True, "decoder.post_norm"),
    ):
        other = tiny_system.tiny_config()
        other[section][key] = value
        config.write(mixed, other)
        with pytest.raises(ValueError, match=named):
            CM3Leon.load(mixed)


def test_a_tuned_checkpoint_knows_its_tasks(workdir, tmp_path, monkeypatch):
    monkeypatch.setitem(task_sources.SOURCES, "shapes", tiny_tasks.WORLD)
    settings = tiny_system.tiny_config()
    settings["sft"] = tiny_tasks.tiny_config()["sft"]
    settings["sft"] |= {"tasks": {"edit": 1.0, "answer": 1.0}, "only": ("answer",)}
    config.write(tmp_path, settings)
    for path in workdir.iterdir():
        if path.is_dir():
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "sft").symlink_to(workdir / "pretrain")  # as if tuned by nothing
    tuned = CM3Leon.load(tmp_path)
    assert tuned.writer.tasks == {"answer"} and tuned.classes == ()
    with pytest.raises(ValueError, match="not trained on the task 'variation', but on"):
        tuned.variation([RED])
    with pytest.raises(ValueError, match="but on nothing"):
        CM3Leon.load(tmp_path, "pretrain").answer([RED], ["what is it?"])


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
    path = result_file(workdir, protocol, "pretrain")
    assert json.loads(path.read_text()) == result
    assert result["step"] == checkpoint.latest_step(workdir / "pretrain") == 4
    for score in result["scores"].values():
        assert score["low"] <= score["value"] <= score["high"]
        assert score["n"] > 0
    again = stages.evaluate(workdir, protocol, "pretrain")
    assert again["scores"] == result["scores"]
    page = report.write(workdir).read_text()
    for task in tasks:
        samples = workdir / "samples" / path.stem / task
        assert samples.exists() or task in ("likelihood", "perplexity")
    assert "data:image/png" in page and f"{world}:tiny" in page


@pytest.mark.parametrize(
    "world, task, message",
    [
        ("coco", "caption", "world='coco': choose from shapes, shape_tasks"),
        ("shapes", "draw", "no 'draw' in world 'shapes'"),
    ],
)
def test_a_protocol_of_another_world_is_refused(workdir, world, task, message):
    settings = {"split": "test", "documents": 6, "shown": 2, "seed": 0}
    protocol = Protocol(name="x", world=world, tasks=(task,), **settings)
    with pytest.raises(ValueError, match=message):
        stages.evaluate(workdir, protocol, "pretrain")
