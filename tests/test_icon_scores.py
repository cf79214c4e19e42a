"""Scores of artwork: what is known of the truth and of pictures that are wrong."""

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image as Pillow
from test_icon_tasks import make_world

from cm3leon_jax.data import icon_tasks, tasks
from cm3leon_jax.data.icon_sets import SETS
from cm3leon_jax.evaluation import icon_tasks as scoring
from cm3leon_jax.evaluation import looks
from cm3leon_jax.evaluation.protocol import Protocol
from cm3leon_jax.stages import check_protocol
from configs.eval import icon_tasks as protocols

pytest.importorskip("resvg_py", reason="the extra `icons` is not installed")
COUNT = 24


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world") / "cache")


@pytest.fixture(autouse=True)
def plain_features(monkeypatch):
    """Of the pixels, so that no network is needed."""

    def shown(pictures):
        flat = np.stack([x[::4, ::4].reshape(-1) / 255.0 for x in pictures])
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    def drawn(pictures):
        return np.stack([x.reshape(-1, 3).mean(0) for x in pictures])

    monkeypatch.setattr(looks, "shown", shown)
    monkeypatch.setattr(looks, "drawn", drawn)


class Model:
    """Gives `made(task, fields)` for every prompt, here the truth."""

    def __init__(self, source, made=None):
        self.system = SimpleNamespace(source=source, name="artist")
        self.layout = SimpleNamespace(sentinels=range(20))
        self.codec = SimpleNamespace(image=SimpleNamespace(grid=(8, 8)))
        self.made = made

    def reconstruct(self, images):
        return [Pillow.fromarray(x) for x in images]

    def text_to_image(self, prompts, *, seed):
        return self._all("text_to_image", caption=prompts)

    def ground(self, prompts, boxes, *, wording, seed):
        return self._all("ground", caption=prompts, objects=boxes)

    def variation(self, images, *, wording, seed):
        return self._all("variation", source=images)

    def control(self, images, kind, prompts, *, strength=None, wording, seed):
        if strength is None:
            return self._all(f"control_{kind}", caption=prompts, **{kind: images})
        words = [tasks.strength_word(strength)] * len(images)
        return self._all(
            f"reference_{kind}", caption=prompts, reference=images, strength=words
        )

    def edit(self, images, instructions, *, regions=None, wording, seed):
        assert all(len(box) == 4 for box in regions or ())
        task = "edit_region" if regions else "edit"
        return self._all(task, source=images, instruction=instructions)

    def _all(self, task, **columns):
        rows = zip(*columns.values(), strict=True)
        fields = [dict(zip(columns, row, strict=True)) for row in rows]
        return [Pillow.fromarray(self.made(task, row)) for row in fields]

    def infill(self, images, masks, prompts, *, seed):
        return [Pillow.fromarray(self.made("infill", {"image": x})) for x in images]

    def caption(self, images, *, style, wording, seed):
        return [self.made(style, {"image": x}) for x in images]


def truth(source):
    """What the artists made of the fields."""
    known = {}

    def key(row):
        parts = [getattr(x, "array", x) for _, x in sorted(row.items())]
        return tuple(x.tobytes() if hasattr(x, "tobytes") else str(x) for x in parts)

    def made(task, row):
        if task not in known:
            known[task] = {}
            spec = tasks.known(task)
            for unseen in (False, True) if spec.unseen else (False,):
                found = icon_tasks.examples(source, task, "test", unseen_wording=unseen)
                for document in itertools.islice(found, COUNT):
                    fields = tasks.parse(task, document)
                    image = fields.pop("image").array
                    given = {n: x for n, x in fields.items() if n != "region"}
                    known[task][key(given)] = image
        return known[task][key(row)]

    return made


PAINTED = ("edit", "edit_region", "ground", "control_edge", "control_segmentation")
DOCUMENTS = [None] * COUNT


@pytest.mark.parametrize(
    "task", [*PAINTED, "control_scribble", "reference_composition"]
)
def test_the_artists_pictures_reach_the_ceiling(world, task):
    outcome = scoring.TASKS[task](Model(world, truth(world)), DOCUMENTS, 0)
    assert len(outcome.samples) == COUNT and outcome.scores
    if task.startswith(
        ("edit", "control_edge")
    ):  # boxes are wider than what is in them
        assert all(sample.ok is not False for sample in outcome.samples)
    for key, score in outcome.scores.items():
        if f"{key}_ceiling" in outcome.scores:
            assert score == outcome.scores[f"{key}_ceiling"], key
        if key.startswith(("nearer", "kept", "edge_f1")):
            assert score["value"] == 1, key


def test_a_source_given_back_is_no_edit(world):
    model = Model(world, lambda task, row: row["source"])
    for task in ("edit", "edit_region"):
        scores = scoring.TASKS[task](model, DOCUMENTS, 0).scores
        assert scores["nearer"]["value"] == 0 and scores["kept"]["value"] == 1
        kinds = [key for key in scores if key.startswith("nearer_")]
        assert len(kinds) > 3


def test_an_empty_picture_shows_nothing(world):
    model = Model(world, lambda task, row: np.full((32, 32, 3), 255, np.uint8))
    for task, key in (("control_edge", "edge_f1"), ("ground", "boxes")):
        scores = scoring.TASKS[task](model, DOCUMENTS, 0).scores
        assert scores[key]["value"] < 0.5 < scores[f"{key}_ceiling"]["value"]


