"""How a token is chosen: every part against float64 numpy written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.sampling.sampler import (
    ContrastiveTopK,
    Sampler,
    contrast,
    draw,
    settings,
    token_scores,
    truncate,
)

KEY = jax.random.key(7)
GREEDY = Sampler(temperature=0.0)
CD_K = ContrastiveTopK(alpha=0.3, k=3, amateur_temperature=0.5)
FORBIDDEN = 7  # the script forbids this id


def script(streams, rows=1, steps=1):
    return np.full((streams, rows, steps), -1, np.int32)


def logits(streams, rows, size=40, seed=0):
    return np.random.default_rng(seed).normal(0, 2, (streams, rows, size))


ROWS, STEPS = 16, 8  # of every call, so that few programs are compiled
run = jax.jit(token_scores)
cut = jax.jit(truncate)
contrast_of = jax.jit(contrast)


def scores(logits_GBV, samplers, t=0, amateur=False):
    """`token_scores` where one id is forbidden; the last row is there many times."""
    rows = len(samplers)
    order = np.minimum(np.arange(ROWS), rows - 1)
    allowed_BV = np.tile(np.arange(logits_GBV.shape[2]) != FORBIDDEN, (ROWS, 1))
    how = settings(
        [samplers[i] for i in order],
        script(len(logits_GBV), ROWS, STEPS),
        amateur=amateur,
    )
    logits_GBV = np.float32(logits_GBV)[:, order]
    found_BV = run(logits_GBV, allowed_BV, how, np.int32(t))
    return np.float64(found_BV)[:rows]


def softmax(x_V):
    p_V = np.exp(x_V - x_V.max())
    return p_V / p_V.sum()


def softmaxes(x_BV):
    return np.stack([softmax(x_V) for x_V in x_BV])


def forbid(x_V):
    return np.where(np.arange(len(x_V)) == FORBIDDEN, -np.inf, x_V)


# What the distribution should be


def nucleus(logits_V, top_p, top_k):
    """Which ids stay, one id at a time from the likeliest down."""
    order = sorted(range(len(logits_V)), key=lambda i: -logits_V[i])
    order = order[: top_k or None]
    p = np.exp(logits_V[order] - logits_V.max())
    p, keep, mass = p / p.sum(), [], 0.0
    for i, share in zip(order, p, strict=True):
        if mass >= top_p and top_p < 1:
            break
        keep.append(i)
        mass += share
    return set(keep)


def contrastive(expert_V, amateur_V, how):
    """The paper's equation 3, term by term, for the ids that may come."""
    p_expert_V, p_amateur_V = softmax(expert_V), softmax(forbid(amateur_V))
    tempered_V = p_amateur_V ** (1 / how.amateur_temperature)
    tempered_V /= tempered_V.sum()
    kth = sorted(p_expert_V, reverse=True)[how.k - 1]
    score_V = np.full(len(expert_V), -np.inf)
    for i, p in enumerate(p_expert_V):
        if p >= how.alpha * kth and i != FORBIDDEN:
            score_V[i] = np.log(p) - np.log(tempered_V[i])
    return score_V


def expected(logits_GV, sampler):
    """The distribution of one row."""
    scales = [*sampler.scales] * (len(logits_GV) - 1 if len(sampler.scales) == 1 else 1)
    score_V = logits_GV[-1].copy()
    for scale, (more_V, less_V) in zip(
        scales, zip(logits_GV[:-1], logits_GV[1:], strict=True), strict=True
    ):
        score_V += scale * (more_V - less_V)
    score_V = forbid(score_V)
    if sampler.contrastive is not None:
        score_V = contrastive(forbid(logits_GV[0]), logits_GV[-1], sampler.contrastive)
    score_V = score_V / sampler.temperature
    stays = nucleus(score_V, sampler.top_p, sampler.top_k)
    outside = [i for i in range(len(score_V)) if i not in stays]
    score_V[outside] = -np.inf
    return softmax(score_V)


