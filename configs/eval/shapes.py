"""Shapes by the oracle: pictures and captions are read back into objects.

    python launch/evaluate.py --config configs/eval/shapes.py:quick \
        --workdir runs/quick --checkpoint pretrain

`objects` is F1 over exact (shape, colour, size, cell) tuples of unseen scenes; its
interval counts scenes with the same objects as one. `full` also asks for colours of
shapes that training has never shown together (`unseen_pairs`).
"""

from ml_collections import ConfigDict


def get_config(variant: str = "quick") -> ConfigDict:
    # At least 300 objects a score for quick, 1,000 otherwise; infilling asks for one a
    # scene.
    scenes = {"quick": 320, "full": 1000}[variant]
    # Quick trains too little to put colours and shapes together anew.
    unseen = {"quick": (), "full": ("unseen_pairs",)}[variant]
    return ConfigDict(
        {
            "name": f"shapes:{variant}",
            "world": "shapes",
            "split": "test",
            "documents": scenes,
            "tasks": ("reconstruction", "text_to_image", "caption", "infill", *unseen),
            "shown": 12,
            "seed": 0,
        }
    ).lock()
