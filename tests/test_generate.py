"""The engine: shared prefixes, candidates, meshes, buckets, what is read how often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax import vocab
from cm3leon_jax.models.decoder import DecoderConfig, abstract
from cm3leon_jax.parallel.mesh import MeshConfig, make_mesh
from cm3leon_jax.parallel.rules import Rules, shardings
from cm3leon_jax.sampling import engine as engines
from cm3leon_jax.sampling import generate as loop
from cm3leon_jax.sampling import prompts
from cm3leon_jax.sampling.engine import Engine, Precision
from cm3leon_jax.sampling.sampler import Sampler

LAYOUT = vocab.build(text=24, image=32, classes=4, sentinels=8, total=128)
CONFIG = DecoderConfig(vocab=128, layers=1, width=16, heads=2, mlp=32, length=64)
IMAGE_TOKENS = 6
GREEDY = Sampler(temperature=0.0, guidance=2.0)
GUIDED = Sampler(guidance=2.0)
RULES = Rules()


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(3)
    return jax.tree.map(
        lambda w: jnp.asarray(rng.normal(0.0, 0.5, w.shape), w.dtype), abstract(CONFIG)
    )


def texts(*lengths):
    return [
        prompts.text_to_image(LAYOUT, [n % 24] * n, IMAGE_TOKENS, guided=True)
        for n in lengths
    ]


def write(engine, lengths, sampler=GUIDED, seed=5, **kwargs):
    """Image codes [prompts, candidates, IMAGE_TOKENS]."""
    rows = list(engine.write(texts(*lengths), sampler, seed, IMAGE_TOKENS, **kwargs))
    codes = [prompts.codes(row, LAYOUT) for row in rows]
    return np.reshape(codes, (len(lengths), -1, IMAGE_TOKENS))


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model, LAYOUT, RULES, None, batch=24)


def plainly(model, request, scale):
    """Greedy codes of one guided prompt by full forward passes, a token at a time."""
    rows = [list(ids) for ids in request.streams]
    for _ in range(IMAGE_TOKENS):
        padded = np.zeros((2, 64), int)
        for row, ids in zip(padded, rows, strict=True):
            row[: len(ids)] = ids
        logits_BLV = np.asarray(forward(model, padded))
        full, none = (logits_BLV[g, len(ids) - 1] for g, ids in enumerate(rows))
        guided = (none + scale * (full - none))[LAYOUT.image.start : LAYOUT.image.stop]
        for ids in rows:
            ids.append(LAYOUT.image.start + int(guided.argmax()))
    return LAYOUT.codes(np.asarray(rows[0][-IMAGE_TOKENS:]))


forward = jax.jit(lambda model, tokens_BL: model(tokens_BL))


@pytest.mark.parametrize("devices", [1, 8])
def test_the_engine_equals_full_forward_passes(model, devices, monkeypatch):
    """Shared prefixes, candidates, buckets, a cache that grows, and a mesh."""
    monkeypatch.setattr(loop, "_FIRST_STAGE", 3)
    mesh, lying = None, model
    if devices == 8:
        mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
        lying = jax.device_put(model, shardings(abstract(CONFIG), mesh, RULES))
    engine = Engine(lying, LAYOUT, RULES, mesh, batch=12)
    codes = write(engine, (2, 9, 5), GREEDY, candidates=3)
    for i, request in enumerate(texts(2, 9, 5)):
        expected = plainly(model, request, 2.0)
        np.testing.assert_array_equal(codes[i], [expected] * 3)


def test_noise_is_keyed_by_prompt_and_candidate(engine):
    alone = write(engine, (2, 9, 5), candidates=4)
    assert len({row.tobytes() for row in alone[0]}) == 4
    # Another company, other places, as many rows: what has a number keeps its sample.
    moved = write(engine, (5, 20, 2), numbers=[2, 7, 0], candidates=4)
    np.testing.assert_array_equal(moved[[2, 0]], alone[[0, 2]])
    # The same prompt under another number, and another seed, are other samples.
    again = write(engine, (2, 2, 5), candidates=4)
    assert (again[0] == alone[0]).all() and (again[1] != again[0]).any()
    assert (write(engine, (2, 9, 5), candidates=4, seed=6) != alone).any()


def test_candidates_that_exceed_the_batch_come_in_parts(model, engine):
    small = Engine(model, LAYOUT, RULES, None, batch=2)
    np.testing.assert_array_equal(
        write(small, (2, 9), candidates=3), write(engine, (2, 9), candidates=3)
    )


def test_samplers_share_the_candidates(engine):
    codes = write(engine, (2, 9, 5), (GREEDY, GUIDED), candidates=4)
    assert (codes[:, 0] == codes[:, 2]).all() and (codes[:, 1] != codes[:, 3]).any()
    np.testing.assert_array_equal(
        codes[:, 1::2], write(engine, (2, 9, 5), candidates=4)[:, 1::2]
    )
    with pytest.raises(ValueError, match="candidates=1 cannot be split among 2 sampl"):
        write(engine, (2,), (GREEDY, GUIDED))
    for seed in (1 << 32, 0.5, None):  # JAX would drop the bits above 32
        with pytest.raises(ValueError, match="seed=.* must be a whole number"):
            write(engine, (2,), seed=seed)
    with pytest.raises(ValueError, match="1 prompts need as many numbers"):
        write(engine, (2,), numbers=[1, 2])


def test_a_prefix_is_read_once(model, monkeypatch):
    """That of a prompt for all candidates, that without text for the whole list."""
    engine = Engine(model, LAYOUT, RULES, None, batch=16)
    read, runs = [], []
    prefill, generate = loop._prefill, engines.generate

    def spy(model, tokens_UL, *args, **kwargs):
        read.append(tokens_UL.shape)
        return prefill(model, tokens_UL, *args, **kwargs)

    def count(*args, **kwargs):
        runs.append(1)
        return generate(*args, **kwargs)

    monkeypatch.setattr(loop, "_prefill", spy)
    monkeypatch.setattr(engines, "generate", count)
    rows = engine.write(texts(*range(2, 18)), GUIDED, 0, IMAGE_TOKENS, candidates=2)
    next(rows)
    assert len(runs) == 1  # results stream: nothing beyond the first batch was run
    assert len(list(rows)) == 31 and len(runs) == 2
    assert sorted(read) == [(1, 8), (8, 32), (8, 32)]


def test_what_changes_within_a_bucket_compiles_nothing(engine):
    write(engine, (2, 9), candidates=3)
    compiled = loop._decode._cache_size(), loop._prefill._cache_size()
    write(engine, (11, 3), candidates=3)
    write(engine, (10, 1, 7, 4), Sampler(top_p=0.5), seed=9, candidates=3)
    write(engine, [9] * 7, (GUIDED, GREEDY), candidates=3, numbers=range(3, 10))
    write(engine, [9, *range(1, 12)], candidates=3)  # more than one batch
    assert (loop._decode._cache_size(), loop._prefill._cache_size()) == compiled


def test_fewer_prompts_take_the_program_of_more(model):
    engine = Engine(model, LAYOUT, RULES, None, batch=16)
    every = write(engine, (9, 10) * 6)
    compiled = loop._decode._cache_size(), loop._prefill._cache_size()
    few = write(engine, (9, 10, 9))
    assert (loop._decode._cache_size(), loop._prefill._cache_size()) == compiled
    np.testing.assert_array_equal(few, every[:3])


def test_few_prompts_do_not_pay_for_the_most_there_ever_were(model, monkeypatch):
    sizes = []

    def generate(_, batch, *args, candidate_C, **kwargs):
        sizes.append(batch.script_GBT.shape[1])
        return np.zeros((sizes[-1] * len(candidate_C), IMAGE_TOKENS), int)

    monkeypatch.setattr(engines, "read", lambda _, batch, **kw: batch.prefix_UL)
    monkeypatch.setattr(engines, "generate", generate)
    engine = Engine(model, LAYOUT, RULES, None, batch=64)
    for prompts_of in (64, 2, 9, 3):
        wanted = texts(*[9] * prompts_of)
        list(engine.write(wanted, GUIDED, 0, IMAGE_TOKENS))
    assert sizes == [64, 8, 64, 8]  # a program for four times as many still serves


def test_there_is_a_bar_where_it_would_move(model, monkeypatch):
    bars, made = [], engines.tqdm.tqdm

    def bar(*given, disable, **how):
        bars.append(disable)
        return made(*given, disable=disable, **how)

    monkeypatch.setattr(engines.tqdm, "tqdm", bar)
    monkeypatch.setattr(Engine, "_write", lambda *_: iter(()))
    engine = Engine(model, LAYOUT, RULES, None, batch=8)
    for candidates in (2, 3):
        wanted = texts(*[9] * 4)
        engine.write(wanted, GUIDED, 0, IMAGE_TOKENS, candidates=candidates)
    assert bars == [True, None]  # one batch, which shows nothing; two


def test_a_prompt_that_ends_within_an_image_goes_on_in_it(model):
    engine = Engine(model, LAYOUT, RULES, None, batch=8)
    start = [LAYOUT.eos, *LAYOUT.text_ids([1]), LAYOUT.brk, *LAYOUT.image_ids([3, 4])]
    hot = Sampler(temperature=30.0)
    codes = [3, 4]
    forced = prompts.Prompt(
        (np.asarray(start[:3]),),
        (np.asarray([*LAYOUT.image_ids(codes), *[prompts.FREE] * 12]),),
    )
    rows = list(engine.write([prompts.free(start, 14)] * 4, hot, 0, IMAGE_TOKENS))
    rows += [row[2:] for row in engine.write([forced] * 4, hot, 1, IMAGE_TOKENS)]
    for row in rows:
        assert np.isin(row[:4], LAYOUT.image).all()
        assert row[4] in (LAYOUT.brk, LAYOUT.eos)


def test_an_amateur_is_for_contrastive_samplers_only(model, engine):
    both = Engine(model, LAYOUT, RULES, None, batch=24, amateur=model)
    greedy = Sampler(temperature=0.0)
    same = write(both, (2, 9), greedy)
    np.testing.assert_array_equal(same, write(engine, (2, 9), greedy))


@pytest.mark.parametrize("setting", ["compute", "weights", "cache"])
def test_precision_is_validated(setting):
    with pytest.raises(ValueError, match=f"precision.{setting}='int7'"):
        Precision(**{setting: "int7"})
