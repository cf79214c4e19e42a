"""Every task: template -> document -> tokens -> document -> the same fields."""

import numpy as np
import pytest
from tiny_data import GRID, LAYOUT, BlockTokenizer, ByteTokenizer, tokenize

from cm3leon_jax.data import infill, records, tasks
from cm3leon_jax.data.documents import Document, Image, Mask, Text
from cm3leon_jax.data.task_templates import BREAK, FIELD, TASKS, Task
from cm3leon_jax.data.tokenization import Encoders
from cm3leon_jax.vocab import CLASS, IMAGE

WORDINGS = [
    (name, number, order)
    for name, task in TASKS.items()
    for number in range(len(task.wordings))
    for order in ("cm3", "autoregressive")
]
TEXTS = {
    "caption": "a red star; it is large, and not {braced}",
    "question": "What is (the) colour of the star?",
    "answer": "dark red",
    "context": "Two shapes.\nOne is a star.",
    "options": "(A) dark red (B) blue",
    "explanation": "Only the star is red. The circle is blue.",
    "instruction": "make the star blue \\1",
    "content": 'EXIT "now"',
    "objects": [("a red star", (3, 4, 10, 20)), ("circle at dusk", (0, 0, 32, 32))],
    "strength": "moderately",
}


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)


def fields_of(name):
    task = TASKS[name]
    fields = {}
    for number, field in enumerate(task.fields):
        if field in task.masks:
            codes = np.arange(64, dtype=np.int32).reshape(8, 8) % 4
            fields[field] = Mask(codes=codes)
        else:
            fields[field] = Image(picture(number)) if field in task.images else None
        if fields[field] is None:
            fields[field] = TEXTS[field]
    return fields


def plain(fields):
    """Comparable: texts, and the codes of pictures and masks as lists."""
    made = {}
    for name, value in fields.items():
        if isinstance(value, Image | Mask):
            codes = value.codes
            if codes is None:
                codes = BlockTokenizer().encode(value.array[None])[0]
            value = codes.ravel().tolist()
        made[name] = value
    return made


def from_tokens(tokens):
    """Ids -> document, by their modality alone."""
    segments = []
    breaks = np.flatnonzero(tokens == LAYOUT.brk)
    for part in np.split(tokens, breaks):
        part = part[part != LAYOUT.brk]
        kind = LAYOUT.modality(part[:1])[0]
        if kind == IMAGE:
            segments.append(Image(codes=LAYOUT.codes(part).reshape(GRID)))
        elif kind == CLASS:
            segments.append(Mask(codes=LAYOUT.labels(part).reshape(8, 8)))
        else:
            segments.append(Text(bytes(LAYOUT.pieces(part).tolist()).decode()))
    return Document(tuple(segments))


def test_every_row_of_table_5_and_those_beyond_are_there():
    wanted = (
        "text_to_image caption_short caption_detailed caption_long answer science "
        "science_cot edit edit_region write ground control_edge control_segmentation "
        "control_hed control_pose control_depth control_normal control_scribble "
        "segment infill variation reference_style reference_composition "
        "reference_content"
    )
    assert set(wanted.split()) <= set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_the_worked_example_is_one(name):
    task = TASKS[name]
    document = Document(
        tuple(
            Text(part)
            if not FIELD.fullmatch(part)
            else Mask(codes=np.zeros((8, 8), np.int32))
            if part[1:-1] in task.masks
            else Image(picture(0))
            for part in task.example.split(BREAK)
        )
    )
    fields = tasks.parse(name, document)
    again = tasks.fill(name, fields, 0)
    assert [s.text for s in again.segments if isinstance(s, Text)] == [
        s.text for s in document.segments if isinstance(s, Text)
    ]
    assert [type(s) for s in again.segments] == [type(s) for s in document.segments]


@pytest.mark.parametrize("name, wording, order", WORDINGS)
def test_template_to_tokens_to_fields(name, wording, order):
    fields = fields_of(name)
    document = tasks.fill(name, fields, wording, order=order, id="x", licence="CC0")
    assert document.metadata["licence"] == "CC0" and document.id == "x"
    seen = wording < len(TASKS[name].templates)
    assert document.metadata["wording"] == ("seen" if seen else "unseen")
    assert plain(tasks.parse(name, document)) == plain(fields)
    (record,) = tokenize([document], regions_per_image=0)
    found = from_tokens(record.tokens)
    assert plain(tasks.parse(name, found)) == plain(fields)


@pytest.mark.parametrize("name, wording, order", WORDINGS)
def test_prompt_and_what_is_written_make_the_example(name, wording, order):
    task, fields = TASKS[name], fields_of(name)
    document = tasks.fill(name, fields, wording, order=order)
    given = {k: v for k, v in fields.items() if k != task.output and k != task.begins}
    parts = tasks.prompt(name, given, wording, order=order)
    if not task.writes_text:
        assert "answer" not in document.metadata
        assert len(parts) == len(document.segments) - 1
        kind = Mask if task.output in task.masks else Image
        assert isinstance(document.segments[-1], kind)
        assert not any(isinstance(part, tasks.Hole) for part in parts)
        return
    segment, start, stop = document.metadata["answer"]
    text = document.segments[segment].text
    hole = parts[segment]
    assert (hole.before, hole.after) == (text[:start], text[stop:])
    assert segment == (len(parts) - 1 if order == "autoregressive" else 0)
    written = {k: fields[k] for k in (task.begins, task.output) if k}
    assert tasks.parse_written(name, text[start:stop], wording) == written
    assert tasks.parse_written(name, text[start:], wording) == written


