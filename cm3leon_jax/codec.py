"""Documents, texts and pictures of the outside world <-> ids of the one vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow

from cm3leon_jax import workdir as workdirs
from cm3leon_jax.data import pictures
from cm3leon_jax.data.documents import Document, Image, Text
from cm3leon_jax.tokenizers import regions
from cm3leon_jax.tokenizers.image import ImageTokenizer
from cm3leon_jax.tokenizers.text import TextTokenizer
from cm3leon_jax.vocab import Layout

Picture = Pillow.Image | np.ndarray
HOLE = "<mask>"  # in the text of a document: what is to be written


def load_text_tokenizer(workdir: Path) -> TextTokenizer:
    """The text tokenizer of a work directory, once its stage has finished."""
    workdirs.results(workdir / "text_tokenizer")
    return TextTokenizer.load(workdir / "text_tokenizer" / "model")


def load_image_tokenizer(workdir: Path) -> ImageTokenizer:
    """The image tokenizer of a work directory, once its stage has finished."""
    workdirs.results(workdir / "image_tokenizer")
    return ImageTokenizer.load(workdir / "image_tokenizer")


class Codec:
    """Both tokenizers over one layout.

    Pictures are PIL images or uint8 arrays of any mode and size; they are fitted to the
    image tokenizer's square. Raises ValueError, naming which entry of a list is wrong.
    """

    def __init__(self, layout: Layout, text: TextTokenizer, image: ImageTokenizer):
        for what, size, room in (
            ("text tokenizer", text.size, len(layout.text)),
            ("image tokenizer", image.codebook, len(layout.image)),
        ):
            if size != room:
                raise ValueError(
                    f"the {what} has {size} ids, but the vocabulary holds {room}: they "
                    "are of different systems"
                )
        self.layout, self.text, self.image = layout, text, image
        self.image_tokens = image.grid[0] * image.grid[1]

    def parts(self, document: Document) -> list[np.ndarray | None]:
        """A document as runs of ids, `None` for every hole."""
        parts: list[np.ndarray | None] = []
        for n, segment in enumerate(document.segments):
            if n:
                parts.append(np.array([self.layout.brk], np.int32))
            if isinstance(segment, Text):
                for k, piece in enumerate(segment.text.split(HOLE)):
                    if k:
                        parts.append(None)
                    parts.append(self.layout.text_ids(self.text.encode(piece)))
            elif isinstance(segment, Image):
                codes = segment.codes
                if codes is None:
                    codes = self.image.encode(self.arrays([segment.array]))[0]
                parts.append(self.layout.image_ids(codes).reshape(-1))
            else:
                raise ValueError("this model was not trained on masks")
        return parts

    def ids(self, document: Document) -> np.ndarray:
        parts = self.parts(document)
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            raise ValueError(f"{HOLE} in a document's text is for `infill`")
        return np.concatenate([np.zeros(0, np.int32), *known])

    def document(self, ids: np.ndarray) -> Document:
        """The segments of written ids, pictures as pixels and codes."""
        segments = []
        for run in np.split(ids, np.flatnonzero(ids == self.layout.brk)):
            is_image = np.isin(run, self.layout.image)
            if is_image.sum() == self.image_tokens:
                codes = self.layout.codes(run[is_image]).reshape(self.image.grid)
                array = self.image.decode(codes[None])[0]
                segments.append(Image(array=array, codes=codes))
            elif len(pieces := run[np.isin(run, self.layout.text)]):
                segments.append(Text(self.decode_text(self.layout.pieces(pieces))))
        return Document(tuple(segments))

    def pieces(self, prompt: str, number: int) -> list[int]:
        if not prompt.strip():
            raise ValueError(f"prompt {number} is empty: say what to draw")
        return self.text.encode(prompt)

    def decode_text(self, pieces: np.ndarray) -> str:
        return self.text.decode(pieces.tolist())

    def arrays(self, images: Sequence[Any]) -> np.ndarray:
        size = self.image.image_size
        return np.stack(
            [
                pictures.fit(pillow(image, i), size)
                for i, image in enumerate(listed(images, None, "images"))
            ]
        )

    def cells(self, mask: np.ndarray, image: Any, number: int) -> np.ndarray:
        """A pixel mask -> the cells that it touches."""
        picture = pillow(image, number)
        mask = np.asarray(mask)
        if mask.dtype != np.bool_ or mask.shape != (picture.height, picture.width):
            raise ValueError(
                f"mask {number} is {mask.dtype} {list(mask.shape)}: give bool "
                f"[{picture.height}, {picture.width}], the picture's own size"
            )
        if not mask.any():
            raise ValueError(f"mask {number} is empty: nothing to regenerate")
        # Cropped and resized like the picture; any touched pixel stays touched.
        grey = Pillow.fromarray(mask.astype(np.uint8) * 255)
        fitted = pictures.fit(grey, self.image.image_size, Pillow.Resampling.BOX)
        touched = fitted[..., 0] > 0
        if not touched.any():
            raise ValueError(f"mask {number} lies outside the centre square in use")
        return regions.cells(touched, self.image.grid)

    def paint(self, codes_BYX: np.ndarray) -> list[Pillow.Image]:
        pixels = self.image.decode(np.asarray(codes_BYX, np.int32))
        return [Pillow.fromarray(picture) for picture in pixels]


def listed(values: Sequence[Any], kind: type | None, name: str) -> Sequence[Any]:
    if isinstance(values, (str, Document, Pillow.Image)) or not len(values):
        raise ValueError(f"{name} is a list with at least one entry")
    for i, value in enumerate(values):
        if kind is not None and not isinstance(value, kind):
            raise ValueError(
                f"{name}[{i}] is {type(value).__name__}, not {kind.__name__}"
            )
    return values


def pillow(image: Any, number: int) -> Pillow.Image:
    if isinstance(image, Pillow.Image):
        return image
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(
            f"picture {number} is {array.dtype} {list(array.shape)}: give a PIL image "
            "or a uint8 array [Y, X, 3]"
        )
    return Pillow.fromarray(array)
