"""Scores of models that have no room for a task, or were not tuned on one."""

from types import SimpleNamespace

import numpy as np
import pytest
from test_task_scores import COUNT, DOCUMENTS, MASKS, WORLD, Oracle, blank, some, truth

from cm3leon_jax.data.documents import highest_label
from cm3leon_jax.evaluation import examples, oracle, task_edits, task_pictures
from cm3leon_jax.evaluation.protocol import Protocol
from cm3leon_jax.evaluation.tasks import TASKS
from cm3leon_jax.stages import check_protocol
from cm3leon_jax.tokenizers.segmentation import SegmentationTokenizer
from configs.eval import shapes as protocols


def test_edits_for_which_the_context_has_no_room_are_left_out():
    given, model = some("edit_region"), Oracle()
    texts = [sum(len(model.codec.pieces(t, 0)) for t in d.texts) for d in given]
    needed = [len(d.segments) + 3 * 64 + n for d, n in zip(given, texts, strict=True)]
    room = SimpleNamespace(length=sorted(needed)[COUNT // 2])
    model.system = SimpleNamespace(**vars(Oracle.system) | {"decoder_config": room})
    found = task_edits.edit_region(model, given, 0)
    assert COUNT > len(found.samples) == sum(n <= room.length for n in needed)
    out = COUNT - len(found.samples)
    assert {score["left_out"] for score in found.scores.values()} == {out}
    whole = task_edits.edit_region(Oracle(), given, 0).scores
    for key in {"changed", "kept", "kept_background"} & set(found.scores):
        assert whole[key]["left_out"] == 0
        assert whole[key].names != found.scores[key].names


def test_masks_of_classes_that_a_model_lacks_are_left_out():
    given, model = some("segment"), Oracle(lambda d: MASKS.ceiling(truth(d)))
    highest = [highest_label(document) for document in given]
    fewer = SegmentationTokenizer(grid=MASKS.grid, classes=MASKS.classes[:-1])
    model.codec = SimpleNamespace(**vars(Oracle.codec) | {"masks": fewer})
    out = sum(label == len(MASKS.classes) - 1 for label in highest)
    found = task_pictures.segment(model, given, 0)
    assert {score["left_out"] for score in found.scores.values()} == {out}
    assert len(found.samples) == len(given) - out > 0 < out


class NotTuned(Oracle):
    writer = SimpleNamespace(tasks=frozenset({"edit_region"}))

    def caption(self, images, *, seed, sampler=None):
        return [document.texts[0] for document in DOCUMENTS]


def test_captions_without_tuning_on_them_are_scored_as_before_it():
    scores = TASKS["caption"](NotTuned(), DOCUMENTS, 0).scores
    wanted = {"objects": 1, "objects_of_1": 1, "hallucinated": 0}
    assert {key: x["value"] for key, x in scores.items()} == wanted


def test_captions_of_one_length_are_scored_without_the_others():
    class Short(Oracle):
        writer = SimpleNamespace(tasks=frozenset({"caption_short"}))

    model = Short()
    scores = TASKS["caption"](model, DOCUMENTS, 0).scores
    assert {task for task, _ in model.wordings} == {"caption_short"}
    new = {f"{key}_{examples.UNSEEN}": 1 for key in ("pairs", "style")}
    wanted = {"pairs": 1, "style": 1, "hallucinated_pairs": 0} | new
    assert {key: x["value"] for key, x in scores.items()} == wanted


@pytest.mark.parametrize("variant", sorted(protocols.VARIANTS))
def test_protocols_ask_for_what_is_measured(variant):
    protocol = Protocol(**protocols.get_config(variant).to_dict())
    check_protocol(protocol)
    assert oracle.parse(WORLD, np.asarray(blank())) == frozenset()
