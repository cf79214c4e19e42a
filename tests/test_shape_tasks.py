"""Examples of tasks from shapes: what they say is true of their pictures.

Pictures are read by the oracle, sentences by `shape_reader.py`, neither of which knows
how the examples are made.
"""

import itertools
import re
from collections import Counter

import numpy as np
import pytest
import shape_reader

from cm3leon_jax.data import (
    controls,
    shape_edits,
    shape_questions,
    shape_references,
    shape_tasks,
    shape_views,
    shapes,
    tasks,
)
from cm3leon_jax.data.documents import Image, Mask, to_bytes
from cm3leon_jax.data.task_templates import TASKS
from cm3leon_jax.evaluation import oracle

FULL = shapes.ShapesConfig()
QUICK = shapes.ShapesConfig(
    image_size=32,
    layout=2,
    shapes=("circle", "square", "triangle", "cross"),
    colours=("red", "green", "blue", "yellow", "purple", "orange"),
    backgrounds=("white", "black"),
)
WORLDS = {"full": FULL, "quick": QUICK}
EDGES = ("control_edge",)  # need scikit-image
SCENES = ("source", "reference", "image")  # fields that the oracle can read


def some(config, task, count=40, split="train", **options):
    if task in EDGES:
        pytest.importorskip("skimage")
    found = shape_tasks.examples(config, task, split, **options)
    return list(itertools.islice(found, count))


def fields_of(document):
    fields = tasks.parse(document.metadata["task"], document)
    return {
        name: value.array if isinstance(value, Image | Mask) else value
        for name, value in fields.items()
    }


def read(config, picture):
    return set(oracle.parse(config, picture)), oracle.background(config, picture)


def scene_of(value):
    scene = shapes.Scene.from_json(value)
    return set(scene.objects), scene.background


@pytest.fixture(params=WORLDS)
def config(request):
    return WORLDS[request.param]


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("task", shape_tasks.TASKS)
def test_pictures_are_the_scenes_of_the_metadata_and_of_the_split(task, split):
    spec = TASKS[task]
    for document in some(FULL, task, 12, split):
        fields, facts = fields_of(document), document.metadata
        assert list(fields) == list(spec.fields)
        assert facts["licence"] == "CC0-1.0" and facts["wording"] == "seen"
        for name in set(SCENES) & set(fields):
            objects, background = read(FULL, fields[name])
            kind = "scene" if name != "image" or task == "segment" else "target_scene"
            assert (objects, background) == scene_of(facts[kind])
            assert shapes.owns(split, sorted(objects))
            assert not shapes.HELD_OUT & {(o.colour, o.shape) for o in objects}
        for text in document.texts:
            assert not shapes.HELD_OUT & set(oracle.parse_pairs(text)), text


@pytest.mark.parametrize("task", shape_tasks.TASKS)
def test_examples_are_a_pure_function_of_their_number(config, task):
    first, again = some(config, task, 6), some(config, task, 6)
    assert [to_bytes(d) for d in first] == [to_bytes(d) for d in again]
    others = {d.id for split in shapes.SPLITS for d in some(config, task, 3, split)}
    assert len(others) == 9 and len({d.id for d in first}) == 6


@pytest.mark.parametrize("task", shape_tasks.TASKS)
def test_unseen_wordings_are_never_in_training(task):
    if task.startswith("science"):
        with pytest.raises(ValueError, match="no wording"):
            shape_tasks.examples(FULL, task, "test", unseen_wording=True)
        return
    forms = {d.metadata["template"] for d in some(FULL, task, 20)}
    unseen = some(FULL, task, 8, unseen_wording=True)
    assert {d.metadata["wording"] for d in unseen} == {"unseen"}
    if TASKS[task].unseen:
        assert not forms & {d.metadata["template"] for d in unseen}
    for words in (shape_edits.WORDINGS, shape_edits.LOCAL, shape_questions.WORDINGS):
        assert words[True].keys() == words[False].keys()
        for kind in words[False]:
            assert not set(words[True][kind]) & set(words[False][kind])


