"""OK-VQA: 5,046 questions of the test part of val2014 that need outside knowledge.

    python launch/evaluate.py --config configs/eval/okvqa.py --workdir runs/7b \
        --checkpoint sft --data data/okvqa

The official accuracy of VQA. The paper (tuned 7B): 23.8. Add documents to the bank and
`--config.public.retrieve=(0,2)` to see what they are worth.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "name": "okvqa",
            "world": "public",
            "split": "validation",
            "documents": 5_046,
            "tasks": ("answer",),
            "shown": 24,
            "seed": 0,
            "public": {
                "set": "okvqa",
                "metrics": ("vqa_accuracy",),
                "sampler": {"temperature": 0.0},
            },
        }
    ).lock()
