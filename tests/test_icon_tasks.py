"""Task examples of artwork, on a made-up world of squares: no network."""

import itertools
import json

import numpy as np
import pytest
from test_icons import icon_set, write_world

from cm3leon_jax.data import controls, icon_names, icon_sets, icon_tasks, icons, tasks
from cm3leon_jax.data.documents import Image, Mask, Text, from_bytes, to_bytes
from cm3leon_jax.data.icon_edits import EDITS
from cm3leon_jax.data.icon_scenes import CELLS, CLASSES, Artwork, label_of

pytest.importorskip("resvg_py", reason="the extra `icons` is not installed")
pytest.importorskip("skimage", reason="the extra `controls` is not installed")

SIZE = 32
NAMES = ["".join(parts) for parts in itertools.product(*["bdfgklm", "aou"] * 2)]
# Of each class two, which makes several subjects of each subgroup.
SUBGROUPS = (0, 5, 16, 20, 25, 28, 34, 38, 42, 47, 54, 56, 65, 80, 85, 94)
# Two sets of one maker, one of another, and a set of icons, which have no class.
MAKERS = {"noto": "G", "noto-v1": "G", "twemoji": "T", "icon-park": "I"}
SPDX = {"twemoji": "CC-BY-4.0"}


def colour_of(name, prefix):
    seed = icon_names.digest(name, prefix)
    return seed // 25 % 200, seed // 7777 % 200, seed // 99 % 200


def drawing(name, prefix):
    """A shape of one colour; both differ between names and artists."""
    seed = icon_names.digest(name, prefix)
    x, y = seed % 5, seed // 5 % 5
    path = f"M{x} {y}H{15 - y}V{14 - x}H{x}z"
    if prefix == "twemoji":  # slanting, so that some pixels are partly covered
        path = f"M{x} {y}L15 {14 - y}L{4 - y} 12z"
    red, green, blue = colour_of(name, prefix)
    return {"body": f'<path fill="rgb({red},{green},{blue})" d="{path}"/>'}


def make_world(cache):
    write_world(cache)
    emoji = [
        {
            "label": name,
            "hexcode": f"{0x1F900 + number:X}",
            "tags": [f"tag of {name}"],
            "subgroup": SUBGROUPS[number % len(SUBGROUPS)],
        }
        for number, name in enumerate(NAMES)
    ]
    (cache / "emoji.json").write_text(json.dumps(emoji))
    for prefix in icon_sets.SETS:
        drawn = {name: drawing(name, prefix) for name in NAMES if prefix in MAKERS}
        data = icon_set(drawn, spdx=SPDX.get(prefix, "MIT"))
        data["info"]["author"]["name"] = MAKERS.get(prefix, "")
        (cache / f"{prefix}.json").write_text(json.dumps(data))
    return icons.IconsConfig(image_size=SIZE, cache=str(cache))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world") / "cache")


def take(world, task, count=12, split="train", **options):
    return list(
        itertools.islice(icon_tasks.examples(world, task, split, **options), count)
    )


def same(one, other):
    """Equal in every byte."""
    return [to_bytes(a) for a in one] == [to_bytes(b) for b in other]


def pictures(document):
    return [s.array for s in document.segments if not isinstance(s, Text)]


@pytest.mark.parametrize("task", icon_tasks.TASKS)
def test_every_task_in_every_split(world, task):
    subjects, seen = {}, {}
    for split in icons.SPLITS:
        documents = take(world, task, 8, split)
        assert same(documents, take(world, task, 8, split))
        subjects[split] = {
            piece["subject"] for d in documents for piece in d.metadata["artwork"]
        }
        assert all(icon_names.split_of(name) == split for name in subjects[split])
        seen[split] = {document.id for document in documents}
        for document in documents:
            fields = tasks.parse(task, document)
            spec = tasks.known(task)
            assert list(fields) == list(spec.fields)
            for name, value in fields.items():
                kind = Mask if name in spec.masks else Image
                if isinstance(value, kind):
                    assert value.array.shape[:2] == (SIZE, SIZE)
            facts = document.metadata
            licences = {piece["licence"] for piece in facts["artwork"]}
            assert (
                set(facts["licence"].split(" AND "))
                == licences
                <= {
                    "MIT",
                    "CC-BY-4.0",
                }
            )
            assert facts["source"] and facts["wording"] == "seen"
            assert icon_sets.showable(facts) == (licences == {"MIT"})
            assert from_bytes(to_bytes(document)).metadata == facts
    assert len(set.union(*seen.values())) == 24


def texts_of_other_splits(split):
    return {name for name in NAMES if icon_names.split_of(name) != split}


