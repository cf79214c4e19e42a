"""Settings of samplers: impossible ones are named, and a config says them all."""

import pytest

from cm3leon_jax.config import make
from cm3leon_jax.sampling.sampler import ContrastiveTopK, Sampler

CD_K = ContrastiveTopK(alpha=0.3, k=3, amateur_temperature=0.5)


@pytest.mark.parametrize(
    "setting, allowed",
    [
        (dict(temperature=-1.0), ">= 0"),
        (dict(temperature=float("nan")), ">= 0"),
        (dict(top_p=0.0), r"in \(0, 1\]"),
        (dict(top_p=1.1), r"in \(0, 1\]"),
        (dict(top_k=-1), "an int >= 0"),
        (dict(guidance=()), ">= 0"),
        (dict(guidance=(-1.0,)), ">= 0"),
        (dict(guidance=(1.0, float("nan"))), ">= 0"),
        (dict(guidance=-2.0), ">= 0"),
        (dict(schedule=(1.0,)), "two or more factors >= 0"),
        (dict(schedule=(1.0, -1.0)), "two or more factors >= 0"),
        (dict(schedule=[0.0, 1.0]), "two or more factors >= 0.* a tuple"),
        (dict(temperature="1"), ">= 0"),
        (dict(top_p=None), r"in \(0, 1\]"),
        (dict(top_k=float("inf")), "an int >= 0"),
        (dict(guidance=[7.5, 1.5]), ">= 0 .* or a tuple"),
        (dict(guidance=("7.5", 1.5)), ">= 0"),
        (dict(contrastive=True), "None or a ContrastiveTopK"),
        (dict(contrastive={"alpha": 0.1}), "None or a ContrastiveTopK"),
    ],
)
def test_settings_out_of_range_are_named(setting, allowed):
    name = next(iter(setting))
    with pytest.raises(ValueError, match=f"sampler.{name}=.* must be {allowed}"):
        Sampler(**setting)


@pytest.mark.parametrize(
    "setting, allowed",
    [
        (dict(alpha=0.0), r"in \(0, 1\]"),
        (dict(alpha=1.5), r"in \(0, 1\]"),
        (dict(k=0), "an int >= 1"),
        (dict(k=1.5), "an int >= 1"),
        (dict(k=float("inf")), "an int >= 1"),
        (dict(alpha="0.1"), r"in \(0, 1\]"),
        (dict(amateur_temperature=0.0), "> 0"),
    ],
)
def test_settings_of_the_contrast_out_of_range_are_named(setting, allowed):
    name = next(iter(setting))
    with pytest.raises(ValueError, match=f"contrastive.{name}=.* must be {allowed}"):
        ContrastiveTopK(**{"alpha": 0.5, **setting})


def test_guidance_and_contrast_do_not_go_together():
    with pytest.raises(ValueError, match="guidance=3.0 and sampler.contrastive do not"):
        Sampler(guidance=3.0, contrastive=CD_K)


def test_a_config_says_it_all():
    section = {
        "guidance": [7, 1.5],
        "temperature": 1,
        "schedule": [0, 1.0],
    }
    made = make(Sampler, section, "sampling.edit")
    assert made == Sampler(guidance=(7.0, 1.5), schedule=(0.0, 1.0))
    section = {"contrastive": {"alpha": 0.3, "k": 3, "amateur_temperature": 0.5}}
    assert make(Sampler, section, "sampling.edit") == Sampler(contrastive=CD_K)
    with pytest.raises(ValueError, match="sampling.edit.guidance=.* a number or"):
        make(Sampler, {"guidance": ["7"]}, "sampling.edit")
    with pytest.raises(ValueError, match="sampler.contrastive.alpha=2.0 must be"):
        make(Sampler, {"contrastive": {"alpha": 2.0}}, "sampling.edit")
