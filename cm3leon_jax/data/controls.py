"""Pictures -> the control pictures of structure control (paper 1.12, Table 5).

Edges are scikit-image's Canny detector: the well-kept implementation of Python's array
libraries, a tenth of OpenCV's size. It comes with the extra `controls`.
"""

from __future__ import annotations

import colorsys

import numpy as np
from scipy import ndimage

# Of gradients of channels in [0, 1]; faint shading is no edge.
_LOW, _HIGH = 0.08, 0.2
_WOBBLE = 0.02  # how far a scribbled line strays, of the picture's side
_GOLDEN = 0.618034  # turns of the colour wheel between labels: none meet, for any count


def edges(picture_YXC: np.ndarray, *, sigma: float = 0.7) -> np.ndarray:
    """Uint8 [Y, X, 3] -> its Canny edges, white on black, uint8 [Y, X, 3].

    An edge of any channel is an edge: red and green of equal lightness have a border.
    sigma: blur before, in pixels. Raises ModuleNotFoundError without scikit-image.
    """
    return _white(_lines(picture_YXC, sigma))


def scribble(picture_YXC: np.ndarray, seed: int) -> np.ndarray:
    """As a child would draw it: its main lines, thick and unsteady; uint8 [Y, X, 3].

    A pure function of the picture and the seed. Raises what `edges` raises.
    """
    size = picture_YXC.shape[:2]
    scale = max(size) / 32
    grey = picture_YXC.mean(axis=2, keepdims=True)  # single lines, the strong ones
    lines = _lines(grey, 1.2 * max(1.0, scale**0.5))
    rng = np.random.default_rng(seed)
    grid = np.indices(size).astype(np.float64)
    for axis in range(2):
        drift = ndimage.gaussian_filter(rng.standard_normal(size), max(size) / 8)
        grid[axis] += drift / (drift.std() + 1e-9) * _WOBBLE * max(size)
    moved = ndimage.map_coordinates(lines.astype(np.float32), grid, order=1) > 0.3
    if scale >= 3:  # in smaller pictures a line is thick enough
        moved = ndimage.binary_dilation(moved, iterations=round(scale / 3))
    return _white(moved)


def class_picture(mask_YX: np.ndarray, classes: int) -> np.ndarray:
    """Labels in [0, classes) as `class_colours`, uint8 [Y, X, 3]; else ValueError."""
    if mask_YX.min() < 0 or mask_YX.max() >= classes:
        raise ValueError(
            f"class map has labels {mask_YX.min()} … {mask_YX.max()}, there are "
            f"{classes} classes: 0 … {classes - 1}"
        )
    return class_colours(classes)[mask_YX]


def class_colours(classes: int) -> np.ndarray:
    """Uint8 [classes, 3]: black for label 0, then hues, bright and dark in turn.

    A label's colour does not depend on how many there are.
    """
    colours = [(0.0, 0.0, 0.0)]
    for label in range(classes - 1):
        value = (1.0, 0.6)[label % 2]
        colours.append(colorsys.hsv_to_rgb(label * _GOLDEN % 1, 1.0, value))
    return np.rint(np.array(colours[:classes]) * 255).astype(np.uint8)


def _lines(picture_YXC: np.ndarray, sigma: float) -> np.ndarray:
    try:
        from skimage import feature
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "edges are found by scikit-image, which is not installed: "
            'pip install "cm3leon-jax[controls]"'
        ) from None
    values = picture_YXC.astype(np.float64) / 255
    found = [
        feature.canny(
            values[..., channel],
            sigma=sigma,
            low_threshold=_LOW,
            high_threshold=_HIGH,
            mode="nearest",
        )
        for channel in range(values.shape[2])
    ]
    return np.logical_or.reduce(found)


def _white(lines_YX: np.ndarray) -> np.ndarray:
    return np.repeat(lines_YX[..., None].astype(np.uint8) * 255, 3, axis=2)
