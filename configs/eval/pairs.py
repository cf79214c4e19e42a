"""Any captioned pictures: reconstruction and held-out likelihood, with samples.

    python launch/evaluate.py --config configs/eval/pairs.py \
        --workdir runs/icons --checkpoint pretrain

Nothing here says whether a picture shows what its prompt asked for: look at the samples
in the report for that.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "name": "pairs",
            "world": "pairs",
            "split": "test",
            "documents": 300,
            "tasks": (
                "reconstruction",
                "likelihood",
                "text_to_image",
                "caption",
                "infill",
            ),
            "shown": 24,
            "seed": 0,
        }
    ).lock()
