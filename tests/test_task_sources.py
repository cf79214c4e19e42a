"""Where task examples come from: worlds, and folders of JSON lines, faulty ones too."""

import itertools
import json

import numpy as np
import pytest
import tiny_tasks
from PIL import Image as Pillow

from cm3leon_jax.data import shapes, sources, task_sources, task_templates, tasks
from cm3leon_jax.data.documents import Document, Mask, Skipped
from cm3leon_jax.data.task_sources import ExampleConfig

SOURCE = shapes.ShapesConfig(image_size=32, layout=2)


@pytest.fixture
def folder(tmp_path):
    """40 examples of control_hed, some segmentations, and every kind of fault."""
    rng = np.random.default_rng(0)
    for i in range(40):
        picture = rng.integers(0, 256, (32, 48, 3), np.uint8)
        Pillow.fromarray(picture).save(tmp_path / f"{i}.png")
    labels = np.zeros((64, 64), np.uint8)
    labels[:32] = 3
    Pillow.fromarray(labels).save(tmp_path / "labels.png")
    lines = [
        {
            "id": f"n{i}",
            "fields": {"hed": f"{i}.png", "caption": f"c{i}", "image": f"{39 - i}.png"},
            "licence": "CC0-1.0",
        }
        for i in range(40)
    ]
    (tmp_path / "control_hed.jsonl").write_text("\n".join(map(json.dumps, lines)))
    fields = {"image": "0.png", "mask": "labels.png"}
    lines = [{"id": str(i), "fields": fields, "wording": 0} for i in range(40)]
    (tmp_path / "segment.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def config(task, path="", world="folder", **changes):
    settings = {"source": SOURCE, "autoregressive": False} | changes
    return ExampleConfig(world=world, task=task, path=str(path), **settings)


def test_a_folder_gives_its_examples_split_by_their_ids(folder):
    found = {
        split: list(task_sources.documents(config("control_hed", folder), split))
        for split in sources.SPLITS
    }
    ids = [document.id for part in found.values() for document in part]
    assert sorted(ids) == sorted(f"n{i}" for i in range(40))
    assert len(found["train"]) > 25
    for document in found["train"]:
        number = int(document.id[1:])
        fields = tasks.parse("control_hed", document)
        assert fields["caption"] == f"c{number}"
        assert document.metadata["licence"] == "CC0-1.0"
        assert document.metadata["wording"] == "seen"
        assert [p.shape for p in document.pictures] == [(32, 32, 3)] * 2
        saved = np.asarray(Pillow.open(folder / f"{number}.png"))[:, 8:40]
        np.testing.assert_array_equal(fields["hed"].array, saved)


def test_masks_keep_their_labels(folder):
    first = next(task_sources.documents(config("segment", folder), "train"))
    assert isinstance(first, Document) and isinstance(first.segments[-1], Mask)
    expected = np.zeros((32, 32), int)
    expected[:16] = 3
    np.testing.assert_array_equal(first.segments[-1].array, expected)


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{", "line 1 of control_hed.jsonl"),
        ('{"id": "n1"}', "fields"),
        ("[1]", "line 1"),
        ('{"id": "n1", "fields": {"caption": "c"}}', "takes the fields hed, caption"),
        (
            '{"id": "n1", "fields": '
            '{"hed": "x.png", "caption": "c", "image": "1.png"}}',
            "x.png",
        ),
        (
            '{"id": "n1", "wording": 7, "fields": '
            '{"hed": "1.png", "caption": "c", "image": "1.png"}}',
            "has the wordings 0",
        ),
        (
            '{"id": "n1", "wording": 1, "fields": '
            '{"hed": "1.png", "caption": "c", "image": "1.png"}}',
            "wording 1 is one that training never uses",
        ),
        (
            '{"id": "n1", "fields": '
            '{"hed": "control_hed.jsonl", "caption": "c", "image": "1.png"}}',
            "unusable picture",
        ),
    ],
)
def test_a_line_that_cannot_be_used_is_skipped_and_says_why(folder, line, reason):
    (folder / "control_hed.jsonl").write_text(line)
    wanted = config("control_hed", folder)
    found = [x for s in sources.SPLITS for x in task_sources.documents(wanted, s)]
    skipped = [item for item in found if isinstance(item, Skipped)]
    assert len(skipped) == len(found) > 0 and reason in skipped[0].reason


