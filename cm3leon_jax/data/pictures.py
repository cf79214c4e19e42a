"""Strangers' picture and caption files -> clean arrays and strings, or a reason."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image as Pillow
from PIL import ImageOps

# A header may promise any size; nothing above this is decoded (~200 MB as RGB).
MAX_PIXELS = 40_000_000


def read_picture(data: bytes, size: int) -> np.ndarray:
    """File bytes of any mode and size -> uint8 [size, size, 3].

    EXIF orientation applied, alpha laid over white, 16 bits reduced to 8, the largest
    centred square resized (Lanczos). ValueError says why a file cannot be used.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about odd EXIF, sizes, …
            return _read(data, size)
    except Exception as error:  # damaged files raise a dozen unrelated types
        raise ValueError(f"unusable picture: {error or type(error).__name__}") from None


def read_caption(data: bytes) -> str:
    """UTF-8 bytes -> text without surrounding white space; ValueError if unusable."""
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"caption is not UTF-8: {error}") from None
    if not text:
        raise ValueError("empty caption")
    return text


def _read(data: bytes, size: int) -> np.ndarray:
    picture = Pillow.open(io.BytesIO(data))
    if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(
            f"{picture.width}x{picture.height} pixels are more than {MAX_PIXELS:,}"
        )
    picture.draft(picture.mode, (2 * size, 2 * size))  # JPEG: decode no more than that
    return fit(picture, size)


def fit(
    picture: Pillow.Image,
    size: int,
    resample: Pillow.Resampling = Pillow.Resampling.LANCZOS,
) -> np.ndarray:
    """A picture of any mode and size -> uint8 [size, size, 3]: its centred square."""
    picture = rgb(ImageOps.exif_transpose(picture))
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    # Crop and resize in one step: a 1x10,000 strip must not become 64x640,000.
    box = (left, top, left + side, top + side)
    return np.asarray(picture.resize((size, size), resample, box))


def rgb(picture: Pillow.Image) -> Pillow.Image:
    """A picture of any mode as RGB: 16 bits reduced to 8, alpha laid over white."""
    if picture.mode.startswith("I"):  # 16-bit grey, which convert() would clip
        grey = np.asarray(picture).astype(np.int64).clip(0, 65_535) >> 8
        picture = Pillow.fromarray(grey.astype(np.uint8))
    elif picture.mode == "F":
        raise ValueError("floating-point pictures have no known range: scale to uint8")
    if picture.has_transparency_data:
        alpha = picture.convert("RGBA")
        white = Pillow.new("RGBA", alpha.size, "white")
        picture = Pillow.alpha_composite(white, alpha)
    return picture.convert("RGB")
