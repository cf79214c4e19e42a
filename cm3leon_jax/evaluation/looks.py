"""Measures of pictures that no oracle can read: pixels, edges, features.

Pictures are uint8 [Y, X, 3] of one size. Features are those of EfficientNet-Lite0 with
ImageNet weights (extra `features`): scores by them say how it sees pictures, no more.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image as Pillow
from scipy import ndimage

from cm3leon_jax.data import controls
from cm3leon_jax.interop import efficientnet
from cm3leon_jax.models.efficientnet import EfficientNetLite0
from cm3leon_jax.models.vqgan import to_float

CHOICES = 10  # pictures among which the right one is to be found
_SIDE, _BATCH = 96, 64  # of what the network sees
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


def features(pictures: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """What is shown, [B, 1280] of length 1, and how it is drawn, [B, 80]: mean and
    deviation of the two finest feature maps over the picture."""
    network, shown, drawn = _network(), [], []
    side = (_SIDE, _SIDE)
    small = [
        np.asarray(Pillow.fromarray(x).resize(side, Pillow.Resampling.BICUBIC))
        for x in pictures
    ]
    for start in range(0, len(small), _BATCH):
        part = small[start : start + _BATCH]
        filled = np.stack(part + part[:1] * (_BATCH - len(part)))
        content, style = _features(network, filled)
        shown.append(np.asarray(content)[: len(part)])
        drawn.append(np.asarray(style)[: len(part)])
    content_BE = np.concatenate(shown)
    norm_B1 = np.linalg.norm(content_BE, axis=1, keepdims=True)
    return content_BE / np.maximum(norm_B1, 1e-9), np.concatenate(drawn)


@functools.cache
def _network() -> EfficientNetLite0:
    return efficientnet.from_arrays(efficientnet.read(efficientnet.weights_file()))


@jax.jit
def _features(network: EfficientNetLite0, images_BYXC: jax.Array):
    maps = network(to_float(images_BYXC))
    content_BE = jax.nn.relu6(network.head(maps[-1])).mean((1, 2))
    parts = [f(x, axis=(1, 2)) for x in maps[:2] for f in (jnp.mean, jnp.std)]
    return content_BE, jnp.concatenate(parts, axis=1)


def found_among(
    made_BE: np.ndarray,
    wanted_BE: np.ndarray,
    names: Sequence[Hashable],
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
