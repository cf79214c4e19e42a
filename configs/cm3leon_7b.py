"""CM3Leon-7B as published: paper Table 3. Differs from the 350M in size and rate.

    python launch/pretrain.py --config configs/cm3leon_7b.py --workdir DIR

2.4T tokens. Expected: zero-shot COCO FID-30K 10.82, 5.78 and 4.88 with 0, 1 and 2
retrieved documents (paper Table 1). `:sft` adds fine-tuning as in paper Table 4.
"""

from ml_collections import ConfigDict

from configs import cm3leon_350m


def get_config(variant: str = "") -> ConfigDict:
    c = cm3leon_350m.get_config(variant)
    c.name = "cm3leon_7b"
    c.decoder.layers = 32
    c.decoder.width = 4096
    c.decoder.heads = 32
    c.decoder.mlp = 16_384
    c.pretrain.optimizer.peak = 1.2e-4
    c.pretrain.optimizer.steps = 300_000
    return c
