"""Prompts after retrieved documents: their form, what fits, and what is said."""

import types

import numpy as np
import pytest
from tiny_data import (
    GRID,
    LAYOUT,
    BlockTokenizer,
    ByteTokenizer,
    make_documents,
    tokenize,
)

from cm3leon_jax.api import CM3Leon
from cm3leon_jax.codec import Codec
from cm3leon_jax.data.documents import Document, Image, Text
from cm3leon_jax.data.infill import InfillConfig, draw, place_points
from cm3leon_jax.data.pipeline import build_sample
from cm3leon_jax.data.records import index_of
from cm3leon_jax.retrieval.recall import Found
from cm3leon_jax.sampling import prompts
from cm3leon_jax.sampling.engine import Engine
from cm3leon_jax.sampling.sampler import Sampler

EOS, BRK, S0 = LAYOUT.eos, LAYOUT.brk, LAYOUT.sentinels[0]
LIMIT, IMAGE_TOKENS = 110, 16
DOCUMENTS = make_documents(6)


class Words(ByteTokenizer):
    def decode(self, pieces):
        return bytes(pieces).decode()


class Pictures(BlockTokenizer):
    def decode(self, codes):
        return np.zeros((len(codes), 8, 8, 3), np.uint8)


CODEC = Codec(LAYOUT, Words(), Pictures())
IDS = CODEC.ids(DOCUMENTS)


def _joined(numbers):
    return [token for i in numbers for token in (*IDS[i].tolist(), BRK)]


def test_documents_stand_before_every_form_in_every_stream():
    pieces, codes = [104, 105], np.arange(16).reshape(GRID)
    cells = np.zeros(GRID, bool)
    cells[1:3, 1:3] = True
    for prompt in (
        prompts.text_to_image(LAYOUT, pieces, IMAGE_TOKENS, guided=True),
        prompts.caption(LAYOUT, codes, 8),
        prompts.region_infill(LAYOUT, codes, cells, pieces, guided=True),
    ):
        whole, count = prompts.after(prompt, IDS[:2], LAYOUT, 999)
        assert count == 2 and whole.scripts is prompt.scripts
        for before, ids in zip(prompt.streams, whole.streams, strict=True):
            assert ids.dtype == np.int32
            assert ids.tolist() == [EOS, *_joined([0, 1]), *before[1:].tolist()]
        same, count = prompts.after(prompt, [], LAYOUT, 999)
        assert count == 0
        for before, ids in zip(prompt.streams, same.streams, strict=True):
            np.testing.assert_array_equal(before, ids)
    prompt = prompts.text_to_image(LAYOUT, pieces, IMAGE_TOKENS, guided=True)
    text, nothing = prompts.after(prompt, IDS[:2], LAYOUT, 999)[0].streams
    assert text.tolist()[-4:] == [BRK, *LAYOUT.text_ids(pieces).tolist(), BRK]
    assert nothing.tolist() == [EOS, *_joined([0, 1]), S0, BRK]


def test_prompts_are_the_beginnings_of_samples_with_retrieved_documents():
    query, *found = tokenize_some(DOCUMENTS[:3])
    codes = LAYOUT.codes(query.tokens[slice(*query.bounds[1])]).reshape(GRID)
    pieces = LAYOUT.pieces(query.tokens[slice(*query.bounds[0])])
    hidden = InfillConfig(spans=0, segment=1, region=0, region_without_text=0)
    seen = set()
    for epoch in range(8):
        number = np.zeros(1, np.int64)
        options = {"epoch": epoch, "seed": 0}
        draws = draw(
            *(hidden, index_of([query], LAYOUT), number),
            **options, sentinels=12, capacity=None,
        )  # fmt: skip
        points = place_points(draws, number, **options)
        sample = build_sample(query, draws, 0, points[0], LAYOUT, found)
        start = 1 + sum(len(record.tokens) + 1 for record in found)
        if sample.tokens[start] == S0:  # its text is hidden
            form = prompts.caption(LAYOUT, codes, 20)
            guided = prompts.text_to_image(LAYOUT, pieces, IMAGE_TOKENS, guided=True)
            ids = [record.tokens for record in found]
            for stream in (
                prompts.after(form, ids, LAYOUT, 999)[0].streams[0],
                prompts.after(guided, ids, LAYOUT, 999)[0].streams[1],
            ):
                np.testing.assert_array_equal(stream, sample.tokens[: len(stream)])
            seen.add("caption")
    assert seen