SAMPLERS = {
    "plain": Sampler(),
    "hot": Sampler(temperature=1.7),
    "top-p": Sampler(temperature=0.8, top_p=0.7),
    "top-k": Sampler(top_k=5),
    "both cuts": Sampler(top_k=9, top_p=0.6),
    "guided": Sampler(guidance=3.0, temperature=0.9),
    "guided top-p": Sampler(guidance=2.0, top_p=0.9),
    "unconditional": Sampler(guidance=0.0),
    "CD": Sampler(contrastive=ContrastiveTopK(alpha=0.1)),
    "CD-K": Sampler(contrastive=CD_K),
    "hot CD-K": Sampler(contrastive=CD_K, temperature=2.0),
    "CD-K top-k": Sampler(contrastive=CD_K, top_k=2),
    "CD-K, all": Sampler(contrastive=ContrastiveTopK(alpha=1e-9, k=40)),
}


def test_every_sampler_has_its_distribution_whatever_the_other_rows_do():
    samplers = list(SAMPLERS.values())
    logits_GBV = logits(2, len(samplers))
    p_BV = softmaxes(scores(logits_GBV, samplers))
    for b, name in enumerate(SAMPLERS):
        wanted_V = expected(logits_GBV[:, b], samplers[b])
        np.testing.assert_allclose(p_BV[b], wanted_V, atol=2e-6, err_msg=name)
        assert p_BV[b, FORBIDDEN] == 0


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_has_its_distribution_alone(name):
    logits_GBV, sampler = logits(2, 1, seed=2), SAMPLERS[name]
    p_V = softmax(scores(logits_GBV, [sampler])[0])
    np.testing.assert_allclose(p_V, expected(logits_GBV[:, 0], sampler), atol=2e-6)


# Guidance


def test_guidance_steps_from_stream_to_stream():
    samplers = [
        Sampler(guidance=(7.5, 1.5)),
        Sampler(guidance=(2.0, 0.0)),
        Sampler(guidance=3.0),
        Sampler(),
        Sampler(contrastive=CD_K),
    ]
    full, image, none = logits_GBV = logits(3, 5)
    found_BV = scores(logits_GBV, samplers)
    wanted_BV = [
        none[0] + 1.5 * (image[0] - none[0]) + 7.5 * (full[0] - image[0]),
        none[1] + 2 * (full[1] - image[1]),
        none[2] + 3 * (full[2] - none[2]),  # as if there were two streams
        full[3],
    ]
    for found_V, wanted_V in zip(found_BV, wanted_BV, strict=False):
        np.testing.assert_allclose(found_V, forbid(wanted_V), rtol=1e-4, atol=1e-4)
    two = scores(logits_GBV[[0, 2], 4:], samplers[4:])
    np.testing.assert_array_equal(found_BV[4:], two)


def test_no_guidance_is_the_full_stream_whatever_else_there_is():
    for none in (1.0, (1.0, 1.0)):
        sampler = Sampler(guidance=none)
        assert sampler.streams == 1
        for streams in (1, 2, 3):
            weight_GBT = settings([sampler], script(streams)).weight_GBT
            weight_G = np.asarray(weight_GBT)[:, 0, 0]
            np.testing.assert_array_equal(weight_G, np.eye(streams)[0])


def test_guidance_needs_its_streams():
    assert Sampler(guidance=3.0).streams == 2
    assert Sampler(guidance=(7.5, 1.5)).streams == 3
    with pytest.raises(ValueError, match="guidance=2.0 needs .* unconditional stream"):
        settings([Sampler(guidance=2.0)], script(1))
    with pytest.raises(ValueError, match=r"guidance=\(7.5, 1.5\) has 2 .* needs 1"):
        settings([Sampler(guidance=(7.5, 1.5))], script(2))
    with pytest.raises(ValueError, match=r"guidance=\(7.5, 1.5\) has 2 .* needs 3"):
        settings([Sampler(guidance=(7.5, 1.5))], script(4))


