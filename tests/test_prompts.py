"""Prompts are the beginnings of training samples, and scripts what follows in them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cm3leon_jax import vocab
from cm3leon_jax.data.infill import infill
from cm3leon_jax.sampling.prompts import (
    FREE,
    IMAGE,
    TEXT,
    bucket,
    caption,
    coarse,
    codes,
    fill,
    free,
    region_infill,
    stack,
    text_infill,
    text_to_image,
    texts,
)
from cm3leon_jax.tokenizers import regions

LAYOUT = vocab.build(text=20, image=16, classes=2, sentinels=12)
EOS, BRK, EOSS, S0 = LAYOUT.eos, LAYOUT.brk, LAYOUT.eoss, LAYOUT.sentinels[0]
CODES = np.arange(16).reshape(4, 4)
PIECES = [3, 1, 4]


def sample(pieces, codes_YX):
    """`<eos> text <break> image <eos>`, and where text and image begin."""
    text, image = LAYOUT.text_ids(pieces), LAYOUT.image_ids(codes_YX).reshape(-1)
    return np.concatenate([[EOS], text, [BRK], image, [EOS]]), 1, len(text) + 2


def follows(tokens, script):
    """Whether a script allows exactly these tokens; runs of TEXT may be cut short."""
    tokens, at = list(tokens), 0
    for i, code in enumerate(script):
        if code == TEXT and i and script[i - 1] == TEXT and tokens[at - 1] == EOSS:
            continue
        token = tokens[at] if at < len(tokens) else None
        good = {
            IMAGE: token in LAYOUT.image,
            TEXT: token in LAYOUT.text or token == EOSS,
        }.get(code, token == code)
        if not good:
            return False
        at += 1
    return at == len(tokens)


def test_text_to_image_begins_a_causal_sample():
    tokens, _, image = sample(PIECES, CODES)
    prompt = text_to_image(LAYOUT, PIECES, 16, guided=True)
    np.testing.assert_array_equal(prompt.streams[0], tokens[:image])
    assert follows(tokens[image:-1], prompt.scripts[0])
    # The unconditional stream: the same sample with its text moved away.
    hidden = infill(tokens, [(1, 4)], LAYOUT)
    np.testing.assert_array_equal(prompt.streams[1], hidden[:3])
    assert list(prompt.streams[1]) == [EOS, S0, BRK]
    assert len(text_to_image(LAYOUT, PIECES, 16).streams) == 1


def test_caption_begins_a_sample_whose_text_is_moved():
    tokens, *_ = sample(PIECES, CODES)
    moved = infill(tokens, [(1, 4)], LAYOUT)
    prompt = caption(LAYOUT, CODES, 5)
    cut = len(prompt.streams[0])
    np.testing.assert_array_equal(prompt.streams[0], moved[:cut])
    assert moved[cut - 1] == S0
    assert list(prompt.scripts[0]) == [TEXT] * 6  # five pieces and <eoss>
    assert follows(moved[cut:-1], prompt.scripts[0])


def test_text_infill_with_two_holes():
    tokens, *_ = sample([3, 1, 4, 1, 5], CODES)
    moved = infill(tokens, [(1, 3), (4, 6)], LAYOUT)
    parts = [None, tokens[3:4], None, tokens[6:-1]]
    prompt = text_infill(LAYOUT, parts, 3)
    cut = len(prompt.streams[0])
    np.testing.assert_array_equal(prompt.streams[0], moved[:cut])
    assert list(prompt.scripts[0]) == [TEXT] * 4 + [S0 + 1] + [TEXT] * 4
    assert follows(moved[cut:-1], prompt.scripts[0])


@st.composite
def cells(draw):
    bits = draw(st.lists(st.booleans(), min_size=16, max_size=16).filter(any))
    return np.asarray(bits).reshape(4, 4)


@given(cells())
def test_region_infill_begins_a_region_sample(cells_YX):
    tokens, text, image = sample(PIECES, CODES)
    spans = [(a + image, b + image) for a, b in regions.runs(cells_YX)]
    prompt = region_infill(LAYOUT, CODES, cells_YX, PIECES, guided=True)
    with_text = infill(tokens, spans, LAYOUT)
    order = [*range(1, len(spans) + 1), 0]  # the regions first, the text last
    without = infill(tokens, [(text, text + 3), *spans], LAYOUT, order)
    for ids, script, whole in zip(
        prompt.streams, prompt.scripts, (with_text, without), strict=True
    ):
        np.testing.assert_array_equal(ids, whole[: len(ids)])
        written = whole[len(ids) : len(ids) + len(script)]
        assert follows(written, script)
    assert len(with_text) == len(prompt.streams[0]) + len(prompt.scripts[0]) + 1
    alone = region_infill(LAYOUT, CODES, cells_YX)
    np.testing.assert_array_equal(alone.streams[0], prompt.streams[1])
    # What is written goes back where it was hidden; the rest is copied.
    written = with_text[len(prompt.streams[0]) :]
    blanked = np.where(cells_YX, 0, CODES)
    np.testing.assert_array_equal(fill(blanked, cells_YX, written, LAYOUT), CODES)


def test_written_tokens_are_read_back():
    tokens = [*LAYOUT.text_ids([1, 2]), EOSS, 0, 0, S0 + 1, *LAYOUT.text_ids([7]), EOSS]
    first, second = texts(np.asarray(tokens), LAYOUT)
    assert (list(first), list(second)) == ([1, 2], [7])
    tokens = np.asarray([S0, *LAYOUT.image_ids([5, 6]), EOSS, 0])
    assert list(codes(tokens, LAYOUT)) == [5, 6]


def test_buckets_grow_by_half_at_most():
    sizes = [bucket(n) for n in range(1, 3000)]
    assert sizes == sorted(sizes) and all(s >= n for n, s in enumerate(sizes, 1))
    assert all(s <= 1.5 * n for n, s in enumerate(sizes, 1) if n > 8)
    assert sorted(set(sizes))[:7] == [8, 12, 16, 24, 32, 48, 64]
    assert bucket(1024) == 1024
    assert all(coarse(n) >= bucket(n) and coarse(n) < 2 * n for n in range(8, 3000))
    assert sorted({coarse(n) for n in range(1, 500)}) == [
        *(8, 16, 32, 64, 96, 128, 192, 256, 384, 512)
    ]


def test_stacking_pads_on_the_right_and_buckets():
    prompts = [text_to_image(LAYOUT, [1] * n, 16, guided=True) for n in (1, 9)]
    batch = stack(prompts, LAYOUT, 64)
    # The last token of a prompt is read by the first step; the stream without text is
    # the same for both and comes once.
    assert [p.shape for p in batch.prefix_UL] == [(2, 16), (1, 8)]
    np.testing.assert_array_equal(batch.length_U[0], [2, 10])
    np.testing.assert_array_equal(batch.length_U[1], [2])
    np.testing.assert_array_equal(
        batch.prefix_UL[0][1, :10], prompts[1].streams[0][:-1]
    )
    assert [last.tolist() for last in batch.last_U] == [[LAYOUT.brk] * 2, [LAYOUT.brk]]
    assert (batch.prefix_UL[0][0, 2:] == LAYOUT.pad).all()
    assert batch.script_GBT.shape == (2, 2, 16)
    # A bucket never passes the end of the decoder's positions.
    assert stack([free([EOS] * 10, 1)], LAYOUT, 11).prefix_UL[0].shape[-1] == 10


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: stack([], LAYOUT, 64), "at least one"),
        (
            lambda: stack([free([EOS], 8), free([EOS], 64)], LAYOUT, 64),
            "prompt 1 has 1 tokens and 64 to come, but the context holds 64",
        ),
        (
            lambda: stack(
                [text_to_image(LAYOUT, [1], 4, guided=g) for g in (True, False)],
                LAYOUT,
                64,
            ),
            "with and without guidance",
        ),
        (lambda: text_infill(LAYOUT, [[EOS]], 4), "no hole"),
        (lambda: caption(LAYOUT, CODES, 0), "max_text=0"),
        (lambda: text_infill(LAYOUT, [None] * 13, 4), "13 spans need as many sentin"),
        (lambda: region_infill(LAYOUT, CODES, CODES < 0), "hides no cell"),
        (lambda: region_infill(LAYOUT, CODES, CODES[:2] < 1), r"bool \[4, 4\]"),
        (
            lambda: region_infill(LAYOUT, CODES, CODES < 3, guided=True),
            "guidance needs a text",
        ),
        (lambda: text_to_image(LAYOUT, [20], 4), "text piece 20 is outside"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_free_scripts():
    assert list(free([EOS, 30], 3).scripts[0]) == [FREE] * 3