def tokenize_some(documents):
    return tokenize(documents, 1)


def test_the_last_documents_go_whole_where_the_context_is_full():
    prompt = prompts.text_to_image(LAYOUT, [104], IMAGE_TOKENS, guided=True)
    need = len(prompt.streams[0]) + IMAGE_TOKENS
    sizes = [len(ids) + 1 for ids in IDS]
    for count in range(4):
        for spare in (0, sizes[count] - 1):
            limit = need + sum(sizes[:count]) + spare
            whole, fits = prompts.after(prompt, IDS, LAYOUT, limit)
            assert fits == count
            prompts.stack([whole], LAYOUT, limit)
            assert whole.streams[0].tolist()[1:-2] == _joined(range(count))
    # A prompt that does not fit by itself is refused later, by `stack`, not cut.
    whole, fits = prompts.after(prompt, IDS, LAYOUT, need - 1)
    assert fits == 0
    with pytest.raises(ValueError, match="shorten the text"):
        prompts.stack([whole], LAYOUT, need - 1)


class Asked:
    """A memory that notes its questions and finds the first documents."""

    def __init__(self, has=6, alike=0):
        self.has, self.alike, self.calls = has, alike, []

    def look(self, texts, images, k):
        self.calls.append((list(texts), [x is not None for x in images], k))
        return [Found(DOCUMENTS[: min(k, self.has)], self.alike) for _ in texts]


@pytest.fixture
def written(monkeypatch):
    """Streams of all prompts that a decoder would be given, call by call."""
    calls = []

    def write(self, wanted, samplers, seed, image_tokens, *, candidates, numbers):
        prompts.stack(wanted, self.layout, LIMIT)
        calls.append([[ids.tolist() for ids in p.streams] for p in wanted])
        text = [*LAYOUT.text_ids([104, 105]), LAYOUT.eoss]
        for prompt in wanted:
            codes = (prompt.scripts[0] == prompts.IMAGE).sum()
            image = LAYOUT.image_ids(np.zeros(codes, int))
            yield image if codes else np.array(text)

    monkeypatch.setattr(Engine, "write", write)
    return calls


def _model(memory=None):
    names = types.SimpleNamespace
    sampling = names(
        text_to_image=Sampler(guidance=2.0),
        caption=Sampler(),
        infill=Sampler(),
        text_candidates=1,
    )
    system = names(
        name="tiny",
        layout=LAYOUT,
        rules=None,
        sampling=sampling,
        decoder_config=names(length=LIMIT),
        image_tokenizer=names(model=names(image_size=8, grid=4)),
    )
    decoder = names(config=names(length=LIMIT))
    return CM3Leon(system, decoder, CODEC, memory=memory)


def test_text_to_image_with_documents_given_and_retrieved(written):
    model = _model(Asked())
    texts = ["a red", "blue"]
    model.text_to_image(texts)
    plain = written.pop()
    model.text_to_image(texts, retrieve=[DOCUMENTS[2:4], []])
    first, second = written.pop()
    assert second == plain[1]
    for before, ids in zip(plain[0], first, strict=True):
        assert ids == [EOS, *_joined([2, 3]), *before[1:]]
    assert first[1][-2:] == [S0, BRK]  # guidance keeps the documents
    assert not model.memory.calls
    model.text_to_image(texts, retrieve=1)
    assert model.memory.calls == [(texts, [False, False], 1)]
    for ids in written.pop():
        assert ids[0][: 1 + len(_joined([0]))] == [EOS, *_joined([0])]
    assert not model.context.fallbacks


