"""Scores of masks: IoU of every class, their mean, and how well boundaries are met.

Counts are added up over all pictures before they are divided, as is usual for mean
IoU; intervals come from drawing pictures again (`protocol.interval`). Masks are
integers [B, Y, X], label 0 is the background. Own code of a few lines: libraries score
whole sets at once, and the intervals need the counts of each picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from cm3leon_jax.evaluation.protocol import Score, interval

TOLERANCE = 1.0  # pixels, Euclidean


def scores(
    truth_BYX: np.ndarray,
    made_BYX: np.ndarray,
    ceiling_BYX: np.ndarray,
    classes: Sequence[str],
    tolerance: float = TOLERANCE,
) -> dict[str, Score]:
    """All scores of masks, with 95 % intervals over pictures.

    `miou` is the mean IoU over classes, the background among them; `iou/NAME` one
    class; `ceiling` the mean IoU of `ceiling_BYX`, the truth as the grid can say it;
    `miou_of_ceiling` their ratio; `boundary_f1` see `boundary_f1`. Classes that no
    picture shows are left out. Raises ValueError for masks that do not match.
    """
    n, C = len(truth_BYX), len(classes)
    made_B3C = areas(truth_BYX, made_BYX, C)
    best_B3C = areas(truth_BYX, ceiling_BYX, C)
    both_BP3C = np.stack([made_B3C, best_B3C], axis=1)
    edges_BCK = boundary_counts(truth_BYX, made_BYX, C, tolerance)
    found: dict[str, Score] = {
        "miou": interval(made_B3C, miou, n),
        "ceiling": interval(best_B3C, miou, n),
        "miou_of_ceiling": interval(
            both_BP3C, lambda x: miou(x[:, 0]) / miou(x[:, 1]), n
        ),
    }
    if edges_BCK.any():
        found["boundary_f1"] = interval(edges_BCK, lambda x: boundary_f1(x.sum(0)), n)
    shown_BC = made_B3C[:, 1] > 0  # by the truth
    for label, name in enumerate(classes):
        if shown_BC[:, label].any():
            # Only pictures that have to do with the class: a sample without any of
            # them has no IoU.
            mine = made_B3C[:, :, label].any(1)
            found[f"iou/{name}"] = interval(
                made_B3C[mine],
                lambda x, label=label: float(iou(x)[label]),
                int(shown_BC[:, label].sum()),
                np.flatnonzero(mine).tolist(),
            )
    return found


def areas(truth_BYX: np.ndarray, made_BYX: np.ndarray, classes: int) -> np.ndarray:
    """Pixels of every class in both masks of a picture, in the true and in the made
    one: int64 [B, 3, C]."""
    truth_BYX, made_BYX = np.asarray(truth_BYX), np.asarray(made_BYX)
    if truth_BYX.shape != made_BYX.shape or truth_BYX.ndim != 3 or not truth_BYX.size:
        raise ValueError(
            f"masks [B, Y, X] of {list(made_BYX.shape)} for true ones of "
            f"{list(truth_BYX.shape)}: they must match, and there must be some"
        )
    for what, labels in (("true", truth_BYX), ("made", made_BYX)):
        if labels.dtype.kind not in "iu" or not (
            0 <= labels.min() <= labels.max() < classes
        ):
            raise ValueError(
                f"{what} masks have {labels.dtype} labels from {labels.min()} to "
                f"{labels.max()}: integers in [0, {classes}) have a class"
            )
    B = len(truth_BYX)
    first_B11 = np.arange(B).reshape(B, 1, 1) * (classes + 1)
    both_BYX = np.where(truth_BYX == made_BYX, truth_BYX, classes)
    counts = [
        np.bincount((first_B11 + x).ravel(), minlength=B * (classes + 1))
        for x in (both_BYX, truth_BYX, made_BYX)
    ]
    return np.stack(counts).reshape(3, B, -1).swapaxes(0, 1)[..., :classes]


def iou(areas_B3C: np.ndarray) -> np.ndarray:
    """Intersection over union of each class, pictures added up, float64 [C]; nan where
    it has no pixel, true or made."""
    both_C, true_C, made_C = areas_B3C.sum(0)
    either_C = true_C + made_C - both_C
    return np.where(either_C > 0, both_C / np.maximum(either_C, 1), np.nan)


def miou(areas_B3C: np.ndarray) -> float:
    """Mean IoU over the classes that have a pixel, true or made."""
    return float(np.nanmean(iou(areas_B3C)))


def boundary_counts(
    truth_BYX: np.ndarray, made_BYX: np.ndarray, classes: int, tolerance: float
) -> np.ndarray:
    """int64 [B, C - 1, 4] of every class but the background, whose boundary is theirs.

    Boundary pixels of the made mask, those of them within `tolerance` pixels of the
    true boundary, and the same the other way round. A pixel of the class is on its
    boundary if one of its four neighbours is of another class; the picture's border
    is no boundary.
    """
    reach = int(tolerance)
    offset = np.arange(-reach, reach + 1)
    disk_YX = offset[:, None] ** 2 + offset**2 <= tolerance**2
    counts_BCK = np.zeros((len(truth_BYX), classes - 1, 4), np.int64)
    for label in range(1, classes):
        regions = [np.asarray(x) == label for x in (made_BYX, truth_BYX)]
        if not any(region.any() for region in regions):
            continue
        edges = [boundary(region) for region in regions]
        near = [ndimage.binary_dilation(edge, disk_YX[None]) for edge in edges]
        matched = edges[0] & near[1], edges[1] & near[0]
        for k, pixels in enumerate((edges[0], matched[0], edges[1], matched[1])):
            counts_BCK[:, label - 1, k] = pixels.sum((1, 2))
    return counts_BCK


def boundary(region_BYX: np.ndarray) -> np.ndarray:
    """The pixels of regions bool [B, Y, X] that touch, by a side, a pixel outside."""
    cross = ndimage.generate_binary_structure(2, 1)[None]
    inside_BYX = ndimage.binary_erosion(region_BYX, cross, border_value=1)
    return region_BYX & np.logical_not(inside_BYX)


def boundary_f1(counts_CK: np.ndarray) -> float:
    """Mean over classes of the F1 of boundary precision and recall (Csurka et al.,
    BMVC 2013, there per picture), of `boundary_counts` added up over pictures.

    Classes without any boundary are left out.
    """
    made_C, right_C, true_C, met_C = counts_CK.T
    precision_C, recall_C = (
        right_C / np.maximum(made_C, 1),
        met_C / np.maximum(true_C, 1),
    )
    total_C = np.maximum(precision_C + recall_C, 1e-12)
    f1_C = 2 * precision_C * recall_C / total_C
    return float(f1_C[made_C + true_C > 0].mean())
