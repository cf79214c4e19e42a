"""Protocols: honest intervals, results that nothing overwrites, enough documents."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image as Pillow

from cm3leon_jax import config
from cm3leon_jax.data import shapes as world
from cm3leon_jax.data import sources
from cm3leon_jax.evaluation import (
    compare,
    examples,
    hallucination,
    kept,
    protocol,
)
from cm3leon_jax.evaluation.protocol import Outcome, Protocol, Sample, interval
from cm3leon_jax.evaluation.public_sets import PublicConfig
from cm3leon_jax.sampling.engine import Precision
from cm3leon_jax.sampling.sampler import Sampler
from cm3leon_jax.system import SamplingConfig
from configs import shapes as configs_of_shapes
from configs.eval import coco_fid30k, entities
from configs.eval import shapes as shape_protocols

WORLD = world.ShapesConfig(image_size=32, layout=2)
PROTOCOL = Protocol(
    **{"name": "a:b", "world": "shapes", "split": "test", "documents": 12},
    **{"tasks": ("draw",), "shown": 2, "seed": 0},
)


def test_copies_do_not_narrow_an_interval():
    rng = np.random.default_rng(0)
    values = rng.random(50)
    plain = interval(values, np.mean, 50)
    copies, names = np.repeat(values, 4), np.repeat(np.arange(50), 4).tolist()
    grouped = interval(copies, np.mean, 200, names)
    naive = interval(copies, np.mean, 200)
    assert grouped == plain | {"n": 200, "clusters": 50}
    width = plain["high"] - plain["low"]
    assert naive["high"] - naive["low"] < 0.6 * width
    assert interval(values, np.mean, 50, range(50)) == plain | {"clusters": 50}
    # Two sets that are equal and iterate otherwise, and another.
    sets = [map(frozenset, x) for x in ([(0, 8), "c"], [(8, 0), "c"], [(0, 9), "c"])]
    first, same, other = (interval(values[:2], np.mean, 2, [*x]).names for x in sets)
    assert first == same != other


def test_what_is_always_right_may_be_wrong_the_next_time():
    all_right = interval(np.ones(20), np.mean, 20)
    assert (all_right["value"], all_right["high"]) == (1, 1)
    assert all_right["low"] == pytest.approx(20 / (20 + 1.96**2), abs=1e-5)  # Wilson
    never = interval(np.zeros((30, 3)), np.mean, 90, [i // 3 for i in range(30)])
    assert (never["value"], never["low"]) == (0, 0)
    assert never["high"] == pytest.approx(1.96**2 / (10 + 1.96**2), abs=1e-5)
    same = interval(np.full(20, 7.0), np.mean, 20)  # no share of anything
    assert same["low"] == same["high"] == 7


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A work directory with 11 test documents, whose model is never looked at."""
    config.write(tmp_path, {"name": "x"})
    limits = {"test": 11, "validation": 3}
    sources.prepare(WORLD, world.documents, tmp_path / "documents", limits)
    (tmp_path / "pretrain").mkdir()
    done = {"steps": 5, "inputs_hash": "0123456789ab"}
    (tmp_path / "pretrain" / "DONE.json").write_text(json.dumps(done))
    one = Sampler()
    sampling = SamplingConfig(text_to_image=one, caption=one, infill=one)
    model = SimpleNamespace(system=SimpleNamespace(name="x", sampling=sampling))
    monkeypatch.setattr(protocol.CM3Leon, "load", lambda *_, **__: model)
    monkeypatch.setattr(protocol, "latest_step", lambda _: 5)
    return tmp_path


def draw(_, documents, seed):
    samples = [Sample(text="x", pictures={"a": Pillow.new("RGB", (4, 4))})] * 3
    return Outcome({"count": interval(np.ones(len(documents)), np.sum, 1)}, samples)


def run(workdir, settings, checkpoint="pretrain"):
    result = protocol.run_protocol(workdir, checkpoint, settings, {"draw": draw})
    return result, protocol.result_file(workdir, settings, checkpoint)


def test_an_encoder_that_is_given_chooses_among_candidates_too(workdir):
    model = protocol.CM3Leon.load(workdir, "pretrain")
    model.context = SimpleNamespace(encoder=None)
    encoder = SimpleNamespace(name="clip-0123")

    def seen(kept, documents, seed):
        assert kept.context.encoder is kept.embedder is encoder
        return draw(kept, documents, seed)

    tasks = {"draw": seen}
    result = protocol.run_protocol(
        workdir, "pretrain", PROTOCOL, tasks, encoder=encoder
    )
    assert result["encoder"] == "clip-0123"


