"""VQA v2: all questions of val2014 by the official accuracy, or answers for test-dev.

    python launch/evaluate.py --config configs/eval/vqa2.py --workdir runs/7b \
        --checkpoint sft --data data/vqa2

The paper (tuned 7B): 47.6 on test-dev, whose answers only the server has: `:test_dev`
writes `samples/…/texts@0.json`, to be handed in there.
"""

from ml_collections import ConfigDict

VARIANTS = {
    "val": ("vqa2", 214_354, ("vqa_accuracy",)),
    "test_dev": ("vqa2_test_dev", 107_394, ()),
}


def get_config(variant: str = "val") -> ConfigDict:
    name, count, metrics = VARIANTS[variant]
    return ConfigDict(
        {
            "name": name,
            "world": "public",
            "split": "validation" if metrics else "test",
            "documents": count,
            "tasks": ("answer",),
            "shown": 24,
            "seed": 0,
            "public": {
                "set": name,
                "metrics": metrics,
                "sampler": {"temperature": 0.0},
            },
        }
    ).lock()
