"""How much of what is made is real, and how much of what is real is made.

Precision and recall: Kynkäänniemi et al. 2019 (arXiv:1904.06991); density and coverage:
Naeem et al. 2020 (arXiv:2002.09797). A picture counts as inside a set where it lies in
the ball around one of its members that reaches to the member's k-th neighbour.

Vectors are float32, as features are made. In memory are those of both sets (of one
twice, while it is read) and the distances of a few rows: about 1 GiB of 30,000.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import tqdm

from cm3leon_jax.evaluation.protocol import Score, interval

Batches = Iterable[np.ndarray]  # of features
NEIGHBOURS = 5
_ROWS = 512  # of distances in memory at a time
_EQUAL = 1e-6  # of squared lengths: what is nearer than rounding is the same


@dataclass(frozen=True)
class Balls:
    """Features [N, E] as seen from `centre` [E], and the squared radius of the ball
    around each, to its k-th neighbour."""

    features: np.ndarray
    radii: np.ndarray
    centre: np.ndarray

    @classmethod
    def around(
        cls, batches: Batches, k: int = NEIGHBOURS, real: Balls | None = None
    ) -> Balls:
        """Of features [B, E] in any number of batches, from the centre of the `real`
        ones. ValueError where they are not finite, no more than k, or of another width.
        """
        x_NE = np.concatenate([np.asarray(x, np.float32) for x in batches])
        width = x_NE.shape[-1] if real is None else len(real.centre)
        right = x_NE.ndim == 2 and len(x_NE) > k and x_NE.shape[1] == width
        if not right or not np.isfinite(x_NE).all():
            raise ValueError(
                f"{'made' if real else 'real'} features {list(x_NE.shape)}: needed are "
                f"more than k={k}, of width {width}, all of them finite"
            )
        centre = x_NE.mean(0) if real is None else real.centre
        x_NE -= centre
        radii_N = np.empty(len(x_NE), np.float32)
        for own, distance_BN in _distances(x_NE, x_NE, "balls"):
            distance_BN.partition(k)  # the nearest of each is itself
            radii_N[own] = distance_BN[:, k]
        return cls(x_NE, radii_N, centre)


def scores(real: Balls, batches: Batches, k: int = NEIGHBOURS) -> dict[str, Score]:
    """`precision`, `recall`, `density`, `coverage` of made features, in batches [B, E],
    with intervals over the pictures that each counts, the balls staying as they are."""
    made = Balls.around(batches, k, real)
    inside_N = np.zeros(len(made.features), np.int64)
    recalled, covered = [], []
    for own, d in _distances(real.features, made.features, "real among made"):
        inside_N += (d <= real.radii[own, None]).sum(0)
        recalled.append((d <= made.radii).any(1))
        covered.append(d.min(1) <= real.radii[own])
    values = {
        "precision": inside_N > 0,
        "recall": np.concatenate(recalled),
        "density": inside_N / k,
        "coverage": np.concatenate(covered),
    }
    return {
        key: interval(x.astype(float), np.mean, len(x)) for key, x in values.items()
    }


def _distances(
    a_ME: np.ndarray, b_NE: np.ndarray, name: str
) -> Iterator[tuple[slice, np.ndarray]]:
    """Squared, some rows of a at a time, and which they are."""
    length_N = np.square(b_NE).sum(1)
    bar = tqdm.tqdm(
        range(0, len(a_ME), _ROWS), name, disable=None, leave=False, delay=1
    )
    for start in bar:
        own = slice(start, start + _ROWS)
        lengths_BN = np.square(a_ME[own]).sum(1)[:, None] + length_N
        distance_BN = a_ME[own] @ b_NE.T
        distance_BN *= -2
        distance_BN += lengths_BN
        lengths_BN *= np.float32(_EQUAL)
        distance_BN[distance_BN < lengths_BN] = 0.0
        yield own, distance_BN
