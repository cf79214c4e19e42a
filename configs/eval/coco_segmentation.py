"""COCO-Stuff's 5,000 validation pictures, their classes as tokens.

    python launch/evaluate.py --config configs/eval/coco_segmentation.py \
        --workdir runs/7b --checkpoint sft --data data/coco_stuff

Mean IoU over the classes that the checkpoint was tuned on (`sft.classes`) and the set
names, `ceiling`, the same of the truth through the grid of class tokens, and
`boundary_f1`. What COCO-Stuff leaves without a label (255) is not counted. The paper
names the task and gives no number.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "name": "coco_segmentation",
            "world": "public",
            "split": "validation",
            "documents": 5_000,
            "tasks": ("segment",),
            "shown": 24,
            "seed": 0,
            "public": {
                "set": "coco_segmentation",
                "metrics": ("miou",),
                "sampler": {"temperature": 0.0},
                "version": 2,  # 1 counted classes where there is no label
            },
        }
    ).lock()
