"""Texts, pictures and documents -> vectors that the memory bank compares.

The vector of a document is the normalised mean of the normalised embeddings of its
texts and pictures (paper section 1.8). Its signature, by which near-duplicates are
known, is the embedding of its pictures alone (of its texts where it has none): the mean
is as near to another picture of the same thing as to a copy of the same picture. What
embeds them is a pair of functions, so that a dual encoder trained here, a CLIP and a
pair of frozen networks are all the same to the bank (`encoders.py` makes them).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image as Pillow

from cm3leon_jax.data.documents import Document

_TINY = 1e-6  # a mean this short has no direction


class Embedder:
    """Two functions into one space; numpy in, float32 [B, E] of length 1 out.

    `name` says which encoder this is, in a few letters that no other has: vectors of
    two embedders may be compared only where their names are the same. `size` is E.
    `texts` maps strings, `images` uint8 [B, Y, X, 3] of `image_size` pixels a side.
    """

    def __init__(
        self,
        *,
        name: str,
        size: int,
        image_size: int,
        texts: Callable[[list[str]], np.ndarray],
        images: Callable[[np.ndarray], np.ndarray],
    ):
        self.name, self.size, self.image_size = name, size, image_size
        self._texts, self._images = texts, images

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Strings -> [B, E]; an empty list gives [0, E]."""
        texts = list(texts)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"text {i} is {type(text).__name__}, not a string")
        if not texts:
            return np.zeros((0, self.size), np.float32)
        return self._checked(self._texts(texts), len(texts), "texts")

    def images(self, images: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
        """Square uint8 pictures [B, Y, X, 3] of any size -> [B, E].

        They are resized (bicubic, as CLIP's were) to the encoder's side.
        """
        if not len(images):
            return np.zeros((0, self.size), np.float32)
        return self._checked(
            self._images(np.stack([self._fitted(i, x) for i, x in enumerate(images)])),
            len(images),
            "pictures",
        )

    def documents(self, documents: Sequence[Document]) -> tuple[np.ndarray, np.ndarray]:
        """Documents -> vectors, the normalised mean over kinds of segments, and
        signatures, of the pictures or else of the texts: both [B, E].

        Several texts (or pictures) of a document count together as much as one. One
        without texts, or without pictures, has the vector of what it has. ValueError
        names a document that has neither.
        """
        texts = [document.texts for document in documents]
        images = [document.pictures for document in documents]
        text_BE = self._means(texts, self.texts)
        image_BE = self._means(images, self.images)
        total_BE = text_BE + image_BE
        for i in np.flatnonzero(np.linalg.norm(total_BE, axis=1) < _TINY).tolist():
            raise ValueError(
                f"document {documents[i].id!r} has neither text nor a picture in "
                "pixels to embed"
            )
        pictured_B1 = np.array([bool(part) for part in images], bool)[:, None]
        return normalised(total_BE), np.where(pictured_B1, image_BE, text_BE)

    def _means(
        self, parts: list[list[Any]], embed: Callable[[list[Any]], np.ndarray]
    ) -> np.ndarray:
        """The direction of each list's mean embedding, zero where a list is empty."""
        sum_BE = np.zeros((len(parts), self.size), np.float32)
        owner = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        np.add.at(sum_BE, owner, embed([x for part in parts for x in part]))
        return normalised(sum_BE)

    def _fitted(self, i: int, image: np.ndarray) -> np.ndarray:
        image, side = np.asarray(image), self.image_size
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"picture {i} is {image.dtype} {list(image.shape)}: the encoder reads "
                "uint8 [Y, X, 3]"
            )
        if image.shape[0] != image.shape[1]:
            raise ValueError(
                f"picture {i} is {image.shape[1]}x{image.shape[0]} pixels: cut it to a "
                "square first (data/pictures.py: fit)"
            )
        if image.shape[0] == side:
            return image
        resized = Pillow.fromarray(image).resize(
            (side, side), Pillow.Resampling.BICUBIC
        )
        return np.asarray(resized)

    def _checked(self, vectors: np.ndarray, count: int, what: str) -> np.ndarray:
        vectors_BE = np.asarray(vectors, np.float32)
        if vectors_BE.shape != (count, self.size):
            raise ValueError(
                f"encoder {self.name} made {list(vectors_BE.shape)} of {count} {what}, "
                f"not [{count}, {self.size}]"
            )
        bad = np.flatnonzero(~np.isfinite(vectors_BE).all(1))
        if len(bad):
            raise ValueError(
                f"encoder {self.name} made embeddings that are not numbers of "
                f"{len(bad)} {what} (the first is number {bad[0]}): its weights are "
                "damaged or its training diverged"
            )
        return normalised(vectors_BE)


def normalised(x_BE: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; rows of zeros stay."""
    length_B1 = np.linalg.norm(x_BE, axis=1, keepdims=True)
    return x_BE / np.where(length_B1 < _TINY, 1, length_B1)
