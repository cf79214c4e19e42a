"""Entities by the oracle: looks that only memory or retrieval can know.

    python launch/evaluate.py --config configs/eval/entities.py:retrieval \
        --workdir runs/study/runs/retrieval-0 --checkpoint pretrain

`entity/GROUP@K` is the share of attributes (shape, colour, size) right with K retrieved
documents, of 1,020 attributes; `retrieve/recall@2_GROUP` how often one of the two
documents found has the name; `likelihood/nats@K` the loss per query image token.
For evaluation alone, the memory holds the documents of the new names. `baseline` is for
systems without retrieval.
"""

from ml_collections import ConfigDict

# The hash of the test documents that `configs/shapes.py:study` makes.
DATA = {"15911c72300c test[:2000]": "979df37d64e8"}


VARIANTS = {
    "retrieval": ("entity", "retrieve", "likelihood"),
    "baseline": ("entity", "likelihood"),
}


def get_config(variant: str = "retrieval") -> ConfigDict:
    tasks = VARIANTS[variant]
    return ConfigDict(
        {
            "name": f"entities:{variant}",
            "world": "entities",
            "split": "test",
            "documents": 2000,
            "tasks": tasks,
            "shown": 24,
            "seed": 0,
            "data": DATA,
        }
    ).lock()
