"""The Fréchet distance: the reference's value, closed forms, any order of adding up."""

import warnings

import numpy as np
import pytest
import references

from cm3leon_jax.evaluation import frechet
from cm3leon_jax.evaluation.frechet import Moments


def moments(features) -> Moments:
    return Moments.empty(features.shape[1]).add(features)


def patches(name: str, n: int, seed: int) -> np.ndarray:
    """float64 [n, 192]: 8x8 patches of a photograph, whose covariance is near-singular
    since neighbouring pixels are alike."""
    photograph = getattr(pytest.importorskip("skimage.data"), name)()
    rng = np.random.default_rng(seed)
    rows, columns = (rng.integers(side - 8, size=n) for side in photograph.shape[:2])
    places = zip(rows, columns, strict=True)
    return np.stack([photograph[y : y + 8, x : x + 8].ravel() for y, x in places]) / 255


def rotated(values, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(len(values), len(values))))
    return basis @ np.diag(values) @ basis.T


def given(mean, covariance, count=100) -> Moments:
    return Moments(count, np.asarray(mean, float), covariance * (count - 1))


def reference(a: Moments, b: Moments) -> float:
    module = references.module("pytorch_fid.fid_score")
    with warnings.catch_warnings():  # scipy: its argument `disp` is to go
        warnings.simplefilter("ignore", DeprecationWarning)
        return module.calculate_frechet_distance(
            a.mean, a.covariance, b.mean, b.covariance
        )


def test_moments_are_numpys_however_they_are_added_up():
    x = patches("astronaut", 4096, 0) + 1000  # sums of squares would cancel
    whole = moments(x)
    np.testing.assert_allclose(whole.mean, x.mean(0), rtol=1e-13)
    wanted = np.cov(x, rowvar=False)
    np.testing.assert_allclose(whole.covariance, wanted, rtol=0, atol=1e-12)
    for sizes in ([1, 4095], [1000, 0, 3, 3093], [2048, 2048]):
        parts = np.split(x, np.cumsum(sizes)[:-1])
        one = Moments.empty(192)
        for part in parts:
            one = one.add(part)
        assert one.count == 4096
        np.testing.assert_allclose(one.mean, whole.mean, rtol=1e-13)
        np.testing.assert_allclose(one.scatter, whole.scatter, rtol=0, atol=1e-8)


def test_distance_is_pytorch_fids_on_photographs():
    a, b = (moments(patches(n, 4096, 0)) for n in ("astronaut", "chelsea"))
    np.testing.assert_allclose(frechet.distance(a, b), reference(a, b), rtol=1e-6)
    same = moments(patches("astronaut", 4096, 1))
    np.testing.assert_allclose(frechet.distance(a, same), reference(a, same), rtol=1e-6)


@pytest.mark.parametrize("zeros", [0, 30, 60])
def test_singular_covariances_have_the_value_of_the_formula(zeros):
    rng = np.random.default_rng(zeros)
    values = rng.uniform(0.1, 9, (2, 64))
    values[:, :zeros] = 0
    a, b = (given(np.full(64, i), rotated(v)) for i, v in enumerate(values))
    wanted = 64 + np.square(np.sqrt(values[0]) - np.sqrt(values[1])).sum()
    np.testing.assert_allclose(frechet.distance(a, b), wanted, rtol=1e-9)


def test_fewer_pictures_than_features():
    """tr √(ST) of few features is a sum of singular values of as many."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 256)), 2 * rng.normal(size=(50, 256)) + 0.1
    x_centred, y_centred = x - x.mean(0), y - y.mean(0)
    cross = np.linalg.svd(x_centred @ y_centred.T, compute_uv=False).sum()
    traces = np.square(x_centred).sum() / 39 + np.square(y_centred).sum() / 49
    apart = np.square(x.mean(0) - y.mean(0)).sum()
    wanted = apart + traces - 2 * cross / np.sqrt(39 * 49)
    np.testing.assert_allclose(
        frechet.distance(moments(x), moments(y)), wanted, rtol=1e-9
    )


def test_the_same_is_at_distance_zero_and_constants_at_that_of_means():
    a = moments(patches("astronaut", 500, 0))
    assert frechet.distance(a, a) < 1e-10
    flat = moments(np.full((9, 192), 0.5))
    apart = np.square(a.mean - 0.5).sum() + np.trace(a.covariance)
    np.testing.assert_allclose(frechet.distance(flat, a), apart, rtol=1e-12)


def test_score_tells_how_far_disjoint_subsets_spread():
    x, y = patches("astronaut", 6000, 0), patches("chelsea", 6000, 1)
    batches = [x[i : i + 70] for i in range(0, 6000, 70)]
    parts = frechet.subsets(batches, 192)
    assert [p.count for p in parts] == [600] * 10
    np.testing.assert_allclose(parts[3].mean, x[3::10].mean(0), rtol=1e-12)
    score = frechet.score(parts, moments(y))
    assert score["n"] == 6000
    assert score["value"] == round(frechet.distance(moments(x), moments(y)), 5)
    each = [frechet.distance(p, moments(y)) for p in parts]
    assert score["spread"] == round(float(np.std(each, ddof=1)), 5)
    assert score["low"] < score["value"] < score["high"]
    # The subsets are further away: the interval is not theirs.
    assert np.mean(each) > score["value"]


def test_features_are_added_up_many_at_a_time(monkeypatch):
    x, added, add = patches("astronaut", 5000, 0), [], Moments.add

    def counted(self, features):
        added.append(len(features))
        return add(self, features)

    monkeypatch.setattr(Moments, "add", counted)
    batches = [x[i : i + 64] for i in range(0, 5000, 64)]
    parts = frechet.subsets(batches, 192)
    assert added == [500] * 10  # and not ten times for every batch
    np.testing.assert_allclose(parts[9].mean, x[9::10].mean(0), rtol=1e-12)
    added.clear()
    monkeypatch.setattr(frechet, "_ROWS", 2048)
    whole = frechet.moments(iter(batches), 192)
    assert len(added) == 3 and whole.count == sum(added) == 5000
    np.testing.assert_allclose(whole.mean, x.mean(0), rtol=1e-12)
    wanted = np.cov(x, rowvar=False)
    np.testing.assert_allclose(whole.covariance, wanted, rtol=0, atol=1e-12)


def test_what_has_no_distribution_is_refused():
    empty = Moments.empty(4)
    with pytest.raises(ValueError, match="are not 4 wide"):
        empty.add(np.zeros((2, 5)))
    with pytest.raises(ValueError, match="not finite"):
        empty.add(np.full((2, 4), np.nan))
    with pytest.raises(ValueError, match="1 pictures have no covariance"):
        frechet.distance(empty.add(np.ones((1, 4))), empty.add(np.ones((2, 4))))
    with pytest.raises(ValueError, match="4 and 5 wide"):
        frechet.distance(moments(np.ones((3, 4))), moments(np.ones((3, 5))))
    with pytest.raises(ValueError, match="differ"):
        moments(np.ones((3, 4))).merge(moments(np.ones((3, 5))))