def test_captions_of_three_lengths(config):
    length = {}
    for style in ("short", "detailed", "long"):
        documents = some(config, f"caption_{style}")
        texts = [fields_of(d)["caption"] for d in documents]
        length[style] = np.mean([len(text) for text in texts])
        for document, text in zip(documents, texts, strict=True):
            objects, background = scene_of(document.metadata["scene"])
            if style == "short":
                pairs = Counter((o.colour, o.shape) for o in objects)
                assert oracle.parse_pairs(text) == pairs
            else:
                assert oracle.parse_caption(config, text) == objects, text
                assert background in text
            segment, start, stop = document.metadata["answer"]
            assert document.segments[segment].text[start:stop].strip() == text
    assert 1.5 * length["short"] < length["detailed"] < length["long"] / 1.5


def test_answers_follow_from_the_picture(config):
    kinds = Counter()
    for document in some(config, "answer", 300):
        fields, facts = fields_of(document), document.metadata
        objects, background = read(config, fields["image"])
        question, answer = fields["question"], fields["answer"]
        found = shape_reader.reply(config.layout, objects, background, question)
        assert found == answer == facts["answer_text"], question
        kinds[facts["question_kind"]] += 1
    assert set(kinds) == set(shape_questions.KINDS) and min(kinds.values()) > 10


@pytest.mark.parametrize("split", ["train", "test"])
def test_no_answer_is_the_usual_one(config, split):
    rng = np.random.default_rng(0)
    answers = {}
    for _ in range(2000 if split == "train" else 900):
        q = shape_questions.ask(config, split, rng)
        assert q.answer in q.options
        place = (
            ("first", "last")[q.options.index(q.answer)] if "larger" == q.kind else ""
        )
        answers.setdefault(q.kind, Counter())[place or q.answer] += 1
    for kind, counts in answers.items():
        assert max(counts.values()) <= 0.6 * counts.total(), (kind, counts)


def test_choices_hold_the_answer_and_thoughts_lead_to_it(config):
    letters = Counter()
    for document in some(config, "science", 40) + some(config, "science_cot", 40):
        fields = fields_of(document)
        objects, background = read(config, fields["image"])
        question = fields["question"]
        found = shape_reader.reply(config.layout, objects, background, question)
        options = dict(re.findall(r"(\(\w\)) (.+?)(?= \(|$)", fields["options"]))
        assert options[fields["answer"]] == found
        assert len(set(options.values())) == len(options) >= 2
        letters[fields["answer"]] += 1
        if "explanation" in fields:
            explanation = fields["explanation"]
            assert oracle.parse_caption(config, explanation) == objects
            assert f"That means: {found}." in explanation
    assert max(letters.values()) <= 0.6 * letters.total()


def cells_in(config, box):
    x0, y0, x1, y1 = box
    side = config.image_size / config.layout
    for cell in range(config.layout**2):
        y, x = divmod(cell, config.layout)
        if x0 < (x + 0.5) * side < x1 and y0 < (y + 0.5) * side < y1:
            yield cell


