"""CM3Leon-760M as published: paper Table 3. Differs from the 350M in size and rate.

    python launch/pretrain.py --config configs/cm3leon_760m.py --workdir DIR

1.9T tokens. Expected: zero-shot COCO FID-30K 6.61 with two retrieved documents.
`:sft` adds fine-tuning with the settings of paper Table 4.
"""

from ml_collections import ConfigDict

from configs import cm3leon_350m


def get_config(variant: str = "") -> ConfigDict:
    c = cm3leon_350m.get_config(variant)
    c.name = "cm3leon_760m"
    c.decoder.width = 1536
    c.decoder.mlp = 6144
    c.pretrain.optimizer.peak = 5e-4
    c.pretrain.optimizer.steps = 237_000
    return c