def test_caption_with_documents_given_and_retrieved(written):
    model = _model(Asked())
    pictures = [DOCUMENTS[4].segments[1].array, DOCUMENTS[5].segments[1].array]
    assert model.caption(pictures, retrieve=2) == ["hi", "hi"]
    assert model.memory.calls == [([None, None], [True, True], 2)]
    for i, (ids,) in enumerate(written.pop(), 4):
        form = prompts.caption(LAYOUT, CODEC.image.encode(pictures)[i - 4], 1)
        assert ids == [EOS, *_joined([0, 1]), *form.streams[0][1:].tolist()]
    # Captions get shorter before documents are dropped, but not too short.
    model.caption(pictures, retrieve=[DOCUMENTS[:2], DOCUMENTS[:3]])
    assert model.context.fallbacks["dropped"] in (0, 1)


def test_infilling_with_documents_given_and_retrieved(written):
    model = _model(Asked())
    picture, mask = DOCUMENTS[4].segments[1].array, np.zeros((8, 8), bool)
    mask[:4, :4] = True
    guided = Sampler(guidance=3.0)
    model.infill([picture], [mask], ["a red"], sampler=guided)
    plain = written.pop()[0]
    model.infill([picture], [mask], ["a red"], sampler=guided, retrieve=1)
    assert model.memory.calls == [(["a red"], [True], 1)]
    for before, ids in zip(plain, written.pop()[0], strict=True):
        assert ids == [EOS, *_joined([0]), *before[1:]]
    assert plain[1][1] == S0  # guidance hides the text, not the documents
    model.infill([picture], [(0, 0, 4, 4)], retrieve=[DOCUMENTS[:1]])
    (bare,) = written.pop()[0]
    assert bare == [EOS, *_joined([0]), *plain[1][1:]]
    # A document asks by its text, without the hole, and by its picture.
    model.memory.calls.clear()
    hole = Document((Text("x<mask>y"), Image(picture)))
    (filled,) = model.infill([hole], retrieve=2)
    assert model.memory.calls == [(["x y"], [True], 2)]
    assert filled.segments[0].text == "xhiy" and filled.metadata == {}
    (ids,) = written.pop()[0]
    assert ids[: 1 + len(_joined([0, 1]))] == [EOS, *_joined([0, 1])]
    assert ids[1 + len(_joined([0, 1]))] == LAYOUT.text_ids(list(b"x"))[0]


def test_generation_and_likelihood_with_documents(written, monkeypatch):
    model = _model(Asked())
    begun = [Document((Text("ab"),)), Document((Text("c"), DOCUMENTS[1].segments[1]))]
    own = CODEC.ids(begun)
    model.generate(begun, retrieve=1)
    assert model.memory.calls == [(["ab", "c"], [False, True], 1)]
    for (ids,), mine in zip(written.pop(), own, strict=True):
        assert ids == [EOS, *_joined([0]), *mine.tolist()]
    assert not model.context.fallbacks
    # An empty document has nothing to ask by, but can be given documents.
    model.generate([Document(())], retrieve=[DOCUMENTS[:1]])
    assert written.pop() == [[[EOS, *_joined([0])]]]
    scored = []
    monkeypatch.setattr(
        Engine, "score", lambda self, *given: scored.append(given) or [-1.0] * 2
    )
    model.log_likelihood(begun)
    rows, starts = scored.pop()
    assert starts == [1, 1]
    assert [r.tolist() for r in rows] == [[EOS, *ids.tolist(), EOS] for ids in own]
    model.log_likelihood(begun, retrieve=[DOCUMENTS[:2], []])
    rows, starts = scored.pop()
    before = [EOS, *_joined([0, 1])]
    assert starts == [len(before), 1]
    assert rows[0].tolist() == [*before, *own[0].tolist(), EOS]


