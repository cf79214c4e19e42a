"""Rates of a run; model FLOPs where only parts of the decoder are trained."""

import jax
import pytest

from cm3leon_jax import vocab
from cm3leon_jax.models.decoder import DecoderConfig
from cm3leon_jax.training.flops import train_flops_per_token
from cm3leon_jax.training.metrics import Work, peak_flops
from cm3leon_jax.training.parts import Parts, PartsConfig

LAYOUT = vocab.build(text=100, image=64, classes=4, sentinels=4)
N, D, F, V, L = 3, 16, 64, LAYOUT.size, 32
CONFIG = DecoderConfig(vocab=V, layers=N, width=D, heads=2, mlp=F, length=L)
BLOCKS, HEAD = N * (4 * D * D + 2 * D * F), D * V
ATTENTION = N * 2 * D * L / 2
FORWARD = 2 * (BLOCKS + HEAD + ATTENTION)
THROUGH = 2 * (BLOCKS + HEAD) + 4 * ATTENTION


@pytest.mark.parametrize(
    ("train", "wanted"),
    [
        (("all",), 6 * (BLOCKS + HEAD + ATTENTION)),
        (("head",), FORWARD + 2 * HEAD),
        (("head_image_rows",), FORWARD + 2 * D * 64),
        (("attention",), FORWARD + THROUGH + 2 * N * 4 * D * D),
        (("embed",), FORWARD + THROUGH),  # a look-up; the gradient goes all the way
        (("attention", "head"), FORWARD + THROUGH + 2 * (N * 4 * D * D + HEAD)),
    ],
)
def test_what_is_frozen_needs_no_gradient_of_its_own(train, wanted):
    parts = Parts(PartsConfig(train=train), LAYOUT)
    assert train_flops_per_token(CONFIG, L, parts) == wanted


def test_low_rank_changes_are_small_products_beside_the_frozen_ones():
    parts = Parts(PartsConfig(train=("lora",), rank=4, alpha=8.0), LAYOUT)
    factors = N * 4 * (4 * 2 * D + 2 * (D + F))
    found = train_flops_per_token(CONFIG, L, parts)
    assert found == FORWARD + THROUGH + 6 * factors
    assert found < train_flops_per_token(CONFIG, L)


def test_a_tied_embedding_is_the_head_too():
    tied = DecoderConfig(**vars(CONFIG) | {"tie_embeddings": True})
    parts = Parts(PartsConfig(train=("embed",)), LAYOUT)
    assert train_flops_per_token(tied, L, parts) == FORWARD + THROUGH + 2 * HEAD


def test_rates():
    work = Work(unit="tokens", per_step=1000, flops_per_step=2e12, peak_flops=1e13)
    assert work.rates(5, 2.0) == {"tokens_per_second": 2500.0, "mfu": 0.5}
    assert Work(unit="rows", per_step=4).rates(1, 2.0) == {"rows_per_second": 2.0}
    assert peak_flops(jax.devices()[0]) is None  # nobody publishes a CPU's

    class Fake:
        device_kind = "NVIDIA H100 80GB HBM3"

    assert peak_flops(Fake()) == 989e12