@pytest.mark.parametrize("task", ["edit", "edit_region"])
def test_edits_do_what_the_instruction_says_and_nothing_else(config, task):
    seen = Counter()
    for document in some(config, task, 250):
        fields, edit = fields_of(document), document.metadata["edit"]
        before, after = (read(config, fields[name]) for name in ("source", "image"))
        assert before != after
        region = document.metadata.get("region", (0, 0, 0, 0))
        wanted = shape_reader.follow(
            config.layout,
            *before,
            fields["instruction"],
            set(cells_in(config, region)),
        )
        assert wanted == after, fields["instruction"]
        assert {o.cell for o in before[0] ^ after[0]} == set(edit["cells"])
        assert sorted(edit["cells"] + edit["kept"]) == list(range(config.layout**2))
        seen[edit["kind"], edit["spatial"], edit["several"]] += 1
        if edit["kind"] == "background":
            assert before[0] == after[0]
            continue
        same = (fields["source"] == fields["image"]).all(-1)
        for cell in edit["kept"]:
            x0, y0, x1, y1 = shape_views.cell_box(config, cell)
            assert same[y0:y1, x0:x1].all()
        if task == "edit_region":
            x0, y0, x1, y1 = region
            hidden = np.zeros_like(same)
            hidden[y0:y1, x0:x1] = True
            assert hidden.any() and same[~hidden].all()
            assert (fields["region"][hidden] == 128).all()
            assert (fields["region"][~hidden] == fields["source"][~hidden]).all()
    kinds = shape_edits.KINDS if task == "edit" else shape_edits.LOCAL_KINDS
    assert {kind for kind, _, _ in seen} == set(kinds)
    share = sum(n for (_, spatial, _), n in seen.items() if spatial) / 250
    assert 0.2 < share < 0.6
    assert any(several for _, _, several in seen) == (task == "edit")


def test_boxes_are_tight(config):
    for document in some(config, "ground"):
        fields = fields_of(document)
        boxes = oracle.boxes(config, fields["image"])
        found = Counter((f"{o.colour} {o.shape}", box) for o, box in boxes.items())
        assert Counter(fields["objects"]) == found
        assert [[name, list(b)] for name, b in fields["objects"]] == document.metadata[
            "boxes"
        ]
        assert (
            f"{document.metadata['scene']['background']} background"
            in (fields["caption"])
        )


def labels(config, picture):
    mask = np.zeros(picture.shape[:2], int)
    for o, own in oracle.covered(config, picture):
        mask[own] = shape_tasks.CLASSES.index(o.shape)
    return mask


def test_masks_and_control_maps_agree_with_the_picture(config):
    for document in some(config, "segment"):
        fields = fields_of(document)
        assert (fields["mask"] == labels(config, fields["image"])).all()
    for document in some(config, "control_segmentation"):
        fields = fields_of(document)
        wanted, given = labels(config, fields["image"]), fields["segmentation"]
        colours = controls.class_colours(len(shape_tasks.CLASSES))
        assert (given == colours[wanted]).all()
    for document in some(config, "control_depth"):
        fields = fields_of(document)
        for o, own in oracle.covered(config, fields["image"]):
            assert (fields["depth"][own] == {"large": 255, "small": 158}[o.size]).all()
        assert not fields["depth"][labels(config, fields["image"]) == 0].any()


def test_class_colours_show_no_held_out_pair():
    masks = np.arange(len(shape_tasks.CLASSES))[None]
    colours = np.array(list(shapes.COLOURS.values()))
    for shape, shown in zip(
        shape_tasks.CLASSES[1:],
        controls.class_picture(masks, masks.size)[0, 1:].astype(int),
        strict=True,
    ):
        nearest = ((colours - shown) ** 2).sum(-1).argmin()
        assert (list(shapes.COLOURS)[nearest], shape) not in shapes.HELD_OUT


@pytest.mark.parametrize("kind", ["edge", "scribble"])
def test_lines_follow_the_outlines(config, kind):
    far = {"edge": 2.0, "scribble": 0.25 * config.image_size / config.layout + 1}
    grid = np.stack(np.indices((config.image_size,) * 2), -1).reshape(-1, 2)
    for document in some(config, f"control_{kind}"):
        fields = fields_of(document)
        lines = fields[kind]
        assert set(np.unique(lines)) == {0, 255}
        drawn = grid[lines[..., 0].ravel() > 0]
        inside = np.pad(labels(config, fields["image"]) > 0, 1)
        core = inside[1:-1, 1:-1]
        inner = core & inside[:-2, 1:-1] & inside[2:, 1:-1]
        inner &= inside[1:-1, :-2] & inside[1:-1, 2:]
        border = grid[(core & ~inner).ravel()]
        away = np.sqrt(((drawn[:, None] - border) ** 2).sum(-1))
        assert away.min(1).max() <= far[kind]
        assert np.median(away.min(0)) <= 1.5


