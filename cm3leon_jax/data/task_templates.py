"""The tasks of supervised fine-tuning, as data: templates (paper 1.12, Table 5).

A template is what stands in a training sample: segments joined by ` <break> `, fields
in braces.

    Question: {question} Answer: {answer}. <break> {image}

A task whose output is a picture or a mask ends in it. A task that writes text has its
picture last, so that the CM3 objective can move the answer behind it. `tasks.py` fills
templates in and reads them back. A new task is one entry in `TASKS`, one source
(`task_sources.py`) and one test.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

BREAK = " <break> "  # between the segments of a template
FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task.

    templates: wordings that mean the same. output: the field to be written. images,
    masks: fields that are a segment of their own; all others are text, but `objects`,
    which is [(phrase, box), …], and `strength`, a word of
    `tasks.STRENGTHS`. unseen: wordings
    that training never uses. begins: the field at which the text to be written begins,
    where that is before `output`. example: a sample of the first wording, text fields
    filled in. Raises ValueError where these do not fit together.
    """

    name: str
    templates: tuple[str, ...]
    output: str
    images: tuple[str, ...]
    masks: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    begins: str | None = None
    example: str

    def __post_init__(self):
        where, pictures = f"task {self.name!r}", {*self.images, *self.masks}
        for template in self.wordings:
            parts = template.split(BREAK)
            names = FIELD.findall(template)
            if sorted(names) != sorted(self.fields):
                raise ValueError(
                    f"{where}: {template!r} has the fields {sorted(names)}, the first "
                    f"wording {sorted(self.fields)}"
                )
            for name in (*pictures, self.output, self.begins or self.output):
                if name not in names:
                    raise ValueError(f"{where}: {template!r} has no {{{name}}}")
            for part in parts:
                if part not in _braced(pictures) and pictures & {*FIELD.findall(part)}:
                    raise ValueError(
                        f"{where}: in {part!r} of {template!r} a picture is not a "
                        f"segment of its own: put {BREAK!r} between"
                    )
            first, last = self.begins or self.output, parts[-1]
            if self.writes_text:
                whole = [part for part in parts if f"{{{self.output}}}" in part]
                if f"{{{first}}}" not in whole[0] or last == whole[0]:
                    raise ValueError(
                        f"{where}: {template!r} must end in a picture, and what is to "
                        "be written must stand in one segment before it"
                    )
            elif last != f"{{{self.output}}}":
                raise ValueError(f"{where}: {template!r} must end in its output")

    @property
    def wordings(self) -> tuple[str, ...]:
        """All templates by number: those of training, then the unseen ones."""
        return self.templates + self.unseen

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """Names of all fields, in the order of the first wording."""
        return tuple(FIELD.findall(self.templates[0]))

    @property
    def writes_text(self) -> bool:
        """Whether the output is a part of a text rather than a segment."""
        return self.output not in (*self.images, *self.masks)


def _braced(names: Iterable[str]) -> set[str]:
    return {f"{{{name}}}" for name in names}


