"""Masks as class tokens, and the scores of masks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skimage.segmentation import find_boundaries

from cm3leon_jax.evaluation import segmentation as scoring
from cm3leon_jax.tokenizers.segmentation import SegmentationTokenizer

CLASSES = ("background", "cat", "dog", "bird")
C = len(CLASSES)
TOKENIZER = SegmentationTokenizer(grid=4, classes=CLASSES)
SEEDS = st.integers(0, 2**32 - 1)


def random_labels(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, C, shape)


def blobs(seed: int, count: int = 6, side: int = 16) -> np.ndarray:
    """Masks [B, Y, X] of two overlapping boxes each, their classes at random."""
    rng, made = np.random.default_rng(seed), np.zeros((count, side, side), int)
    for mask in made:
        for _ in range(2):
            y, x = rng.integers(0, side - 3, 2)
            height, width = rng.integers(3, side // 2, 2)
            mask[y : y + height, x : x + width] = rng.integers(1, C)
    return made


# ------------------------------------------------------------------ the tokenizer


@given(seed=SEEDS, cell=st.integers(1, 9))
def test_labels_are_cells_of_classes_that_are_there(seed, cell):
    mask = random_labels(seed, (4 * cell, 4 * cell))
    labels = TOKENIZER.encode(mask)
    assert (labels.dtype, labels.shape) == (np.int32, (4, 4))
    assert set(labels.ravel()) <= {0, *mask.ravel()}


@given(seed=SEEDS, cell=st.integers(1, 9))
def test_a_cell_takes_the_class_that_covers_most_if_it_covers_enough(seed, cell):
    """Against the definition, pixel by pixel."""
    mask = random_labels(seed, (4 * cell, 4 * cell))
    labels = TOKENIZER.encode(mask)
    for y, x in np.ndindex(4, 4):
        part = mask[y * cell : (y + 1) * cell, x * cell : (x + 1) * cell].ravel()
        covers = [(part == label).sum() for label in range(1, C)]
        most = covers.index(max(covers)) + 1  # the first among equals
        assert labels[y, x] == (most if max(covers) / cell**2 >= 0.4 else 0)


def test_two_fifths_of_a_cell_are_enough_and_less_is_not():
    mask = np.zeros((20, 20), int)
    mask[:5, :2] = 3  # 10 of 25 pixels
    mask[5:10, :2] = 3
    mask[5, 0] = 0  # 9 of 25
    assert TOKENIZER.encode(mask)[:2, 0].tolist() == [3, 0]


def test_of_equal_covers_the_lowest_label_is_taken():
    mask = np.zeros((16, 16), int)
    mask[:4, :2], mask[:4, 2:4] = 3, 1
    assert TOKENIZER.encode(mask)[0, 0] == 1
    halves = np.zeros((4, 4, C))
    halves[..., [1, 3]] = 0.5
    assert (TOKENIZER.decode(halves, 16) == 1).all()


@pytest.mark.parametrize("label", range(C))
def test_a_mask_of_one_class_stays_as_it_is(label):
    mask = np.full((16, 16), label)
    np.testing.assert_array_equal(TOKENIZER.ceiling(mask), mask)


@given(seed=SEEDS, cell=st.integers(1, 13))
def test_every_grid_of_labels_survives_pixels(seed, cell):
    labels = random_labels(seed, (4, 4))
    mask = TOKENIZER.decode(labels, 4 * cell)
    assert (mask.dtype, mask.shape) == (np.int32, (4 * cell, 4 * cell))
    np.testing.assert_array_equal(TOKENIZER.encode(mask), labels)


@given(seed=SEEDS, cell=st.integers(1, 2))
def test_masks_of_two_classes_in_small_cells_are_exact(seed, cell):
    labels = random_labels(seed, (4, 4)) % 2
    mask = labels.repeat(cell, 0).repeat(cell, 1)
    np.testing.assert_array_equal(TOKENIZER.ceiling(mask), mask)


@given(seed=SEEDS, rows=st.booleans(), cell=st.integers(1, 9))
def test_stripes_of_cells_are_exact(seed, rows, cell):
    """Straight borders between cells: only corners are rounded."""
    stripes = random_labels(seed, (4, 1)).repeat(4, 1)
    labels = stripes if rows else stripes.T
    mask = labels.repeat(cell, 0).repeat(cell, 1)
    np.testing.assert_array_equal(TOKENIZER.ceiling(mask), mask)


def test_large_cells_lose_their_corners_only():
    labels = np.zeros((4, 4), int)
    labels[1:3, 1:3] = 2
    mask = labels.repeat(4, 0).repeat(4, 1)
    wanted = mask.copy()
    wanted[np.ix_([4, 11], [4, 11])] = 0
    np.testing.assert_array_equal(TOKENIZER.decode(labels, 16), wanted)


def test_probabilities_move_a_border():
    """The likelier its neighbour thinks a class, the farther it reaches."""
    cells = np.zeros((4, 4, C))
    cells[..., 0] = 1
    cells[:, 0] = [0, 1, 0, 0]
    reach = []
    for share in (0.0, 0.2, 0.4):
        cells[:, 1] = [1 - share, share, 0, 0]
        reach.append((TOKENIZER.decode(cells, 64)[0] == 1).sum())
    assert reach[0] == 16 and reach[0] < reach[1] < reach[2] < 24


@given(seed=SEEDS)
def test_up_sampling_turns_with_the_picture(seed):
    labels = random_labels(seed, (4, 4))
    for turn in (np.transpose, np.flipud, np.fliplr):
        np.testing.assert_array_equal(
            TOKENIZER.decode(turn(labels), 12), turn(TOKENIZER.decode(labels, 12))
        )


@pytest.mark.parametrize(
    ("mask", "named"),
    [
        (np.zeros((16, 12), int), "16x12 pixels"),
        (np.zeros((18, 18), int), "grid of 4x4"),
        (np.zeros((0, 0), int), "0x0"),
        (np.zeros((16, 16, 3), int), r"\[16, 16, 3\]"),
        (np.zeros((16, 16)), "float64"),
        (np.full((16, 16), C), f"label {C} has no class"),
        (np.full((16, 16), -1), "label -1 has no class"),
    ],
)
def test_masks_that_do_not_fit_are_named(mask, named):
    with pytest.raises(ValueError, match=named):
        TOKENIZER.encode(mask)


@pytest.mark.parametrize(
    ("cells", "size", "named"),
    [
        (np.zeros((4, 4), int), 18, "18x18 pixels"),
        (np.zeros((4, 4), int), 0, "0x0 pixels"),
        (np.zeros((5, 4), int), 16, r"\[5, 4\]"),
        (np.full((4, 4), C), 16, f"label {C} has no class"),
        (np.zeros((4, 4)), 16, "float64"),
        (np.ones((4, 4, C + 1)) / (C + 1), 16, rf"\[4, 4, {C}\]"),
        (np.ones((4, 4, C)), 16, "add up to 1"),
        (np.full((4, 4, C), np.nan), 16, "add up to 1"),
    ],
)
def test_cells_that_do_not_fit_are_named(cells, size, named):
    with pytest.raises(ValueError, match=named):
        TOKENIZER.decode(cells, size)


@pytest.mark.parametrize(
    ("grid", "classes"), [(0, CLASSES), (4, ("background",)), (4, ("a", "b", "a"))]
)
def test_grids_and_names_that_cannot_be(grid, classes):
    with pytest.raises(ValueError, match="give"):
        SegmentationTokenizer(grid=grid, classes=classes)


# ------------------------------------------------------------------ the scores


def brute_iou(truth, made, label):
    a, b = truth == label, made == label
    return (a & b).sum() / (a | b).sum() if (a | b).any() else np.nan


@given(seed=SEEDS)
def test_iou_is_intersection_over_union(seed):
    truth, made = blobs(seed), blobs(seed + 1)
    found = scoring.iou(scoring.areas(truth, made, C))
    wanted = [brute_iou(truth, made, label) for label in range(C)]
    np.testing.assert_allclose(found, wanted)
    alone = scoring.areas(truth[2:3], made[2:3], C)
    np.testing.assert_array_equal(scoring.areas(truth, made, C)[2:3], alone)


def test_scores_agree_with_scikit_learn():
    reason = "the extra `parity` is not installed"
    metrics = pytest.importorskip("sklearn.metrics", reason=reason)
    truth, made = blobs(0), blobs(1)
    counts = scoring.areas(truth, made, C)
    flat = truth.ravel(), made.ravel()
    each = metrics.confusion_matrix(*flat)
    wanted = np.stack([np.diagonal(each), each.sum(1), each.sum(0)])
    np.testing.assert_array_equal(counts.sum(0), wanted)
    each = metrics.jaccard_score(*flat, average=None)
    np.testing.assert_allclose(scoring.iou(counts), each)
    assert scoring.miou(counts) == pytest.approx(
        metrics.jaccard_score(*flat, average="macro")
    )


def test_boundaries_are_scikit_image_s():
    region = blobs(0) == blobs(1)
    found = scoring.boundary(region)
    for one, edge in zip(region, found, strict=True):
        wanted = find_boundaries(one, connectivity=1, mode="inner") & one
        np.testing.assert_array_equal(edge, wanted)


@given(seed=SEEDS, tolerance=st.sampled_from([0, 1, 1.5, 2, 3]))
def test_boundaries_are_matched_by_distance(seed, tolerance):
    """Against all distances between all pixels."""
    truth, made = blobs(seed, 2), blobs(seed + 1, 2)
    found = scoring.boundary_counts(truth, made, C, tolerance)
    for i, label in np.ndindex(2, C - 1):
        made_at, true_at = (
            np.argwhere(scoring.boundary(x[i : i + 1] == label + 1)[0])
            for x in (made, truth)
        )
        apart = np.linalg.norm(made_at[:, None] - true_at, axis=-1)
        met = apart <= tolerance
        wanted = [len(made_at), met.any(1).sum(), len(true_at), met.any(0).sum()]
        assert found[i, label].tolist() == wanted


def test_a_shift_within_the_tolerance_costs_no_boundary():
    truth = np.zeros((1, 16, 16), int)
    truth[0, 4:10, 4:10] = 1
    made = np.roll(truth, 1, axis=2)

    def f1(made, tolerance):
        counts = scoring.boundary_counts(truth, made, C, tolerance)
        return scoring.boundary_f1(counts.sum(0))

    assert f1(truth, 0) == f1(made, 1) == 1
    assert 0 < f1(made, 0) < 1
    assert f1(np.roll(truth, 6, axis=2), 1) < f1(np.roll(truth, 3, axis=2), 1)
    assert f1(np.zeros_like(truth), 1) == 0
    both = np.where(np.roll(truth, 8, axis=2) > 0, 2, truth)  # a class nobody asked for
    assert f1(both, 1) == 0.5


def test_scores_of_a_perfect_mask_and_of_the_grid_s_best():
    truth = blobs(3, 40)
    best = np.stack([TOKENIZER.ceiling(mask) for mask in truth])
    perfect = scoring.scores(truth, truth, best, CLASSES)
    assert perfect["miou"]["value"] == perfect["boundary_f1"]["value"] == 1
    assert perfect["miou_of_ceiling"]["value"] > 1
    reached = scoring.scores(truth, best, best, CLASSES)
    assert reached["miou"] == reached["ceiling"] == perfect["ceiling"]
    assert reached["miou_of_ceiling"] == {"value": 1, "low": 1, "high": 1, "n": 40}
    assert {f"iou/{name}" for name in CLASSES} <= set(reached)
    each = [reached[f"iou/{name}"]["value"] for name in CLASSES]
    assert reached["miou"]["value"] == pytest.approx(np.mean(each), abs=1e-4)
    cats = reached["iou/cat"]
    assert cats["n"] == (truth == 1).any((1, 2)).sum()
    assert 0 < cats["low"] < cats["value"] < cats["high"] < 1


def test_scores_of_a_class_name_the_pictures_they_are_of():
    truth = np.zeros((6, 4, 4), int)
    truth[0] = 1
    made = [truth.copy(), truth.copy()]
    made[0][1], made[1][2] = 1, 1  # as many pictures, but others
    names = ("background", "cat")
    one, two = (scoring.scores(truth, x, truth, names) for x in made)
    assert one["iou/cat"]["n"] == two["iou/cat"]["n"]
    assert one["iou/cat"].names != two["iou/cat"].names
    assert one["miou"].names == two["miou"].names


def test_classes_that_are_nowhere_have_no_score():
    truth = np.zeros((2, 8, 8), int)
    truth[:, 2:6, 2:6] = 1
    found = scoring.scores(truth, truth, truth, CLASSES)
    assert found["miou"]["value"] == 1
    assert {"iou/background", "iou/cat"} <= set(found)
    assert not {"iou/dog", "iou/bird"} & set(found)
    empty = np.zeros((2, 8, 8), int)
    assert "boundary_f1" not in scoring.scores(empty, empty, empty, CLASSES)


@pytest.mark.parametrize(
    ("made", "named"),
    [
        (np.zeros((2, 8, 6), int), r"\[2, 8, 6\]"),
        (np.zeros((0, 8, 8), int), r"\[0, 8, 8\]"),
        (np.full((2, 8, 8), C), f"to {C}"),
        (np.zeros((2, 8, 8)), "float64"),
    ],
)
def test_masks_that_cannot_be_compared_are_named(made, named):
    with pytest.raises(ValueError, match=named):
        scoring.areas(np.zeros((2, 8, 8), int), made, C)
