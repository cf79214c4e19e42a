"""What tuned checkpoints can do: instructions in the templates of their training.

Prompts are made by `data/tasks.py`, as the samples of fine-tuning are (paper 1.12), so
that training and inference cannot disagree. Methods of `CM3Leon` with the same names
say what these do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Unpack

import numpy as np
from PIL import Image as Pillow

from cm3leon_jax.codec import Piece
from cm3leon_jax.data import tasks
from cm3leon_jax.data.documents import Image, Segment
from cm3leon_jax.data.task_templates import BREAK, FIELD
from cm3leon_jax.inputs import Box, Picture, Region, as_many, listed, placed, written
from cm3leon_jax.pretrained import CUT, mapped
from cm3leon_jax.sampling import prompts as forms
from cm3leon_jax.sampling.prompts import CLASS, IMAGE
from cm3leon_jax.sampling.sampler import Sampler
from cm3leon_jax.writer import (
    Common,
    Drawing,
    Options,
    Telling,
    TextOptions,
    Writer,
    usual_sampler,
)

Fields = dict[str, Any]  # of one prompt, by the names of its template
STYLES = {"short": 64, "detailed": 128, "long": 256}  # pieces they usually need
_ANSWER, _EXPLANATION = 32, 192
# Aligned with the picture to be made, or a reference that it takes something from.
STRUCTURES = ("edge", "segmentation", "hed", "pose", "depth", "normal", "scribble")
REFERENCES = ("style", "composition", "content")
KINDS = STRUCTURES + REFERENCES
_NO_CONTEXT = "N/A"


def caption(
    writer: Writer,
    images: Iterable[Picture],
    style: str,
    wording: int,
    **options: Unpack[TextOptions],
) -> list[str]:
    if style not in STYLES:
        raise ValueError(f"style={style!r}: choose from {', '.join(STYLES)}")
    fields = [{"image": image} for image in _pictures(writer, images)]
    task = f"caption_{style}"
    return _tell(writer, task, fields, wording, STYLES[style], "a caption", **options)


def answer(
    writer: Writer,
    images: Iterable[Picture],
    questions: Iterable[str],
    wording: int,
    **options: Unpack[TextOptions],
) -> list[str]:
    given = _pictures(writer, images)
    texts = as_many(written(questions, "questions"), len(given), "questions", "images")
    fields = _zipped(image=given, question=texts)
    return _tell(writer, "answer", fields, wording, _ANSWER, "an answer", **options)


def science(
    writer: Writer,
    images: Iterable[Picture],
    questions: Iterable[str],
    choices: Iterable[Sequence[str]],
    contexts: Iterable[str] | None,
    **options: Unpack[TextOptions],
) -> list[str]:
    fields = _science(writer, images, questions, choices, contexts)
    return _tell(writer, "science", fields, 0, _ANSWER, "an answer", **options)


def explain(
    writer: Writer,
    images: Iterable[Picture],
    questions: Iterable[str],
    choices: Iterable[Sequence[str]],
    contexts: Iterable[str] | None,
    **options: Unpack[TextOptions],
) -> list[tuple[str, str]]:
    fields = _science(writer, images, questions, choices, contexts)
    texts = _tell(
        *(writer, "science_cot", fields, 0, _EXPLANATION, "an explanation"), **options
    )
    return mapped(_explained, texts)


def _explained(text: str) -> tuple[str, str]:
    try:
        both = tasks.parse_written("science_cot", text, 0)
        return both["explanation"], both["answer"]
    except ValueError:  # it came to no end
        return text, ""


def edit(
    writer: Writer,
    images: Iterable[Picture],
    instructions: Iterable[str],
    regions: Iterable[Region] | None,
    wording: int,
    **options: Unpack[Options],
) -> list[Pillow.Image]:
    images = listed(images, None, "images")
    texts = written(instructions, "instructions")
    texts = as_many(texts, len(images), "instructions", "images")
    fields = _zipped(source=_pictures(writer, images), instruction=texts)
    default, task = writer.system.sampling.edit, "edit"
    if regions is None:
        return _draw(writer, task, fields, wording, default, **options)
    regions = as_many(regions, len(images), "regions", "images")
    cells = []
    for i, (image, region) in enumerate(zip(images, regions, strict=True)):
        greyed, touched = writer.codec.greyed(image, region, i)
        fields[i]["region"] = Image(greyed)
        cells.append(touched)
    return _draw(
        writer, "edit_region", fields, wording, default, cells=cells, **options
    )


def control(
    writer: Writer,
    images: Iterable[Picture],
    kind: str,
    prompts: Iterable[str] | None,
    strength: float,
    wording: int,
    **options: Unpack[Options],
) -> list[Pillow.Image]:
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: choose from {', '.join(KINDS)}")
    images = listed(images, None, "images")
    if kind == "segmentation":
        images = [writer.codec.coloured(x, i) for i, x in enumerate(images)]
    given, name, extra = _pictures(writer, images), kind, {}
    if kind in REFERENCES:
        name, extra = "reference", {"strength": tasks.strength_word(strength)}
    elif strength != 1:
        raise ValueError(
            f"strength={strength} is for {', '.join(REFERENCES)}; {kind} has none"
        )
    texts: Sequence[str | None] = [None] * len(given)
    if prompts is not None:
        texts = as_many(written(prompts, "prompts"), len(given), "prompts", "images")
    task = f"reference_{kind}" if kind in REFERENCES else f"control_{kind}"
    fields = [
        extra | {name: image, "caption": text}
        for image, text in zip(given, texts, strict=True)
    ]
    default = writer.system.sampling.control
    return _draw(writer, task, fields, wording, default, **options)


def ground(
    writer: Writer,
    prompts: Iterable[str],
    boxes: Iterable[Sequence[tuple[str, Box]]],
    wording: int,
    **options: Unpack[Options],
) -> list[Pillow.Image]:
    texts = written(prompts, "prompts")
    side = writer.codec.image.image_size
    every = as_many(boxes, len(texts), "lists of boxes", "prompts")
    rows = [placed(row, side, f"boxes[{i}]") for i, row in enumerate(every)]
    fields = _zipped(caption=texts, objects=rows)
    default = writer.system.sampling.text_to_image
    return _draw(writer, "ground", fields, wording, default, **options)


def write(
    writer: Writer, contents: Iterable[str], wording: int, **options: Unpack[Options]
) -> list[Pillow.Image]:
    fields = [{"content": text} for text in written(contents, "contents")]
    default = writer.system.sampling.text_to_image
    return _draw(writer, "write", fields, wording, default, **options)


def variation(
    writer: Writer, images: Iterable[Picture], wording: int, **options: Unpack[Options]
) -> list[Pillow.Image]:
    fields = [{"source": image} for image in _pictures(writer, images)]
    default = writer.system.sampling.control
    return _draw(writer, "variation", fields, wording, default, **options)


def segment(
    writer: Writer, images: Iterable[Picture], wording: int, **options: Unpack[Common]
) -> list[np.ndarray]:
    fields = [{"image": image} for image in _pictures(writer, images)]
    return _label(writer, "segment", fields, wording, **options)


def instruct(
    writer: Writer,
    task: str,
    fields: Iterable[Mapping[str, Any]],
    wording: int,
    **options: Unpack[Options],
) -> list[str] | list[Pillow.Image] | list[np.ndarray]:
    spec = tasks.known(task)
    if task == "infill":
        raise ValueError("infilling needs a region: ask `infill` for it")
    given = [dict(each) for each in listed(fields, Mapping, "fields")]
    for each in given:
        free = {"caption"} if len(spec.images) > 1 else set()  # beside a picture
        if missing := [k for k in each.keys() - free if each[k] is None]:
            raise ValueError(f"the task {task} needs {missing[0]}, not None")
        for name in each.keys() & set(spec.images):
            (each[name],) = _pictures(writer, [each[name]])
        if isinstance(text := each.get("objects"), str):
            each["objects"] = [*tasks.objects(text)]
            if not each["objects"]:
                raise ValueError(f"objects={text!r}: PHRASE at (x0, y0) -> (x1, y1)")
        if "objects" in each:
            side = writer.codec.image.image_size
            each["objects"] = placed(each["objects"], side, "objects")
    if spec.writes_text:
        return _tell(writer, task, given, wording, _EXPLANATION, "a text", **options)
    if spec.output in spec.masks:
        return _label(writer, task, given, wording, **options)
    default = usual_sampler(writer.system.sampling, spec)
    return _draw(writer, task, given, wording, default, **options)


def _tell(
    writer: Writer,
    task: str,
    fields: Sequence[Fields],
    wording: int,
    usual: int,
    name: str,
    **options: Unpack[TextOptions],
) -> list[str]:
    """The output of a task that writes text; one that was cut ends in CUT."""
    check_trained(writer, task)
    sft = writer.system.sft
    last = sft is not None and sft.autoregressive
    order = "autoregressive" if last else "cm3"
    asked = [tasks.prompt(task, each, wording, order=order) for each in fields]
    after = [next(x.after for x in a if isinstance(x, tasks.Hole)) for a in asked]
    wanted = [
        Telling(
            # What follows the hole is not read where nothing follows it.
            parts=[*parts[:-1]] if last else parts,
            last=last,
            text=each.get("question"),
            image=next((x.array for x in each.values() if isinstance(x, Image)), None),
        )
        for parts, each in zip(
            writer.codec.parts([[*map(piece, a)] for a in asked]), fields, strict=True
        )
    ]
    default = usual_sampler(writer.system.sampling, tasks.known(task))
    texts, longest = writer.tell(wanted, default, name, usual, **options)
    return mapped(
        lambda spans, rest: _said(writer, spans[0], longest, rest if last else ""),
        *(texts, after),
    )


def _said(writer: Writer, pieces: np.ndarray, longest: int, after: str) -> str:
    text = writer.codec.decode_text(pieces).strip()
    return text + CUT if len(pieces) >= longest else text.removesuffix(after.rstrip())


def _draw(
    writer: Writer,
    task: str,
    fields: Sequence[Fields],
    wording: int,
    default: Sampler,
    *,
    cells: Sequence[np.ndarray] | None = None,
    **options: Unpack[Options],
) -> list[Pillow.Image]:
    """The output of a task that makes pictures. `cells` (bool): all others are copied
    from the field `source`, whatever the model would like."""
    check_trained(writer, task)
    scripts = [np.full(writer.codec.image_tokens, IMAGE, np.int32)] * len(fields)
    if cells is not None:
        sources = np.stack([each["source"].array for each in fields])
        kept = writer.layout.image_ids(writer.codec.image.encode(sources))
        scripts = [*np.where(np.stack(cells), IMAGE, kept).reshape(len(fields), -1)]
    wanted = _drawings(writer, task, fields, wording, scripts)
    return writer.draw(wanted, default, f"the task {task}", **options)


def _label(
    writer: Writer,
    task: str,
    fields: Sequence[Fields],
    wording: int,
    **options: Unpack[Common],
) -> list[np.ndarray]:
    """The output of a task that makes class maps."""
    check_trained(writer, task)
    masks = writer.codec.masks
    if masks is None:
        raise ValueError("this system has no classes: name them in sft.classes")
    script = np.full(masks.grid**2, CLASS, np.int32)
    wanted = _drawings(writer, task, fields, wording, [script] * len(fields))
    default = writer.system.sampling.segment
    classes = len(masks.classes)
    chances = writer.label(wanted, classes, default, "segmentation", **options)
    side, grid = writer.codec.image.image_size, (masks.grid, masks.grid)
    return [masks.decode(p_TC.reshape(*grid, -1), side) for p_TC in chances]


def _drawings(
    writer: Writer,
    task: str,
    fields: Sequence[Fields],
    wording: int,
    scripts: Sequence[np.ndarray],
) -> list[Drawing]:
    """Prompts of a task whose output comes last. A text field of None is hidden."""
    spec, wanted = tasks.known(task), []
    shown = [{k: "-" if x is None else x for k, x in each.items()} for each in fields]
    asked = [tasks.prompt(task, each, wording) for each in shown]
    every = writer.codec.parts([[*map(piece, a)] for a in asked])
    for each, parts, script in zip(fields, every, scripts, strict=True):
        segments, said = parts[::2], {}  # between them stand <break>s
        for n, part in enumerate(spec.wordings[wording].split(BREAK)[:-1]):
            match = FIELD.fullmatch(part)
            if match and match[1] not in (*spec.images, *spec.masks):
                said[n] = each[match[1]]
        for n, text in said.items():
            segments[n] = None if text is None else segments[n]
        asks = [x for key, x in each.items() if key != "strength"]
        texts = [x for x in asks if isinstance(x, str)]
        images = [x.array for x in each.values() if isinstance(x, Image)]
        wanted.append(
            Drawing(
                prompt=forms.instruction(
                    writer.layout,
                    segments,
                    [n for n, text in said.items() if text is not None],
                    script,
                ),
                text=" ".join(texts) or None,
                describes=texts == [each.get("caption")],
                image=images[0] if images else None,
            )
        )
    return wanted


def piece(segment: Segment | tasks.Hole) -> Piece:
    if isinstance(segment, tasks.Hole):
        return (segment.before, segment.after)
    return segment


def check_trained(writer: Writer, task: str) -> None:
    if task not in writer.tasks:
        trained = ", ".join(sorted(writer.tasks)) or "nothing"
        raise ValueError(
            f"this checkpoint was not trained on the task {task!r}, but on {trained}: "
            "add it to sft.tasks of the config, run launch/sft.py, and load the "
            "checkpoint 'sft'"
        )


def _pictures(writer: Writer, images: Iterable[Picture]) -> list[Image]:
    return [Image(array) for array in writer.codec.arrays(images)]


def _zipped(**columns: Sequence[Any]) -> list[Fields]:
    rows = zip(*columns.values(), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _science(
    writer: Writer,
    images: Iterable[Picture],
    questions: Iterable[str],
    choices: Iterable[Sequence[str]],
    contexts: Iterable[str] | None,
) -> list[Fields]:
    given = _pictures(writer, images)
    texts = as_many(written(questions, "questions"), len(given), "questions", "images")
    options = []
    for i, row in enumerate(as_many(choices, len(given), "choices", "images")):
        name = f"choices[{i}]"
        options.append(tasks.lettered(written(row, name), name))
    about = [_NO_CONTEXT] * len(given) if contexts is None else contexts
    about = as_many(written(about, "contexts"), len(given), "contexts", "images")
    return _zipped(image=given, question=texts, context=about, options=options)