def _control(kind: str, features: str, unseen: str) -> Task:
    """`Make high quality image from … features`: the seven rows of Table 5 differ in
    one word. Control pictures are RGB, aligned with the picture to be made."""
    rest = f"{{{kind}}} <break> {{caption}} <break> {{image}}"
    return Task(
        name=f"control_{kind}",
        templates=(f"Make high quality image from {features} <break> {rest}",),
        unseen=(
            f"Create a high-quality image from {unseen} and text description <break> "
            f"{rest}",
        ),
        output="image",
        images=(kind, "image"),
        example=f"Make high quality image from {features} <break> {{{kind}}} "
        "<break> a red star <break> {image}",
    )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        # Pairs as in pretraining.
        Task(
            name="text_to_image",
            templates=("{caption} <break> {image}",),
            unseen=("High quality image of {caption} <break> {image}",),
            output="image",
            images=("image",),
            example="a red star <break> {image}",
        ),
        # A region of the picture is always what is moved, with and without its text.
        Task(
            name="infill",
            templates=("{caption} <break> {image}",),
            output="image",
            images=("image",),
            example="a red star <break> {image}",
        ),
        # COCO captions, Flickr30k.
        Task(
            name="caption_short",
            templates=(
                "{caption} <break> {image}",
                "Describe the given picture. {caption} <break> {image}",
            ),
            unseen=("What does the picture show? {caption} <break> {image}",),
            output="caption",
            images=("image",),
            example="a red star <break> {image}",
        ),
        # Image Paragraph.
        Task(
            name="caption_detailed",
            templates=(
                "Describe the given picture in very detail. {caption} <break> {image}",
                "Describe all the objects in the given image in very detail. {caption} "
                "<break> {image}",
            ),
            unseen=("List everything in the picture. {caption} <break> {image}",),
            output="caption",
            images=("image",),
            example="Describe the given picture in very detail. a large red star at "
            "the top left and nothing else <break> {image}",
        ),
        # Image Paragraph, Localized Narratives.
        Task(
            name="caption_long",
            templates=(
                "Generate a long caption for the given image. {caption} <break> "
                "{image}",
                "Generate a long narration of what is happening in the given image. "
                "{caption} <break> {image}",
            ),
            unseen=("Tell me about the picture at length. {caption} <break> {image}",),
            output="caption",
            images=("image",),
            example="Generate a long caption for the given image. On a white "
            "background there is a star. It is red. <break> {image}",
        ),
        # VQA2, VizWiz, OKVQA.
        Task(
            name="answer",
            templates=(
                "Question: {question} Answer: {answer}. <break> {image}",
                "Question: {question}\n{answer} <break> {image}",
                "Question: {question} The answer is {answer}. <break> {image}",
            ),
            unseen=("Please answer: {question} Reply: {answer}. <break> {image}",),
            output="answer",
            images=("image",),
            example="Question: what colour is the star? Answer: red. <break> {image}",
        ),
        # ScienceQA.
        Task(
            name="science",
            templates=(
                "Question: {question}\nContext: {context}\nOptions: {options}\n"
                "Answer: {answer}. <break> {image}",
            ),
            output="answer",
            images=("image",),
            example="Question: which is larger?\nContext: the star is large, the "
            "circle small\nOptions: (A) the star (B) the circle\nAnswer: (A). <break> "
            "{image}",
        ),
        # ScienceQA with a chain of thought, which is to be written too.
        Task(
            name="science_cot",
            templates=(
                "Question: {question}\nContext: {context}\nOptions: {options}\n"
                "Answer: Let's think step-by-step: {explanation} So the answer is "
                "{answer}. <break> {image}",
            ),
            output="answer",
            begins="explanation",
            images=("image",),
            example="Question: which is larger?\nContext: two shapes\nOptions: (A) the "
            "star (B) the circle\nAnswer: Let's think step-by-step: The star fills its "
            "cell. The circle does not. So the answer is (A). <break> {image}",
        ),
        # InstructPix2Pix.
        Task(
            name="edit",
            templates=(
                "Edit first image following the instruction <break> {source} <break> "
                "{instruction} <break> {image}",
            ),
            unseen=(
                "Edit the image following the text instruction <break> {source} "
                "<break> {instruction} <break> {image}",
            ),
            output="image",
            images=("source", "image"),
            example="Edit first image following the instruction <break> {source} "
            "<break> make the star blue <break> {image}",
        ),
        # `region` is the source with the region painted mid-grey (128).
        Task(
            name="edit_region",
            templates=(
                "Edit the grey region of the first image following the instruction "
                "<break> {source} <break> {region} <break> {instruction} <break> "
                "{image}",
            ),
            unseen=(
                "Change only the region that is grey in the second image <break> "
                "{source} <break> {region} <break> {instruction} <break> {image}",
            ),
            output="image",
            images=("source", "region", "image"),
            example="Edit the grey region of the first image following the instruction "
            "<break> {source} <break> {region} <break> make it blue <break> {image}",
        ),
        # OCR, how-to-write.
        Task(
            name="write",
            templates=('draw "{content}" <break> {image}',),
            unseen=('write the words "{content}" <break> {image}',),
            output="image",
            images=("image",),
            example='draw "EXIT" <break> {image}',
        ),
        # COCO, OpenImages, Objects365.
        Task(
            name="ground",
            templates=(
                "Generate high quality image of {caption} with segmentations {objects} "
                "<break> {image}",
            ),
            unseen=("Draw {caption}, placed as follows: {objects} <break> {image}",),
            output="image",
            images=("image",),
            example="Generate high quality image of two shapes with segmentations red "
            "star at (3, 4) -> (12, 13), circle at (18, 20) -> (30, 30) <break> "
            "{image}",
        ),
        # ControlNet's kinds.
        _control("edge", "canny edge features", "canny edges"),
        _control("segmentation", "a segmentation map", "a map of segments"),
        _control("hed", "hed features", "soft edges"),
        _control("pose", "openpose features", "a body pose"),
        _control("depth", "depth features", "a depth map"),
        _control("normal", "3D norm features", "surface normals"),
        _control("scribble", "children's scribbles", "children's scribble"),
        # Beyond Table 5: a grid of class tokens (design section 2.12).
        Task(
            name="segment",
            templates=("Segment the first image <break> {image} <break> {mask}",),
            unseen=("Make a class map of the image <break> {image} <break> {mask}",),
            output="mask",
            images=("image",),
            masks=("mask",),
            example="Segment the first image <break> {image} <break> {mask}",
        ),
        # Beyond Table 5: control by a reference picture, with a strength.
        Task(
            name="reference_style",
            templates=(
                "Make an image {strength} in the style of the first image <break> "
                "{reference} <break> {caption} <break> {image}",
            ),
            unseen=(
                "Draw the following, {strength} as the first image is drawn <break> "
                "{reference} <break> {caption} <break> {image}",
            ),
            output="image",
            images=("reference", "image"),
            example="Make an image strongly in the style of the first image <break> "
            "{reference} <break> a red star <break> {image}",
        ),
        Task(
            name="reference_composition",
            templates=(
                "Make an image {strength} with the composition of the first image "
                "<break> {reference} <break> {caption} <break> {image}",
            ),
            unseen=(
                "Draw the following, {strength} laid out as the first image is "
                "<break> {reference} <break> {caption} <break> {image}",
            ),
            output="image",
            images=("reference", "image"),
            example="Make an image strongly with the composition of the first image "
            "<break> {reference} <break> blue circles <break> {image}",
        ),
        Task(
            name="reference_content",
            templates=(
                "Make an image {strength} with the content of the first image <break> "
                "{reference} <break> {caption} <break> {image}",
            ),
            unseen=(
                "Draw the following, {strength} showing what the first image shows "
                "<break> {reference} <break> {caption} <break> {image}",
            ),
            output="image",
            images=("reference", "image"),
            example="Make an image strongly with the content of the first image "
            "<break> {reference} <break> on a black background <break> {image}",
        ),
        Task(
            name="variation",
            templates=(
                "Make a variation of the first image <break> {source} <break> {image}",
            ),
            unseen=(
                "Draw the first image again in another way <break> {source} "
                "<break> {image}",
            ),
            output="image",
            images=("source", "image"),
            example="Make a variation of the first image <break> {source} <break> "
            "{image}",
        ),
    )
}


def known(name: str) -> Task:
    """A task by its name; ValueError with all names for one that does not exist."""
    if name not in TASKS:
        raise ValueError(f"no task {name!r}: choose from {', '.join(TASKS)}")
    return TASKS[name]
