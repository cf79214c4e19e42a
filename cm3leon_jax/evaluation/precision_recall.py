"""How much of what is made is real, and how much of what is real is made.

Precision and recall: Kynkäänniemi et al. 2019 (arXiv:1904.06991); density and coverage:
Naeem et al. 2020 (arXiv:2002.09797). A picture counts as inside a set where it lies in
the ball around one of its members that reaches to the member's k-th neighbour.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cm3leon_jax.evaluation.protocol import Score, interval

NEIGHBOURS = 5
_ROWS = 512  # of distances in memory at a time
_EQUAL = 1e-12  # of squared lengths: what is nearer than rounding is the same


def scores(
    real_ME: np.ndarray, made_NE: np.ndarray, k: int = NEIGHBOURS
) -> dict[str, Score]:
    """`precision`, `recall`, `density`, `coverage`, with intervals over the pictures
    that each counts, the balls staying as they are.

    ValueError where there are no more than k pictures, or features do not match.
    """
    for name, x in (("real", real_ME), ("made", made_NE)):
        if x.ndim != 2 or len(x) <= k or x.shape[1] != real_ME.shape[1]:
            raise ValueError(
                f"{name} features are {list(x.shape)}: needed are more than k={k}, of "
                f"width {real_ME.shape[-1]}"
            )
        if not np.isfinite(x).all():
            raise ValueError(f"{name} features are not finite")
    real_M, made_N = _radii(real_ME, k), _radii(made_NE, k)
    inside = [(d <= real_M).sum(1) for d in _distances(made_NE, real_ME)]
    inside_N = np.concatenate(inside)
    recalled, covered = [], []
    start = 0
    for d in _distances(real_ME, made_NE):
        recalled.append((d <= made_N).any(1))
        covered.append(d.min(1) <= real_M[start : start + len(d)])
        start += len(d)
    values = {
        "precision": inside_N > 0,
        "recall": np.concatenate(recalled),
        "density": inside_N / k,
        "coverage": np.concatenate(covered),
    }
    return {
        key: interval(x.astype(float), np.mean, len(x)) for key, x in values.items()
    }


def _radii(x_NE: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each to its k-th neighbour; the nearest is itself."""
    return np.concatenate([np.partition(d, k)[:, k] for d in _distances(x_NE, x_NE)])


def _distances(a_ME: np.ndarray, b_NE: np.ndarray) -> Iterator[np.ndarray]:
    """Squared, float64, some rows at a time."""
    b_NE = np.asarray(b_NE, np.float64)
    length_N = np.square(b_NE).sum(1)
    for start in range(0, len(a_ME), _ROWS):
        a_BE = np.asarray(a_ME[start : start + _ROWS], np.float64)
        lengths_BN = np.square(a_BE).sum(1)[:, None] + length_N
        distance_BN = lengths_BN - 2 * a_BE @ b_NE.T
        distance_BN[distance_BN < _EQUAL * lengths_BN] = 0.0
        yield distance_BN
