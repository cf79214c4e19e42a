"""Scores of the world of entities, with a painter that knows what it is told."""

import numpy as np
import pytest
from flax import nnx
from PIL import Image as Pillow
from test_entities import TINY
from tiny_data import LAYOUT

from cm3leon_jax.data import entities as world
from cm3leon_jax.data import shapes
from cm3leon_jax.data.documents import Document, Image, Text
from cm3leon_jax.evaluation import entities
from cm3leon_jax.models.decoder import Decoder, DecoderConfig
from cm3leon_jax.parallel.rules import Rules
from cm3leon_jax.sampling.engine import Engine


class Memory:
    """Finds by the name in the caption, in what it has been given."""

    def __init__(self, documents):
        self.documents = list(documents)

    @property
    def ids(self):
        return [document.id for document in self.documents]

    def add(self, documents, *, keep):
        assert not keep
        assert not {d.id for d in documents} & set(self.ids)
        self.documents += documents

    def remove(self, ids, *, keep):
        assert not keep and set(ids) <= set(self.ids)
        self.documents = [d for d in self.documents if d.id not in ids]

    def other(self, documents):
        assert not any(d.metadata["group"] == "tail" for d in documents)
        return Memory(documents)

    def find(self, texts, images, k):
        assert len(texts) == len(images)
        return [
            [d for d in self.documents if d.metadata.get("entity", "?") in text][:k]
            for text in texts
        ]


class Painter:
    """Copies the look of the first document it is given into the cell asked for."""

    class system:
        name, source = "tiny", TINY

    def __init__(self, memory=None, cell=None, size=None):
        self.memory, self.cell, self.size = memory, cell, size
        self.given = []

    def text_to_image(self, prompts, *, retrieve=None, seed=0):
        found = retrieve or [[] for _ in prompts]
        self.given.append({len(row) for row in found})
        return [self._paint(*pair) for pair in zip(prompts, found, strict=True)]

    def _paint(self, prompt, documents):
        look = {"size": "small", "colour": "red", "shape": "circle"}
        if documents:
            (thing,) = documents[0].metadata["scene"]["objects"]
            look = {key: thing[key] for key in look}
        look["size"] = self.size or look["size"]
        names = shapes.CELL_NAMES[2]
        (cell,) = (i for i, name in enumerate(names) if name in prompt)
        cell = cell if self.cell is None else self.cell
        ground = "black" if "black" in prompt else "white"
        scene = shapes.Scene((shapes.Object(cell=cell, **look),), ground)
        return Pillow.fromarray(shapes.render(TINY, scene))


@pytest.fixture(scope="module")
def documents():
    return [world.document(TINY, "test", i) for i in range(200)]


@pytest.fixture(scope="module")
def bank():
    return [d for d in world.documents(TINY, "train") if "entity" in d.metadata]


def value(outcome, key):
    return outcome.scores[key]["value"]


def test_who_retrieves_knows_every_look(documents, bank):
    outcome = entities.entity(Painter(Memory(bank)), documents, 0)
    for group in entities.GROUPS:
        for kind in ("1", "2", "1_oracle", "2_oracle"):
            assert value(outcome, f"{group}@{kind}") == 1.0
        assert value(outcome, f"{group}@0") < 0.7
        assert value(outcome, f"chance_{group}") < 0.7
    first = outcome.samples[:3]
    assert [s.note.split(";")[0] for s in first] == list(entities.GROUPS)
    assert {"retrieved 1", "with 0", "with 2 oracle", "truth"} <= set(first[0].pictures)
    assert all(sample.ok for sample in outcome.samples)


def test_with_how_many_documents_and_by_what_is_scored(documents, bank):
    painter = Painter(Memory(bank), size="small")
    outcome = entities.entity(painter, documents, 0)
    # Every group in turn: none, one, one by the oracle, two, two; then what a changed
    # memory has.
    plain = [{0}, {1}, {1}, {2}, {2}]
    assert painter.given == [*plain, *plain, {0}, *plain, {0}]
    for group, queries in entities._queries(TINY, documents, 340).items():
        sizes = [d.metadata["scene"]["objects"][0]["size"] for d in queries]
        small = np.mean([size == "small" for size in sizes])
        assert 0 < small < 1
        for kind in ("1", "2_oracle"):
            wanted = pytest.approx((2 + small) / 3, abs=1e-4)
            assert value(outcome, f"{group}@{kind}") == wanted