def test_another_precision_has_a_result_of_its_own(workdir, monkeypatch):
    asked, load = [], protocol.CM3Leon.load
    monkeypatch.setattr(
        protocol.CM3Leon, "load", lambda *a, **k: asked.append(k) or load()
    )
    _, plain = run(workdir, PROTOCOL)
    how = Precision(weights="int8", cache="bfloat16")
    given = (workdir, "pretrain", PROTOCOL, {"draw": draw})
    other = protocol.run_protocol(*given, precision=how)
    same = protocol.run_protocol(*given, precision=Precision())
    assert asked[1]["precision"] == how and "precision" not in same
    assert other["precision"] == "weights=int8,cache=bfloat16"
    assert other["checkpoint"] == "pretrain"
    path = plain.with_name(f"{plain.stem}.weights-int8-cache-bfloat16.json")
    assert json.loads(path.read_text()) == other
    found = compare.read_all([plain, path])
    assert found[1]["name"] == f"{found[0]['name']} {other['precision']}"
    compare.check(found)


def test_results_and_samples_are_kept_apart(workdir):
    changed = dataclasses.replace(PROTOCOL, seed=1)
    files = set()
    for settings, checkpoint in (
        (PROTOCOL, "pretrain"),
        (PROTOCOL, "pretrain@3"),
        (changed, "pretrain"),
        (PROTOCOL, "pretrain"),
    ):
        result, path = run(workdir, settings, checkpoint)
        assert json.loads(path.read_text()) == result
        assert result["inputs_hash"] == "0123456789ab"
        samples = workdir / "samples" / path.stem / "draw" / "index.jsonl"
        assert len(samples.read_text().splitlines()) == 2
        files.add(path.name)
    assert len(files) == 3 == len(list((workdir / "samples").iterdir()))
    assert all(name.startswith("a-b-") for name in files)


def test_draws_of_a_run_that_was_killed_are_not_those_of_the_old_result(
    workdir, monkeypatch
):
    _, path = run(workdir, PROTOCOL)
    found, write = compare.read(path), kept.write_whole
    assert set(found["draws"]) == set(found["rows"]) == {"draw/count"}

    def killed(path, data):
        if path.suffix == ".json":
            raise KeyboardInterrupt
        write(path, data)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(kept, "write_whole", killed)
        patched.setattr(protocol, "hardware", lambda: "another machine")
        run(workdir, PROTOCOL)
    assert compare.read(path)["draws"] == {}


def test_failures_after_the_first_samples_are_kept_too(workdir):
    def judged(_, documents, seed):
        right = (True, False, True, False, False, False)
        picture = {"a": Pillow.new("RGB", (4, 4))}
        samples = [Sample(text="x", pictures=picture, ok=ok) for ok in right]
        return Outcome(draw(None, documents, seed).scores, samples)

    protocol.run_protocol(workdir, "pretrain", PROTOCOL, {"draw": judged})
    (folder,) = (workdir / "samples").iterdir()
    found = {}
    for path in folder.glob("*/index.jsonl"):
        lines = path.read_text().splitlines()
        found[path.parent.name] = [json.loads(line)["ok"] for line in lines]
    assert found == {"draw": [True, False], "draw_failures": [False, False]}


def test_only_the_data_of_the_protocols_hash_is_measured(workdir):
    result, _ = run(workdir, PROTOCOL)
    known = dataclasses.replace(PROTOCOL, data_hash=result["data_hash"])
    assert run(workdir, known)[0]["data_hash"] == result["data_hash"]
    shorter = dataclasses.replace(known, documents=10)
    with pytest.raises(ValueError, match=f"for data of hash {known.data_hash} .data_h"):
        run(workdir, shorter)


def test_data_are_frozen_by_what_they_are_made_from(workdir):
    key = protocol.data_key(workdir, "test", 11)
    assert key is not None and key.endswith(" test[:11]")
    frozen = dataclasses.replace(PROTOCOL, data={key: "0123456789ab"})
    assert frozen.hash == PROTOCOL.hash
    with pytest.raises(ValueError, match=r"hash 0123456789ab .as it is made from "):
        run(workdir, frozen)
    assert not list(workdir.glob("eval/*"))
    right = run(workdir, PROTOCOL)[0]["data_hash"]
    assert run(workdir, dataclasses.replace(frozen, data={key: right}))
    for change in ({"documents": 10}, {"data_hash": right}):  # other data; told to
        assert run(workdir, dataclasses.replace(frozen, **change))


