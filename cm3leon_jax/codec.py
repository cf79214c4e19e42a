"""Documents, texts and pictures of the outside world <-> ids of the one vocabulary."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image as Pillow

from cm3leon_jax import workdir as workdirs
from cm3leon_jax.data import controls, pictures, tokenization
from cm3leon_jax.data.documents import Document, Image, Mask, Segment, Text
from cm3leon_jax.inputs import Picture, Region, listed, mask_of, pillow, touched
from cm3leon_jax.tokenizers import bytelevel, regions
from cm3leon_jax.tokenizers.bytelevel import JsonTokenizer
from cm3leon_jax.tokenizers.image import ImageTokenizer
from cm3leon_jax.tokenizers.segmentation import SegmentationTokenizer
from cm3leon_jax.tokenizers.text import TextTokenizer
from cm3leon_jax.vocab import Layout

Parts = list[np.ndarray | None]  # runs of ids, None for every hole
Piece = Segment | tuple[str, ...]  # the texts around the holes of a text
HOLE = "<mask>"  # in the text of a document: what is to be written


def load_text_tokenizer(workdir: Path) -> TextTokenizer | JsonTokenizer:
    """The text tokenizer of a work directory, once its stage has finished."""
    folder = workdir / "text_tokenizer"
    workdirs.results(folder)
    if (folder / bytelevel.FILE).is_file():
        return JsonTokenizer(folder / bytelevel.FILE)
    return TextTokenizer.load(folder / "model")


def load_image_tokenizer(workdir: Path) -> ImageTokenizer:
    """The image tokenizer of a work directory, once its stage has finished."""
    workdirs.results(workdir / "image_tokenizer")
    return ImageTokenizer.load(workdir / "image_tokenizer")


class Codec:
    """All tokenizers over one layout; `masks` None: this system has no class tokens.

    Pictures are PIL images or uint8 arrays of any mode and size; they are fitted to the
    image tokenizer's square. Raises ValueError, naming which entry of a list is wrong.
    """

    def __init__(
        self,
        layout: Layout,
        text: TextTokenizer | JsonTokenizer,
        image: ImageTokenizer,
        masks: SegmentationTokenizer | None = None,
    ):
        tokenization.check_sizes(text, image, layout)
        self.layout, self.text, self.image, self.masks = layout, text, image, masks
        self.image_tokens = image.grid[0] * image.grid[1]

    @functools.cached_property
    def grey(self) -> np.ndarray:
        """The codes of a picture of which everything is hidden, int32 [Yg, Xg]."""
        side = self.image.image_size
        hidden = np.full((1, side, side, 3), regions.GREY, np.uint8)
        return self.image.encode(hidden)[0]

    # Documents -> ids.

    def parts(self, rows: Sequence[Sequence[Piece]]) -> list[Parts]:
        """Rows of segments as runs of ids, joined by <break>; the pictures of all rows
        are encoded together. A text with holes is a tuple of the texts around them."""
        fresh = [
            segment.array
            for row in rows
            for segment in row
            if isinstance(segment, Image)
            and segment.codes is None
            and segment.array is not None
        ]
        codes = iter(self.image.encode(self.arrays(fresh)) if fresh else ())
        return [self._parts(row, i, codes) for i, row in enumerate(rows)]

    def _parts(
        self, row: Sequence[Piece], number: int, encoded: Iterator[np.ndarray]
    ) -> Parts:
        parts: Parts = []
        for n, segment in enumerate(row):
            if n:
                parts.append(np.array([self.layout.brk], np.int32))
            if isinstance(segment, tuple):
                first, *after_holes = segment
                parts.append(self._text_ids(first))
                for text in after_holes:
                    parts += [None, self._text_ids(text)]
            elif isinstance(segment, Text):
                parts.append(self._text_ids(segment.text))
            elif isinstance(segment, Image):
                codes = next(encoded) if segment.codes is None else segment.codes
                if codes.shape != self.image.grid:
                    raise ValueError(
                        f"document {number} has codes of grid {codes.shape}, the image "
                        f"tokenizer's is {self.image.grid}"
                    )
                parts.append(self.layout.image_ids(codes).reshape(-1))
            else:
                parts.append(self._class_ids(segment, number))
        return parts

    def _class_ids(self, mask: Mask, number: int) -> np.ndarray:
        if self.masks is None:
            raise ValueError(
                f"document {number} has a mask: this model was not trained on masks"
            )
        codes = mask.codes
        if codes is None:
            try:
                codes = self.masks.encode(np.asarray(mask.array))
            except ValueError as error:
                raise ValueError(f"document {number}: {error}") from error
        return self.layout.class_ids(codes).reshape(-1)

    def ids(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """Every document as int32 ids, without the outer <eos>; no holes."""
        rows = []
        for i, parts in enumerate(self.parts([holed(d) for d in documents])):
            known = [part for part in parts if part is not None]
            if len(known) < len(parts):
                raise ValueError(f"document {i} has a {HOLE}: that is for `infill`")
            rows.append(np.concatenate([np.zeros(0, np.int32), *known]))
        return rows

    def pieces(self, prompt: str, number: int) -> list[int]:
        if not prompt.strip():
            raise ValueError(f"prompt {number} is empty: say what to draw")
        return self.text.encode(prompt)

    def _text_ids(self, text: str) -> np.ndarray:
        return self.layout.text_ids(self.text.encode(text))

    # Ids -> documents.

    def decode_text(self, pieces: np.ndarray) -> str:
        return self.text.decode(pieces.tolist())

    def filled(self, document: Document, spans: Iterable[np.ndarray]) -> Document:
        """A document with its holes filled: the text pieces of each, in order."""
        spans, segments = iter(spans), []
        for segment in document.segments:
            if isinstance(segment, Text):
                text, *after_holes = segment.text.split(HOLE)
                for after in after_holes:
                    text = joined(text, self.decode_text(next(spans)), after)
                segment = Text(text)
            segments.append(segment)
        return dataclasses.replace(document, segments=tuple(segments))

    def continued(
        self, documents: Sequence[Document], written: Iterable[np.ndarray]
    ) -> list[Document]:
        """Documents with the tokens written after them; only those are decoded, the
        pictures of all documents together."""
        edges = (self.layout.brk, self.layout.eoss)  # which may end a picture
        new = [
            [
                self._segment(run)
                for run in np.split(tokens, np.flatnonzero(np.isin(tokens, edges)))
            ]
            for tokens in written
        ]
        images = [s for row in new for s in row if isinstance(s, Image)]
        codes = [image.codes for image in images if image.codes is not None]
        pixels = iter(self.image.decode(np.stack(codes)) if codes else ())
        return [
            dataclasses.replace(
                document, segments=_appended(document.segments, row, pixels)
            )
            for document, row in zip(documents, new, strict=True)
        ]

    def _segment(self, run: np.ndarray) -> Text | Image | None:
        is_image = np.isin(run, self.layout.image)
        if is_image.sum() == self.image_tokens:
            codes = self.layout.codes(run[is_image]).reshape(self.image.grid)
            return Image(array=None, codes=codes)
        pieces = run[np.isin(run, self.layout.text)]
        if not len(pieces):
            return None
        return Text(self.decode_text(self.layout.pieces(pieces)))

    # Pictures.

    def arrays(self, images: Iterable[Picture]) -> np.ndarray:
        """Pictures fitted to the tokenizer's square: uint8 [B, Y, X, 3]."""
        size = self.image.image_size
        images = listed(images, None, "images")
        return np.stack(
            [pictures.fit(pillow(image, i), size) for i, image in enumerate(images)]
        )

    def coloured(self, image: Picture, number: int) -> Picture:
        """A class map as a picture in the palette of training (`data/controls.py`).

        Integers [Y, X] are labels; anything else is a picture already.
        """
        if not (isinstance(image, np.ndarray) and image.ndim == 2):
            return image
        if image.dtype.kind not in "iu" or image.size == 0:
            return image
        if self.masks is None:
            raise ValueError(
                f"picture {number} is labels, but this system has no classes: give a "
                "picture of the class map"
            )
        try:
            made = controls.class_picture(image, len(self.masks.classes))
        except ValueError as error:
            raise ValueError(f"picture {number}: {error}") from error
        nearest = Pillow.Resampling.NEAREST
        return pictures.fit(Pillow.fromarray(made), self.image.image_size, nearest)

    def first_picture(self, document: Document) -> np.ndarray | None:
        """Of a document, uint8 [Y, X, 3] in the tokenizer's size; None without one."""
        for segment in document.segments:
            if isinstance(segment, Image) and segment.array is not None:
                return self.arrays([segment.array])[0]
            if isinstance(segment, Image) and segment.codes is not None:
                return self.image.decode(segment.codes[None])[0]
        return None

    def hidden(
        self, image: Picture, region: Region, number: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """A picture without what is in a region of its own (upright) pixels: uint8
        [Y, X, 3] in the tokenizer's size, and the cells that the region touches."""
        # Blanked before it is resized too: that spreads pixels over the cells' edges.
        greyed, cells = self.greyed(image, region, number)
        return regions.blank(greyed[None], cells[None])[0], cells

    def greyed(
        self, image: Picture, region: Region, number: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `hidden`, but with mid-grey for exactly the region's pixels: cells that it
        touches may still show some of the picture."""
        picture = pillow(image, number)
        mask = mask_of(region, picture, number)
        cells = touched(mask, self.image.grid)
        if not cells.any():
            raise ValueError(f"mask {number} lies outside the centre square in use")
        pixels = np.array(pictures.rgb(picture))
        pixels[mask] = regions.GREY
        return pictures.fit(Pillow.fromarray(pixels), self.image.image_size), cells

    def paint(self, codes_BYX: np.ndarray) -> list[Pillow.Image]:
        pixels = self.image.decode(np.asarray(codes_BYX, np.int32))
        return [Pillow.fromarray(picture) for picture in pixels]


def joined(before: str, written: str, after: str) -> str:
    """The text around a hole and what was written there, one space between words.

    The space before a hole is written with what fills it:
    ("a large ", " red", " square") -> "a large red square".
    """
    if before.endswith(" "):
        before = before[:-1]
        if written and not written.startswith(" "):
            written = " " + written
    if not before:  # the beginning of a text
        written = written.removeprefix(" ")
    if after.startswith(" "):
        written = written.removesuffix(" ")
        if not before and not written:
            after = after[1:]
    return before + written + after


def _appended(
    given: tuple[Segment, ...],
    new: Sequence[Text | Image | None],
    pixels: Iterator[np.ndarray],
) -> tuple[Segment, ...]:
    """Segments and those written after them, of which the first goes on in the last."""
    segments = list(given)
    for n, segment in enumerate(new):
        last = segments[-1] if n == 0 and segments else None
        if segment is not None and isinstance(last, Text):
            segments.pop()  # a picture can only follow at once on an empty text
            if isinstance(segment, Text):
                segment = Text(joined(last.text, segment.text, ""))
        if isinstance(segment, Image):
            segment = Image(array=next(pixels), codes=segment.codes)
        if segment is not None:
            segments.append(segment)
    return tuple(segments)


def holed(document: Document) -> list[Piece]:
    """The segments of a document, its holes seen. Pieces of text begin with their
    space: that before a hole belongs to what is missing."""
    found: list[Piece] = []
    for segment in document.segments:
        if isinstance(segment, Text) and HOLE in segment.text:
            *before, last = segment.text.split(HOLE)
            segment = (*(text.removesuffix(" ") for text in before), last)
        found.append(segment)
    return found


def unended(document: Document) -> Document:
    """A document without the space at its end, which belongs to the word to come."""
    *before, last = document.segments or (None,)
    if not isinstance(last, Text):
        return document
    ending = Text(last.text.removesuffix(" "))
    return dataclasses.replace(document, segments=(*before, ending))
