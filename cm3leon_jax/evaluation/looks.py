"""Measures of pictures that no oracle can read: pixels, edges, features.

Pictures are uint8 [Y, X, 3] of one size. Features are those of EfficientNet-Lite0 with
ImageNet weights (extra `features`): scores by them say how it sees pictures, no more.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence

import numpy as np
from scipy import ndimage

from cm3leon_jax.data import controls
from cm3leon_jax.evaluation.features import (
    Features,
    efficientnet_lite0,
    efficientnet_style,
)
from cm3leon_jax.retrieval.embed import normalised

CHOICES = 10  # pictures among which the right one is to be found
_SIDE = 96  # of what the network sees
_STEP = 48  # levels of a channel: farther from the ground is paint


def nearer(made, wanted, other, where_YX: np.ndarray) -> bool:
    """Whether a picture is nearer to `wanted` than to `other` in squared distance."""
    one, two = (
        np.square(made.astype(float) - x)[where_YX].sum() for x in (wanted, other)
    )
    return bool(one < two)


def painted(picture_YXC: np.ndarray, ground: Sequence[int]) -> np.ndarray:
    """Bool [Y, X]: what is not the flat background of this colour."""
    return np.abs(picture_YXC.astype(int) - np.asarray(ground)).max(axis=2) > _STEP


def edge_counts(made_YXC: np.ndarray, true_YXC: np.ndarray) -> tuple[int, ...]:
    """Canny edges as in control pictures: made, of those at most a pixel off a true
    one; true, of those met."""
    edges = [controls.edges(x)[..., 0] > 0 for x in (made_YXC, true_YXC)]
    near = [ndimage.binary_dilation(x, np.ones((3, 3))) for x in edges[::-1]]
    met = [np.logical_and(*both) for both in zip(edges, near, strict=True)]
    return tuple(int(x.sum()) for pair in zip(edges, met, strict=True) for x in pair)


def edge_f1(counts: np.ndarray) -> float:
    """F1 of precision and recall, of `edge_counts` of pictures [B, 4] added up."""
    made, right, true, met = counts.sum(0)
    precision, recall = right / max(made, 1), met / max(true, 1)
    return float(2 * precision * recall / max(precision + recall, 1e-12))


def shown(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """What is shown: float32 [B, 1280] of length 1."""
    return normalised(_networks()[0](pictures))


def drawn(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """How it is drawn: float32 [B, 80]."""
    return _networks()[1](pictures)


@functools.cache
def _networks() -> tuple[Features, Features]:
    return efficientnet_lite0(_SIDE), efficientnet_style(_SIDE)


def found_among(
    made_BE: np.ndarray, wanted_BE: np.ndarray, names: Sequence[Hashable]
) -> np.ndarray:
    """Whether each picture is nearest to its own `wanted` among `CHOICES`, the others
    drawn from those of other names: bool [B], by chance in a tenth. ValueError where
    there are too few others."""
    rng, found = np.random.default_rng(0), []
    for i, made_E in enumerate(made_BE):
        others = [j for j, name in enumerate(names) if name != names[i]]
        if len(others) < CHOICES - 1:
            raise ValueError(
                f"{len(names)} pictures have too few names to choose among {CHOICES}: "
                "give the protocol more documents"
            )
        drawn = rng.choice(others, CHOICES - 1, replace=False)
        found.append(wanted_BE[i] @ made_E > (wanted_BE[drawn] @ made_E).max())
    return np.array(found)


def nearest(
    styles_BE: np.ndarray, known_ME: np.ndarray, names: Sequence[str]
) -> list[str]:
    """The name in `names` [M] whose pictures `known_ME` are nearest on average to each
    of `styles_BE`; every axis counts in units of its deviation."""
    middle, spread = known_ME.mean(0), known_ME.std(0) + 1e-6
    each = np.array(names)
    labels = sorted(set(names))
    scaled = (known_ME - middle) / spread
    centres = np.stack([scaled[each == name].mean(0) for name in labels])
    asked = (styles_BE - middle) / spread
    far = ((asked[:, None] - centres) ** 2).sum(2)
    return [labels[i] for i in far.argmin(1)]
