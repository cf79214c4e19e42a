"""Pixel masks, code cells and runs."""

import numpy as np
import pytest

from cm3leon_jax.tokenizers import regions


def test_a_mask_covers_every_cell_that_it_touches():
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = rng.random((24, 16)) < 0.02
        found = regions.cells(mask, (6, 4))
        for y in range(6):
            for x in range(4):
                assert found[y, x] == mask[y * 4 : y * 4 + 4, x * 4 : x * 4 + 4].any()


def test_blanking_hides_all_and_only_the_hidden_cells():
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (3, 12, 8, 3), np.uint8)
    cells = rng.random((3, 6, 4)) < 0.4
    blanked = regions.blank(images, cells)
    assert blanked.dtype == np.uint8
    for b, y, x in np.ndindex(3, 12, 8):
        hidden = cells[b, y // 2, x // 2]
        assert (blanked[b, y, x] == (128 if hidden else images[b, y, x])).all()


def test_runs_cover_the_cells_and_never_leave_their_row():
    rng = np.random.default_rng(2)
    for _ in range(50):
        cells = rng.random((5, 7)) < rng.random()
        runs = regions.runs(cells)
        covered = np.zeros(35, bool)
        for start, stop in runs:
            assert start < stop and start // 7 == (stop - 1) // 7
            assert not covered[start:stop].any()
            covered[start:stop] = True
        np.testing.assert_array_equal(covered.reshape(5, 7), cells)
        assert (runs[1:, 0] > runs[:-1, 0]).all()
        flat = np.pad(cells, ((0, 0), (1, 0)))
        assert len(runs) == (flat[:, 1:] & ~flat[:, :-1]).sum()


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="divide"):
        regions.cells(np.zeros((9, 8), bool), (4, 4))
    with pytest.raises(ValueError, match="bool"):
        regions.cells(np.zeros((8, 8), np.uint8), (4, 4))
    with pytest.raises(ValueError, match="go with"):
        regions.blank(np.zeros((2, 8, 8, 3), np.uint8), np.zeros((1, 4, 4), bool))
