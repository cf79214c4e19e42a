"""Documents -> token records: ids of the one vocabulary, and the records' bytes.

A record is `text <break> image …` without the outer `<eos>`, and for every picture a
few regions: masks drawn once, with the codes of the picture blanked under them
(design section 2.13).
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import msgpack
import numpy as np

from cm3leon_jax.data.documents import Document, Image, Mask, Text
from cm3leon_jax.data.infill import draw_region
from cm3leon_jax.tokenizers import regions
from cm3leon_jax.vocab import Layout

SCHEMA = "cm3leon_jax/tokens/1"
_DOCUMENTS_AT_ONCE = 256  # their pictures go through the image encoder together


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """A hidden part of one picture of a record.

    segment: which segment the picture is. cells: bool [Yg, Xg], True = hidden. codes:
    int32 [Yg, Xg] of the picture that was blanked under the cells before encoding.
    """

    segment: int
    cells: np.ndarray
    codes: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """One tokenized document.

    tokens: int32 [L], segments joined by `<break>`. bounds: int32 [S, 2], (start, stop)
    of each segment in them.
    """

    id: str
    tokens: np.ndarray
    bounds: np.ndarray
    regions: tuple[Region, ...]


def tokenize(
    documents: Iterable[Document],
    text_tokenizer: Any,
    image_tokenizer: Any,
    layout: Layout,
    regions_per_image: int,
    seed: int,
) -> Iterator[Record]:
    """Documents -> records, in order.

    Region masks depend on `seed` and the document's id alone. Segments that already
    hold codes are not encoded again (and have no regions: their pixels are gone).
    Raises ValueError naming the document for pictures of another size or grid.
    """
    check_sizes(text_tokenizer, image_tokenizer, layout)
    stream = iter(documents)
    while chunk := list(itertools.islice(stream, _DOCUMENTS_AT_ONCE)):
        yield from _tokenize_chunk(
            chunk, text_tokenizer, image_tokenizer, layout, regions_per_image, seed
        )


def check_sizes(text_tokenizer: Any, image_tokenizer: Any, layout: Layout) -> None:
    """ValueError where the tokenizers and the layout are of different systems."""
    for what, size, room in (
        ("text tokenizer", text_tokenizer.size, len(layout.text)),
        ("image tokenizer", image_tokenizer.codebook, len(layout.image)),
    ):
        if size != room:
            raise ValueError(
                f"the {what} has {size} ids, but the vocabulary holds {room}: they are "
                "of different systems; train it with the sizes of this config"
            )


def _tokenize_chunk(
    chunk, text_tokenizer, image_tokenizer, layout, regions_per_image, seed
) -> Iterator[Record]:
    grid = tuple(image_tokenizer.grid)
    pictures, hidden = [], []  # all that must be encoded, in order of use
    for document in chunk:
        # A region must leave a sentinel for the text.
        rng = np.random.default_rng([seed, *_name_words(document.id)])
        for segment in document.segments:
            if isinstance(segment, Image) and segment.codes is None:
                _check_size(document, segment.array, image_tokenizer)
                pictures += [segment.array] * (1 + regions_per_image)
                hidden.append(np.zeros(grid, bool))
                hidden += [
                    draw_region(rng, grid, len(layout.sentinels) - 1)
                    for _ in range(regions_per_image)
                ]
    encoded = iter(())
    if pictures:
        cells = np.stack(hidden)
        codes = image_tokenizer.encode(regions.blank(np.stack(pictures), cells))
        encoded = iter(zip(cells, np.asarray(codes, np.int32), strict=True))
    for document in chunk:
        yield _record(
            document, text_tokenizer, layout, grid, encoded, regions_per_image
        )


def _record(
    document, text_tokenizer, layout, grid, encoded, regions_per_image
) -> Record:
    parts, bounds, drawn, position = [], [], [], 0
    for number, segment in enumerate(document.segments):
        if isinstance(segment, Text):
            ids = layout.text_ids(text_tokenizer.encode(segment.text))
        elif isinstance(segment, Mask):
            if segment.codes is None:
                raise ValueError(f"document {document.id!r}: a mask without class ids")
            ids = layout.class_ids(segment.codes).ravel()
        else:
            codes = segment.codes
            if codes is None:
                _, codes = next(encoded)
                for _ in range(regions_per_image):
                    drawn.append(Region(number, *next(encoded)))
            if codes.shape != grid:
                raise ValueError(
                    f"document {document.id!r}: codes of grid {codes.shape}, the image "
                    f"tokenizer's is {grid}"
                )
            ids = layout.image_ids(codes).ravel()
        if number:
            parts.append(np.array([layout.brk], np.int32))
            position += 1
        parts.append(ids)
        bounds.append((position, position + len(ids)))
        position += len(ids)
    if not position:
        raise ValueError(f"document {document.id!r} is empty")
    tokens = np.concatenate(parts)
    return Record(document.id, tokens, np.array(bounds, np.int32), tuple(drawn))


def _check_size(document: Document, picture: Any, image_tokenizer: Any) -> None:
    size = image_tokenizer.image_size
    if picture.shape[:2] != (size, size):
        raise ValueError(
            f"document {document.id!r}: a picture of {picture.shape[1]}x"
            f"{picture.shape[0]} pixels, the image tokenizer's size is {size}"
        )


def _name_words(name: str) -> list[int]:
    digest = hashlib.blake2b(name.encode(errors="replace"), digest_size=16).digest()
    return np.frombuffer(digest, np.uint32).tolist()


def to_bytes(record: Record) -> bytes:
    """Record -> msgpack bytes."""
    return msgpack.Packer().pack(
        {
            "schema": SCHEMA,
            "id": record.id,
            "tokens": record.tokens.astype("<i4").tobytes(),
            "bounds": record.bounds.astype("<i4").tobytes(),
            "regions": [
                [
                    region.segment,
                    region.cells.shape,
                    np.packbits(region.cells).tobytes(),
                    region.codes.astype("<i4").tobytes(),
                ]
                for region in record.regions
            ],
        }
    )


def from_bytes(data: bytes) -> Record:
    """Msgpack bytes -> Record; ValueError for bytes of any other schema."""
    try:
        fields = msgpack.unpackb(data)
        schema = fields["schema"]
    except Exception as error:  # msgpack raises a dozen unrelated types
        raise ValueError(f"not a token record ({error!r})") from error
    if schema != SCHEMA:
        raise ValueError(f"record has schema {schema!r}, this program reads {SCHEMA!r}")
    try:
        drawn = []
        for segment, shape, cells, codes in fields["regions"]:
            bits = np.unpackbits(np.frombuffer(cells, np.uint8), count=np.prod(shape))
            codes = np.frombuffer(codes, "<i4").reshape(shape)
            drawn.append(Region(segment, bits.reshape(shape).astype(bool), codes))
        bounds = np.frombuffer(fields["bounds"], "<i4").reshape(-1, 2)
        tokens = np.frombuffer(fields["tokens"], "<i4")
        return Record(fields["id"], tokens, bounds, tuple(drawn))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"damaged token record ({error!r})") from error