def test_what_was_measured_first_is_measured_ever_after(workdir):
    result, path = run(workdir, PROTOCOL)
    changed = sources.read_documents(workdir / "documents", "test")[1:]
    arguments = workdir, "pretrain@3", PROTOCOL, {"draw": draw}
    with pytest.raises(ValueError, match=f"hash {result['data_hash']} .as in {path}"):
        protocol.run_protocol(*arguments, examples=changed)
    anew = protocol.run_protocol(*arguments, examples=changed, overwrite=True)
    assert anew["data_hash"] != result["data_hash"]


@pytest.mark.parametrize("variant", ["quick", "full"])
def test_the_documents_of_the_configs_are_those_of_the_protocols(variant, tmp_path):
    made = Protocol(**shape_protocols.get_config(variant).to_dict())
    settings = configs_of_shapes.get_config(variant).data.settings.to_dict()
    source = config.make(world.ShapesConfig, settings, "")
    limits = {"test": made.documents}
    sources.prepare(source, world.documents, tmp_path / "documents", limits)
    documents = sources.read_documents(tmp_path / "documents", "test")
    key = protocol.data_key(tmp_path, "test", len(documents))
    assert made.data[key] == kept.digest(documents[:])


def test_settings_that_are_not_given_leave_old_hashes_as_they_are():
    # Results of finished work directories are found by this name.
    made = Protocol(**entities.get_config().to_dict())
    assert made.hash == "d92d155de162"
    assert dataclasses.replace(made, version=2).hash != made.hash
    values = coco_fid30k.get_config().to_dict()
    fid = config.make(Protocol, values, "")
    assert fid.hash == "2d211393c9ca"
    values["public"]["resize"] = "clean"
    assert config.make(Protocol, values, "").hash != fid.hash
    with pytest.raises(ValueError, match="public.resize='cubic': choose from"):
        dataclasses.replace(fid.public, resize="cubic")
    assert dataclasses.replace(made, data_hash="x").hash != made.hash


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_is_never_a_result(workdir, bad):
    def broken(_, documents, seed):
        score = {"value": bad, "low": 0.0, "high": 1.0, "n": 3}
        return Outcome({"count": score})

    with pytest.raises(ValueError, match="draw/count is .* no result is written"):
        protocol.run_protocol(workdir, "pretrain", PROTOCOL, {"draw": broken})
    assert not list(workdir.glob("eval/*"))


@pytest.mark.parametrize("scores", [{}, {"count": interval(np.ones(3), np.mean, 0)}])
def test_no_scores_are_no_result(workdir, scores):
    made = {"draw": lambda *_: Outcome(scores, draw(None, [1], 0).samples)}
    with pytest.raises(ValueError, match="a:b has measured nothing: draw left no"):
        protocol.run_protocol(workdir, "pretrain", PROTOCOL, made)
    assert not list(workdir.glob("eval/*")) and not list(workdir.glob("samples/*/draw"))


@pytest.mark.parametrize("part", ["decoder", "image tokenizer"])
def test_weights_that_are_no_numbers_are_never_measured(workdir, monkeypatch, part):
    model = protocol.CM3Leon.load()
    weights = {"a": np.ones(3, np.float16), "b": np.array([1.0, np.nan], np.float32)}
    whole, broken = {"a": weights["a"], "n": np.ones(2, np.int32)}, weights
    model.decoder = broken if part == "decoder" else whole
    image = SimpleNamespace(model=whole if part == "decoder" else broken)
    model.codec = SimpleNamespace(image=image)
    with pytest.raises(ValueError, match=r"pretrain: dict\['b'\] is not finite"):
        run(workdir, PROTOCOL)
    assert not list(workdir.glob("eval/*"))
    broken["b"] = np.ones(2, np.float32)
    assert run(workdir, PROTOCOL)


def test_a_rate_of_nothing_is_no_score(workdir):
    def silent(_, documents, seed):
        said = hallucination.scores([set(), set()], [{"star"}, {"moon"}])
        return Outcome(said)

    made = protocol.run_protocol(workdir, "pretrain", PROTOCOL, {"draw": silent})
    assert set(made["scores"]) == {"draw/hallucinated_captions", "draw/named"}


def test_another_memory_bank_is_asked_anew_and_said(workdir):
    model, asked, made = protocol.CM3Leon.load(), set(), []

    def drawn(model, documents, seed):
        asked.add(model.identity)
        return draw(model, documents, seed)

    for ids in (["a", "b"], ["a", "c"]):
        model.memory = SimpleNamespace(ids=ids)
        arguments = workdir, "pretrain", PROTOCOL, {"draw": drawn}
        made.append(protocol.run_protocol(*arguments))
    assert made[0]["bank"] != made[1]["bank"] and len(asked) == 2


