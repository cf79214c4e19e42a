"""Regions of a picture on the grid of its image codes; numpy only.

A pixel mask covers every code cell that it touches, and each run of covered cells
within a row of the grid is one span with its own sentinel (design section 2.13):

```
cells  . # # .      runs  [1, 3)
       . # # #            [5, 8)
       . . . .
```
"""

from __future__ import annotations

import numpy as np

GREY = 128  # what a hidden cell looks like to the image encoder


def cells(mask_YX: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Bool pixel mask [Y, X] (True = hidden) -> bool [Yg, Xg] of the touched cells.

    Raises ValueError where the grid does not divide the mask.
    """
    mask_YX = np.asarray(mask_YX)
    if mask_YX.dtype != np.bool_ or mask_YX.ndim != 2:
        raise ValueError(
            f"a mask is bool [Y, X], got {mask_YX.dtype} {list(mask_YX.shape)}"
        )
    height, width = _cell_size(mask_YX.shape, grid)
    blocks = mask_YX.reshape(grid[0], height, grid[1], width)
    return np.asarray(blocks.any(axis=(1, 3)))


def blank(images_BYXC: np.ndarray, cells_BYgXg: np.ndarray) -> np.ndarray:
    """Uint8 pictures [B, Y, X, 3] with their hidden cells painted mid-grey.

    Done before encoding: an encoder that looks around would otherwise spread hidden
    content into the visible codes. `cells_BYgXg` is bool, True = hidden.
    """
    images_BYXC, cells_BYgXg = np.asarray(images_BYXC), np.asarray(cells_BYgXg)
    if cells_BYgXg.dtype != np.bool_ or cells_BYgXg.ndim != 3:
        raise ValueError("cells must be bool [B, Yg, Xg]")
    if images_BYXC.ndim != 4 or len(images_BYXC) != len(cells_BYgXg):
        raise ValueError(
            f"{list(images_BYXC.shape)} pictures do not go with "
            f"{list(cells_BYgXg.shape)} cells"
        )
    height, width = _cell_size(images_BYXC.shape[1:3], cells_BYgXg.shape[1:])
    hidden_BYX = cells_BYgXg.repeat(height, axis=1).repeat(width, axis=2)
    grey = np.asarray(GREY, images_BYXC.dtype)
    return np.where(hidden_BYX[..., None], grey, images_BYXC)


def runs(cells_YgXg: np.ndarray) -> np.ndarray:
    """Bool [Yg, Xg] -> int32 [runs, 2]: (start, stop) of each row's runs of hidden
    cells, as offsets into the picture's codes in raster order."""
    height, width = cells_YgXg.shape
    padded = np.zeros((height, width + 2), np.int8)
    padded[:, 1:-1] = cells_YgXg
    steps = np.diff(padded, axis=1)  # [Yg, Xg + 1]; a run never wraps round a row's end
    row, start = np.nonzero(steps == 1)
    _, stop = np.nonzero(steps == -1)
    return np.stack([row * width + start, row * width + stop], axis=1).astype(np.int32)


def _cell_size(shape: tuple[int, ...], grid: tuple[int, ...]) -> tuple[int, int]:
    if shape[0] % grid[0] or shape[1] % grid[1]:
        raise ValueError(
            f"{shape[0]}x{shape[1]} pixels do not divide into {grid[0]}x{grid[1]} "
            "cells: use pictures of the image tokenizer's size"
        )
    return shape[0] // grid[0], shape[1] // grid[1]
