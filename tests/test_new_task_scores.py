"""Scores of what no training example is like: two edits, other kinds of edits, no text,
classes to come."""

from types import SimpleNamespace

import numpy as np
from PIL import Image as Pillow
from test_task_scores import (
    DOCUMENTS,
    MASKS,
    WORLD,
    Blank,
    Oracle,
    some,
    two_edits,
    untaught_edits,
)

from cm3leon_jax.data import shape_edits, shapes, tasks
from cm3leon_jax.data.shapes import Scene
from cm3leon_jax.evaluation import filling, scenes, task_pictures
from cm3leon_jax.evaluation.tasks import TASKS
from cm3leon_jax.tokenizers.segmentation import SegmentationTokenizer


def test_two_edits_are_counted_apart():
    def first_alone(document):
        """The places of the second edit as they were."""
        facts = document.metadata["edit"]
        before, after = (
            Scene.from_json(document.metadata[key]) for key in ("scene", "target_scene")
        )
        kept = set(facts["parts"][1])
        objects = [o for o in before.objects if o.cell in kept]
        objects += [o for o in after.objects if o.cell not in kept]
        scene = Scene(tuple(sorted(objects)), before.background)
        return Pillow.fromarray(shapes.render(WORLD, scene))

    scores = TASKS["two_edits"](Oracle(first_alone), DOCUMENTS, 0).scores
    assert scores["first"]["value"] == 1 == scores["kept"]["value"]
    assert scores["second"]["value"] == 0 == scores["both"]["value"]
    assert 0 < scores["changed"]["value"] < 1


def test_two_edits_are_of_two_kinds_and_places():
    for document in two_edits(30):
        facts = document.metadata["edit"]
        first, second = map(set, facts["parts"])
        assert first and second and not first & second
        assert first | second == set(facts["cells"])
        assert len(set(facts["kind"].split(" and "))) == 2
        before, after = (
            Scene.from_json(document.metadata[key]) for key in ("scene", "target_scene")
        )
        assert shapes.allowed(WORLD, "test", after.objects)
        same = [o for o in before.objects if o.cell in facts["kept"]]
        assert same == [o for o in after.objects if o.cell in facts["kept"]]
        assert " and " in tasks.parse("edit", document)["instruction"]


def test_kinds_that_were_never_taught():
    kinds = set()
    for document in untaught_edits(40):
        facts = document.metadata["edit"]
        before, after = (
            Scene.from_json(document.metadata[key]) for key in ("scene", "target_scene")
        )
        old, late = {*before.objects}, {*after.objects}
        gone, new = old - late, late - old
        looks = [
            sorted((o.shape, o.size, o.colour) for o in some) for some in (gone, new)
        ]
        kinds.add(facts["kind"])
        assert {o.cell for o in gone | new} == set(facts["cells"])
        assert shapes.allowed(WORLD, "test", after.objects)
        if facts["kind"] == "exchange":
            assert len(gone) == 2 and looks[0] == looks[1]
        else:
            kept = {(o.shape, o.size, o.colour) for o in before.objects}
            assert not gone and len(new) == 1 and looks[1][0] in kept
    assert kinds == set(shape_edits.UNTAUGHT) and not kinds & set(shape_edits.KINDS)


def test_infilling_without_a_text_must_be_a_scene():
    class Vandal(Oracle):
        def infill(self, images, masks, prompts, *, seed):
            assert prompts is None
            rng = np.random.default_rng(0)
            made = []
            for image, mask in zip(images, masks, strict=True):
                pixels = np.array(image)
                pixels[mask] = rng.integers(0, 256, (mask.sum(), 3))
                made.append(Pillow.fromarray(pixels))
            return made

    scores = TASKS["infill_untold"](Vandal(), DOCUMENTS, 0).scores
    for low, high in filling.SIZES:
        assert scores[f"valid_{low}_{high}"]["value"] < 0.2
        assert scores[f"visible_{low}_{high}"]["value"] == 1
        assert scores[f"seams_{low}_{high}"]["value"] > 2
    blanks = TASKS["infill_untold"](Blank(), DOCUMENTS, 0).scores
    assert blanks["valid_10_25"]["value"] == 0 and blanks["kept_10_25"]["value"] == 0
    assert blanks["visible_10_25"]["value"] < 1


def test_seams_are_jumps_beyond_those_of_the_reconstruction():
    flat, hidden = np.full((8, 8, 3), 100, np.uint8), np.zeros((8, 8), bool)
    hidden[2:4, 2:6] = True
    filled = flat.copy()
    filled[hidden] += 20
    assert filling.jumps(flat, hidden) == 0
    assert filling.jumps(filled, hidden) == 20 * (4 + 4 + 2 + 2)
    assert filling.seams([(240.0, 0.0)] * 3)["value"] == 3 * 240 + 1
    assert filling.seams([(240.0, 240.0), (0.0, 0.0)])["value"] == 1


def test_pictures_of_classes_to_come_are_left_out():
    model = Oracle()
    model.codec = SimpleNamespace(
        **vars(Oracle.codec) | {"masks": SegmentationTokenizer(16, MASKS.classes[:-1])}
    )
    documents = some("segment", count=40)
    scores = task_pictures.segment(model, documents, 0).scores
    stars = [
        MASKS.classes[-1] in {o.shape for o in scenes.shown(d).objects}
        for d in documents
    ]
    assert 0 < sum(stars) and scores["miou"]["n"] == len(documents) - sum(stars)
    assert scores["miou"]["value"] == 1 and f"iou/{MASKS.classes[-1]}" not in scores
