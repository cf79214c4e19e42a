"""Sampling: the loop against a plain one, its invariants."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax import vocab
from cm3leon_jax.models.decoder import DecoderConfig, abstract
from cm3leon_jax.parallel.mesh import MeshConfig, make_mesh
from cm3leon_jax.parallel.rules import Rules, shard_fn, shardings
from cm3leon_jax.sampling import generate as loop
from cm3leon_jax.sampling import prompts
from cm3leon_jax.sampling.generate import generate
from cm3leon_jax.sampling.sampler import Sampler

LAYOUT = vocab.build(text=24, image=32, classes=4, sentinels=8, total=128)
CONFIG = DecoderConfig(vocab=128, layers=2, width=16, heads=2, mlp=32, length=96)
IMAGE_TOKENS = 6
GREEDY = Sampler(temperature=0.0)
PLAIN = Sampler()
HOT = Sampler(temperature=30.0)  # nearly uniform: every branch is taken somewhere
KEY = jax.random.key(7)
CODES = np.arange(6).reshape(2, 3)
CELLS = np.asarray([[True, True, False], [False, True, False]])


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(3)
    return jax.tree.map(
        lambda w: jnp.asarray(rng.normal(0.0, 0.5, w.shape), w.dtype), abstract(CONFIG)
    )


def text_prompts(*lengths, guided=True):
    return [
        prompts.text_to_image(LAYOUT, [n % 24] * n, IMAGE_TOKENS, guided=guided)
        for n in lengths
    ]


def sample(model, requests, sampler=PLAIN, key=KEY, **kwargs):
    batch = prompts.stack(requests, LAYOUT, CONFIG.length)
    kwargs = dict(image_tokens=IMAGE_TOKENS) | kwargs
    return np.asarray(generate(model, batch, key, sampler, LAYOUT, **kwargs))


# The loop

forward = jax.jit(lambda model, tokens_BL: model(tokens_BL))


def plainly(model, request, scale):
    """Greedy generation of one prompt by full forward passes, a token at a time."""
    rows, written = [list(ids) for ids in request.streams], []
    for t in range(len(request.scripts[0])):
        logits = []
        for row in rows:
            padded = np.zeros(64, int)
            padded[: len(row)] = row
            logits.append(np.asarray(forward(model, padded[None])[0, len(row) - 1]))
        guided = logits[0]
        if len(rows) == 2:
            guided = logits[1] + scale * (logits[0] - logits[1])
        code = request.scripts[0][t]
        last = t + 1 == len(request.scripts[0]) or request.scripts[0][t + 1] != code
        if code == prompts.TEXT and written and written[-1] == LAYOUT.eoss:
            break  # one run only in these tests
        allowed = {
            prompts.IMAGE: [*LAYOUT.image],
            prompts.TEXT: [LAYOUT.eoss] if last else [*LAYOUT.text, LAYOUT.eoss],
        }.get(int(code))
        for g, row in enumerate(rows):
            forced = request.scripts[g][t]
            token = forced if forced >= 0 else max(allowed, key=lambda i: guided[i])
            row.append(int(token))
        written.append(rows[0][-1])
    return written


def requests():
    region = dict(codes_YX=CODES, cells_YX=CELLS)
    return {
        "text_to_image": text_prompts(2, 9, 5, 1, 3, 3, 8, 4),
        "caption": [prompts.caption(LAYOUT, CODES + n, 7) for n in range(8)],
        "region": [
            prompts.region_infill(LAYOUT, pieces=[1] * n, guided=True, **region)
            for n in range(1, 9)
        ],
    }


@pytest.mark.parametrize(
    "task, devices",
    [
        ("text_to_image", 1),
        ("caption", 1),
        ("region", 1),
        ("caption", 8),
        ("region", 8),
    ],
)
def test_greedy_generation_equals_full_forward_passes(model, task, devices):
    shard, scale = loop.identity, 1.0
    if devices == 8:
        mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
        shard = shard_fn(mesh, Rules())
        model = jax.device_put(model, shardings(abstract(CONFIG), mesh, Rules()))
    if task != "caption":
        scale = 2.5
    sampler = dataclasses.replace(GREEDY, guidance=scale)
    tokens_BT = sample(model, requests()[task], sampler, shard=shard)
    single = jax.device_get(model)
    # Every fourth prompt: the plain loop is slow.
    for row, request in list(zip(tokens_BT, requests()[task], strict=True))[::4]:
        expected = plainly(single, request, scale)
        np.testing.assert_array_equal(row[: len(expected)], expected)
        assert (row[len(expected) :] == LAYOUT.pad).all()


def test_guidance_one_is_the_conditional_stream(model):
    alone = sample(model, text_prompts(2, 9, guided=False))
    np.testing.assert_array_equal(sample(model, text_prompts(2, 9)), alone)
    strong = sample(model, text_prompts(2, 9), Sampler(guidance=4.0))
    assert (strong != alone).any()


def test_a_prompt_does_not_depend_on_its_neighbours(model):
    index = np.asarray([10, 11, 12])
    how = [Sampler(), Sampler(top_p=0.8), Sampler(temperature=0.7)]
    one = sample(model, text_prompts(2, 5, 4), how, index_B=index)
    for order in ([2, 0, 1], [1, 1, 0]):
        requests = [text_prompts(2, 5, 4)[i] for i in order]
        other = sample(model, requests, [how[i] for i in order], index_B=index[order])
        np.testing.assert_array_equal(other, one[order])
    # Longer neighbours (another bucket) change nothing either, other noise does.
    padded = sample(model, text_prompts(2, 20, 30), how, index_B=index)
    np.testing.assert_array_equal(padded[0], one[0])
    assert (sample(model, text_prompts(2, 2, 2), how[0])[0] != one[0]).any()
    assert (sample(model, text_prompts(2, 5, 4), how, jax.random.key(8)) != one).any()
    same = sample(model, text_prompts(2, 2, 2), index_B=np.asarray([1, 1, 2]))
    assert (same[0] == same[1]).all() and (same[1] != same[2]).any()


def test_text_to_image_writes_codes_only(model):
    tokens_BT = sample(model, text_prompts(1, 2, 3, 4))
    codes_BT = LAYOUT.codes(tokens_BT[:, :IMAGE_TOKENS])
    assert codes_BT.shape == (4, IMAGE_TOKENS)
    assert (tokens_BT[:, IMAGE_TOKENS:] == LAYOUT.pad).all()


def test_text_runs_end_with_eoss_and_padding(model):
    parts = [None, LAYOUT.text_ids([1, 2]), None, [LAYOUT.brk], LAYOUT.image_ids(CODES)]
    parts[-1] = parts[-1].reshape(-1)
    tokens_BT = sample(model, [prompts.text_infill(LAYOUT, parts, 5)] * 40, HOT)
    lengths = set()
    for row in tokens_BT:
        assert row[6] == LAYOUT.sentinels[1]
        for run in (row[:6], row[7:13]):
            (end,) = np.flatnonzero(run == LAYOUT.eoss)
            assert all(token in LAYOUT.text for token in run[:end])
            assert (run[end + 1 :] == LAYOUT.pad).all()
            lengths.add(end)
        assert (row[13:] == LAYOUT.pad).all()
    assert {0, 5} <= lengths  # at once, and only because the run was full


def test_text_after_an_early_stop_reads_no_padding(model):
    """The second hole sees the first one's text, <eoss>, its sentinel; no <pad>."""
    parts = [None, LAYOUT.text_ids([1, 2]), None]
    first = prompts.text_infill(LAYOUT, parts, 9)
    rows = sample(model, [first] * 30, HOT)
    row = next(row for row in rows if (row[:10] == LAYOUT.pad).sum() > 3)
    # The same beginning as one prompt, and the second hole drawn greedily in both.
    stop = int(np.flatnonzero(row == LAYOUT.eoss)[0]) + 1
    begun = np.concatenate([first.streams[0], row[:stop], [LAYOUT.sentinels[1]]])
    run = np.full(10, prompts.TEXT)
    forced = np.concatenate(
        [row[:stop], np.zeros(10 - stop, int), [LAYOUT.sentinels[1]], run]
    )
    script = prompts.Prompt(first.streams, (forced,))
    direct = prompts.Prompt((begun,), (run,))
    a, b = sample(model, [script], GREEDY)[0], sample(model, [direct], GREEDY)[0]
    np.testing.assert_array_equal(a[11:21], b[:10])


