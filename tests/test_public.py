"""Public sets: read as they are given out, asked in parts, scored as they should be."""

import ast
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_sets
from PIL import Image as Pillow

from cm3leon_jax import config, stages
from cm3leon_jax.evaluation import hallucination, public, public_job, public_sets
from cm3leon_jax.evaluation.kept import Kept, Parts, digest
from cm3leon_jax.evaluation.protocol import Protocol
from cm3leon_jax.evaluation.public_sets import PublicConfig
from cm3leon_jax.sampling.rerank import Ranked
from cm3leon_jax.tokenizers.segmentation import SegmentationTokenizer

SIDE = tiny_sets.SIDE
PROTOCOLS = sorted((Path(__file__).parent.parent / "configs/eval").glob("*.py"))


def variants(path):
    """What `get_config` may be given: the keys of what it looks `variant` up in."""
    made = runpy.run_path(str(path))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Subscript) and ast.unparse(node.slice) == "variant":
            code = compile(ast.Expression(node.value), str(path), "eval")
            return [(made, (key,)) for key in eval(code, made)]
    return [(made, ())]


@pytest.mark.parametrize(
    ("module", "variant"),
    [
        pytest.param(*x, id=":".join((path.stem, *x[1])))
        for path in PROTOCOLS
        for x in variants(path)
    ],
)
def test_every_protocol_of_the_repository_can_be_run(module, variant):
    made = module["get_config"](*variant).to_dict()
    protocol = config.make(Protocol, made, "protocol")
    stages.check_protocol(protocol)
    assert config.make(Protocol, config.complete(Protocol, made), "").hash == (
        protocol.hash
    )


@pytest.mark.parametrize("name", tiny_sets.MAKERS)
def test_a_set_is_read_as_it_is_given_out(tmp_path, name):
    assert set(tiny_sets.MAKERS) == set(public_sets.SETS)
    with pytest.raises(FileNotFoundError) as error:
        public_sets.read(name, tmp_path)
    needs = public_sets.SETS[name][0]
    assert all(need in str(error.value) for need in (*needs, str(tmp_path), "--data"))
    assert "\n" not in str(error.value)
    tiny_sets.MAKERS[name](tmp_path)
    found = public_sets.read(name, tmp_path)
    assert len(found) == tiny_sets.COUNT - (
        name in ("coco_karpathy", "image_paragraph")
    )
    assert len({example.id for example in found}) == len(found)
    assert found == public_sets.read(name, tmp_path)
    assert all(example.size for example in found)
    for need in needs:
        if need.endswith(".json"):
            (tmp_path / need).write_text('{"a": [{}]}')
            with pytest.raises(ValueError, match="have another form"):
                public_sets.read(name, tmp_path)


def test_what_is_read_is_what_stands_there(tmp_path):
    tiny_sets.coco_prompts(tmp_path)
    one = next(x for x in public_sets.read("coco_prompts", tmp_path) if x.id == "7")
    assert one.references == ("picture 7, said 1 times",)  # the first of its captions
    assert one.picture == "val2014/COCO_val2014_000000000007.jpg"
    tiny_sets.vqa2(tmp_path)
    one = public_sets.read("vqa2", tmp_path)[3]
    assert one.id == "103" and one.question == "Which is 3?"
    assert one.references == ("number 3",) * 9 + ("none",)
    tiny_sets.visdial(tmp_path)
    one = public_sets.read("visdial", tmp_path)[5]
    assert one.question == "number 5. is it red? yes. is it round?"
    assert one.options == ("never", "maybe", "no", "yes")
    assert one.relevance == (0.0, 0.5, 1.0, 0.0)
    tiny_sets.coco_segmentation(tmp_path)
    assert public_sets.labels(tmp_path) == {"star": 0, "tree": 1}


