"""Several pictures for a prompt, drawn by a real (untrained) decoder: splits, choices,
scores, and another model as amateur."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_api
from tiny_data import LAYOUT

from cm3leon_jax.codec import Codec
from cm3leon_jax.data.documents import Document, Text
from cm3leon_jax.models.decoder import DecoderConfig, abstract
from cm3leon_jax.parallel.rules import Rules
from cm3leon_jax.retrieval.embed import Embedder
from cm3leon_jax.sampling import prompts as forms
from cm3leon_jax.sampling.engine import Engine
from cm3leon_jax.sampling.rerank import Ranked, Rerank
from cm3leon_jax.sampling.sampler import ContrastiveTopK, Sampler

LENGTH = 48
GREEDY = Sampler(temperature=0.0)
GUIDED = Sampler(guidance=2.0)
CD_K = Sampler(contrastive=ContrastiveTopK(alpha=0.2, k=4, amateur_temperature=0.7))
TEXTS = ["ab", "xyz"]


class Pictures(tiny_api.Pictures):
    """Codes as grey levels, so that pictures tell what was drawn."""

    def decode(self, codes):
        grey = np.kron(codes, np.ones((2, 2))).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)


def decoder(seed, layers=1):
    config = DecoderConfig(
        vocab=LAYOUT.size, layers=layers, width=16, heads=2, mlp=32, length=LENGTH
    )
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda w: jnp.asarray(rng.normal(0.0, 0.4, w.shape), w.dtype), abstract(config)
    )


def darkest(text, level):
    """An embedder for which that text is like a picture of that grey level."""

    def images(images_BYXC):
        level_B = images_BYXC.reshape(len(images_BYXC), -1).mean(-1)
        near_B = np.exp(-np.abs(level_B - level) / 9)
        return np.stack([near_B, np.sqrt(1 - near_B**2)], -1)

    def texts(strings):
        return np.array([[float(s == text), float(s != text)] for s in strings])

    return Embedder(name="x", size=2, image_size=8, texts=texts, images=images)


@pytest.fixture(scope="module")
def model():
    made = tiny_api.model(LENGTH, decoder=decoder(0))
    made.system.sampling.rerank = Rerank(gain=1.0)
    made.codec = made.writer.codec = made.context.codec = Codec(
        LAYOUT, tiny_api.Words(), Pictures(), tiny_api.MASKS
    )
    return made


def codes_of(picture):
    return np.asarray(picture)[::2, ::2, 0]


def by_number(ranked):
    """The codes of the candidates in the order in which they were drawn."""
    return [codes_of(ranked.outputs[i]) for i in np.argsort(ranked.numbers)]


@pytest.fixture(scope="module")
def four(model):
    return model.text_to_image(TEXTS, sampler=GUIDED, candidates=4, return_scores=True)


def test_the_best_candidate_is_taken(model, four):
    assert all(isinstance(ranked, Ranked) for ranked in four)
    best = model.text_to_image(TEXTS, sampler=GUIDED, candidates=4)
    for picture, ranked in zip(best, four, strict=True):
        np.testing.assert_array_equal(picture, ranked.outputs[0])
        assert list(ranked.scores) == sorted(ranked.scores, reverse=True)
        assert sorted(ranked.numbers) == [0, 1, 2, 3]
        assert ranked.scores == ranked.parts["gain"]
        assert len({codes_of(p).tobytes() for p in ranked.outputs}) == 4


def test_scores_are_those_of_the_picture(model, four):
    engine = model.writer.engine
    for text, ranked in zip(TEXTS, four, strict=True):
        ids = LAYOUT.text_ids(list(text.encode()))
        image = LAYOUT.image_ids(codes_of(ranked.outputs[2])).ravel()
        full = np.array([LAYOUT.eos, *ids, LAYOUT.brk, *image])
        bare = np.array([LAYOUT.eos, LAYOUT.sentinels[0], LAYOUT.brk, *image])
        one, other = engine.score([full, bare], [len(full) - 16, len(bare) - 16])
        assert ranked.scores[2] == pytest.approx(one - other, abs=1e-3)


def test_fewer_candidates_are_the_first_of_more(model, four):
    two = model.text_to_image(TEXTS, sampler=GUIDED, candidates=2, return_scores=True)
    for few, many in zip(two, four, strict=True):
        for a, b in zip(by_number(few), by_number(many), strict=False):
            np.testing.assert_array_equal(a, b)


def test_samplers_share_the_candidates(model):
    (mixed,) = model.text_to_image(
        TEXTS[:1], sampler=(GREEDY, CD_K), candidates=4, return_scores=True
    )
    drawn = by_number(mixed)
    np.testing.assert_array_equal(drawn[0], drawn[2])
    assert (drawn[1] != drawn[3]).any() and (drawn[0] != drawn[1]).any()
    (alone,) = model.text_to_image(TEXTS[:1], sampler=GREEDY)
    np.testing.assert_array_equal(drawn[0], codes_of(alone))


@pytest.mark.parametrize("given", [False, True])
def test_other_scores_choose_others(model, given):
    """By the memory's encoder, or one that is given to a system without a memory."""
    options = dict(sampler=GUIDED, candidates=4, return_scores=True)
    weights = Rerank(similarity=10.0, likelihood=0.5)
    try:
        if given:
            model.context.encoder = darkest("ab", 20)
        else:
            model.memory = types.SimpleNamespace(embedder=darkest("ab", 20))
        found = model.text_to_image(TEXTS, rerank=weights, **options)
    finally:
        model.memory = model.context.encoder = None
    for text, ranked in zip(TEXTS, found, strict=True):
        cosines, nats = ranked.parts["similarity"], ranked.parts["likelihood"]
        total = 10 * np.array(cosines) + 0.5 * np.array(nats)
        np.testing.assert_allclose(ranked.scores, total, rtol=1e-6)
        for picture, cosine, value in zip(ranked.outputs, cosines, nats, strict=True):
            near = np.exp(-abs(np.asarray(picture).mean() - 20) / 9)
            wanted = near if text == "ab" else np.sqrt(1 - near**2)
            assert cosine == pytest.approx(wanted, abs=1e-5)
            image = LAYOUT.image_ids(codes_of(picture)).ravel()
            s0 = LAYOUT.sentinels[0]
            head = [LAYOUT.eos, s0, LAYOUT.brk, *image, s0]
            ids = [*head, *LAYOUT.text_ids(list(text.encode())), LAYOUT.eoss]
            (nat,) = model.writer.engine.score([np.array(ids)], [len(head)])
            assert value == pytest.approx(nat, abs=1e-3)


