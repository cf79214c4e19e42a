"""Precision, recall, density, coverage; the Inception score; NDCG; bootstraps."""

import tracemalloc

import numpy as np
import pytest
import references
from scipy.special import log_softmax

from cm3leon_jax.evaluation import (
    inception_score,
    ndcg,
    precision_recall,
    public_pictures,
    reconstruction,
)
from cm3leon_jax.evaluation.precision_recall import Balls

WHY = references.WHY


def clouds(m=700, n=600, width=24, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(m, width)), 0.8 * rng.normal(size=(n, width)) + 0.1


def values(real, made, k=5) -> dict[str, float]:
    scores = precision_recall.scores(Balls.around([real], k), [made], k)
    assert all(s["low"] <= s["value"] <= s["high"] for s in scores.values())
    assert scores["recall"]["n"] == len(real) and scores["density"]["n"] == len(made)
    return {name: score["value"] for name, score in scores.items()}


def test_four_measures_are_the_references():
    module = pytest.importorskip("prdc", reason=WHY)
    real, made = clouds()
    wanted = module.compute_prdc(real, made, nearest_k=5)
    found = values(real, made)
    assert 0.1 < found["precision"] < 0.999 and 0.1 < found["recall"] < 0.999
    for name, value in wanted.items():
        assert found[name] == round(float(value), 5), name


def test_the_same_set_is_perfect_and_another_place_nothing():
    real, made = clouds()
    found = values(real, real[::-1])
    assert found["precision"] == found["recall"] == found["coverage"] == 1
    assert found["density"] > 1
    assert set(values(real, made + 100).values()) == {0.0}
    one = values(real, np.tile(real[:1], (50, 1)))
    assert one["precision"] == 1 and one["recall"] < 0.01 and one["coverage"] < 0.2


def test_copies_are_at_distance_zero_far_from_the_origin():
    real, _ = clouds(60)
    copies = np.repeat(real + 1e4, 7, axis=0)
    assert values(copies, copies)["precision"] == 1


def test_too_few_or_unlike_features_are_refused():
    real, made = clouds(20, 20)
    for a, b, named in (
        (real, made[:5], "made features .5, 24.: needed are more than k=5"),
        (real, made[:, :3], "of width 24"),
        (real * np.nan, made, "real features .* all of them finite"),
    ):
        with pytest.raises(ValueError, match=named):
            precision_recall.scores(Balls.around([a], 5), [b])


def test_vectors_are_kept_in_float32_whatever_their_batches():
    real, made = clouds()
    balls = Balls.around(np.array_split(real, 9), 5)
    assert balls.features.dtype == balls.radii.dtype == np.float32
    np.testing.assert_allclose(balls.features, real - real.mean(0), atol=1e-6)
    parts = precision_recall.scores(balls, np.array_split(made, 7))
    whole = values(real, made)
    assert {name: score["value"] for name, score in parts.items()} == whole


def test_inception_score_of_counted_cases():
    sure = 100 * np.eye(8)[np.arange(800) % 8]
    assert inception_score.score(sure, splits=1)["value"] == pytest.approx(8)
    assert inception_score.score(np.zeros((80, 8)))["value"] == 1
    assert inception_score.score(sure[::8])["value"] == pytest.approx(1)  # one class
    p = np.exp(log_softmax(np.random.default_rng(0).normal(size=(40, 5)), axis=1))
    mean = p.mean(0)
    divergence = (p * np.log(p / mean)).sum(1).mean()
    found = inception_score.score(np.log(p), splits=1)["value"]
    assert found == pytest.approx(np.exp(divergence), abs=1e-5)
    with pytest.raises(ValueError, match="4 finite logits for 10 parts"):
        inception_score.score(sure[:4])


@pytest.mark.parametrize("n", [1000, 1013])
def test_inception_score_is_torch_fidelitys(n):
    theirs = references.module("torch_fidelity.metric_isc")
    import torch

    logits = 3 * np.random.default_rng(n).normal(size=(n, 1008)).astype(np.float32)
    wanted = theirs.isc_features_to_metric(torch.tensor(logits))
    found = inception_score.score(logits)
    for key, theirs_key in (("value", "mean"), ("spread", "std")):
        value = float(wanted[f"inception_score_{theirs_key}"])
        assert found[key] == pytest.approx(value, abs=1e-5), key


def test_ndcg_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics", reason=WHY)
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(50, 100))
    relevance = np.maximum(rng.integers(-8, 6, (50, 100)), 0) / 5
    relevance[:, 0] = 0.4
    wanted = [
        metrics.ndcg_score(r[None], s[None], k=int((r > 0).sum()))
        for s, r in zip(scores, relevance, strict=True)
    ]
    np.testing.assert_allclose(ndcg.ndcg(scores, relevance), wanted, rtol=1e-12)


def test_ndcg_of_the_best_order_is_one_and_needs_relevance():
    relevance = np.array([[0, 0.5, 1.0], [1.0, 0, 0]])
    np.testing.assert_allclose(ndcg.ndcg(relevance, relevance), 1)
    assert ndcg.ndcg(-relevance, relevance)[1] == 0
    with pytest.raises(ValueError, match="a relevance above 0"):
        ndcg.ndcg(relevance, relevance * [[1], [0]])


def test_use_of_codes_has_intervals_over_pictures():
    rng = np.random.default_rng(0)
    codes = np.minimum(rng.geometric(0.05, (200, 16)), 64) - 1
    codes[:100] = codes[:1]  # copies say no more than one
    found = public_pictures.code_scores(codes, 80)
    whole = reconstruction.code_use(np.bincount(codes.ravel(), minlength=80))
    for key, score in found.items():
        assert score["value"] == pytest.approx(whole[key], abs=1e-5)
        assert score["low"] < score["value"] < score["high"]
        assert score["n"] == 200 and len(score.draws) == 1000
    assert found["usage"]["high"] <= 1 and found["bits"]["high"] <= 6.4
    assert 0.02 < found["bits"]["high"] - found["bits"]["low"] < 0.6


def test_balls_keep_the_distances_of_a_few_rows_only():
    x_NE = np.random.default_rng(0).normal(size=(4096, 8)).astype(np.float32)
    tracemalloc.start()
    try:
        Balls.around([x_NE])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * len(x_NE) ** 2 / 2  # half of all distances
