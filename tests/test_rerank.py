"""The best of several candidates: scores by hand in float64, and their order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax import vocab
from cm3leon_jax.models.decoder import DecoderConfig, abstract
from cm3leon_jax.parallel.rules import Rules
from cm3leon_jax.retrieval.embed import Embedder
from cm3leon_jax.sampling import prompts as forms
from cm3leon_jax.sampling import rerank
from cm3leon_jax.sampling.engine import Engine
from cm3leon_jax.sampling.rerank import Ranked, Rerank

LAYOUT = vocab.build(text=24, image=32, classes=4, sentinels=8, total=128)
CONFIG = DecoderConfig(vocab=128, layers=1, width=16, heads=2, mlp=32, length=24)
RNG = np.random.default_rng(3)
CODES = np.arange(6).reshape(2, 3)
CELLS = np.asarray([[True, True, False], [False, True, False]])


@pytest.fixture(scope="module")
def engine():
    decoder = jax.tree.map(
        lambda w: jnp.asarray(RNG.normal(0.0, 0.5, w.shape), w.dtype), abstract(CONFIG)
    )
    return Engine(decoder, LAYOUT, Rules(), None, 8)


@pytest.fixture(scope="module")
def forward(engine):
    """log p of every next id, float64: [L, V] for ids [L]."""
    run = jax.jit(lambda tokens_BL: engine.decoder(tokens_BL))

    def log_p(ids):
        padded = np.zeros((1, CONFIG.length), np.int32)
        padded[0, : len(ids)] = ids
        logits_LV = np.float64(run(padded)[0])
        top_L1 = logits_LV.max(-1, keepdims=True)
        total_L1 = np.log(np.exp(logits_LV - top_L1).sum(-1, keepdims=True)) + top_L1
        return logits_LV - total_L1

    return log_p


def by_hand(forward, ids, numbers):
    """log p of the ids at these numbers."""
    log_p_LV = forward(ids)
    return sum(log_p_LV[n - 1, ids[n]] for n in numbers)


def test_gain_of_whole_pictures(engine, forward):
    texts = [[1, 2, 3], [4], [5, 6]]
    prompts = [forms.text_to_image(LAYOUT, text, 6, guided=True) for text in texts]
    images = LAYOUT.image_ids(RNG.integers(0, 32, (3, 6)))
    written = np.pad(images, ((0, 0), (0, 2)))  # as the loop does
    found = rerank.gain(engine, prompts, list(written))
    for n, text in enumerate(texts):
        full = [LAYOUT.eos, *LAYOUT.text_ids(text), LAYOUT.brk, *images[n]]
        bare = [LAYOUT.eos, LAYOUT.sentinels[0], LAYOUT.brk, *images[n]]
        one = by_hand(forward, full, range(len(full) - 6, len(full)))
        other = by_hand(forward, bare, range(3, 9))
        assert found[n] == pytest.approx(one - other, abs=1e-4)


def test_what_a_script_forces_does_not_count(engine, forward):
    prompt = forms.region_infill(LAYOUT, CODES, CELLS, [7, 8], guided=True)
    a, b, c = LAYOUT.image_ids(np.array([9, 10, 11]))
    image = LAYOUT.image_ids(CODES).ravel()
    s0, s1, s2, *_ = LAYOUT.sentinels
    end = LAYOUT.eoss
    written = np.array([s0, a, b, end, s1, c, end, LAYOUT.pad])
    (found,) = rerank.gain(engine, [prompt], [written])
    text = LAYOUT.text_ids([7, 8])
    head = [LAYOUT.eos, *text, LAYOUT.brk, s0, image[2], image[3], s1, image[5]]
    full = [*head, s0, a, b, end, s1, c, end]
    at = len(head)
    one = by_hand(forward, full, [at + 1, at + 2, at + 5])
    # Without the text sentinels are numbered from the text on.
    head = [LAYOUT.eos, s0, LAYOUT.brk, s1, image[2], image[3], s2, image[5]]
    bare = [*head, s1, a, b, end, s2, c, end]
    at = len(head)
    other = by_hand(forward, bare, [at + 1, at + 2, at + 5])
    assert found == pytest.approx(one - other, abs=1e-4)


def test_gain_needs_something_to_compare_with(engine):
    prompts = [forms.text_to_image(LAYOUT, [1], 6, guided=g) for g in (True, False)]
    with pytest.raises(ValueError, match="rerank.gain .* prompt 1 has none"):
        rerank.gain(engine, prompts, [LAYOUT.image_ids(np.arange(6))] * 2)


def test_likelihood_of_a_text_as_caption(engine, forward):
    pieces = [np.array([1, 2]), np.array([3, 4, 5])]
    prompts = [forms.caption(LAYOUT, CODES + n, len(pieces[n])) for n in range(2)]
    found = rerank.likelihood(engine, prompts, pieces)
    for n, text in enumerate(pieces):
        s0, image = LAYOUT.sentinels[0], LAYOUT.image_ids(CODES + n).ravel()
        head = [LAYOUT.eos, s0, LAYOUT.brk, *image, s0]
        ids = [*head, *LAYOUT.text_ids(text), LAYOUT.eoss]
        wanted = by_hand(forward, ids, range(len(head), len(ids)))
        assert found[n] == pytest.approx(wanted, abs=1e-4)


def test_similarity_is_the_cosine():
    def texts(strings):
        return np.array([[len(s), 1.0, 0.0] for s in strings])

    def images(images_BYXC):
        return images_BYXC.reshape(len(images_BYXC), -1)[:, :3].astype(float)

    embedder = Embedder(name="x", size=3, image_size=2, texts=texts, images=images)
    pictures = RNG.integers(1, 255, (6, 2, 2, 3), dtype=np.uint8)
    found = rerank.similarity(embedder, ["a", "abc"], pictures)
    for p, text in enumerate([[1.0, 1.0, 0.0], [3.0, 1.0, 0.0]]):
        for c in range(3):
            image = np.float64(pictures[3 * p + c, 0, 0])
            cosine = image @ text / np.linalg.norm(image) / np.linalg.norm(text)
            assert found[p, c] == pytest.approx(cosine, abs=1e-6)


PARTS = {
    "similarity": np.array([[0.1, 0.3, 0.2], [0.5, 0.5, 0.5]]),
    "gain": np.array([[9.0, 1.0, 2.0], [-3.0, -1.0, -1.0]]),
}


@pytest.mark.parametrize(
    "weights, wanted",
    [
        (Rerank(similarity=1.0), [[1, 2, 0], [0, 1, 2]]),
        (Rerank(gain=2.0), [[0, 2, 1], [1, 2, 0]]),
        (Rerank(similarity=10.0, gain=0.1), [[1, 2, 0], [1, 2, 0]]),
        (Rerank(similarity=10.0, gain=0.5), [[0, 1, 2], [1, 2, 0]]),
    ],
)
def test_candidates_are_ordered_by_the_weighted_sum(weights, wanted):
    number_PC, score_PC = rerank.order(weights, PARTS)
    np.testing.assert_array_equal(number_PC, wanted)
    total_PC = weights.similarity * PARTS["similarity"] + weights.gain * PARTS["gain"]
    np.testing.assert_allclose(score_PC, total_PC)


def test_everything_is_in_the_order_of_the_ranks():
    weights = Rerank(similarity=10.0, gain=0.1)
    number_PC, score_PC = rerank.order(weights, PARTS)
    parts = {name: x[0] for name, x in PARTS.items()}
    made = rerank.ranked("abc", number_PC[0], score_PC[0], parts)
    assert isinstance(made, Ranked) and made.outputs == ("b", "c", "a")
    assert made.numbers == (1, 2, 0)
    assert made.scores == pytest.approx((3.1, 2.2, 1.9))
    assert made.parts == {"similarity": (0.3, 0.2, 0.1), "gain": (1.0, 2.0, 9.0)}


def test_weights_are_validated():
    assert Rerank(gain=1.0).parts == {"gain": 1.0}
    with pytest.raises(ValueError, match="rerank.gain=-1.0 must be >= 0"):
        Rerank(gain=-1.0)
    with pytest.raises(ValueError, match="rerank.similarity=nan must be >= 0"):
        Rerank(similarity=float("nan"))
    with pytest.raises(ValueError, match="rerank.likelihood are all 0: at least one"):
        Rerank()
