"""Artwork after tuning on tasks: what can be measured without knowing what is right.

    python launch/evaluate.py --config configs/eval/icon_tasks.py \
        --workdir runs/icon_tasks --checkpoint sft

What the keys mean is in `cm3leon_jax/evaluation/icon_tasks.py`; those of features need
`bash launch/setup.sh features`. `all_artists` is for systems that left no artist out.
"""

from ml_collections import ConfigDict

TASKS = (
    *("reconstruction", "likelihood", "text_to_image", "caption", "answer", "edit"),
    *("edit_region", "infill", "segment", "ground", "control_edge"),
    *("control_scribble", "control_segmentation", "reference_style"),
    *("reference_content", "reference_composition", "variation"),
)
# The hash of the test documents that `configs/icons.py:tasks` makes.
DATA = {"38d5526c5aaf test[:300]": "88789f0ec4f9"}
VARIANTS = {"new_artists": (*TASKS, "reference_style_new"), "all_artists": TASKS}


def get_config(variant: str = "new_artists") -> ConfigDict:
    return ConfigDict(
        {
            "name": f"icon_tasks:{variant}",
            "world": "icon_tasks",
            "split": "test",
            "documents": 300,
            "tasks": VARIANTS[variant],
            "shown": 12,
            "seed": 0,
            "data": DATA,
        }
    ).lock()