def test_boxes_outside_the_picture_are_skipped(folder):
    fields = {"caption": "c", "image": "0.png"}
    boxes = [[0, 0, 32, 32], [0, 0, 33, 32], [4, 0, 4, 9]]
    lines = [
        {"id": f"n{i}", "fields": fields | {"objects": [["a star", box]]}}
        for i, box in enumerate(boxes)
    ]
    (folder / "ground.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = [
        x
        for split in sources.SPLITS
        for x in task_sources.documents(config("ground", folder), split)
    ]
    why = [x.reason for x in found if isinstance(x, Skipped)]
    assert len(found) == 3 and len(why) == 2
    assert "inside 32x32 pixels" in "".join(why)


def test_colours_are_no_labels(folder):
    (folder / "labels.png").write_bytes((folder / "0.png").read_bytes())
    found = list(task_sources.documents(config("segment", folder), "train"))
    assert all("a mask of mode RGB" in item.reason for item in found) and found


def test_a_prepared_folder_of_a_task(folder, tmp_path):
    wanted, out = config("control_hed", folder), tmp_path / "out"
    fields = {"hed": "1.png", "caption": "c", "image": "2.png"}
    lines = [json.dumps({"id": f"m{i}", "fields": fields}) for i in range(90)]
    (folder / "control_hed.jsonl").write_text("\n".join(lines))
    limits = {"train": 10, "validation": 1, "test": 1}
    made = sources.prepare(wanted, task_sources.documents, out, limits)
    assert made["train"]["documents"] == 10
    again = sources.prepare(wanted, task_sources.documents, out, limits)
    assert again == made
    with pytest.raises(ValueError, match="made with other settings"):
        other = config("control_hed", folder, autoregressive=True)
        sources.prepare(other, task_sources.documents, out, limits)


def test_a_task_that_nobody_makes_is_an_error(folder, monkeypatch):
    monkeypatch.setitem(task_sources.SOURCES, "shapes", tiny_tasks.WORLD)
    task_sources.check("shapes", "edit", "")
    task_sources.check("folder", "control_hed", str(folder))
    with pytest.raises(ValueError, match="'shapes' makes no examples of 'write'.*path"):
        task_sources.check("shapes", "write", "")
    with pytest.raises(ValueError, match="only of nothing"):
        task_sources.check("folder", "edit", "")
    with pytest.raises(FileNotFoundError, match="has no write.jsonl"):
        task_sources.check("shapes", "write", str(folder))
    assert task_sources.classes("shapes") == tiny_tasks.CLASSES
    assert task_sources.classes("folder") == ()


def test_texts_come_last_where_they_are_to(monkeypatch):
    monkeypatch.setitem(task_sources.SOURCES, "shapes", tiny_tasks.WORLD)
    here = {"world": "shapes"}
    for name in tiny_tasks.NAMES:
        one, two = (
            next(
                task_sources.documents(
                    config(name, autoregressive=last, **here), "train"
                )
            )
            for last in (False, True)
        )
        kinds = [[type(s).__name__ for s in x.segments] for x in (one, two)]
        if tasks.known(name).writes_text:
            assert kinds == [["Text", "Image"], ["Image", "Text"]]
            text, (segment, start, stop) = two.texts[0], two.metadata["answer"]
            assert segment == 1 and one.texts[0][start:stop] == text[start:stop]
        else:
            assert kinds[0] == kinds[1]
        assert one.id == two.id and one.metadata["task"] == two.metadata["task"]


@pytest.mark.parametrize("world", task_sources.SOURCES)
def test_a_worlds_examples_are_of_their_task_and_endless(world):
    made = task_sources.SOURCES[world]
    assert set(made.tasks) <= set(task_templates.TASKS)
    if world != "shapes":
        return  # needs artwork; its own tests do the same
    for name in made.tasks:
        found = list(itertools.islice(made.examples(SOURCE, name, "train"), 3))
        again = list(itertools.islice(made.examples(SOURCE, name, "train"), 3))
        assert [d.id for d in found] == [d.id for d in again]
        assert len({d.id for d in found}) == 3
        for document in found:
            assert document.metadata["task"] == name
            assert set(tasks.parse(name, document)) == set(tasks.known(name).fields)
