"""The Fréchet distance between two sets of features, as if each were Gaussian.

Heusel et al. 2017 (arXiv:1706.08500): |m - n|² + tr(S + T - 2 √(ST)) of means m, n and
covariances S, T. Only with the features of the standard Inception weights is it the
FID (`Features.key`). Means and covariances are added up in float64, batch by batch, so
that any number of pictures needs the memory of a few matrices.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cm3leon_jax.evaluation.protocol import Score

PARTS = 10  # disjoint subsets that tell how far a distance spreads
_ROWS = 8192  # features that are added up at a time


@dataclass(frozen=True)
class Moments:
    """Of `count` features: their `mean` [E] and `scatter` [E, E], the sum of outer
    products of what they differ from it by. float64."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def empty(cls, width: int) -> Moments:
        return cls(0, np.zeros(width), np.zeros((width, width)))

    def add(self, features_BE: np.ndarray) -> Moments:
        """With more features; ValueError where they have another width or are not
        finite."""
        x_BE = np.asarray(features_BE, np.float64)
        if x_BE.ndim != 2 or x_BE.shape[1] != len(self.mean):
            raise ValueError(
                f"features {list(x_BE.shape)} are not {len(self.mean)} wide"
            )
        if not np.isfinite(x_BE).all():
            raise ValueError("features that are not finite have no distribution")
        if not len(x_BE):
            return self
        mean = x_BE.mean(0)
        x_BE = x_BE - mean
        return self.merge(Moments(len(x_BE), mean, x_BE.T @ x_BE))

    def merge(self, other: Moments) -> Moments:
        """Of both together (Chan et al. 1979): sums of squares would cancel."""
        if len(self.mean) != len(other.mean):
            raise ValueError(f"widths {len(self.mean)} and {len(other.mean)} differ")
        if not other.count:
            return self
        count = self.count + other.count
        apart = other.mean - self.mean
        weight = self.count * other.count / count
        return Moments(
            count,
            self.mean + apart * (other.count / count),
            self.scatter + other.scatter + weight * np.outer(apart, apart),
        )

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased [E, E]; ValueError of fewer than 2 features."""
        if self.count < 2:
            raise ValueError(f"{self.count} pictures have no covariance: 2 or more do")
        return self.scatter / (self.count - 1)


def moments(batches: Iterable[np.ndarray], width: int) -> Moments:
    """Of all features together."""
    return subsets(batches, width, 1)[0]


def subsets(
    batches: Iterable[np.ndarray], width: int, parts: int = PARTS
) -> list[Moments]:
    """Moments of disjoint subsets: feature i of all is in part i modulo `parts`."""
    made, start = [Moments.empty(width)] * parts, 0
    for features_BE in _blocks(batches):
        part_B = (start + np.arange(len(features_BE))) % parts
        made = [m.add(features_BE[part_B == i]) for i, m in enumerate(made)]
        start += len(features_BE)
    return made


def _blocks(batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Many batches as one: a matrix is added up as often as there are blocks."""
    waiting: list[np.ndarray] = []
    for batch in batches:
        waiting.append(batch)
        if sum(map(len, waiting)) >= _ROWS:
            yield np.concatenate(waiting)
            waiting.clear()
    if waiting:
        yield np.concatenate(waiting)


def score(made: Sequence[Moments], reference: Moments) -> Score:
    """The distance of all `made` together from the reference.

    `spread` is the standard deviation of the distances of the disjoint subsets, each
    of a share of the pictures; the 95 % interval is ± 1.96 spread / √subsets, since the
    variance falls with their number. (Few pictures are further away on average, so the
    mean of the subsets is no estimate of the value.) ValueError of fewer than two
    pictures a subset.
    """
    whole = functools.reduce(Moments.merge, made)
    if min(part.count for part in made) < 2:
        raise ValueError(
            f"{whole.count} pictures are too few for a distance and its spread over "
            f"{len(made)} subsets: score at least {2 * len(made)}"
        )
    root = _root(reference.covariance)
    value = distance(whole, reference, root)
    spread = float(np.std([distance(m, reference, root) for m in made], ddof=1))
    half = 1.96 * spread / len(made) ** 0.5
    return {
        "value": round(value, 5),
        "low": round(max(value - half, 0.0), 5),
        "high": round(value + half, 5),
        "n": whole.count,
        "spread": round(spread, 5),
    }


def distance(a: Moments, b: Moments, root_b: np.ndarray | None = None) -> float:
    """The squared Fréchet distance, which is what everybody reports; `root_b` is that
    of the covariance of b where it is known."""
    root_b = _root(b.covariance) if root_b is None else root_b
    if len(a.mean) != len(b.mean):
        raise ValueError(f"features {len(a.mean)} and {len(b.mean)} wide: not the same")
    # tr √(ST) is the sum of the singular values of √S √T, which are real whatever the
    # rank; the square root of the product itself is not.
    cross = np.linalg.svd(_root(a.covariance).T @ root_b, compute_uv=False).sum()
    apart = a.mean - b.mean
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return max(float(apart @ apart + traces - 2 * cross), 0.0)


def _root(covariance_EE: np.ndarray) -> np.ndarray:
    """R [E, rank] with R Rᵀ the covariance: directions whose variance is not above
    rounding are left out, since their square root would be far above it."""
    value_E, vector_EE = np.linalg.eigh(covariance_EE)
    least = value_E[-1] * len(value_E) * np.finfo(np.float64).eps
    kept = value_E > max(least, 0.0)
    return vector_EE[:, kept] * np.sqrt(value_E[kept])
