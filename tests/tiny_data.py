"""Documents and stand-in tokenizers small enough for tests of the data path."""

import numpy as np

from cm3leon_jax import vocab
from cm3leon_jax.data import records
from cm3leon_jax.data.documents import Document, Image, Text
from cm3leon_jax.data.tokenization import Encoders

LAYOUT = vocab.build(text=256, image=64, classes=4, sentinels=12)
GRID = (4, 4)


class ByteTokenizer:
    size = 256

    def encode(self, text):
        return list(text.encode())


class BlockTokenizer:
    """A code is the mean of its 2x2 block plus that of the whole picture: like an
    encoder with attention, it lets hidden pixels change visible codes."""

    image_size, grid, codebook = 8, GRID, 64

    def encode(self, images):
        blocks = np.asarray(images, np.float64).reshape(len(images), 4, 2, 4, 2, 3)
        whole = 16 * blocks.mean(axis=(1, 2, 3, 4, 5))[:, None, None]
        return (blocks.mean(axis=(2, 4, 5)) // 4 + whole).astype(np.int32) % 64


def make_documents(count, seed=0, longest=12):
    """Captions of 1 … `longest` bytes with random 8x8 pictures."""
    rng = np.random.default_rng(seed)
    return [
        Document(
            (
                Text("abcdefghijklmnopqrstuvwxyz"[: rng.integers(1, longest + 1)]),
                Image(rng.integers(0, 256, (8, 8, 3), np.uint8)),
            ),
            id=f"document {i}",
        )
        for i in range(count)
    ]


def tokenize(documents, regions_per_image=2, seed=0, *, layout=LAYOUT, **more):
    encoders = Encoders(ByteTokenizer(), BlockTokenizer(), layout, **more)
    return list(records.tokenize(documents, encoders, regions_per_image, seed))


def build_cache(
    directory, documents, *, shards=2, regions_per_image=2, split="train", **more
):
    records.build(
        *(documents, directory, split, shards),
        encoders=Encoders(ByteTokenizer(), BlockTokenizer(), LAYOUT, **more),
        regions_per_image=regions_per_image,
        seed=0,
    )
    return records.TokenRecords(directory, split, layout=LAYOUT, grid=GRID)