def test_what_misses_the_first_measure_is_in_the_gallery_of_failures(world):
    back = Model(world, lambda task, row: row["source"])
    white = np.full((32, 32, 3), 255, np.uint8)
    blank, mute = (Model(world, lambda *_, x=x: x) for x in (white, "nothing"))
    given = {"edit": back, "edit_region": back, "caption": mute}
    for task in (*given, "control_edge", "ground", "variation", "infill"):
        samples = scoring.TASKS[task](given.get(task, blank), DOCUMENTS, 0).samples
        assert any(sample.ok is False for sample in samples), task


def test_references_and_styles_of_new_artists(world):
    with pytest.raises(ValueError, match="was trained on all artists"):
        scoring.reference_style_new(Model(world), DOCUMENTS, 0)
    some = tuple(name for name in SETS if name not in ("twemoji", "icon-park"))
    mine = dataclasses.replace(world, sets=some)
    seen = []

    def made(task, row):
        seen.append(row)
        return row["reference"]

    outcome = scoring.reference_style_new(Model(mine, made), DOCUMENTS, 0)
    assert len(seen) == COUNT
    styles = {"style", "style_ceiling", "one_of_ten", "one_of_ten_ceiling"}
    assert styles == set(outcome.scores)
    assert outcome.scores["one_of_ten_ceiling"]["value"] == 1


def test_what_is_hidden_and_what_is_seen(world):
    same = scoring.TASKS["infill"](
        Model(world, lambda _, row: row["image"]), DOCUMENTS, 0
    )
    assert same.scores["visible"]["value"] == 1
    assert same.scores["hidden_psnr_untold"]["value"] == 100
    assert len(same.samples) == 2 * COUNT
    assert [sample.text for sample in same.samples[:2]] == ["", "untold"]
    white = np.full((32, 32, 3), 255, np.uint8)
    scores = scoring.TASKS["infill"](
        Model(world, lambda *_: white), DOCUMENTS, 0
    ).scores
    assert scores["visible"]["value"] < 1 and scores["hidden_psnr"]["value"] < 50


def test_words_of_captions(world):
    model = Model(world, lambda style, row: "nothing of that kind")
    scores = scoring.TASKS["caption"](model, DOCUMENTS, 0).scores
    forms = ("", "_detailed", "_long")
    assert set(scores) == {
        f"{x}{of}" for x in ("words", "hallucinated") for of in forms
    }
    assert scores["words"]["value"] == 0 and scores["hallucinated"]["n"] == 0


def test_captions_that_name_what_no_picture_shows_make_things_up(world):
    names = sorted(scoring._subjects(world))

    def rate(text):
        model = Model(world, lambda *_: text)
        score = scoring.TASKS["caption"](model, DOCUMENTS, 0).scores["hallucinated"]
        return score["value"], score["n"]

    examples = icon_tasks.examples(world, "caption_short", "test")
    shown = [next(examples).metadata["artwork"] for _ in DOCUMENTS]
    subject = shown[0][0]["subject"]
    known = sum(subject in {x["subject"] for x in some} for some in shown)
    value, n = rate(f"{subject}, of a kind")
    assert n >= COUNT and value == pytest.approx(1 - known / n, abs=1e-4)
    assert len(names) > COUNT


class Encoder:
    """Of colours: a text is its letters' sum, which says nothing."""

    name = "trained-0123"

    def images(self, pictures):
        return np.stack([np.float64(x).mean((0, 1)) for x in pictures])

    def texts(self, texts):
        return np.array([[len(text), sum(map(ord, text)) % 97, 1.0] for text in texts])


def test_edits_are_compared_with_their_captions_by_an_encoder(world):
    for made, same in ((truth(world), False), (lambda _, row: row["source"], True)):
        model = Model(world, made)
        model.embedder = Encoder()
        scores = scoring.TASKS["edit"](model, DOCUMENTS, 0).scores
        for name in ("trained_directional", "trained_similarity"):
            best = scores[f"{name}_ceiling"]
            assert (scores[name] == best) != same and -1 <= best["value"] <= 1
        if same:
            assert scores["trained_similarity"]["value"] == 1
            assert scores["trained_directional"]["value"] == 0


def test_measures_by_hand():
    ground = (200, 200, 200)
    pixels = np.full((2, 2, 3), 200, np.uint8)
    pixels[0, 1] = (200, 100, 200)
    assert looks.painted(pixels, ground).tolist() == [[False, True], [False, False]]
    assert looks.nearer(pixels, pixels, pixels + 1, np.ones((2, 2), bool))
    names = list("abcdefghijkl")
    vectors = np.eye(12)
    assert looks.found_among(vectors, vectors, names).all()
    assert not looks.found_among(np.roll(vectors, 1, 0) * 0, vectors, names).any()
    with pytest.raises(ValueError, match="too few names"):
        looks.found_among(vectors[:5], vectors[:5], names[:5])
    known = np.array([[0.0, 0], [0.2, 0], [5, 1], [5.2, 1]])
    found = looks.nearest(np.array([[0.3, 0.1], [4, 1]]), known, ["a", "a", "b", "b"])
    assert found == ["a", "b"]
    assert looks.edge_f1(np.array([[10, 5, 10, 10]])) == pytest.approx(2 / 3)


@pytest.mark.parametrize("variant", protocols.VARIANTS)
def test_protocols_ask_for_what_is_measured(variant):
    check_protocol(Protocol(**protocols.get_config(variant).to_dict()))