def test_documents_that_are_gone_are_not_known(documents, bank):
    memory = Memory(bank)
    outcome = entities.entity(Painter(memory), documents, 0)
    for key, zero in (("new@2_removed", "new@0"), ("tail@2_swapped", "tail@0")):
        n = outcome.scores[key]["n"]
        assert n <= 3 * entities.FEW
        if n == outcome.scores[zero]["n"]:
            assert value(outcome, key) == value(outcome, zero)
        assert value(outcome, key) < 0.7
    assert {d.id for d in entities.added(TINY)} <= set(memory.ids)
    assert set(outcome.scores) == {
        f"{group}@{kind}"
        for group in entities.GROUPS
        for kind in ("0", "1", "2", "1_oracle", "2_oracle")
    } | {f"chance_{group}" for group in entities.GROUPS} | {
        "new@2_removed",
        "tail@2_swapped",
    }


def test_recall_has_queries_of_its_own(documents, bank, monkeypatch):
    monkeypatch.setattr(entities, "PER_GROUP", 5)
    outcome = entities.retrieve(Painter(Memory(bank)), documents, 0)
    tail = sum(d.metadata["group"] == "tail" for d in documents)
    assert outcome.scores["recall@2_tail"]["n"] == tail > 5
    assert outcome.scores["recall@2_new"]["n"] == TINY.new * world.QUERIES


def test_a_look_in_another_cell_is_wrong(documents, bank):
    outcome = entities.entity(Painter(Memory(bank), cell=0), documents, 0)
    asked = [d for d in documents if d.metadata["group"] == "tail"]
    right = [d.metadata["scene"]["objects"][0]["cell"] == 0 for d in asked]
    assert value(outcome, "tail@2") == pytest.approx(np.mean(right), abs=1e-4)


def test_without_a_memory_only_zero_documents(documents):
    outcome = entities.entity(Painter(), documents, 0)
    assert {key.split("@")[-1] for key in outcome.scores if "@" in key} == {"0"}
    with pytest.raises(ValueError, match="no memory"):
        entities.retrieve(Painter(), documents, 0)


def test_recall_counts_names_found(documents, bank):
    outcome = entities.retrieve(Painter(Memory(bank)), documents, 0)
    assert value(outcome, "recall@2_tail") == value(outcome, "right@2_new") == 1.0
    without = [d for d in bank if d.metadata["group"] != "tail"]
    outcome = entities.retrieve(Painter(Memory(without)), documents, 0)
    assert value(outcome, "recall@2_tail") == 0.0
    assert value(outcome, "recall@2_head") == 1.0


def test_the_memory_gets_the_new_names_once(documents):
    memory = Memory([])
    for _ in range(2):
        entities.retrieve(Painter(memory), documents, 0)
    assert len(memory.documents) == 3 * TINY.new
    assert {d.metadata["role"] for d in memory.documents} == {"bank"}


class Lengths:
    """An engine by which every retrieved id costs a tenth of a nat per image id."""

    def __init__(self, codec):
        self.codec, self.calls = codec, []

    def score(self, rows, starts):
        self.calls.append([list(map(int, row)) for row in rows])
        tokens = self.codec.image_tokens
        assert [len(row) - start for row, start in zip(rows, starts, strict=True)] == (
            [tokens] * len(rows)
        )
        return [-tokens * 0.1 * list(row).count(LAYOUT.brk) for row in rows]


