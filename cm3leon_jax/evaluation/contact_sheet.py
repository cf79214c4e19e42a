"""Token records as people see them: decoded again, as an HTML page or one PNG.

What is shown is what the decoder is given, not the documents: texts out of their
pieces, pictures out of their codes, with each of their regions as it is hidden.
"""

from __future__ import annotations

import base64
import io
import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from cm3leon_jax.codec import Codec
from cm3leon_jax.data import controls
from cm3leon_jax.data.tokenization import Record
from cm3leon_jax.evaluation.page import flat, frame, show, table
from cm3leon_jax.tokenizers import regions
from cm3leon_jax.vocab import IMAGE, TEXT

_SIDE = 96  # of a picture in the PNG, and the least in the page
_PER_ROW, _GAP, _LINE = 8, 12, 13  # pictures; pixels
_LETTERS, _LINES = 34, 4  # of a caption below two pictures


class Card(NamedTuple):
    """A record: its name, texts, and pictures uint8 [Y, X, 3] with what they are."""

    name: str
    words: str
    pictures: list[tuple[str, np.ndarray]]


def cards(
    codec: Codec, records: Sequence[Record], near: Sequence[Sequence[Record]]
) -> list[Card]:
    """A card for every record, with those that are `near` each of them."""
    waiting: list[np.ndarray] = []  # codes, all decoded together
    made = []
    for record, neighbours in zip(records, near, strict=True):
        words, pictures = _segments(codec, record, "picture", waiting)
        for region in record.regions:
            pictures.append(("hidden", (len(waiting), region.cells)))
            waiting.append(region.codes)
        for neighbour in neighbours:
            label = f"near: {_segments(codec, neighbour, '', [])[0]}"
            pictures += _segments(codec, neighbour, label, waiting)[1]
        made.append((record.id, words, pictures))
    painted = [np.asarray(p) for p in codec.paint(np.stack(waiting))] if waiting else []

    def pixels(found: Any) -> np.ndarray:
        if isinstance(found, np.ndarray):
            return found
        number, cells = found
        picture = painted[number]
        return (
            picture if cells is None else regions.blank(picture[None], cells[None])[0]
        )

    return [
        Card(name, words, [(label, pixels(found)) for label, found in pictures])
        for name, words, pictures in made
    ]


def _segments(
    codec: Codec, record: Record, label: str, waiting: list[np.ndarray]
) -> tuple[str, list[tuple[str, Any]]]:
    """The texts of a record, and its pictures as places in `waiting`, or as pixels."""
    words, pictures, layout = [], [], codec.layout
    for start, stop in record.bounds:
        ids = record.tokens[start:stop]
        kind = layout.modality(ids[:1]).tolist()
        if kind == [TEXT]:
            words.append(codec.decode_text(layout.pieces(ids)))
        elif kind == [IMAGE]:
            pictures.append((label, (len(waiting), None)))
            waiting.append(layout.codes(ids).reshape(codec.image.grid))
        elif kind:
            side = round(len(ids) ** 0.5)
            labels = layout.labels(ids).reshape(side, side)
            picture = controls.class_picture(labels, len(layout.classes))
            pictures.append(("classes", picture))
    return " ⏎ ".join(words), pictures


def page(
    title: str,
    sheet: Iterable[Card],
    numbers: Mapping[str, Mapping[str, Any]],
    faults: Sequence[str],
) -> str:
    """One file of HTML without network: faults, numbers, then the cards."""
    parts = [f"<li>{escape(fault)}</li>" for fault in faults]
    told = f"<ul>{''.join(parts)}</ul>" if parts else "<p class=note>None.</p>"
    blocks = [f"<section><h2>Broken invariants</h2>{told}</section>"]
    for name, values in numbers.items():
        rows = [(escape(key), show(value)) for key, value in flat(values)]
        blocks.append(f"<section><h2>{escape(name)}</h2>{table(rows)}</section>")
    shown = "".join(map(_card, sheet))
    blocks.append(
        f'<section><h2>Records</h2><div class="cards">{shown}</div></section>'
    )
    return frame(title, "".join(blocks), head=escape(title))


def _card(card: Card) -> str:
    figures = []
    for label, picture in card.pictures:
        file = io.BytesIO()
        Pillow.fromarray(picture).save(file, "PNG")
        data = base64.b64encode(file.getvalue()).decode("ascii")
        width = picture.shape[1] * max(1, round(_SIDE / picture.shape[1]))
        figures.append(
            f'<figure><img class=pixels style="width:{width}px" alt="{escape(label)}" '
            f'src="data:image/png;base64,{data}">'
            f"<figcaption>{escape(textwrap.shorten(label, 40))}</figcaption></figure>"
        )
    return (
        f'<div class=card><div class="pictures found">{"".join(figures)}</div>'
        f"<div class=words>{escape(card.words)}<br><small>{escape(card.name)}</small>"
        "</div></div>"
    )


def picture(sheet: Sequence[Card]) -> Pillow.Image:
    """The cards one below the other, `_PER_ROW` pictures of each at most; letters that
    the font of Pillow has not are boxes (the page has all)."""
    height = _SIDE + _LINES * _LINE + _GAP
    columns = max((min(len(c.pictures), _PER_ROW) for c in sheet), default=1)
    columns = max(columns, 2)
    across = max(1, _PER_ROW // columns)
    rows = -(-len(sheet) // across)
    width = columns * (_SIDE + 4) + _GAP
    made = Pillow.new("RGB", (across * width + _GAP, rows * height + _GAP), "white")
    draw, font = ImageDraw.Draw(made), ImageFont.load_default(_LINE - 2)
    for number, card in enumerate(sheet):
        row, column = divmod(number, across)
        left, top = _GAP + column * width, _GAP + row * height
        for k, (_, pixels) in enumerate(card.pictures[:_PER_ROW]):
            side = (_SIDE, _SIDE)
            small = Pillow.fromarray(pixels).resize(side, Pillow.Resampling.NEAREST)
            made.paste(small, (left + k * (_SIDE + 4), top))
        letters = _LETTERS * columns // 2
        lines = textwrap.wrap(card.words or card.name, letters, max_lines=_LINES)
        for k, line in enumerate(lines):
            draw.text((left, top + _SIDE + 2 + k * _LINE), line, "black", font)
    return made


def write(directory: Path, samples: Sequence[Any]) -> None:
    """`Sample`s as PNG files, `index.jsonl` and all on one `sheet.png` in a new folder;
    none where there is no sample."""
    if not samples:
        return
    directory.mkdir(parents=True)
    lines, cards = [], []
    for i, sample in enumerate(samples):
        files, shown = {}, []
        for label, image in sample.pictures.items():
            files[label] = f"{i:03d}-{label.replace(' ', '_')}.png"
            image.save(directory / files[label])
            shown.append((label, np.asarray(image.convert("RGB"))))
        line = {"prompt": sample.text, "pictures": files}
        lines.append(json.dumps(line | {"ok": sample.ok, "note": sample.note}) + "\n")
        cards.append(Card(str(i), sample.text or sample.note, shown))
    (directory / "index.jsonl").write_text("".join(lines))
    picture(cards).save(directory / "sheet.png")
