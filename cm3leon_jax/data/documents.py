"""Documents: ordered tuples of text, image and mask segments, and their bytes.

A pair of the paper is `Document((Text(caption), Image(picture)))` (paper section 1.6).
Documents are stored as msgpack with pictures as PNG, one document a record.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np
from PIL import Image as Pillow

SCHEMA = "cm3leon_jax/document/1"


@dataclass(frozen=True)
class Text:
    """A piece of text."""

    text: str

    def __post_init__(self):
        if not isinstance(self.text, str):
            raise ValueError(f"Text holds a str, got {type(self.text).__name__}")


@dataclass(frozen=True, eq=False)
class Image:
    """A picture: pixels uint8 [Y, X, 3], its image codes int32 [Yg, Xg], or both."""

    array: np.ndarray | None = None
    codes: np.ndarray | None = None

    def __post_init__(self):
        if self.array is None and self.codes is None:
            raise ValueError("Image needs array or codes")
        if self.array is not None and (
            self.array.dtype != np.uint8
            or self.array.ndim != 3
            or self.array.shape[2] != 3
            or self.array.size == 0
        ):
            raise ValueError(
                "Image.array must be uint8 [Y, X, 3], got "
                f"{self.array.dtype} {self.array.shape}"
            )
        _check_codes("Image", self.codes)


@dataclass(frozen=True, eq=False)
class Mask:
    """Class labels: int [Y, X] in [0, 65536), their class tokens [Yg, Xg], or both."""

    array: np.ndarray | None = None
    codes: np.ndarray | None = None

    def __post_init__(self):
        if self.array is None and self.codes is None:
            raise ValueError("Mask needs array or codes")
        if self.array is not None and (
            self.array.dtype.kind not in "iu"
            or self.array.ndim != 2
            or self.array.size == 0
            or self.array.min() < 0
            or self.array.max() > 65_535
        ):
            raise ValueError("Mask.array must be integers [Y, X] in [0, 65536)")
        _check_codes("Mask", self.codes)


Segment = Text | Image | Mask


@dataclass(frozen=True, eq=False)
class Document:
    """Segments in reading order, a name, and JSON-able facts (licence, scene, …)."""

    segments: tuple[Segment, ...]
    id: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for segment in self.segments:
            if not isinstance(segment, Segment):
                raise ValueError(
                    f"document {self.id!r}: a segment is Text, Image or Mask, "
                    f"got {type(segment).__name__}"
                )

    @property
    def texts(self) -> list[str]:
        """Of its `Text` segments, in order."""
        return [s.text for s in self.segments if isinstance(s, Text)]

    @property
    def pictures(self) -> list[np.ndarray]:
        """Pixels of its `Image` segments that have them, uint8 [Y, X, 3], in order."""
        images = (s.array for s in self.segments if isinstance(s, Image))
        return [array for array in images if array is not None]


@dataclass(frozen=True)
class Skipped:
    """What a source yields instead of a document that it cannot use."""

    id: str
    reason: str


def highest_label(document: Document) -> int:
    """Of its masks; 0 where it has none."""
    masks = (s.array for s in document.segments if isinstance(s, Mask))
    return max((int(x.max()) for x in masks if x is not None), default=0)


def to_bytes(document: Document) -> bytes:
    """Document -> msgpack bytes (pictures as PNG, losslessly)."""
    return msgpack.Packer().pack(
        {
            "schema": SCHEMA,
            "id": document.id,
            "metadata": document.metadata,
            "segments": [_pack_segment(segment) for segment in document.segments],
        }
    )


def from_bytes(data: bytes) -> Document:
    """Msgpack bytes -> Document; ValueError for bytes of any other schema."""
    record = _unpack(data)
    try:
        return Document(
            segments=tuple(_unpack_segment(part) for part in record["segments"]),
            id=record["id"],
            metadata=record["metadata"],
        )
    except (KeyError, TypeError, IndexError, OSError, SyntaxError) as error:
        raise ValueError(f"damaged document record ({error!r})") from error


def texts_from_bytes(data: bytes) -> list[str]:
    """The texts of a record, in order: far cheaper than all of its pictures too."""
    try:
        parts = _unpack(data)["segments"]
        return [part["text"] for part in parts if part["kind"] == "text"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"damaged document record ({error!r})") from error


def _unpack(data: bytes) -> dict[str, Any]:
    try:
        record = msgpack.unpackb(data)
        schema = record["schema"]
    except Exception as error:  # msgpack raises a dozen unrelated types
        raise ValueError(f"not a document record ({error!r})") from error
    if schema != SCHEMA:
        raise ValueError(f"record has schema {schema!r}, this program reads {SCHEMA!r}")
    return record


def _check_codes(name: str, codes: np.ndarray | None) -> None:
    if codes is not None and (codes.dtype != np.int32 or codes.ndim != 2):
        raise ValueError(
            f"{name}.codes must be int32 [Yg, Xg], got {codes.dtype} {codes.shape}"
        )


def _pack_segment(segment: Segment) -> dict[str, Any]:
    if isinstance(segment, Text):
        return {"kind": "text", "text": segment.text}
    kind = "image" if isinstance(segment, Image) else "mask"
    array, codes = segment.array, segment.codes
    return {
        "kind": kind,
        "png": None if array is None else _to_png(array),
        "codes": None if codes is None else [codes.shape, codes.tobytes()],
    }


def _unpack_segment(part: dict[str, Any]) -> Segment:
    kind = part["kind"]
    if kind == "text":
        return Text(part["text"])
    if kind not in ("image", "mask"):
        raise ValueError(f"unknown kind of segment {kind!r}")
    array = codes = None
    if part["codes"] is not None:
        shape, data = part["codes"]
        codes = np.frombuffer(data, np.int32).reshape(shape)
    if part["png"] is not None:
        array = np.asarray(Pillow.open(io.BytesIO(part["png"])))
    if kind == "image":
        return Image(array, codes)
    return Mask(None if array is None else array.astype(np.int32), codes)


def _to_png(array: np.ndarray) -> bytes:
    """Uint8 [Y, X, 3], or labels [Y, X] as 8 bits where they fit, else 16."""
    if array.ndim == 2:
        array = array.astype(np.uint8 if array.max() < 256 else np.uint16)
    out = io.BytesIO()
    # Level 1: a little larger than the default, several times faster.
    Pillow.fromarray(np.ascontiguousarray(array)).save(out, "PNG", compress_level=1)
    return out.getvalue()
