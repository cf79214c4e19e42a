"""Runs of class tokens: only the classes in use, in any place of a script."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax import vocab
from cm3leon_jax.models.decoder import DecoderConfig, abstract
from cm3leon_jax.parallel.rules import Rules
from cm3leon_jax.sampling import prompts
from cm3leon_jax.sampling.engine import Engine
from cm3leon_jax.sampling.generate import generate
from cm3leon_jax.sampling.sampler import Sampler

LAYOUT = vocab.build(text=24, image=32, classes=4, sentinels=8, total=128)
CONFIG = DecoderConfig(vocab=128, layers=1, width=16, heads=2, mlp=16, length=48)
HOT = Sampler(temperature=30.0)


def random_decoder():
    rng = np.random.default_rng(3)
    return jax.tree.map(
        lambda w: jnp.asarray(rng.normal(0.0, 0.5, w.shape), w.dtype), abstract(CONFIG)
    )


def sample(classes, **kwargs):
    model = random_decoder()
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


def test_chances_are_those_of_each_row_read_alone():
    model, rng = random_decoder(), np.random.default_rng(0)
    rows = [rng.integers(1, CONFIG.vocab, n) for n in (7, 12, 9)]
    starts = [3, 8, 5]  # four ids each
    engine = Engine(model, LAYOUT, Rules(), None, batch=2)
    found = list(engine.chances(rows, starts, LAYOUT.classes[:3]))
    for chances_TC, row, start in zip(found, rows, starts, strict=True):
        logits_LV = model(jnp.asarray(row[None]))[0, start - 1 : -1]
        wanted = jax.nn.softmax(logits_LV[:, np.asarray(LAYOUT.classes[:3])])
        np.testing.assert_allclose(chances_TC, wanted, atol=1e-6)
