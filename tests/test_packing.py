"""Packing plans: everything exactly once per epoch, from the row's number alone."""

import numpy as np
import pytest

from cm3leon_jax.data import packing
from cm3leon_jax.data.hashing import permute, uniform
from cm3leon_jax.data.packing import PackingConfig, Plan


def _plan(kind, sizes_by_epoch, row_length=15, asked=None):
    def lengths(epoch, positions):
        if asked is not None:
            asked.append((epoch, len(positions)))
        return np.asarray(sizes_by_epoch[epoch])[positions]

    config = PackingConfig(kind=kind, row_length=row_length)
    return Plan(lengths, len(sizes_by_epoch[0]), config)


def _sizes(count, epochs=3, largest=16, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, largest + 1, count) for _ in range(epochs)]


@pytest.mark.parametrize("count", [1, 5, 128, 129, 700])
def test_concatenate_has_every_token_once_and_in_order(count, monkeypatch):
    monkeypatch.setattr(packing, "_BLOCK", 64)
    sizes = _sizes(count, largest=50, seed=count)
    sizes[0][0] = 3
    plan = _plan("concatenate", sizes)
    for epoch in range(3):
        if sizes[epoch].sum() == 0:
            continue
        stream = [(p, t) for p, size in enumerate(sizes[epoch]) for t in range(size)]
        found = []
        for row in range(plan.rows(epoch)):
            tokens = [
                (part.position, token)
                for part in plan.slices(epoch, row)
                for token in range(part.start, part.stop)
            ]
            assert len(tokens) == 16 or row == plan.rows(epoch) - 1
            found += tokens
        assert found == stream


@pytest.mark.parametrize("count", [1, 5, 128, 129, 700])
def test_first_fit_has_every_sample_once_and_whole(count, monkeypatch):
    monkeypatch.setattr(packing, "_BLOCK", 256)
    sizes = _sizes(count, seed=count)
    sizes[0][0] = sizes[1][0] = sizes[2][0] = 3
    plan = _plan("first_fit", sizes)
    for epoch in range(3):
        positions = []
        for row in range(plan.rows(epoch)):
            parts = plan.slices(epoch, row)
            assert parts and sum(part.stop for part in parts) <= 16
            for part in parts:
                assert part.start == 0 and part.stop == sizes[epoch][part.position]
                positions.append(part.position)
        assert sorted(positions) == np.flatnonzero(sizes[epoch]).tolist()


def test_first_fit_is_the_textbook_one():
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 17, (20, 40))
    found = packing.first_fit(lengths, 16)
    for window, sizes in enumerate(lengths):
        free = []
        for sample, size in enumerate(sizes):
            if size == 0:
                assert found[window, sample] == -1
                continue
            row = next((r for r, room in enumerate(free) if room >= size), len(free))
            if row == len(free):
                free.append(16)
            free[row] -= size
            assert found[window, sample] == row
    full = packing.first_fit(np.full((2, 40), 16), 16)
    np.testing.assert_array_equal(full, np.tile(np.arange(40), (2, 1)))
    with pytest.raises(ValueError, match="longer"):
        packing.first_fit(np.array([[17]]), 16)


@pytest.mark.parametrize("kind", packing.KINDS)
def test_rows_are_numbered_through_all_epochs(kind):
    sizes = _sizes(200)
    plan = _plan(kind, sizes)
    every = [(epoch, row) for epoch in range(3) for row in range(plan.rows(epoch))]
    assert [plan.locate(g) for g in range(len(every))] == every
    fresh = _plan(kind, sizes)
    last = len(every) - 1
    assert fresh.slices(*fresh.locate(last)) == plan.slices(*every[last])
    with pytest.raises(ValueError, match="negative"):
        plan.locate(-1)


def test_a_plan_asks_for_lengths_in_blocks_and_remembers_few():
    asked = []
    plan = _plan("first_fit", _sizes(40_000, epochs=1), asked=asked)
    plan.rows(0)
    assert len(asked) == 3 and max(count for _, count in asked) <= 16_384
    for row in range(50):
        plan.slices(0, row)
    assert len(asked) == 3


def test_nothing_that_fits_is_an_error():
    with pytest.raises(ValueError, match="row_length=15"):
        _plan("first_fit", [np.zeros(5, int)]).locate(0)
    with pytest.raises(ValueError, match="row_length"):
        _plan("concatenate", [np.zeros(0, int)]).locate(0)
    with pytest.raises(ValueError, match="packing.kind"):
        PackingConfig(kind="best_fit", row_length=4)
    with pytest.raises(ValueError, match="packing.row_length"):
        PackingConfig(kind="first_fit", row_length=0)


@pytest.mark.parametrize("size", [1, 2, 3, 17, 64, 1000, 4097])
def test_permutations_are_bijections_that_shuffle(size):
    positions = np.arange(size)
    found = permute(positions, size, 3, 0)
    np.testing.assert_array_equal(np.sort(found), positions)
    np.testing.assert_array_equal(found[5:9], permute(positions[5:9], size, 3, 0))
    if size > 60:
        assert abs(np.corrcoef(positions, found)[0, 1]) < 0.3
        assert (found != permute(positions, size, 3, 1)).mean() > 0.9


def test_hashed_numbers_are_uniform_and_independent():
    numbers = uniform(0, 1, np.arange(50_000))
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert 0 <= numbers.min() and numbers.max() < 1
    assert np.abs(counts / 2500 - 1).max() < 0.08
    for other in (
        uniform(0, 2, np.arange(50_000)),
        uniform(0, 1, 1 + np.arange(50_000)),
    ):
        assert abs(np.corrcoef(numbers, other)[0, 1]) < 0.02
