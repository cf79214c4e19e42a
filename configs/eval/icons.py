"""Icons of held-out names: reconstruction, likelihood, words of captions, samples.

    python launch/evaluate.py --config configs/eval/icons.py --workdir runs/icons \
        --checkpoint pretrain

All 1,492 pictures whose names training has never seen, by the measures of `pairs.py`.
"""

from ml_collections import ConfigDict

from configs.eval import pairs


def get_config() -> ConfigDict:
    config = pairs.get_config().unlock()
    config.update({"name": "icons", "documents": 1_492})
    return config.lock()
