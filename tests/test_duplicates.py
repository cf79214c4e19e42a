"""Near-duplicates: copies are found, pictures of other things are not."""

import imagehash
import numpy as np
import own_data
import pytest
from PIL import Image as Pillow
from PIL import ImageEnhance

from cm3leon_jax.data.duplicates import Seen, fingerprint
from cm3leon_jax.data.pictures import read_picture
from cm3leon_jax.data.shapes import ShapesConfig, documents

SIDE = 64


def _copies(picture):
    """Files of one picture, as it goes round the web."""
    small = picture.resize((picture.width // 2, picture.height // 2))
    return {
        "jpeg": own_data.encoded(picture, "JPEG", quality=60),
        "webp": own_data.encoded(picture, "WEBP", quality=70),
        "small": own_data.encoded(small),
        "brighter": own_data.encoded(ImageEnhance.Brightness(picture).enhance(1.05)),
    }


def _print(data):
    return fingerprint(read_picture(data, SIDE))


def test_the_hash_is_that_of_imagehash():
    for seed in range(20):
        array = np.asarray(own_data.picture(seed, 64, 64))
        wanted = int(str(imagehash.phash(Pillow.fromarray(array))), 16)
        assert fingerprint(array)[0] == wanted


def test_copies_are_found_and_others_are_not():
    seen, found, pictures = Seen(4), 0, 40
    for seed in range(pictures):
        picture = own_data.picture(seed, 120, 90)
        data = _print(own_data.encoded(picture))
        assert seen.find(*data) is None
        seen.add(*data, str(seed))
        for copy in _copies(picture).values():
            found += seen.find(*_print(copy)) == str(seed)
    assert found >= 0.97 * 4 * pictures


def test_colours_tell_pictures_apart_that_are_grey_twins():
    red, green = (np.zeros((SIDE, SIDE, 3), np.uint8) for _ in range(2))
    red[20:40, 20:40, 0], green[20:40, 20:40, 1] = 200, 102  # of one lightness
    assert fingerprint(red)[0] == fingerprint(green)[0]
    seen = Seen(4)
    for level in (0, 60, 120, 255):  # flat ones have no frequencies at all
        flat = fingerprint(np.full((SIDE, SIDE, 3), level, np.uint8))
        assert seen.find(*flat) is None
        seen.add(*flat, str(level))
        assert seen.find(*flat) == str(level)
    seen.add(*fingerprint(red), "red")
    assert seen.find(*fingerprint(green)) is None


def test_scenes_of_other_objects_are_not_duplicates():
    seen, lost = Seen(4), 0
    for number, document in zip(
        range(300), documents(ShapesConfig(image_size=64), "train"), strict=False
    ):
        data = fingerprint(document.pictures[0])
        lost += seen.find(*data) is not None
        seen.add(*data, str(number))
    assert lost <= 3


@pytest.mark.parametrize("bits", [0, 3, 4, 10])
def test_bands_find_what_comparing_all_finds(bits):
    rng = np.random.default_rng(bits)
    seen, keys, small = Seen(bits), [], np.zeros((8, 8, 3), np.uint8)
    for number in range(1500):  # more than there is room for at first
        key = int(rng.integers(0, 2**64, dtype=np.uint64))
        if number % 3 == 0 and keys:
            key = keys[int(rng.integers(len(keys)))]
            for bit in rng.choice(64, rng.integers(0, bits + 4), replace=False):
                key ^= 1 << int(bit)
        near = [i for i, k in enumerate(keys) if (k ^ key).bit_count() <= bits]
        assert seen.find(key, small) == (str(near[0]) if near else None)
        seen.add(key, small, str(number))
        keys.append(key)
    with pytest.raises(ValueError, match="bits"):
        Seen(11)