def test_a_chain_of_thought_is_written_whole():
    document = tasks.fill("science_cot", fields_of("science_cot"), 0)
    _, start, stop = document.metadata["answer"]
    text = document.segments[0].text
    assert text[start:stop] == f" {TEXTS['explanation']} So the answer is dark red"
    with pytest.raises(ValueError, match="which task 'science_cot' writes"):
        tasks.parse_written("science_cot", "I think and think", 0)


def test_boxes_are_text_and_come_back():
    assert tasks.location((1, 2, 30, 40)) == "(1, 2) -> (30, 40)"
    assert tasks.location(np.array([1, 2, 30, 40])) == "(1, 2) -> (30, 40)"
    text = "a at (1, 2) -> (3, 4), b at (5, 6) -> (7, 8)"
    assert tasks.parse_locations(text) == [(1, 2, 3, 4), (5, 6, 7, 8)]
    for box in ((3, 0, 3, 9), (5, 0, 2, 9), (-1, 0, 2, 2), (0, 0, 1.5, 2), (1, 2, 3)):
        with pytest.raises(ValueError, match="box"):
            tasks.location(box)


def test_strengths_have_words():
    assert [tasks.strength_word(s) for s in (0.2, 0.33, 0.6, 0.67, 1.0)] == [
        *("slightly", "slightly", "moderately", "moderately", "strongly")
    ]
    with pytest.raises(ValueError, match="strength=0"):
        tasks.strength_word(0)


@pytest.mark.parametrize(
    "task, fields, wording, message",
    [
        ("paint", {}, 0, "no task 'paint': choose from text_to_image"),
        ("answer", {"question": "q"}, 0, "takes the fields question, answer, image"),
        ("answer", fields_of("answer") | {"box": 1}, 0, "takes the fields"),
        ("answer", fields_of("answer") | {"answer": " "}, 0, "'answer' must be a text"),
        ("answer", fields_of("answer"), 4, "has the wordings 0 … 3, not 4"),
        ("answer", fields_of("answer"), -1, "not -1"),
        ("ground", fields_of("ground") | {"objects": []}, 0, "'objects' must be"),
        ("variation", fields_of("variation") | {"image": "x.png"}, 0, "Image or an a"),
        (
            "reference_style",
            fields_of("reference_style") | {"strength": "much"},
            0,
            "strength='much': choose from slightly",
        ),
    ],
)
def test_what_cannot_be_filled_in_is_an_error(task, fields, wording, message):
    with pytest.raises(ValueError, match=message):
        tasks.fill(task, fields, wording)


def test_another_task_does_not_parse():
    document = tasks.fill("edit", fields_of("edit"), 0)
    with pytest.raises(ValueError, match="no wording of the task 'answer'"):
        tasks.parse("answer", document)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"templates": ("{a} <break> {image}", "{b} <break> {image}")}, "the fields"),
        ({"output": "c"}, r"has no \{c\}"),
        ({"templates": ("{image} <break> {a}",)}, "must end in a picture"),
        ({"templates": ("see {image} <break> {a}",)}, "not a segment of its own"),
        ({"output": "image", "templates": ("{image} <break> {a}",)}, "end in its out"),
    ],
)
def test_templates_that_do_not_fit_together_are_errors(changes, message):
    settings = {
        "name": "new",
        "templates": ("{a} <break> {image}",),
        "output": "a",
        "images": ("image",),
        "example": "",
    }
    Task(**settings)
    with pytest.raises(ValueError, match=message):
        Task(**settings | changes)


def test_moving_the_answer_and_back():
    fields = fields_of("answer")
    document = tasks.fill("answer", fields, 0)
    (record,) = tokenize([document], regions_per_image=0, tasks=["edit", "answer"])
    assert record.task == 2
    tokens = np.concatenate([[LAYOUT.eos], record.tokens, [LAYOUT.eos]])
    spans = [(int(a) + 1, int(b) + 1) for a, b in record.answers]
    moved = infill.infill(tokens, spans, LAYOUT)
    np.testing.assert_array_equal(infill.uninfill(moved, LAYOUT), tokens)
    pieces = LAYOUT.text_ids(ByteTokenizer().encode(" dark red"))
    np.testing.assert_array_equal(moved[-len(pieces) - 2 : -2], pieces)


class PairTokenizer(ByteTokenizer):
    """Two characters a piece: where a text is cut decides all pieces after it."""

    def encode(self, text):
        return [sum(text[i : i + 2].encode()) % 256 for i in range(0, len(text), 2)]


@pytest.mark.parametrize("order", ["cm3", "autoregressive"])
def test_an_answer_has_pieces_of_its_own_as_in_a_prompt(order):
    fields = fields_of("answer") | {"question": "What?"}
    document = tasks.fill("answer", fields, 0, order=order)
    encoders = Encoders(PairTokenizer(), BlockTokenizer(), LAYOUT, tasks=("answer",))
    (record,) = records.tokenize([document], encoders, 0, 0)
    given = {"question": "What?", "image": fields["image"]}
    (hole,) = [
        part
        for part in tasks.prompt("answer", given, 0, order=order)
        if isinstance(part, tasks.Hole)
    ]
    parts = [PairTokenizer().encode(x) for x in (hole.before, " dark red", hole.after)]
    start, stop = record.bounds[record.bounds[:, 1].argmax() if order != "cm3" else 0]
    pieces = LAYOUT.pieces(record.tokens[start:stop]).tolist()
    assert pieces == parts[0] + parts[1] + parts[2]
    first = int(start) + len(parts[0])
    expected = [[first, first + len(parts[1])]] if order == "cm3" else []
    assert record.answers.tolist() == expected