def test_the_hidden_part_of_a_picture_has_candidates_too(model):
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    mask = np.zeros((8, 8), bool)
    mask[2:6, 2:5] = True
    options = dict(sampler=GUIDED, candidates=3, return_scores=True)
    (ranked,) = model.infill([picture], [mask], ["ab"], **options)
    hidden = np.kron([[0] * 4, [0, 1, 1, 0], [0, 1, 1, 0], [0] * 4], np.ones((2, 2)))
    seen = [np.asarray(p)[hidden == 0] for p in ranked.outputs]
    assert (seen[0] == seen[1]).all() and len({x.tobytes() for x in seen}) == 1
    assert len({np.asarray(p).tobytes() for p in ranked.outputs}) == 3
    message = "rerank.gain: nothing says what picture 0 is to show"
    with pytest.raises(ValueError, match=message):
        model.infill([picture], [mask], candidates=3)
    model.infill([picture], [mask])  # one needs no score


def test_captions_have_candidates_with_scores_too(model):
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    how = dict(max_text=5, candidates=3, sampler=CD_K)
    (ranked,) = model.caption([picture], return_scores=True, **how)
    assert sorted(ranked.numbers) == [0, 1, 2] and len(set(ranked.outputs)) == 3
    assert list(ranked.scores) == sorted(ranked.scores, reverse=True)
    assert model.caption([picture], **how) == [ranked.outputs[0]]