def test_likelihood_is_of_so_many_documents_and_random_ones(
    documents, bank, monkeypatch
):
    class Ids:
        layout, image_tokens = LAYOUT, 2

        def ids(self, given):
            return [np.array([len(d.id), LAYOUT.brk, 8, 9], np.int32) for d in given]

    monkeypatch.setattr(entities, "FEW", 10)
    model = Painter(Memory(bank))
    model.codec, model.engine = Ids(), Lengths(Ids())
    outcome = entities.likelihood(model, documents, 0)
    groups = [document.metadata["group"] for document in documents]
    for k in range(3):
        nats = np.array([0.1 * (1 + 2 * k * (g != "plain")) for g in groups])
        assert value(outcome, f"nats@{k}") == pytest.approx(nats.mean(), abs=1e-4)
        for group in set(groups):
            wanted = 0.1 * (1 + 2 * k * (group != "plain"))
            assert value(outcome, f"{group}@{k}") == pytest.approx(wanted, abs=1e-4)
        if k != 1:
            same = nats[:50].mean()
            assert value(outcome, f"nats@{k}_same") == pytest.approx(same, abs=1e-4)
    assert value(outcome, "nats@2_random") == pytest.approx(0.5, abs=1e-4)
    assert outcome.scores["nats@2_random"]["n"] == 50
    names = {d.metadata.get("entity", d.id) for d in documents}
    assert outcome.scores["nats@2"]["clusters"] == len(names) < len(documents)
    names = {d.metadata["entity"] for d in documents if d.metadata["group"] == "tail"}
    assert outcome.scores["tail@2"]["clusters"] == len(names)
    rows = entities._random(TINY, 50)
    assert len({tuple(d.id for d in row) for row in rows}) > 45
    alone = Painter()
    alone.codec, alone.engine = Ids(), Lengths(Ids())
    assert {
        key.split("@")[1] for key in entities.likelihood(alone, documents, 0).scores
    } == {"0"}


def test_same_name_never_gives_the_query(documents):
    queries = [d for d in documents if d.metadata["group"] != "plain"]
    queries += [
        d for d in world.documents(TINY, "new") if d.metadata["role"] == "query"
    ]
    for query, found in zip(queries, entities.same_name(TINY, queries), strict=True):
        assert len(found) == 2 and found[0].id != found[1].id
        for document in found:
            assert document.id != query.id
            assert document.metadata["entity"] == query.metadata["entity"]


class Codec:
    layout, image_tokens = LAYOUT, 2

    def ids(self, documents):
        rows = []
        for document in documents:
            text, image = document.segments
            text = LAYOUT.text_ids(list(text.text.encode()))
            codes = LAYOUT.image_ids(image.codes).reshape(-1)
            rows.append(np.concatenate([text, [LAYOUT.brk], codes]).astype(np.int32))
        return rows


def pair(text, *codes):
    return Document((Text(text), Image(array=None, codes=np.array([codes], np.int32))))


def test_loss_is_that_of_the_query_image_alone():
    query, near, far = pair("a", 1, 2), pair("bc", 3, 4), pair("d", 5, 6)
    rows, starts = entities.query_rows(Codec(), [query, query], [[near, far], []])
    a, b, c, d = (LAYOUT.text_ids([byte])[0] for byte in b"abcd")
    z = LAYOUT.image.start
    brk, eos = LAYOUT.brk, LAYOUT.eos
    before = [b, c, brk, z + 3, z + 4, brk, d, brk, z + 5, z + 6, brk]
    assert rows[0].tolist() == [eos, *before, a, brk, z + 1, z + 2]
    assert rows[1].tolist() == [eos, a, brk, z + 1, z + 2]
    config = DecoderConfig(
        vocab=LAYOUT.size, layers=1, width=16, heads=2, mlp=32, length=32
    )
    decoder = Decoder(config, nnx.Rngs(0))
    decoder.unembed[...] = np.random.default_rng(0).normal(size=(16, LAYOUT.size))
    engine = Engine(decoder, LAYOUT, Rules(), None, batch=4)
    nats = entities.nats_per_token(engine, rows, starts)
    whole = -np.array(engine.score(rows))
    head = -np.array(engine.score([row[:-2] for row in rows]))
    np.testing.assert_allclose(2 * nats, whole - head, rtol=1e-5)
    with pytest.raises(ValueError, match="as many starts"):
        engine.score(rows, [1])
