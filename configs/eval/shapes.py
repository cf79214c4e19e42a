"""Shapes by the oracle: pictures and captions are read back into objects.

    python launch/evaluate.py --config configs/eval/shapes.py:quick \
        --workdir runs/quick --checkpoint pretrain

`objects` is F1 over exact (shape, colour, size, cell) tuples of unseen scenes; its
interval counts scenes with the same objects as one.

* quick: before tuning, 320 scenes
* tuned: the quick system after tuning, with the tasks that it is tuned on
* pretrained: before tuning, 1,000 scenes, and colours of shapes that training has never
  shown together (`unseen_pairs`)
* full: a checkpoint tuned on all tasks, every task, at least 1,000 things each
* study: the same, at least 320 things each
* scales: how much a reference counts, by the scale of its picture in guidance

The documents of these configs are frozen: `DATA` has their hashes, others are refused.

What is counted is in `cm3leon_jax/evaluation/task_*.py`; keys that end in
`_unseen_wording` are of instructions in words that training has never used.
"""

from ml_collections import ConfigDict

PAIRS = ("reconstruction", "text_to_image", "caption", "infill")
TASKS = (
    *("reconstruction", "text_to_image", "unseen_pairs", "caption", "answer"),
    *("science", "science_cot", "edit", "edit_region", "infill", "infill_sizes"),
    *("segment", "ground", "control_edge", "control_scribble"),
    *("control_segmentation", "control_depth", "reference_style"),
    *("reference_composition", "reference_content", "variation"),
    *(
        "two_edits",
        "untaught_edits",
        "infill_untold",
    ),  # no example of training is like these
)
# The hashes of the test documents that the configs of `configs/shapes.py` make.
DATA = {
    "0fefe2c98825 test[:320]": "ea575f7958bc",  # quick
    "0fefe2c98825 test[:1000]": "7d22a852eed6",
    "025003eb70cf test[:320]": "7f17d1339856",  # full
    "025003eb70cf test[:1000]": "2fc2fadd6b36",
}
# Documents, and tasks. Quick trains too little to put colours and shapes together anew.
VARIANTS = {
    "quick": ("shapes", 320, PAIRS),
    "tuned": ("shape_tasks", 320, (*PAIRS, "edit_region", "segment")),
    "pretrained": ("shapes", 1000, (*PAIRS, "unseen_pairs")),
    "full": ("shape_tasks", 1000, TASKS),
    "study": ("shape_tasks", 320, TASKS),
    "scales": ("shape_tasks", 320, ("reference_scales",)),
}


def get_config(variant: str = "quick") -> ConfigDict:
    world, documents, tasks = VARIANTS[variant]
    return ConfigDict(
        {
            "name": f"shapes:{variant}",
            "world": world,
            "split": "test",
            "documents": documents,
            "tasks": tasks,
            "shown": 12,
            "seed": 0,
            "data": DATA,
        }
    ).lock()
