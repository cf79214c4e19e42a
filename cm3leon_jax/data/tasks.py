"""Task examples: fields -> document -> fields, by the templates of Table 5.

A task that writes text has its picture last, and the CM3 objective moves exactly the
answer to the end, so at inference the model is given all the rest and fills the hole:

    <eos> Question: where is the star? Answer:<s0>. <break> image <s0> left <eoss> <eos>

The alternative order "autoregressive" (the original's `cm3_ft_ar`) puts the pictures
first and the text last: `<eos> image <break> Question: … Answer: left. <eos>`. Outputs
that are pictures or masks stand last in both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from string import ascii_uppercase
from typing import Any, Literal, get_args

from cm3leon_jax.data.documents import Document, Image, Mask, Segment, Text
from cm3leon_jax.data.task_templates import BREAK, FIELD, Task, known

Order = Literal["cm3", "autoregressive"]
Box = Sequence[int]  # x0, y0, x1, y1 in pixels
# How much of a reference is to be kept, in words and as a number.
STRENGTHS = {"slightly": 0.33, "moderately": 0.67, "strongly": 1.0}
_LOCATION = re.compile(r"\((\d+), (\d+)\) -> \((\d+), (\d+)\)")
_OBJECT = re.compile(rf"(.+?) at ({_LOCATION.pattern})(?:, |$)", re.DOTALL)


@dataclass(frozen=True)
class Hole:
    """A text of which a part is to be written: `before` + that part + `after`.

    The space before the missing part belongs to it, as text pieces begin with theirs.
    """

    before: str
    after: str


def fill(
    task: str,
    fields: Mapping[str, Any],
    wording: int,
    *,
    order: Order = "cm3",
    id: str = "",
    **metadata: Any,
) -> Document:
    """An example of a task.

    `fields` has a str for every text field, [(phrase, box), …] for `objects`, pictures
    as `Image` or uint8 [Y, X, 3], masks as `Mask` or int [Y, X]. `wording` numbers
    `Task.wordings`. Metadata gets "task", "wording" ("seen" or "unseen"), "template"
    (the number) and, for a task that writes text, "answer": [segment, start, stop], the
    characters to be written with the space before them. Raises ValueError for a task
    or wording that does not exist and for fields that are missing, unknown or empty.
    """
    spec = known(task)
    _check_fields(spec, fields)
    segments: list[Segment] = []
    facts: dict[str, Any] = {
        "task": task,
        "wording": "seen" if wording < len(spec.templates) else "unseen",
        "template": wording,
    }
    for part in _parts(spec, wording, order):
        segment, span = _filled(spec, part, fields)
        if span:
            facts["answer"] = [len(segments), *span]
        segments.append(segment)
    return Document(tuple(segments), id=id, metadata=facts | metadata)


def prompt(
    task: str, fields: Mapping[str, Any], wording: int, *, order: Order = "cm3"
) -> tuple[Segment | Hole, ...]:
    """What a model is given: `fill` without the output (which `fields` leaves out).

    For a picture or mask, the segments before it. For text, all segments, one of them
    a `Hole`; in the order "autoregressive" that is the last one, of which the model
    reads `before` only.
    """
    spec = known(task)
    first = spec.begins or spec.output
    written = set(spec.fields[spec.fields.index(first) :]) & _texts(spec)
    missing = written if spec.writes_text else {spec.output}
    _check_fields(spec, fields, missing)
    found: list[Segment | Hole] = []
    for part in _parts(spec, wording, order):
        if part == f"{{{spec.output}}}" and not spec.writes_text:
            continue
        if spec.writes_text and f"{{{spec.output}}}" in part:
            before, _, rest = part.partition(f"{{{first}}}")
            after = f"{{{first}}}{rest}".rpartition(f"{{{spec.output}}}")[2]
            text, _ = _rendered(before, fields)
            found.append(Hole(text.removesuffix(" "), _rendered(after, fields)[0]))
        else:
            found.append(_filled(spec, part, fields)[0])
    return tuple(found)


def parse(task: str, document: Document) -> dict[str, Any]:
    """The fields of an example: `fill` backwards, for both orders.

    Its own "template" is read, else the wording with the most fixed words that fits.
    Texts come as str, `objects` as [(phrase, box), …], pictures and masks as their
    segments. ValueError where no wording of the task fits.
    """
    spec = known(task)
    numbers = sorted(
        range(len(spec.wordings)),
        key=lambda number: -len(FIELD.sub("", spec.wordings[number])),
    )
    if document.metadata.get("task") == task and "template" in document.metadata:
        numbers = [document.metadata["template"]]
    for number in numbers:
        for order in get_args(Order):
            fields = _matched(spec, _parts(spec, number, order), document.segments)
            if fields is not None:
                return {name: fields[name] for name in spec.fields}
    raise ValueError(f"document {document.id!r} has no wording of the task {task!r}")


def parse_written(task: str, text: str, wording: int) -> dict[str, str]:
    """What a model wrote into the hole -> the fields it consists of.

    {"answer": …}, or {"explanation": …, "answer": …} with a chain of thought. An order
    "autoregressive" may have written what follows the answer too. ValueError where the
    text has not the form, as a chain of thought that comes to no end.
    """
    spec = known(task)
    (part,) = [p for p in _parts(spec, wording) if f"{{{spec.output}}}" in p]
    first = spec.begins or spec.output
    before, _, rest = part.partition(f"{{{first}}}")
    form = f"{{{first}}}{rest}"
    inner, _, after = form.rpartition(f"{{{spec.output}}}")
    pattern = _pattern(f"{inner}{{{spec.output}}}") + f"(?:{re.escape(after)})?"
    match = re.fullmatch(pattern, text.strip(), re.DOTALL)
    if match is None:
        raise ValueError(f"{text!r} is not {form!r}, which task {task!r} writes")
    return match.groupdict()


def location(box: Box) -> str:
    """`(x0, y0) -> (x1, y1)`, pixels; ValueError where that is no box."""
    values = [int(value) for value in box]
    if len(values) != 4 or list(box) != values or min(values) < 0:
        raise ValueError(f"box {tuple(box)}: give x0, y0, x1, y1 in whole pixels")
    x0, y0, x1, y1 = values
    if x0 >= x1 or y0 >= y1:
        raise ValueError(
            f"box {tuple(box)} is empty or inverted: x0 < x1 and y0 < y1 are needed"
        )
    return f"({x0}, {y0}) -> ({x1}, {y1})"


def parse_locations(text: str) -> list[tuple[int, int, int, int]]:
    """All boxes in a text, in order."""
    found = (map(int, match.groups()) for match in _LOCATION.finditer(text))
    return [(x0, y0, x1, y1) for x0, y0, x1, y1 in found]


def strength_word(strength: float) -> str:
    """The word of `STRENGTHS` that is nearest; ValueError outside (0, 1]."""
    if not isinstance(strength, Real) or not 0 < strength <= 1:
        raise ValueError(f"strength={strength!r} must be within (0, 1]")
    return min(STRENGTHS, key=lambda word: abs(STRENGTHS[word] - strength))


def lettered(choices: Sequence[str], name: str = "choices") -> str:
    """`(A) yes (B) no`; ValueError for more choices than letters."""
    if len(choices) > len(ascii_uppercase):
        raise ValueError(f"{name} has {len(choices)}: give at most 26, one a letter")
    letters = zip(ascii_uppercase, choices, strict=False)
    return " ".join(f"({letter}) {choice}" for letter, choice in letters)


def _texts(spec: Task) -> set[str]:
    return set(spec.fields) - {*spec.images, *spec.masks}


def _check_fields(
    spec: Task, fields: Mapping[str, Any], missing: set[str] | None = None
) -> None:
    wanted = [name for name in spec.fields if name not in (missing or ())]
    if sorted(fields) != sorted(wanted):
        raise ValueError(
            f"task {spec.name!r} takes the fields {', '.join(wanted)}; given are "
            f"{', '.join(fields) or 'none'}"
        )


def _parts(spec: Task, wording: int, order: Order = "cm3") -> list[str]:
    """Templates of the segments, in order."""
    whole = isinstance(wording, Integral)
    if not whole or not 0 <= wording < len(spec.wordings):
        raise ValueError(
            f"task {spec.name!r} has the wordings 0 … {len(spec.wordings) - 1}, not "
            f"{wording!r}"
        )
    if order not in get_args(Order):
        raise ValueError(f"order={order!r}: choose from {', '.join(get_args(Order))}")
    parts = spec.wordings[wording].split(BREAK)
    if order == "autoregressive" and spec.writes_text:
        parts.sort(key=lambda part: f"{{{spec.output}}}" in part)  # stable
    return parts


def _filled(
    spec: Task, part: str, fields: Mapping[str, Any]
) -> tuple[Segment, tuple[int, int] | None]:
    """A segment, and (start, stop) of what is to be written of it."""
    for kind, names in ((Image, spec.images), (Mask, spec.masks)):
        for name in names:
            if part == f"{{{name}}}":
                value = fields[name]
                if not isinstance(value, kind) and not hasattr(value, "dtype"):
                    raise ValueError(
                        f"field {name!r} must be a {kind.__name__} or an array, got "
                        f"{type(value).__name__}"
                    )
                return value if isinstance(value, kind) else kind(value), None
    text, spans = _rendered(part, fields)
    if not spec.writes_text or spec.output not in spans:
        return Text(text), None
    start, stop = spans[spec.begins or spec.output][0], spans[spec.output][1]
    if text[start - 1 : start] == " ":
        start -= 1
    return Text(text), (start, stop)


def _rendered(
    part: str, fields: Mapping[str, Any]
) -> tuple[str, dict[str, tuple[int, int]]]:
    """A text template filled in, and where each field stands in it."""
    text, seen, spans = "", 0, {}
    for match in FIELD.finditer(part):
        name = match[1]
        text += part[seen : match.start()]
        value = _value(name, fields[name])
        spans[name] = (len(text), len(text) + len(value))
        text, seen = text + value, match.end()
    return text + part[seen:], spans


def _value(name: str, value: Any) -> str:
    if name == "objects" and not isinstance(value, str):
        value = ", ".join(f"{phrase} at {location(box)}" for phrase, box in value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"field {name!r} must be a text that is not empty: {value!r}")
    if name == "strength" and value not in STRENGTHS:
        raise ValueError(f"strength={value!r}: choose from {', '.join(STRENGTHS)}")
    return value


def _pattern(part: str) -> str:
    """The regular expression of a text template; fields are as short as they can be."""
    pieces, seen = [], 0
    for match in FIELD.finditer(part):
        kind = "|".join(STRENGTHS) if match[1] == "strength" else ".+?"
        pieces += [re.escape(part[seen : match.start()]), f"(?P<{match[1]}>{kind})"]
        seen = match.end()
    return "".join([*pieces, re.escape(part[seen:])])


def _matched(
    spec: Task, parts: Sequence[str], segments: Sequence[Segment]
) -> dict[str, Any] | None:
    """The fields of segments that these templates fit, else None."""
    if len(parts) != len(segments):
        return None
    fields: dict[str, Any] = {}
    for part, segment in zip(parts, segments, strict=True):
        kind = _kind(spec, part)
        if not isinstance(segment, kind):
            return None
        if not isinstance(segment, Text):
            fields[part[1:-1]] = segment
            continue
        match = re.fullmatch(_pattern(part), segment.text, re.DOTALL)
        if match is None:
            return None
        fields |= match.groupdict()
    if "objects" in fields:
        fields["objects"] = list(objects(fields["objects"]))
    return fields


def _kind(spec: Task, part: str) -> type[Segment]:
    name = part[1:-1] if FIELD.fullmatch(part) else ""
    return Image if name in spec.images else Mask if name in spec.masks else Text


def objects(text: str) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
    """The field `objects` as it is written: `PHRASE at (x0, y0) -> (x1, y1), …`."""
    for match in _OBJECT.finditer(text):
        yield match[1], parse_locations(match[2])[0]
