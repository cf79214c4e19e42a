"""VizWiz: questions of blind people about their own photographs, its validation split.

    python launch/evaluate.py --config configs/eval/vizwiz.py --workdir runs/7b \
        --checkpoint sft --data data/vizwiz

The official accuracy of VQA. The paper (tuned 7B) has 37.6 on test-dev, whose answers
only the server has: this is the split that anybody can score.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "name": "vizwiz",
            "world": "public",
            "split": "validation",
            "documents": 4_319,
            "tasks": ("answer",),
            "shown": 24,
            "seed": 0,
            "public": {
                "set": "vizwiz",
                "metrics": ("vqa_accuracy",),
                "sampler": {"temperature": 0.0},
            },
        }
    ).lock()