def test_examples_that_say_nothing_or_show_nothing_are_named(tmp_path):
    tiny_sets.generic(tmp_path)
    assert public_sets.read("vqa2", tmp_path)[2].references == ("number 2",)
    lines = (tmp_path / "examples.jsonl").read_text().splitlines()
    for change, message in (
        ({"references": [" "]}, "example '5' of .* an empty reference"),
        ({"picture": "images/none.png"}, "none.png does not exist, and example '5'"),
        ({"colour": 1}, "line 6: .*colour"),
    ):
        bad = [*lines]
        bad[5] = json.dumps(json.loads(bad[5]) | change)
        (tmp_path / "examples.jsonl").write_text("\n".join(bad))
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            public_sets.read("vqa2", tmp_path)
    for change, message in (
        ({"set": "imagenet"}, "choose from coco_prompts"),
        ({"retrieve": ()}, "public.retrieve"),
        ({"candidates": (0,)}, "public.candidates"),
        ({"metrics": ("FID",)}, "public.metrics has 'FID': choose from fid, inception"),
        (
            {"metrics": ("inception_score",), "features": "efficientnet_lite0"},
            "no inception_score by efficientnet_lite0",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            PublicConfig(**{"set": "vqa2"} | change)


def test_metrics_that_no_task_would_measure_are_refused(tmp_path):
    public_set = PublicConfig(set="vqa2", metrics=("fid",))
    protocol = Protocol(
        **{"name": "x", "world": "public", "split": "test", "documents": 9},
        **{"tasks": ("answer",), "shown": 0, "seed": 0, "public": public_set},
    )
    with pytest.raises(ValueError, match="has 'fid': choose from vqa_accuracy"):
        stages.check_protocol(protocol)
    assert set(public_sets.METRICS) == set(public.TASKS)
    with pytest.raises(ValueError, match="metrics is empty"):
        measure(tmp_path, "coco_prompts", "text_to_image", Model(), tmp_path)


class Network:
    """Features that tell the colours of pictures; its scores are not FID."""

    key, width = "frechet_mean", 3

    def __call__(self, pictures):
        return np.asarray(pictures).mean((1, 2)).astype(np.float32)


class Model:
    """Knows the number of every picture by its colour, and says and draws it."""

    memory = None
    classes = ("background", "moon", "star")
    codec = SimpleNamespace(masks=SegmentationTokenizer(4, classes))
    system = SimpleNamespace(
        name="known",
        image_tokenizer=SimpleNamespace(model=SimpleNamespace(image_size=SIDE)),
    )

    def __init__(self, shift=0):
        self.shift, self.asked = shift, []

    def _numbers(self, pictures):
        self.asked.append(len(pictures))
        return [round(float(p[..., 0].mean()) / 10) + self.shift for p in pictures]

    def caption(self, pictures, *, style, wording, **options):
        return [f"a picture {n}" for n in self._numbers(pictures)]

    def answer(self, pictures, questions, *, wording, **options):
        assert options["sampler"] is None and options["seed"] == 4
        return [f"Number {n}.…" for n in self._numbers(pictures)]

    def segment(self, pictures, *, wording, **options):
        labels = np.zeros((SIDE, SIDE), np.int32)
        labels[:, : SIDE // 2] = 2
        return [np.roll(labels, self.shift, 1) for _ in pictures]

    def text_to_image(self, prompts, *, numbers, candidates=1, **options):
        """Candidate 2 is the best, and the true picture; 0 and 1 are black."""
        found = []
        for prompt in prompts:
            colour = (10 * int(prompt.split()[1].strip(",")), 10, 200)
            pictures = [Pillow.new("RGB", (SIDE, SIDE), c) for c in (0, 0, colour)]
            if candidates == 1:
                found.append(pictures[self.shift])
            else:
                order = (2, 1, 0)
                found.append(
                    Ranked(
                        outputs=tuple(pictures[i] for i in order),
                        numbers=order,
                        scores=(3.0, 2.0, 1.0),
                        parts={},
                    )
                )
        return found


def measure(folder, name, task, model, tmp_path, **settings):
    tiny_sets.MAKERS[name](folder)
    settings = PublicConfig(set=name, image_size=SIDE, **settings)
    examples = public_sets.read(name, folder)
    parts = Parts(tmp_path / "samples" / "x.parts")
    kept = Kept(model, parts, str(model.shift))
    return public.evaluators(settings, folder)[task](kept, examples, 4)


def test_answers_are_scored_and_kept_for_the_server(tmp_path, monkeypatch):
    monkeypatch.setattr(public_job, "PART", 5)
    model, about = Model(), {"metrics": ("vqa_accuracy",)}
    found = measure(tmp_path / "a", "vqa2", "answer", model, tmp_path, **about)
    assert found.scores["vqa_accuracy@0"]["value"] == 1
    assert model.asked == [5, 5, 5, 5, 4]
    lines = json.loads((tmp_path / "samples/x/texts@0.json").read_text())
    assert lines[3] == {"question_id": 103, "answer": "Number 3."}
    again = Model()
    other = measure(tmp_path / "a", "vqa2", "answer", again, tmp_path, **about)
    assert other.scores == found.scores and not again.asked
    wrong = measure(tmp_path / "b", "vizwiz", "answer", Model(1), tmp_path, **about)
    assert wrong.scores["vqa_accuracy@0"]["value"] == 0
    dev = measure(tmp_path / "c", "vqa2_test_dev", "answer", Model(), tmp_path)
    assert set(dev.scores) == {"answered@0"}
    assert "people: number 0 / none" in found.samples[0].note


def test_captions_meet_their_references(tmp_path, monkeypatch):
    def same(made, references, meteor=True):
        right = [a in b for a, b in zip(made, references, strict=True)]
        return {"same": {"value": np.mean(right), "low": 0, "high": 1, "n": len(made)}}

    monkeypatch.setattr(public.text_scores, "scores", same)
    for shift in (0, 1):
        folder = tmp_path / str(shift)
        found = measure(folder, "coco_karpathy", "caption", Model(shift), tmp_path)
        assert found.scores["same@0"]["value"] == 1 - shift


def test_what_captions_make_up_is_counted_by_coco_things(tmp_path, monkeypatch):
    monkeypatch.setattr(public.text_scores, "scores", lambda *_: {})
    about = {"metrics": ("hallucination",)}

    def rate(folder):
        found = measure(
            *(folder, "coco_karpathy", "caption", Model(), tmp_path), **about
        )
        return {key: score["value"] for key, score in found.scores.items()}

    folder = tmp_path / "a"
    with pytest.raises(FileNotFoundError, match="synonyms.txt: put there"):
        rate(folder)
    # Of pictures 1 to 23, captions "a picture N": what people said counts as shown.
    (folder / "synonyms.txt").write_text("picture\n3, three\n4\n")
    with pytest.raises(
        FileNotFoundError, match="instances_val2014.json does not exist"
    ):
        rate(folder)
    kinds = [{"id": 5, "name": "3"}, {"id": 6, "name": "sheep"}]
    things = [{"image_id": 3, "category_id": 5}, {"image_id": 9, "category_id": 6}]
    made = {"categories": kinds, "annotations": things}
    tiny_sets.put(folder / "annotations/instances_val2014.json", made)
    found = rate(folder)
    assert found["hallucinated@0"] == 0 and 0.9 < found["named@0"] < 1  # but a sheep
    noted: list[str] = []  # the result has their digest
    monkeypatch.setattr(public, "note", lambda *x: noted.append(digest(x[2])))
    for names in ("picture\n3, three\n4\n", "picture\n3, three\n4, four\n"):
        (folder / "synonyms.txt").write_text(names)
        rate(folder)
    assert len(set(noted)) == 2
    texts = ["a picture 3", "a picture 4"]
    things = hallucination.coco_shown(folder, ["3", "8"])
    words = hallucination.read_synonyms(folder / "synonyms.txt")
    scores = hallucination.of_captions(texts, [["none"], ["none"]], things, words)
    assert scores["hallucinated"]["value"] == 0.75  # all but the 3


def test_pictures_are_compared_candidate_by_candidate(tmp_path, monkeypatch):
    monkeypatch.setattr(public_job.features, "efficientnet_lite0", Network)
    about = {"metrics": ("fid",), "features": "efficientnet_lite0"}
    read, parts = [], public_job.Job.parts

    def counted(job, name, *rest):
        read.append(name)
        return parts(job, name, *rest)

    monkeypatch.setattr(public_job.Job, "parts", counted)
    found = measure(
        *(tmp_path / "a", "coco_prompts", "text_to_image", Model(), tmp_path),
        candidates=(1, 3),
        **about,
    )
    assert read.count("originals") == 1  # for all scores together
    black, best = (found.scores[f"frechet_mean@{key}"] for key in ("0", "0_of_3"))
    assert black["value"] > 1000 and best["value"] < 30  # JPEG is not exact
    files = {path.parent.name for path in tmp_path.glob("samples/x/*/7.png")}
    assert files == {"pictures@0", "pictures@0_of_3"}
    sample = found.samples[0]
    assert list(sample.pictures) == ["after 0, of 1", "after 0, of 3", "original"]
    one = measure(
        *(tmp_path / "b", "coco_prompts", "text_to_image", Model(2), tmp_path), **about
    )
    assert one.scores["frechet_mean@0"]["value"] == best["value"]
    with pytest.raises(ValueError, match="no section `retrieval`"):
        measure(
            *(tmp_path / "c", "coco_prompts", "text_to_image", Model(), tmp_path),
            metrics=("clip_score",),
        )


def test_masks_are_scored_by_the_classes_that_both_know(tmp_path, monkeypatch):
    for shift, value in ((0, 1.0), (SIDE // 2, 0.0)):
        folder = tmp_path / str(shift)
        found = measure(folder, "coco_segmentation", "segment", Model(shift), tmp_path)
        assert found.scores["miou@0"]["value"] == value
        assert found.scores["ceiling@0"]["value"] == 1
        sample = found.samples[0].pictures
        assert list(sample) == ["picture", "classes", "best of the grid", "truth"]
        same = np.array_equal(sample["classes"], sample["truth"])
        assert same == (shift == 0)
    (folder / "labels.txt").write_text("1: sun\n")
    strange, everywhere = Model(), Model()
    with pytest.raises(ValueError, match="tuned on the classes moon, star, of which"):
        public.evaluators(
            PublicConfig(set="coco_segmentation", image_size=SIDE), folder
        )["segment"](Kept(strange, Parts(tmp_path), "x"), [], 0)
    everywhere.segment = lambda pictures, **_: (
        [np.full((SIDE, SIDE), 2)] * len(pictures)
    )
    for label, value in ((255, 1.0), (7, 0.5)):  # nothing is counted there; it is

        def make(folder, label=label):
            tiny_sets.coco_segmentation(folder)
            for path in folder.glob("stuffthingmaps/*/*.png"):
                mask = np.array(Pillow.open(path))
                mask[mask > 0] = label
                Pillow.fromarray(mask).save(path)

        monkeypatch.setitem(tiny_sets.MAKERS, "coco_segmentation", make)
        places = tmp_path / f"of {label}", tmp_path / f"for {label}"
        found = measure(
            places[0], "coco_segmentation", "segment", everywhere, places[1]
        )
        assert found.scores["miou@0"]["value"] == value
        assert found.scores["boundary_f1@0"]["value"] == (label == 255)


def test_questions_of_a_picture_are_drawn_together(tmp_path):
    tiny_sets.generic(tmp_path / "made")
    lines = (tmp_path / "made/examples.jsonl").read_text().splitlines()
    twice = [line.replace('{"id": "', '{"id": "x') for line in lines]
    (tmp_path / "made/examples.jsonl").write_text("\n".join([*lines, *twice]))
    settings = PublicConfig(set="vqa2", image_size=SIDE, metrics=("vqa_accuracy",))
    examples = public_sets.read("vqa2", tmp_path / "made")
    kept = Kept(Model(), Parts(tmp_path / "x.parts"), "x")
    task = public.evaluators(settings, tmp_path / "made")["answer"]
    for score in task(kept, examples, 4).scores.values():
        assert (score["n"], score["clusters"]) == (48, 24)
