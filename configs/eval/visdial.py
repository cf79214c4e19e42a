"""VisDial v1.0, validation: which of 100 answers goes on with a dialogue?

    python launch/evaluate.py --config configs/eval/visdial.py --workdir runs/7b \
        --checkpoint sft --data data/visdial

The round of each dialogue that people have judged all answers of; answers are ranked by
their log-likelihood after the caption and all that was said. NDCG as a fraction; the
paper (tuned 7B, a task that it has never seen): 22.6.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "name": "visdial",
            "world": "public",
            "split": "validation",
            "documents": 2_064,
            "tasks": ("rank",),
            "shown": 24,
            "seed": 0,
            "public": {"set": "visdial", "metrics": ("ndcg",)},
        }
    ).lock()