def test_a_schedule_goes_from_the_first_sampled_token_to_the_last():
    sampler = Sampler(guidance=3.0, schedule=(0.0, 1.0, 0.5))
    script_GBT = script(2, 3, 8)
    script_GBT[:, 1, 3] = 5  # forced: its neighbours are next to each other
    script_GBT[:, 1, 6:] = 0
    how = settings([sampler, sampler, Sampler(guidance=3.0)], script_GBT)
    weight_GBT = np.asarray(how.weight_GBT)
    scale_BT = weight_GBT[0]
    factors = np.interp(np.arange(8) / 7, [0, 0.5, 1], sampler.schedule)
    np.testing.assert_allclose(scale_BT[0], 1 + 2 * factors, rtol=1e-6)
    np.testing.assert_allclose(scale_BT[1, [0, 1, 2, 4, 5]], [1, 2, 3, 2.5, 2])
    np.testing.assert_array_equal(scale_BT[2], 3.0)
    np.testing.assert_allclose(weight_GBT.sum(axis=0), 1.0, rtol=1e-6)
    # The position decides in the loop.
    logits_GBV = logits(2, 1)
    for t, scale in ((0, 1.0), (7, 2.0)):
        found = scores(logits_GBV, [sampler], t=t)
        constant = scores(logits_GBV, [Sampler(guidance=scale)])
        np.testing.assert_allclose(found, constant, rtol=1e-5)


# CD-K


@pytest.mark.parametrize("alpha", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("k", [1, 2, 8, 39, 1000])
def test_contrast_keeps_what_is_plausible(alpha, k):
    expert_V, amateur_V = logits(2, 1)[:, 0]
    score_BV = contrast_of(
        *(np.float32(x[None]) for x in (forbid(expert_V), amateur_V)),
        *(np.float32([alpha]), np.int32([k]), np.float32([1.0])),
    )
    score_V = np.asarray(score_BV)[0]
    p_V = np.sort(softmax(forbid(expert_V)))[::-1]
    least = alpha * p_V[min(k, len(p_V)) - 1]
    kept = set(np.flatnonzero(softmax(forbid(expert_V)) >= least * (1 - 1e-6)))
    assert set(np.flatnonzero(score_V > -np.inf)) == kept - {FORBIDDEN}
    if alpha == 1 and k < 39:
        assert len(kept) == k


def test_one_token_is_left_where_alpha_and_k_are_one():
    sampler = Sampler(contrastive=ContrastiveTopK(alpha=1.0))
    logits_GBV = logits(2, 3)
    p_BV = softmaxes(scores(logits_GBV, [sampler] * 3))
    best_B = np.apply_along_axis(forbid, -1, logits_GBV[0]).argmax(-1)
    np.testing.assert_array_equal(p_BV, np.eye(40)[best_B])


def test_another_model_as_amateur_has_the_last_stream_for_itself():
    samplers = [Sampler(contrastive=CD_K), Sampler(guidance=3.0), Sampler()]
    logits_GBV = logits(3, 3)
    found_BV = scores(logits_GBV, samplers, amateur=True)
    np.testing.assert_array_equal(found_BV[0], scores(logits_GBV, samplers[:1])[0])
    full, none, _ = logits_GBV
    guided_V = forbid(none[1] + 3 * (full[1] - none[1]))
    np.testing.assert_allclose(found_BV[1], guided_V, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found_BV[2], forbid(full[2]), rtol=1e-6)
    # Where there are two, they are the expert's and the amateur's.
    settings([Sampler(contrastive=CD_K)], script(2), amateur=True)
    with pytest.raises(ValueError, match="guidance=3.0 needs .* unconditional stream"):
        settings([Sampler(guidance=3.0)], script(2), amateur=True)


def test_contrast_needs_an_amateur():
    with pytest.raises(ValueError, match="contrastive needs .* smaller model"):
        settings([Sampler(), Sampler(contrastive=CD_K)], script(1, 2))
    assert Sampler(contrastive=CD_K).streams == 2


def test_candidates_of_a_prompt_may_have_different_samplers():
    samplers = [Sampler(temperature=0.1 * n) for n in range(1, 7)]
    how = settings(samplers, script(2, 3))
    np.testing.assert_allclose(how.temperature_B, [s.temperature for s in samplers])
    assert how.weight_GBT.shape == (2, 6, 1)
    for number in (0, 4):
        with pytest.raises(ValueError, match=f"3 prompts .* got {number}"):
            settings(samplers[:number], script(2, 3))


# Top-k and top-p


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.8, 0.999, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 5, 50, 51])
def test_truncation_against_numpy(top_p, top_k):
    logits_BV = np.random.default_rng(0).normal(0, 2, (4, 50)).astype(np.float32)
    logits_BV[:, 7] = -np.inf  # forbidden by the script
    logits_BV[3] = np.round(logits_BV[3]) - 100  # ties, negative ones only
    logits_BV[3, 9] = 0.0
    cut_BV = np.asarray(
        cut(logits_BV, np.full(4, top_p, np.float32), np.full(4, top_k, np.int32))
    )
    for b, (before_V, after_V) in enumerate(zip(logits_BV, cut_BV, strict=True)):
        stays = set(np.flatnonzero(after_V > -np.inf).tolist())
        wanted = nucleus(before_V, top_p, top_k) - {7}
        if b == 3:  # equal logits stay or go together
            least = min(before_V[list(wanted)])
            wanted = {i for i in range(50) if before_V[i] >= least} - {7}
        assert stays == wanted
        np.testing.assert_array_equal(after_V[list(stays)], before_V[list(stays)])


