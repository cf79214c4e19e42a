"""Icons of held-out names: reconstruction, likelihood, words of captions, samples.

    python launch/evaluate.py --config configs/eval/icons.py --workdir runs/icons \
        --checkpoint pretrain

All 1,492 pictures whose names training has never seen, by the measures of `pairs.py`
and perplexity per token of texts and of pictures.
"""

from ml_collections import ConfigDict

from configs.eval import pairs

# The hash of the test documents that `configs/icons.py:quick` makes.
DATA = {"fcdcc2949d1c test[:1492]": "b6eb70d5badd"}


def get_config() -> ConfigDict:
    config = pairs.get_config().unlock()
    config.update({"name": "icons", "documents": 1_492, "data": DATA})
    config.tasks = (*config.tasks, "perplexity")
    return config.lock()