def test_scribbles_differ_from_each_other():
    scene = shapes.scene(FULL, "train", 0)
    rng = np.random.default_rng(0)
    drawn = {shape_views.scribble(FULL, scene, rng).tobytes() for _ in range(5)}
    assert len(drawn) == 5


def test_colours_in_reading_order_with_a_control(config):
    for document in some(config, "control_depth"):
        objects, background = scene_of(document.metadata["target_scene"])
        caption = fields_of(document)["caption"]
        named = [words[1:] for words in phrases(caption)]
        assert named == [(o.colour, o.shape, "") for o in sorted(objects)]
        assert background in caption
        assert not set(shape_reader.SIZES) & set(caption.split())


def phrases(caption):
    """(size word, colour, shape or "object", cell name) of each object, or ""."""
    names = sorted({n for names in shapes.CELL_NAMES.values() for n in names}, key=len)
    pattern = (
        rf"\ban? (?:({'|'.join(shape_reader.SIZES)}) )?"
        rf"(?:({'|'.join(shapes.COLOURS)}) )?({'|'.join(shapes.SHAPES)}|object)"
        rf"(?: at the ({'|'.join(reversed(names))}))?"
    )
    return re.findall(pattern, caption)


@pytest.mark.parametrize("kind", shape_references.FACETS)
def test_references_give_their_facets_and_captions_the_others(config, kind):
    facets, strengths = shape_references.FACETS[kind], Counter()
    for document in some(config, f"reference_{kind}", 60):
        fields, facts = fields_of(document), document.metadata
        models, model_ground = read(config, fields["reference"])
        objects, ground = read(config, fields["image"])
        strength = tasks.STRENGTHS[fields["strength"]]
        taken = facets[: round(3 * strength)]
        assert list(taken) == facts["taken"] and facts["strength"] == fields["strength"]
        strengths[facts["strength"]] += 1
        told = phrases(fields["caption"])
        models, objects = sorted(models), sorted(objects)
        assert len(told) == len(objects)
        if kind == "style":
            assert len({(o.colour, o.size) for o in models}) == 1
            models = models[:1] * len(objects)
        for o, model, (size, colour, shape, cell) in zip(
            objects, models, told, strict=True
        ):
            said = {
                "size": shape_reader.SIZES.get(size),
                "colour": colour,
                "shape": shape,
                "cell": cell and shapes.CELL_NAMES[config.layout].index(cell),
            }
            for name, value in said.items():
                wanted = getattr(model, name) if name in taken else value
                assert getattr(o, name) == wanted
        if "background" in taken:
            assert ground == model_ground
        else:
            assert ground in fields["caption"]
    assert len(strengths) == 3


def test_variations_keep_what_is_there(config):
    for document in some(config, "variation"):
        fields = fields_of(document)
        before, after = (read(config, fields[name]) for name in ("source", "image"))
        assert before[1] == after[1] and before[0] != after[0]
        pairs = [Counter((o.colour, o.shape) for o in x) for x, _ in (before, after)]
        assert pairs[0] == pairs[1]


def test_what_cannot_be_made_is_said():
    with pytest.raises(ValueError, match="no 'write': choose from text_to_image"):
        shape_tasks.examples(FULL, "write", "train")
    tiny = shapes.ShapesConfig(max_objects=1, shapes=("circle",), colours=("red",))
    kinds = {d.metadata["edit"]["kind"] for d in some(tiny, "edit", 20)}
    assert kinds == {"resize", "move", "background"}
    with pytest.raises(ValueError, match="no unicorn .* this world is too small"):
        shapes.search(lambda: None, "unicorn")