def test_padding_in_a_script_is_skipped(model):
    (request,) = text_prompts(3)
    gaps = np.insert(request.scripts[0], [0, 0, 4], LAYOUT.pad)
    gapped = prompts.Prompt(request.streams, (gaps, gaps))
    a, b = sample(model, [gapped, request], Sampler(temperature=0, guidance=2.0))
    np.testing.assert_array_equal(np.delete(a[:9], [0, 1, 6]), b[:6])


def test_free_generation_keeps_images_whole(model):
    rng = np.random.default_rng(0)
    starts = [
        np.concatenate([[LAYOUT.eos], LAYOUT.text_ids(rng.integers(0, 24, n)), tail])
        for n in range(1, 33)
        for tail in ([LAYOUT.brk], [])
    ]
    budget, images, stops = 20, 0, 0
    tokens_BT = sample(model, [prompts.free(ids, budget) for ids in starts], HOT)
    for ids, row in zip(starts, tokens_BT, strict=True):
        row = row[:budget]
        if LAYOUT.eos in row:
            end = int(np.flatnonzero(row == LAYOUT.eos)[0])
            assert (row[end + 1 :] == LAYOUT.pad).all()
            row, stops = row[: end + 1], stops + 1
        assert LAYOUT.pad not in row
        previous, at = int(ids[-1]), 0
        while at < len(row):
            token = int(row[at])
            if token in LAYOUT.image:
                whole = row[at : at + IMAGE_TOKENS]
                assert previous == LAYOUT.brk and len(whole) == IMAGE_TOKENS
                assert all(code in LAYOUT.image for code in whole)
                previous, at, images = int(whole[-1]), at + IMAGE_TOKENS, images + 1
                continue
            assert token in LAYOUT.text or token in (LAYOUT.brk, LAYOUT.eos)
            if previous in LAYOUT.image:
                assert token in (LAYOUT.brk, LAYOUT.eos)
            if previous == LAYOUT.brk:
                assert token in LAYOUT.text
            previous, at = token, at + 1
    assert images > 10 and stops > 5