def test_a_result_has_its_settings_and_the_sampler_that_was_used(workdir):
    result, _ = run(workdir, PROTOCOL)
    assert Protocol(**result["settings"] | {"tasks": ("draw",)}) == PROTOCOL
    assert set(result["sampling"]) > {"text_to_image", "caption"}
    public = {"set": "coco_prompts", "sampler": Sampler(top_p=0.5)}
    given = dataclasses.replace(PROTOCOL, public=PublicConfig(**public))
    found = protocol.run_protocol(
        *(workdir, "pretrain", given, {"draw": draw}), examples=range(12)
    )
    assert found["sampling"]["sampler"]["top_p"] == 0.5
    assert found["settings"]["public"]["set"] == "coco_prompts"
    assert "caption" not in found["sampling"]


def test_examples_that_a_task_draws_are_those_of_earlier_results(workdir):
    def measured(drawn, checkpoint="pretrain@3", **options):
        def task(model, documents, seed):
            made = examples.enough(model, "some", iter(drawn), 3, examples.one)
            return draw(model, made, seed)

        arguments = workdir, checkpoint, PROTOCOL, {"draw": task}
        return protocol.run_protocol(*arguments, **options)["examples"]

    drawn = sources.read_documents(workdir / "documents", "test")
    first = measured(drawn, "pretrain")
    assert set(first) == {"some"} and measured(drawn) == first
    changed = [dataclasses.replace(d, metadata={"other": 1}) for d in drawn]
    with pytest.raises(ValueError, match="examples of some are others than"):
        measured(changed)
    assert measured(changed, overwrite=True) != first
    # An older result does not say, and nothing is held against it.
    for path in workdir.glob("eval/*.json"):
        found = json.loads(path.read_text())
        path.write_text(json.dumps({k: x for k, x in found.items() if k != "examples"}))
    assert measured(drawn) == first


class Drawing:
    """A model that counts what it is asked for, and breaks when it is told to."""

    def __init__(self, model, breaks=None):
        self.system, self.asked, self.breaks = model.system, [], breaks

    def text_to_image(self, prompts, *, seed, numbers):
        if len(self.asked) == self.breaks:
            raise KeyboardInterrupt
        self.asked.append(list(numbers))
        colours = np.array(
            [[len(p), n, seed] for p, n in zip(prompts, numbers, strict=True)]
        )
        return [Pillow.new("RGB", (2, 2), tuple(c)) for c in colours.tolist()]


def test_an_interrupted_run_goes_on_and_ends_as_if_it_were_not(workdir, monkeypatch):
    whole = protocol.CM3Leon.load()
    monkeypatch.setattr(kept, "PART", 4)

    def drawn(model, documents, seed):
        prompts = [document.segments[0].text for document in documents]
        made = model.text_to_image(prompts, seed=seed)
        values = np.array([np.asarray(picture)[0, 0] for picture in made], float)
        return Outcome({"sum": interval(values, np.sum, len(values))})

    def measure(model, **options):
        monkeypatch.setattr(protocol.CM3Leon, "load", lambda *_, **__: model)
        arguments = workdir, "pretrain", PROTOCOL, {"draw": drawn}
        return protocol.run_protocol(*arguments, **options)["scores"]

    with pytest.raises(KeyboardInterrupt):
        measure(Drawing(whole, breaks=2))
    assert not list(workdir.glob("eval/*"))
    again = Drawing(whole)
    found = measure(again)
    assert again.asked == [[8, 9, 10]]
    assert not list(workdir.glob("samples/*.parts"))
    fresh = Drawing(whole)
    assert measure(fresh) == found
    assert fresh.asked == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    with pytest.raises(KeyboardInterrupt):
        measure(Drawing(whole, breaks=2))
    anew = Drawing(whole)
    assert measure(anew, overwrite=True) == found
    assert len(anew.asked) == 3


def test_a_small_split_is_used_whole_and_a_tiny_one_refused(workdir):
    result, _ = run(workdir, PROTOCOL)
    assert result["documents"] == 11
    assert result["scores"]["draw/count"]["value"] == 11
    with pytest.raises(ValueError, match="3 documents of split 'validation'"):
        run(workdir, dataclasses.replace(PROTOCOL, split="validation"))
    with pytest.raises(ValueError, match="documents=0"):
        dataclasses.replace(PROTOCOL, documents=0)
