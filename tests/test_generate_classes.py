"""Runs of class tokens: only the classes in use, in any place of a script."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax import vocab
from cm3leon_jax.models.decoder import DecoderConfig, abstract
from cm3leon_jax.sampling import prompts
from cm3leon_jax.sampling.generate import generate
from cm3leon_jax.sampling.sampler import Sampler

LAYOUT = vocab.build(text=24, image=32, classes=4, sentinels=8, total=128)
CONFIG = DecoderConfig(vocab=128, layers=1, width=16, heads=2, mlp=16, length=48)
HOT = Sampler(temperature=30.0)


def sample(classes, **kwargs):
    rng = np.random.default_rng(3)
    model = jax.tree.map(
        lambda w: jnp.asarray(rng.normal(0.0, 0.5, w.shape), w.dtype), abstract(CONFIG)
    )
    start = np.asarray([LAYOUT.eos, LAYOUT.image.start, LAYOUT.brk], np.int32)
    script = np.asarray([prompts.CLASS] * 9 + [LAYOUT.eos] + [prompts.IMAGE] * 2)
    batch = prompts.stack([prompts.Prompt((start,), (script,))] * 8, LAYOUT, 48)
    key, index = jax.random.key(0), np.arange(8)
    options = dict(image_tokens=2, classes=classes, index_B=index)
    return np.asarray(generate(model, batch, key, HOT, LAYOUT, **options))


@pytest.mark.parametrize("classes", [range(4), [1, 3], None])
def test_class_runs_use_the_allowed_classes_only(classes):
    tokens_BT = sample(classes)
    written = set(LAYOUT.labels(tokens_BT[:, :9]).ravel().tolist())
    if classes is None:  # the reserved ones too
        assert max(written) >= 4
    else:
        assert written == set(classes)
    assert (tokens_BT[:, 9] == LAYOUT.eos).all()
    assert LAYOUT.codes(tokens_BT[:, 10:12]).shape == (8, 2)


def test_no_class_or_an_unknown_one_is_named():
    with pytest.raises(ValueError, match="classes is empty"):
        sample([])
    with pytest.raises(ValueError, match="class 70 is outside"):
        sample([70])