def test_the_likeliest_of_several_texts_is_taken(monkeypatch):
    def write(self, wanted, samplers, seed, image_tokens, *, candidates, numbers):
        for i in range(len(wanted) * candidates):
            yield np.array([*LAYOUT.text_ids([97 + i]), LAYOUT.eoss])

    def score(self, rows, starts):
        scored.append((rows, starts))
        return [-3.0, -1.0, -2.0, -1.0, -4.0, -0.5][: len(rows)]

    scored: list = []
    monkeypatch.setattr(Engine, "write", write)
    monkeypatch.setattr(Engine, "score", score)
    model = _model()
    pictures = [DOCUMENTS[4].segments[1].array, DOCUMENTS[5].segments[1].array]
    found = model.caption(pictures, candidates=3, retrieve=[DOCUMENTS[:1], []])
    assert found == ["b", "f"]
    codes = CODEC.image.encode(pictures)
    for i, (row, start) in enumerate(zip(*scored.pop(), strict=True)):
        before = [EOS, *_joined([0] if i < 3 else [])]
        text, image = LAYOUT.text_ids([97 + i]), LAYOUT.image_ids(codes[i // 3]).ravel()
        assert row.tolist() == [*before, *text, BRK, *image, EOS]
        assert start == len(before)
    hole = Document((Text("x<mask>y"),))
    assert model.infill([hole], candidates=3)[0].segments[0].text == "xby"
    (row, *_), (start, *_) = scored.pop()
    assert row.tolist() == [EOS, *LAYOUT.text_ids(list(b"xay")), EOS] and start == 1
    # A greedy sampler would write the same thing three times.
    greedy = Sampler(temperature=0.0)
    assert model.caption(pictures, candidates=3, sampler=greedy) == ["a", "b"]
    with pytest.raises(ValueError, match="candidates=0"):
        model.caption(pictures, candidates=0)
    assert not scored


def test_fewer_documents_are_counted_and_said(written, caplog):
    model = _model(Asked(has=1))
    model.text_to_image(["a", "b"], retrieve=3)
    assert model.context.fallbacks == {"missing": 4}
    assert "2 of 2 prompts go on with fewer documents (missing: 4)" in caplog.text
    written.clear()
    model.text_to_image(["a"], retrieve=[DOCUMENTS])
    ids = written.pop()[0][0]
    kept = sum(ids.count(token) for token in (BRK,)) // 2
    assert model.context.fallbacks["dropped"] == len(DOCUMENTS) - kept > 0
    assert ids[: 1 + len(_joined(range(kept)))] == [EOS, *_joined(range(kept))]
    model.memory = Asked(has=0)
    assert model.retrieve(text="a") == []
    assert model.context.fallbacks["missing"] == 6
    model.context.fallbacks.clear()
    model.memory = Asked(has=2, alike=1)
    assert len(model.retrieve(text="a", k=4)) == 2
    assert model.context.fallbacks == {"alike": 1, "missing": 1}


@pytest.mark.parametrize(
    "ask, message",
    [
        (lambda m: m.text_to_image(["a"], retrieve=-1), "retrieve=-1"),
        (lambda m: m.text_to_image(["a"], retrieve=2), "no memory to retrieve from"),
        (lambda m: m.text_to_image(["a"], retrieve=[[], []]), "2 lists of documents"),
        (
            lambda m: m.text_to_image(["a"], retrieve=[["b"]]),
            r"retrieve\[0\]\[0\] is s",
        ),
        (lambda m: m.caption([], retrieve=1), "at least one entry"),
        (lambda m: m.retrieve(text="a"), "no memory"),
        (lambda m: m.retrieve(text="a", k=2.0), "k=2.0 must be a whole number"),
        (lambda m: m.retrieve(text="a", k=True), "k=True must be a whole number"),
        (lambda m: m.retrieve(text="a", k=0), "k=0 must be a whole number"),
        (lambda m: m.retrieve(text="a", k=[[]]), "must be a whole number"),
        (lambda m: m.retrieve(text=["a", "b"]), "text is list, not one text"),
        (lambda m: m.generate([Document(())], retrieve=1), "no memory"),
        (lambda m: m.log_likelihood([DOCUMENTS[0]], retrieve=1), "no memory"),
    ],
)
def test_bad_input_is_named(ask, message):
    with pytest.raises(ValueError, match=message):
        ask(_model())
