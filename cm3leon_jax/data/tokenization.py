"""Documents -> token records: ids of the one vocabulary, and the records' bytes.

A record is `text <break> image …` without the outer `<eos>`, and for every picture a
few regions: masks drawn once, with the codes of the picture blanked under them
(design section 2.13). Of a task example (`tasks.py`) it also has the task's number and
where the answer stands, whose pieces are its own: its text is encoded in parts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
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
    of each segment in them. task: 1, 2, … by the names that `tokenize` was given, 0 for
    none. answers: int32 [A, 2], (start, stop) of what the task moves to the end.
    """

    id: str
    tokens: np.ndarray
    bounds: np.ndarray
    regions: tuple[Region, ...]
    task: int = 0
    answers: np.ndarray = dataclasses.field(
        default_factory=lambda: np.zeros((0, 2), np.int32)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Encoders:
    """All that turns documents into ids. `segmentation` (None: masks must hold their
    class tokens already) has `encode(mask [Y, X]) -> int32 [Ys, Xs]`. `tasks` numbers
    the names in the documents' metadata "task", beginning with 1; without any, that is
    not looked at."""

    text: Any
    image: Any
    layout: Layout
    segmentation: Any = None
    tasks: Sequence[str] = ()


def tokenize(
    documents: Iterable[Document], encoders: Encoders, regions_per_image: int, seed: int
) -> Iterator[Record]:
    """Documents -> records, in order.

    Region masks depend on `seed` and the document's id alone. Segments that already
    hold codes are not encoded again (and have no regions: their pixels are gone); of a
    task's pictures only the last one has regions, as the others are given. Raises
    ValueError naming the document for pictures of another size or grid, for masks
    without class tokens, and for an unknown task or an answer that is not there.
    """
    check_sizes(encoders.text, encoders.image, encoders.layout)
    stream = iter(documents)
    while chunk := list(itertools.islice(stream, _DOCUMENTS_AT_ONCE)):
        yield from _tokenize_chunk(chunk, encoders, regions_per_image, seed)


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
    chunk: Sequence[Document], encoders: Encoders, regions_per_image: int, seed: int
) -> Iterator[Record]:
    grid = tuple(encoders.image.grid)
    pictures, hidden = [], []  # all that must be encoded, in order of use
    for document in chunk:
        # A region must leave a sentinel for the text.
        rng = np.random.default_rng([seed, *_name_words(document.id)])
        for number, segment in enumerate(document.segments):
            if isinstance(segment, Image) and segment.codes is None:
                _check_size(document, segment.array, encoders.image)
                drawn = _regions(document, number, encoders, regions_per_image)
                pictures += [segment.array] * (1 + drawn)
                hidden.append(np.zeros(grid, bool))
                hidden += [
                    draw_region(rng, grid, len(encoders.layout.sentinels) - 1)
                    for _ in range(drawn)
                ]
    encoded = iter(())
    if pictures:
        cells = np.stack(hidden)
        codes = encoders.image.encode(regions.blank(np.stack(pictures), cells))
        encoded = iter(zip(cells, np.asarray(codes, np.int32), strict=True))
    for document in chunk:
        yield _record(document, encoders, grid, encoded, regions_per_image)


def _regions(
    document: Document, number: int, encoders: Encoders, regions_per_image: int
) -> int:
    """How many regions of a picture are drawn."""
    later = document.segments[number + 1 :]
    given = encoders.tasks and any(isinstance(segment, Image) for segment in later)
    return 0 if given else regions_per_image


def _record(
    document: Document,
    encoders: Encoders,
    grid: tuple[int, int],
    encoded: Iterator[tuple[np.ndarray, np.ndarray]],
    regions_per_image: int,
) -> Record:
    layout, task = encoders.layout, _task_number(document, encoders.tasks)
    parts, bounds, drawn, position = [], [], [], 0
    answers = np.zeros((0, 2), np.int32)
    for number, segment in enumerate(document.segments):
        if number:
            parts.append(np.array([layout.brk], np.int32))
            position += 1
        if isinstance(segment, Text):
            cuts = _answer_in(document, number, segment.text) if task else None
            ids, span = _text_ids(segment.text, cuts, encoders)
            # Nothing comes after the last segment that an answer could be moved behind.
            if span is not None and number < len(document.segments) - 1:
                answers = np.array([span], np.int32) + position
        elif isinstance(segment, Mask):
            ids = layout.class_ids(_labels(document, segment, encoders)).ravel()
        else:
            codes = segment.codes
            if codes is None:
                _, codes = next(encoded)
                count = _regions(document, number, encoders, regions_per_image)
                for _ in range(count):
                    drawn.append(Region(number, *next(encoded)))
            if codes.shape != grid:
                raise ValueError(
                    f"document {document.id!r}: codes of grid {codes.shape}, the image "
                    f"tokenizer's is {grid}"
                )
            ids = layout.image_ids(codes).ravel()
        parts.append(ids)
        bounds.append((position, position + len(ids)))
        position += len(ids)
    if not position:
        raise ValueError(f"document {document.id!r} is empty")
    tokens = np.concatenate(parts)
    bounds = np.array(bounds, np.int32)
    return Record(document.id, tokens, bounds, tuple(drawn), task, answers)


def _task_number(document: Document, tasks: Sequence[str]) -> int:
    if not tasks:
        return 0
    name = document.metadata.get("task", "")
    if name not in tasks:
        raise ValueError(
            f"document {document.id!r} is of the task {name!r}, not one of "
            f"{', '.join(tasks)}"
        )
    return 1 + list(tasks).index(name)


def _answer_in(document: Document, number: int, text: str) -> tuple[int, int] | None:
    """(start, stop) of the answer in the text of a segment, None if it is elsewhere."""
    if "answer" not in document.metadata:
        return None
    segment, start, stop = document.metadata["answer"]
    if segment != number:
        return None
    if not 0 <= start < stop <= len(text):
        raise ValueError(
            f"document {document.id!r}: an answer at characters {start} to {stop} of a "
            f"text of {len(text)}"
        )
    return start, stop


def _text_ids(
    text: str, cuts: tuple[int, int] | None, encoders: Encoders
) -> tuple[np.ndarray, tuple[int, int] | None]:
    """Ids of a text, and (start, stop) in them of the answer cut out of it.

    Every part is encoded on its own, as a prompt's are: no piece may reach over an end
    of the answer.
    """
    texts = [text] if cuts is None else [text[: cuts[0]], text[slice(*cuts)]]
    texts += [] if cuts is None else [text[cuts[1] :]]
    pieces = [encoders.text.encode(part) for part in texts]
    ids = encoders.layout.text_ids(list(itertools.chain(*pieces)))
    if cuts is None:
        return ids, None
    return ids, (len(pieces[0]), len(pieces[0]) + len(pieces[1]))


def _labels(document: Document, mask: Mask, encoders: Encoders) -> np.ndarray:
    if mask.codes is not None:
        return mask.codes
    if encoders.segmentation is None:
        raise ValueError(f"document {document.id!r}: a mask without class ids")
    try:
        return encoders.segmentation.encode(mask.array)
    except ValueError as error:
        raise ValueError(f"document {document.id!r}: {error}") from error


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
    own = {"task": record.task, "answers": record.answers.astype("<i4").tobytes()}
    return msgpack.Packer().pack(
        {
            **(own if record.task else {}),
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
        own = {}
        if "task" in fields:
            answers = np.frombuffer(fields["answers"], "<i4").reshape(-1, 2)
            own = {"task": fields["task"], "answers": answers}
        return Record(fields["id"], tokens, bounds, tuple(drawn), **own)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"damaged token record ({error!r})") from error