def test_zeros_of_both_signs_are_equal():
    cut_BV = truncate(jnp.asarray([[0.0, -0.0, -1.0]]), jnp.ones(1), jnp.ones(1, int))
    np.testing.assert_array_equal(cut_BV, [[0.0, 0.0, -np.inf]])


# The draw


def test_draws_follow_the_scores():
    logits_V, n = np.asarray([2.0, 1.0, 0.0, -np.inf], np.float32), 20_000
    keys = jax.random.split(KEY, n)
    drawn = jax.jit(draw)(keys, np.tile(logits_V, (n, 1)), np.ones(n, np.float32))
    counts = np.bincount(np.asarray(drawn), minlength=4) / n
    np.testing.assert_allclose(counts, softmax(logits_V), atol=0.012)
    assert counts[3] == 0


def test_temperature_zero_is_the_maximum():
    samplers = [GREEDY, Sampler(temperature=0.0, contrastive=CD_K), Sampler()] * 7
    logits_GBV = np.repeat(logits(2, 3), 7, axis=1)[:, np.arange(21) % 3 * 7]
    scores_BV = np.concatenate(
        [scores(logits_GBV[:, i : i + 3], samplers[i : i + 3]) for i in range(0, 21, 3)]
    )
    temperature_B = settings(samplers, script(2, 21)).temperature_B
    drawn_B = draw(jax.random.split(KEY, 21), jnp.asarray(scores_BV), temperature_B)
    greedy_B = np.arange(21) % 3 < 2
    different_B = np.asarray(drawn_B) != scores_BV.argmax(-1)
    assert not different_B[greedy_B].any() and different_B[~greedy_B].any()


# One program


def test_no_setting_compiles_anything():
    logits_GBV = logits(2, 2)
    scores(logits_GBV, [Sampler()] * 2)
    programs = run._cache_size()
    for sampler in SAMPLERS.values():
        for other in (GREEDY, Sampler(guidance=2.0, schedule=(0.0, 1.0))):
            scores(logits_GBV, [sampler, other], t=3)
    assert run._cache_size() == programs