def test_free_generation_is_guided_away_from_a_document_of_nothing(monkeypatch):
    written = tiny_api.spy(monkeypatch)
    asked = tiny_api.model(LENGTH)
    begun = [Document((Text("hi"),))]
    for sampler, streams in ((None, 1), (GUIDED, 2), (CD_K, 2)):
        asked.generate(begun, max_text=8, sampler=sampler)
        (prompt,) = written[-1]
        assert len(prompt.streams) == streams
    start = [LAYOUT.eos, *LAYOUT.text_ids(list(b"hi"))]
    np.testing.assert_array_equal(prompt.streams[0], start)
    np.testing.assert_array_equal(prompt.streams[1], [LAYOUT.eos])
    np.testing.assert_array_equal(*prompt.scripts)


def test_another_model_is_the_amateur_and_reads_the_same_prompt():
    expert, amateur = decoder(0), decoder(1, layers=2)
    engine = Engine(expert, LAYOUT, Rules(), None, 4)
    prompt = forms.text_to_image(LAYOUT, list(b"ab"), 16)
    greedy = Sampler(temperature=0.0, contrastive=CD_K.contrastive)
    with pytest.raises(ValueError, match="contrastive needs .* smaller model"):
        list(engine.write([prompt], greedy, 0, 16))
    (alone,) = engine.write([prompt], GREEDY, 0, 16)
    engine.amateur = amateur
    np.testing.assert_array_equal([*engine.write([prompt], GREEDY, 0, 16)], [alone])
    (found,) = engine.write([prompt], greedy, 0, 16)
    forward = jax.jit(lambda model, tokens_BL: model(tokens_BL))
    ids = list(prompt.streams[0])
    for _ in range(16):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(ids)] = ids
        inside = slice(LAYOUT.image.start, LAYOUT.image.stop)
        logits = [
            np.float64(forward(each, padded))[0, len(ids) - 1, inside]
            for each in (expert, amateur)
        ]
        log_e, log_a = (
            x - np.log(np.exp(x).sum()) for x in (logits[0], logits[1] / 0.7)
        )
        kept = np.exp(log_e) >= 0.2 * np.sort(np.exp(log_e))[-4]
        score = np.where(kept, log_e - log_a, -np.inf)
        ids.append(LAYOUT.image.start + int(score.argmax()))
    np.testing.assert_array_equal(found[:16], ids[len(prompt.streams[0]) :])
    assert (found != alone).any()


def test_an_amateur_has_the_same_tokens(model):
    names = types.SimpleNamespace
    pictures = {"image_tokenizer": 0}
    systems = [
        names(name=n, layout=LAYOUT, stage_inputs={"text_tokenizer": t, **pictures})
        for n, t in (("a", 1), ("b", 1), ("c", 2))
    ]
    one, same, other = (
        names(system=s, engine=names(decoder=s.name, amateur=None)) for s in systems
    )
    contrast = type(model.writer).contrast
    contrast(one, same)
    assert one.engine.amateur == "b"
    with pytest.raises(ValueError, match="the amateur c has other tokens than a"):
        contrast(one, other)
    contrast(one, None)
    assert one.engine.amateur is None


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(candidates=0), "candidates=0 must be at least 1"),
        (dict(sampler=(GUIDED, CD_K)), "candidates=1 cannot be split among 2 samplers"),
        (dict(candidates=2.5), "candidates=2.5 must be at least 1, a whole number"),
        (dict(candidates="2"), "candidates='2' must be at least 1, a whole number"),
        (dict(sampler=()), "give at least one"),
        (dict(sampler="greedy"), "sampler='greedy' must be a Sampler or a tuple"),
        (dict(sampler=[GUIDED]), "must be a Sampler or a tuple"),
        (
            dict(candidates=2, rerank=Rerank(similarity=1.0)),
            "rerank.similarity needs an encoder",
        ),
    ],
)
def test_bad_input_is_named(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.text_to_image(TEXTS, **options)


def test_a_greedy_text_has_at_least_one_candidate_too(model):
    picture = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="candidates=-3 must be at least 1"):
        model.caption([picture], candidates=-3, sampler=GREEDY)