@pytest.mark.parametrize("task", icon_tasks.TASKS)
def test_no_text_names_what_another_split_owns(world, task):
    for split in ("train", "test"):
        others = texts_of_other_splits(split)
        for document in take(world, task, 10, split):
            words = set(" ".join(document.texts).replace(",", " ").split())
            assert not words & others


@pytest.mark.parametrize("task", [t for t in icon_tasks.TASKS if tasks.known(t).unseen])
def test_unseen_wordings_are_about_the_same_pictures(world, task):
    seen = take(world, task)
    unseen = take(world, task, unseen_wording=True)
    for one, other in zip(seen, unseen, strict=True):
        assert other.metadata["wording"] == "unseen"
        assert one.texts != other.texts
        for a, b in zip(pictures(one), pictures(other), strict=True):
            assert (a == b).all()


def test_first_examples_are_about_different_drawings(world):
    count = len(Artwork(world, "test").singles)
    documents = take(world, "caption_short", count, "test")
    drawn = {document.metadata["artwork"][0]["id"] for document in documents}
    assert len(drawn) == count
    again = take(world, "caption_short", 2 * count, "test")[count:]
    assert {d.metadata["artwork"][0]["id"] for d in again} == drawn
    assert not same(documents, again)  # another order, other grounds


def test_masks_and_boxes_are_exact(world):
    by_id = {d.id: d for d in Artwork(world, "train").singles}
    labels = set()
    for document in take(world, "segment", 25):
        picture, mask = pictures(document)
        scene = document.metadata["scene"]
        ground = np.array(icons.BACKGROUNDS[scene["background"]])
        empty = np.ones((SIZE, SIZE), bool)
        for item in scene["objects"]:
            drawn = by_id[item["id"]]
            row, column = divmod(item["cell"], 2)
            cell = np.s_[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
            label = CLASSES.index(item["class"])
            labels.add(label)
            assert label == label_of(drawn)
            # One colour on another: how much of it there is says how much is covered.
            step = np.array(colour_of(drawn.names[0], drawn.icon.prefix)) - ground
            covered = (picture[cell].astype(float) - ground) @ step / (step @ step)
            sure = np.abs(covered - 0.5) > 0.03
            assert (mask[cell] == np.where(covered > 0.5, label, 0))[sure].all()
            rows, columns = np.nonzero(mask[cell])
            assert item["box"] == [
                column * 16 + columns.min(),
                row * 16 + rows.min(),
                column * 16 + columns.max() + 1,
                row * 16 + rows.max() + 1,
            ]
            empty[cell] = False
        assert (mask[empty] == 0).all() and (picture[empty] == ground).all()
    assert len(labels) >= 5


def test_class_maps_tell_the_classes_apart(world):
    for document in take(world, "control_segmentation", 6):
        colours, picture = pictures(document)
        found = {tuple(colour) for colour in colours.reshape(-1, 3).tolist()}
        classes = {item["class"] for item in document.metadata["scene"]["objects"]}
        palette = controls.class_colours(len(CLASSES)).tolist()
        assert found == {tuple(palette[CLASSES.index(c)]) for c in classes} | {
            (0, 0, 0)
        }
        assert picture.shape == colours.shape


def boxes_of(scene):
    return {item["cell"]: item for item in scene["objects"]}


@pytest.mark.parametrize("task", ["edit", "edit_region"])
def test_edits_change_what_they_say_and_nothing_else(world, task):
    kinds = set()
    for document in take(world, task, 40):
        facts = document.metadata["edit"]
        source, *region, image = pictures(document)
        x0, y0, x1, y1 = document.metadata["region"]
        outside = np.ones((SIZE, SIZE), bool)
        outside[y0:y1, x0:x1] = False
        assert (source[outside] == image[outside]).all()
        assert (source != image).any()
        if region:
            assert (region[0][outside] == source[outside]).all()
            assert (region[0][~outside] == 128).all()
        before = boxes_of(document.metadata["scene"])
        after = boxes_of(document.metadata["target_scene"])
        (cell,), kind = facts["cells"], facts["kind"]
        assert sorted([cell, *facts["kept"]]) == list(range(len(CELLS)))
        kinds.add(kind)
        assert {c: i for c, i in before.items() if c != cell} == {
            c: i for c, i in after.items() if c != cell
        }
        instruction = tasks.parse(task, document)["instruction"]
        if kind == "add":
            assert cell not in before
        else:
            assert before[cell]["name"] == facts["target"]
        if kind == "remove":
            assert cell not in after and len(after) >= 1
        elif kind == "recolour":
            assert after[cell] == {**before[cell], "colour": facts["colour"]}
            assert facts["colour"] in instruction
        else:
            names = {item["name"] for item in before.values()}
            assert after[cell]["name"] == facts["new"] not in names
            assert facts["new"] in instruction
        assert (CELLS[cell] in instruction) == facts["spatial"]
        assert not (region and facts["spatial"])
        if not region and not facts["spatial"]:
            assert facts["target"] in instruction
    assert kinds == set(EDITS)


def test_answers_are_true(world):
    kinds = set()
    for document in take(world, "answer", 120):
        facts = document.metadata
        assert tasks.parse("answer", document)["answer"] == facts["answer_text"]
        segment, start, stop = facts["answer"]
        said = document.segments[segment].text[start:stop].strip()
        assert said == facts["answer_text"]
        question, kind = facts["question"], facts["question_kind"]
        kinds.add((kind, said) if kind == "whether" else kind)
        if kind == "what":
            assert said == facts["name"]
            continue
        items = boxes_of(facts["scene"])
        named = [cell for cell, item in items.items() if item["name"] in question]
        if kind == "what there":
            (cell,) = [n for n, cell in enumerate(CELLS) if cell in question]
            assert items[cell]["name"] == said
        elif kind == "where":
            assert [said] == [f"at the {CELLS[cell]}" for cell in named]
        elif kind == "how many":
            assert int(said) == len(items)
        elif kind == "how many of":
            assert int(said) == len(named) >= 1
        else:
            assert (said == "yes") == bool(named)
    wanted = set(icon_tasks.QUESTIONS) - {"whether"}
    assert kinds == wanted | {("whether", "yes"), ("whether", "no")}


def test_grounding_gives_the_boxes_of_the_scene(world):
    for document in take(world, "ground"):
        objects = tasks.parse("ground", document)["objects"]
        scene = document.metadata["scene"]["objects"]
        assert objects == [(item["name"], tuple(item["box"])) for item in scene]


def test_references(world):
    drawings = {d.id: d for d in Artwork(world, "train").singles}
    strengths = set()
    for document in take(world, "reference_style", 60):
        facts = document.metadata
        made = drawings[facts["artwork"][0]["id"]]
        shown = drawings[facts["reference"]]
        assert made.subject != shown.subject
        assert made.style not in " ".join(document.texts)
        artists = made.facts["author"] == shown.facts["author"]
        styles = made.style == shown.style
        assert (styles, artists) == {
            "strongly": (True, True),
            "moderately": (False, True),
            "slightly": (False, False),
        }[facts["strength"]]
        strengths.add(facts["strength"])
    for document in take(world, "reference_content", 60):
        facts = document.metadata
        made = drawings[facts["artwork"][0]["id"]]
        shown = drawings[facts["reference"]]
        assert made.names[0] not in " ".join(document.texts)
        assert made.style in " ".join(document.texts)
        if facts["strength"] == "strongly":
            assert made.subject == shown.subject
            assert made.icon.prefix != shown.icon.prefix
        else:
            assert made.subject != shown.subject
            assert label_of(made) == label_of(shown) > 0
            closer = made.emoji.subgroup == shown.emoji.subgroup
            assert closer == (facts["strength"] == "moderately")
        strengths.add(facts["strength"])
    assert strengths == set(tasks.STRENGTHS)
    for document in take(world, "variation"):
        made, shown = document.metadata["artwork"]
        assert made["subject"] == shown["subject"] and made["set"] != shown["set"]


def test_composition_keeps_what_its_strength_says(world):
    met = set()
    for document in take(world, "reference_composition", 60):
        facts = document.metadata
        made, shown = boxes_of(facts["target_scene"]), boxes_of(facts["scene"])
        strength = facts["strength"]
        met.add(strength)
        assert len(made) == len(shown) and made.keys() & shown.keys()
        if strength != "slightly":
            assert made.keys() == shown.keys()
        if strength == "strongly":
            assert all(made[cell]["size"] == shown[cell]["size"] for cell in made)
        names = {item["name"] for item in shown.values()}
        assert not names & {item["name"] for item in made.values()}
        caption = tasks.parse("reference_composition", document)["caption"]
        stated = [item["name"] for item in facts["target_scene"]["objects"]]
        assert caption.split(", ")[: len(stated)] == stated
    assert met == set(tasks.STRENGTHS)


def test_what_cannot_be_made(world):
    with pytest.raises(ValueError, match="no task 'control_pose': choose from"):
        icon_tasks.examples(world, "control_pose", "train")
    with pytest.raises(ValueError, match="'infill' has no wordings"):
        icon_tasks.examples(world, "infill", "train", unseen_wording=True)
    with pytest.raises(ValueError, match="split 'dev'"):
        icon_tasks.examples(world, "edit", "dev")
    alone = icons.IconsConfig(image_size=SIZE, cache=world.cache, sets=("icon-park",))
    for task in ("variation", "segment"):
        with pytest.raises(ValueError, match=rf"no artwork for the task '{task}'"):
            next(icon_tasks.examples(alone, task, "train"))
    assert next(icon_tasks.examples(alone, "text_to_image", "train")).pictures
