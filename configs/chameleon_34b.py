"""Chameleon-34B, converted and tuned: paper section 2.7.

    python launch/convert.py --from DIR --to WORKDIR

Differs from the 7B in size, in norms behind the branches and in shared heads of keys.
"""

from ml_collections import ConfigDict

from configs import chameleon_7b


def get_config(variant: str = "") -> ConfigDict:
    c = chameleon_7b.get_config(variant)
    c.name = c.name.replace("7b", "34b")
    with c.unlocked():
        c.decoder.update({"layers": 48, "width": 8192, "heads": 64, "mlp": 22_016})
        c.decoder.update({"kv_heads": 8, "post_norm": True})
    c.pretrain.batch_size = 3072
    return c
