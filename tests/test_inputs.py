"""Pictures and masks as people have them: taken as they are meant, or refused."""

import numpy as np
import pytest
from PIL import Image as Pillow

from cm3leon_jax.inputs import mask_of, pillow

PICTURE = Pillow.new("RGB", (6, 4), "red")
INSIDE = np.zeros((4, 6), bool)
INSIDE[1:3, 2:5] = True


@pytest.mark.parametrize("white", [1, 255])
def test_masks_of_numbers_are_those_of_truth_values(white):
    numbers = INSIDE * np.uint8(white)
    for mask in (INSIDE, numbers, Pillow.fromarray(numbers)):
        np.testing.assert_array_equal(mask_of(mask, PICTURE, 0), INSIDE)
    np.testing.assert_array_equal(mask_of(INSIDE[..., None], PICTURE, 0), INSIDE)
    with pytest.raises(ValueError, match="mask 2 is empty"):
        mask_of(numbers & 0, PICTURE, 2)
    with pytest.raises(ValueError, match=r"mask 0 is float64 \[4, 6\]: give bool or u"):
        mask_of(INSIDE * 1.0, PICTURE, 0)


def test_what_is_transparent_is_in_no_mask():
    white = np.full((4, 6, 4), 255, np.uint8)
    white[..., 3] = INSIDE * 255
    mask = Pillow.fromarray(white)
    palette = Pillow.fromarray(INSIDE * np.uint8(1), "P")
    palette.putpalette([255, 255, 255, 255, 255, 0])
    palette.info["transparency"] = 0
    for some in (mask, mask.convert("LA"), palette):
        np.testing.assert_array_equal(mask_of(some, PICTURE, 0), INSIDE)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_a_picture_without_pixels_is_refused(size):
    with pytest.raises(ValueError, match="picture 3 has .* pixels: none at all"):
        pillow(Pillow.new("RGB", size), 3)
