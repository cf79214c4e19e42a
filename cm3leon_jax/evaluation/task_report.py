"""The report's section on tasks: how well each is done, in words of training and in
others, and what they cost each other (`tasks_study.json`, by `launch/tasks_study.py`).
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from cm3leon_jax.evaluation.page import cell, is_number, read_object, table, title

STUDY = "tasks_study.json"
# The score that stands for each task, and what it is to reach in `full`.
MAIN: dict[str, float | None] = {
    "reconstruction/objects": 0.99,
    "text_to_image/objects": 0.95,
    "text_to_image/unseen_pairs": 0.85,
    "unseen_pairs/reconstruction": None,
    "caption/objects": 0.97,
    "answer/accuracy": 0.97,
    "science/accuracy": None,
    "science_cot/accuracy": None,
    "edit/changed": 0.92,
    "edit/kept": 0.97,
    "edit/kept_background": 0.97,
    "edit_region/changed": None,
    "edit_region/kept": None,
    "edit_region/kept_background": None,
    "infill/objects": 0.95,
    "infill/kept": 0.99,
    "infill/seams_offgrid": None,
    "two_edits/changed": None,
    "two_edits/kept": None,
    "two_edits/both": None,
    "untaught_edits/changed": None,
    "untaught_edits/kept": None,
    "segment/miou": None,
    "segment/ceiling": 0.75,
    "segment/miou_of_ceiling": 0.95,
    "ground/iou": 0.7,
    "control_edge/layout": 0.95,
    "control_scribble/layout": None,
    "control_segmentation/layout": None,
    "control_depth/layout": None,
    "reference_style/accuracy": 0.9,
    "reference_style/exact": 0.9,
    "reference_composition/layout": 0.9,
    "reference_composition/exact": 0.9,
    "reference_content/objects": 0.9,
    "reference_content/exact": 0.9,
    "variation/objects": None,
}
UNSEEN, UNSEEN_GOAL = "_unseen_wording", 0.8
COPIED = "_handed_back"  # what a copy of the reference picture would get
# Groups of samples, each with what its pictures are.
GROUPS = {
    "edit": "Pictures, what was to be changed in them, and what came.",
    "segment": "The class map that was written, and the best that its grid can say.",
    "ground": "Things that were to be drawn in given boxes.",
    "control": "Pictures that were to be drawn after a control picture and a caption.",
    "reference": "Pictures that were to take something over from a reference.",
    "variation": "The same things in other places and sizes.",
    "answer": "Questions about held-out pictures, and what was answered.",
    "science": "Questions with a choice of answers.",
}
_TOLERATED = 0.02  # that a task may lose by being trained together with others


def section(root: Path, results: Sequence[Mapping[str, Any]]) -> str:
    """HTML; empty where no task was scored after tuning."""
    parts = []
    for result in results:
        scores = result["scores"]
        if not result.get("stale") and any(key.endswith(UNSEEN) for key in scores):
            parts.append(_scores(scores))
            break
    study = read_object(root / STUDY)
    if study.get("tasks"):
        parts.append(_together(study["tasks"]))
    if study.get("added"):
        heading = f"{title(str(study['added']['task']))} added to a tuned checkpoint"
        about, runs = "What the other tasks lose by it.", study["added"]["runs"]
        parts.append(_beside(heading, about, runs, MAIN))
    if study.get("orders"):
        about = (
            "Tasks that write text, tuned on the same samples: the answer moved to the "
            "end, after the picture, or the text simply last. Last, the prompt of "
            "<code>science</code> is how one with a chain of thought begins, and is "
            "often answered as that: these two do not compare."
        )
        parts.append(_beside("CM3 or autoregressive", about, study["orders"], MAIN))
    if study.get("classes"):
        about = (
            "Segmentation, tuned without the last class, then with it for a quarter of "
            "the updates; and with it from the start. Before, pictures that show it "
            "are left out of the scores."
        )
        runs = study["classes"]
        keys = dict.fromkeys(k for scores in runs.values() for k in scores)
        parts.append(_beside("A class added to a tuned checkpoint", about, runs, keys))
    return "".join(parts)


def _scores(scores: Mapping[str, Any]) -> str:
    rows = [
        (
            escape(key),
            cell(scores[key]),
            "" if goal is None else _goal(scores[key], goal),
            cell(scores.get(f"{key}{UNSEEN}")),
            cell(scores.get(f"{key}{COPIED}")),
        )
        for key, goal in MAIN.items()
        if key in scores
    ]
    head = ("measure", "value", "goal", "in words never trained", "handed back")
    return (
        "<p>One checkpoint. Goals are those of the system "
        f"<code>shapes:full</code>; in words never trained it is {UNSEEN_GOAL}. "
        "Of a reference, <code>accuracy</code>, <code>layout</code> and "
        "<code>objects</code> count what is to be taken over and no more (of a content "
        "shapes, colours and sizes, wherever they are): handing it back would do, see "
        "the last column. So <code>exact</code>, the caption's part too, has the same "
        "goal. Seams: jumps at the borders of what was hidden, over those of the "
        "reconstruction there; 1 is none.</p>"
        f"{table(rows, head)}"
    )


def _together(tasks: Mapping[str, Any]) -> str:
    rows = []
    for task, found in tasks.items():
        for key, pair in found.items():
            together, alone = (pair.get(k, {}) for k in ("together", "alone"))
            values = together.get("value"), alone.get("value")
            if not all(map(is_number, values)):
                continue
            gain = gained(key, *values)
            mark = "" if gain >= -_TOLERATED else " <b>lost</b>"
            name = escape(f"{task}/{key}")
            rows.append((name, cell(together), cell(alone), f"{gain:+.3f}{mark}"))
    if not rows:
        return ""
    head = ("measure", "together", "alone", "difference")
    return (
        "<h3>Together or alone</h3><p>Each task trained alone, on the samples that "
        "it has in the mixture, to an update, from the same pretrained decoder; one "
        "seed.</p>"
        f"{table(rows, head)}"
    )


def gained(key: str, together: float, alone: float) -> float:
    """How much better a measure is together: of seams, less is better."""
    return alone - together if key.startswith("seams") else together - alone


def _beside(
    heading: str, about: str, runs: Mapping[str, Any], keys: Iterable[str]
) -> str:
    """Scores of several runs beside each other."""
    rows = [
        (escape(key), *(cell(scores.get(key)) for scores in runs.values()))
        for key in keys
        if any(key in scores for scores in runs.values())
    ]
    head = ("measure", *(escape(name.replace("_", " ")) for name in runs))
    return f"<h3>{heading}</h3><p>{about}</p>{table(rows, head)}"


def _goal(score: Mapping[str, Any], goal: float) -> str:
    value = score.get("value")
    reached = is_number(value) and value >= goal
    return f"{goal}{' reached' if reached else ''}"
