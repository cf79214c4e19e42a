"""The world of entities: frozen, and only memory or retrieval can know a look."""

import dataclasses
import hashlib
import json
from collections import Counter

import numpy as np
import pytest

from cm3leon_jax.data import entities, shapes
from cm3leon_jax.data.sources import SOURCES, prepare, read_documents

STUDY = entities.EntitiesConfig(
    image_size=32,
    layout=2,
    shapes=("circle", "square", "triangle", "cross"),
    colours=tuple(shapes.COLOURS)[:6],
    backgrounds=("white", "black"),
)
TINY = entities.EntitiesConfig(
    image_size=32,
    layout=2,
    backgrounds=("white", "black"),
    entities=60,
    new=10,
    documents=1000,
    head=10,
)
# Of the texts and facts of the first documents. A new digest is another world, and no
# figure measured before can stand beside one measured after.
DIGESTS = {
    "study": "c184ceb5",
    "tiny": "c3271c97",
}


def found(config, split, count):
    return [entities.document(config, split, i) for i in range(count)]


@pytest.mark.parametrize("name", DIGESTS)
def test_frozen(name):
    config = {"study": STUDY, "tiny": TINY}[name]
    seen = hashlib.sha256()
    for split in entities.SPLITS:
        for document in found(config, split, 50):
            facts = json.dumps(document.metadata, sort_keys=True)
            seen.update(f"{document.id} {document.segments[0].text} {facts}".encode())
    assert seen.hexdigest()[:8] == DIGESTS[name]


def test_names_and_groups_of_the_study():
    world = entities.world(STUDY)
    assert len({entity.name for entity in world.entities}) == 4200
    groups = Counter(entity.group for entity in world.entities)
    assert groups == {"head": 101, "middle": 404, "tail": 3495, "new": 200}
    shown = Counter(world.schedule.tolist())
    assert shown.pop(-1) == 24_000
    assert [shown[n] for n in range(4000)] == [e.shown for e in world.entities[:4000]]
    assert set(shown) == set(range(4000))
    assert min(shown.values()) == entities.LEAST


def test_frequencies_follow_the_rank():
    counts = entities.frequencies(4000, 24_000, 1.0)
    assert counts.sum() == 24_000
    rank = np.arange(1, 101)
    assert np.allclose(counts[:100] * rank, counts[0], rtol=0.05)
    assert (entities.frequencies(7, 30, 0.0) == [5, 5, 4, 4, 4, 4, 4]).all()


def test_captions_tell_all_but_the_look():
    words = {w for words in shapes.SIZE_WORDS.values() for w in words}
    words |= set(shapes.COLOURS) | set(shapes.SHAPES)
    looks = {}
    for split in entities.SPLITS:
        for document in found(TINY, split, 50):
            scene = shapes.Scene.from_json(document.metadata["scene"])
            text = document.segments[0].text
            if document.metadata["group"] == "plain":
                continue
            (thing,) = scene.objects
            name = document.metadata["entity"]
            assert {name, scene.background} <= set(text.replace(",", " ").split()) | {
                word.strip(":") for word in text.split()
            }
            assert shapes.CELL_NAMES[2][thing.cell] in text
            assert not words & set(text.replace(",", "").split())
            assert (thing.colour, thing.shape) not in shapes.HELD_OUT
            look = (thing.size, thing.colour, thing.shape)
            assert looks.setdefault(name, look) == look


def test_held_out_arrangements_are_never_trained_on():
    def arrangements(documents, roles=("bank", "query", None)):
        made = {}
        for document in documents:
            facts = document.metadata
            if facts["group"] != "plain" and facts.get("role") in roles:
                (thing,) = facts["scene"]["objects"]
                place = thing["cell"], facts["scene"]["background"]
                made.setdefault(facts["entity"], []).append(place)
        return made

    training = arrangements(entities.documents(TINY, "train"))
    tail = [e.name for e in entities.world(TINY).entities if e.group == "tail"]
    assert tail
    assert all(len(set(training[name])) == len(training[name]) == 3 for name in tail)
    for split in ("validation", "test"):
        for name, places in arrangements(found(TINY, split, 300)).items():
            assert not set(places) & set(training[name])
    new = list(entities.documents(TINY, "new"))
    bank, queries = arrangements(new, ("bank",)), arrangements(new, ("query",))
    assert len(bank) == len(queries) == TINY.new
    for name, places in bank.items():
        assert len(set(places)) == 3 and len(set(queries[name])) == 2
        assert not set(places) & set(queries[name])
    assert not set(bank) & set(training)


def test_held_out_entities_come_as_often_as_in_training():
    groups = Counter(d.metadata["group"] for d in found(TINY, "test", 2000))
    assert groups["plain"] == 1000
    world = entities.world(TINY)
    for group in ("head", "middle", "tail"):
        expected = sum(e.shown for e in world.entities if e.group == group) / 500
        assert groups[group] / 1000 == pytest.approx(expected, abs=0.05)


def test_a_source_like_the_others(tmp_path):
    kind, documents = SOURCES["entities"]
    assert kind is entities.EntitiesConfig
    prepare(TINY, documents, tmp_path, {"train": None, "test": 20, "new": None})
    assert len(read_documents(tmp_path, "train")) == TINY.documents
    stored = read_documents(tmp_path, "new")
    assert len(stored) == 5 * TINY.new
    again = entities.document(TINY, "new", 7)
    assert stored[7].id == again.id and stored[7].metadata == again.metadata
    assert np.array_equal(stored[7].segments[1].array, again.segments[1].array)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"documents": 100}, "need 180"),
        ({"head": 3}, "more than 3"),
        ({"entities": 0}, "positive"),
        ({"backgrounds": ("white",)}, "too few arrangements"),
        ({"shapes": ("ball",)}, "choose from"),
    ],
)
def test_impossible_worlds(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TINY, **changes)


def test_documents_that_are_not_there():
    with pytest.raises(ValueError, match="no document 50"):
        entities.document(TINY, "new", 50)
    with pytest.raises(ValueError, match="'bank' is none of"):
        entities.document(TINY, "bank", 0)
