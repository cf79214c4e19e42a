"""What callers hand in, made sure of: lists, pictures, masks, boxes and regions.

Every function raises ValueError that names which entry is wrong and what to give.
"""

from __future__ import annotations

import itertools
import math
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow
from PIL import ImageOps

from cm3leon_jax.data.documents import Document

Picture = Pillow.Image | np.ndarray
Box = Sequence[int]  # x0, y0, x1, y1 in pixels; x1 and y1 are outside
Region = np.ndarray | Pillow.Image | Box  # a bool mask [Y, X] (or its image), or a box


def listed(values: Iterable[Any], kind: type | None, name: str) -> list[Any]:
    """Any iterable as a list of at least one entry, all of a type (None: of any)."""
    single = isinstance(values, (str, bytes, Document, Pillow.Image)) or (
        isinstance(values, np.ndarray) and values.dtype == np.uint8 and values.ndim < 4
    )
    values = [] if single or not isinstance(values, Iterable) else list(values)
    if not values:
        raise ValueError(f"{name} is a list with at least one entry")
    for i, value in enumerate(values):
        if kind is not None and not isinstance(value, kind):
            raise ValueError(
                f"{name}[{i}] is {type(value).__name__}, not {kind.__name__}"
            )
    return values


def as_many(values: Iterable[Any], count: int, name: str, of: str) -> list[Any]:
    """Any iterable as a list of `count` entries, one for each of something else."""
    single = isinstance(values, (str, bytes)) or not isinstance(values, Iterable)
    values = [values] if single else list(values)
    if single or len(values) != count:
        raise ValueError(f"{count} {of} need as many {name}, not {len(values)}")
    return values


def written(texts: Iterable[str], name: str) -> list[str]:
    """Texts that say something: at least one, none empty."""
    texts = listed(texts, str, name)
    for i, text in enumerate(texts):
        if not text.strip():
            raise ValueError(f"{name.removesuffix('s')} {i} is empty: say what to do")
    return texts


def pillow(image: Any, number: int) -> Pillow.Image:
    """A picture as PIL holds it, upright: turned as its EXIF orientation says."""
    if isinstance(image, Pillow.Image):
        if not image.width * image.height:
            raise ValueError(f"picture {number} has {image.size} pixels: none at all")
        try:
            return ImageOps.exif_transpose(image)
        except Exception as error:  # damaged files raise a dozen unrelated types
            raise ValueError(f"picture {number} cannot be read: {error}") from error
    if isinstance(image, str | Path):
        raise ValueError(
            f"picture {number} is {str(image)!r}: open it with PIL.Image.open"
        )
    array = np.asarray(image)
    if (
        array.dtype != np.uint8
        or array.size == 0
        or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4)))
    ):
        raise ValueError(
            f"picture {number} is {array.dtype} {list(array.shape)}: give a PIL image "
            "or a uint8 array [Y, X, 3]"
        )
    return Pillow.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


def box(corners: Any, width: int, height: int, name: str) -> tuple[int, int, int, int]:
    """A box that lies inside a picture of so many pixels and is not empty."""
    numbers = list(corners) if isinstance(corners, Iterable) else [corners]
    whole = all(
        isinstance(n, int | float | np.number) and float(n).is_integer()
        for n in numbers
    )
    if isinstance(corners, str) or len(numbers) != 4 or not whole:
        raise ValueError(
            f"{name}={reprlib.repr(corners)}: give four whole pixels, x0, y0, x1, y1"
        )
    x0, y0, x1, y1 = (int(n) for n in numbers)
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise ValueError(
            f"{name}={(x0, y0, x1, y1)}: x0 < x1 and y0 < y1 inside {width}x{height} "
            "pixels"
        )
    return x0, y0, x1, y1


def placed(
    things: Any, side: int, name: str
) -> list[tuple[str, tuple[int, int, int, int]]]:
    """Phrases, each with its box in a square picture of `side` pixels; at least one."""
    found = []
    for n, pair in enumerate(listed(things, None, name)):
        where = f"{name}[{n}]"
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"{where}={pair!r}: give (phrase, (x0, y0, x1, y1))")
        phrase, corners = pair
        if not isinstance(phrase, str) or not phrase.strip():
            raise ValueError(f"{where}: the phrase {phrase!r} says nothing")
        found.append((phrase, box(corners, side, side, where)))
    return found


def mask_of(region: Any, picture: Pillow.Image, number: int) -> np.ndarray:
    """A region of an upright picture as a mask of its own pixels: bool [Y, X].

    It is a mask already, bool or uint8 (or a PIL image of one), of which neither black
    nor what is transparent is in the region, or a box.
    """
    wanted = (picture.height, picture.width)
    if isinstance(region, Pillow.Image):
        region = pillow(region, number)
        if region.has_transparency_data:
            black = Pillow.new("RGBA", region.size, (0, 0, 0, 255))
            region = Pillow.alpha_composite(black, region.convert("RGBA"))
        region = np.asarray(region.convert("L"))
    if isinstance(region, np.ndarray) and region.shape[2:] == (1,):
        region = region[..., 0]
    if isinstance(region, np.ndarray) and region.ndim > 1:
        region = region > 0 if region.dtype == np.uint8 else region
        if region.dtype != np.bool_ or region.shape != wanted:
            raise ValueError(
                f"mask {number} is {region.dtype} {list(region.shape)}: give bool or "
                f"uint8 {list(wanted)}, the picture's own size"
            )
        if not region.any():
            raise ValueError(f"mask {number} is empty: nothing to regenerate")
        return region
    x0, y0, x1, y1 = box(region, picture.width, picture.height, f"box {number}")
    mask = np.zeros(wanted, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def touched(mask_YX: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """A mask of any size -> bool [Yg, Xg]: the cells of its centred square in which
    any pixel is set, be it by a corner."""
    side, cells = min(mask_YX.shape), mask_YX
    for axis, count in enumerate(grid):
        start = (mask_YX.shape[axis] - side) / 2
        edges = start + side * np.arange(count + 1) / count
        cells = np.stack(
            [
                cells.take(range(math.floor(low), math.ceil(high)), axis).any(axis)
                for low, high in itertools.pairwise(edges)
            ],
            axis,
        )
    return cells
