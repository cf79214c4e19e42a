"""How a token is chosen: every part against float64 numpy written by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.config import make
from cm3leon_jax.sampling.sampler import Sampler, guide, settings

RNG = np.random.default_rng(0)


def test_guidance_steps_from_stream_to_stream():
    full, image, none = logits_GBV = RNG.normal(0, 2, (3, 2, 9))
    how = settings([Sampler(guidance=(7.5, 1.5)), Sampler(guidance=(2.0, 0.0))], 3)
    guided_BV = np.asarray(guide(jnp.asarray(logits_GBV), how.weight_GB))
    edited_V = none[0] + 1.5 * (image[0] - none[0]) + 7.5 * (full[0] - image[0])
    np.testing.assert_allclose(guided_BV[0], edited_V, rtol=1e-5, atol=1e-5)
    silent_V = none[1] + 2 * (full[1] - image[1])
    np.testing.assert_allclose(guided_BV[1], silent_V, rtol=1e-5, atol=1e-5)


def test_no_guidance_is_the_full_stream_whatever_else_there_is():
    for none in (1.0, (1.0, 1.0)):
        sampler = Sampler(guidance=none)
        assert sampler.streams == 1
        for streams in (1, 2, 3):
            weight_GB = np.asarray(settings([sampler], streams).weight_GB)
            np.testing.assert_array_equal(weight_GB[:, 0], np.eye(streams)[0])


def test_guidance_needs_its_streams():
    assert Sampler(guidance=3.0).streams == 2
    assert Sampler(guidance=(7.5, 1.5)).streams == 3
    with pytest.raises(ValueError, match="guidance=2.0 needs .* unconditional stream"):
        settings([Sampler(guidance=2.0)], 1)
    with pytest.raises(ValueError, match="guidance=3.0 has 1 .* 3 streams needs 2"):
        settings([Sampler(), Sampler(guidance=3.0)], 3)
    with pytest.raises(ValueError, match=r"guidance=\(7.5, 1.5\) has 2 .* needs 1"):
        settings([Sampler(guidance=(7.5, 1.5))], 2)


@pytest.mark.parametrize("scales", [(), (-1.0,), (1.0, np.nan), -2.0])
def test_scales_out_of_range_are_named(scales):
    with pytest.raises(ValueError, match="sampler.guidance=.* must be >= 0"):
        Sampler(guidance=scales)


def test_a_config_gives_scales_as_a_list_of_any_numbers():
    sampler = make(Sampler, {"guidance": [7, 1.5], "temperature": 1}, "sampling.edit")
    assert sampler == Sampler(guidance=(7.0, 1.5))
    with pytest.raises(ValueError, match="sampling.edit.guidance=.* a number or"):
        make(Sampler, {"guidance": ["7"]}, "sampling.edit")