def test_an_image_that_does_not_fit_is_not_started(model):
    start = [LAYOUT.eos, *LAYOUT.text_ids([1]), LAYOUT.brk]
    for budget in (IMAGE_TOKENS - 1, IMAGE_TOKENS):
        tokens_BT = sample(model, [prompts.free(start, budget)] * 64, HOT)
        started = np.isin(tokens_BT, LAYOUT.image).any(axis=1)
        assert started.any() == (budget == IMAGE_TOKENS)


def test_nothing_ends_in_a_break(model):
    """After which a segment would have to come."""
    start = prompts.free([LAYOUT.eos, *LAYOUT.text_ids([1])], 1)
    tokens_BT = sample(model, [start] * 64, HOT)
    assert LAYOUT.brk not in tokens_BT[:, 0] and LAYOUT.eos in tokens_BT[:, 0]


def test_lengths_within_a_bucket_share_one_program(model):
    sample(model, text_prompts(2, 9))
    programs = loop._decode._cache_size()
    sample(model, text_prompts(7, 8), Sampler(temperature=0.3, guidance=2.0))
    sample(model, text_prompts(10, 3), GREEDY, jax.random.key(9))
    assert loop._decode._cache_size() == programs


def test_bad_input_is_named(model):
    with pytest.raises(ValueError, match="guidance=2.0 needs a prompt with an uncond"):
        sample(model, text_prompts(2, guided=False), Sampler(guidance=2.0))
    with pytest.raises(ValueError, match="1 candidates need as many samplers"):
        sample(model, text_prompts(2), [Sampler()] * 2)
    with pytest.raises(ValueError, match="image_tokens=0"):
        sample(model, text_prompts(2), image_tokens=0)
    other = vocab.build(text=24, image=32, classes=4, sentinels=8, total=256)
    batch = prompts.stack(text_prompts(2), other, CONFIG.length)
    with pytest.raises(ValueError, match="256 ids but the decoder 128"):
        generate(model, batch, KEY, GREEDY, other, image_tokens=6)
