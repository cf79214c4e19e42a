"""Of two runs: the FLOPs that each needs to reach a score (paper 1.9).

    python launch/training_efficiency.py --config configs/eval/training_efficiency.py \
        --workdir runs/retrieval --baseline runs/plain

Every checkpoint of both work directories is measured on the same held-out documents;
keep enough of them (`pretrain.keep`). `nats`: log-likelihood of whole documents, after
none retrieved; `entities` that of pictures after retrieved documents, where there are
any (`configs/shapes.py:study`).
"""

from ml_collections import ConfigDict

VARIANTS = {"nats": "pairs", "entities": "entities"}  # worlds


def get_config(variant: str = "nats") -> ConfigDict:
    world = VARIANTS[variant]
    return ConfigDict(
        {
            "name": f"training_efficiency:{variant}",
            "world": world,
            "split": "test",
            "documents": 500,
            "tasks": ("likelihood",),
            "shown": 0,
            "seed": 0,
        }
    ).lock()
