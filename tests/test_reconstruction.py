"""Reconstruction measures against scikit-image and against hand-counted cases."""

import numpy as np
import pytest
from skimage import metrics

from cm3leon_jax.evaluation import reconstruction


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 255, 40)[:, None, None] * np.ones((40, 36, 3))
    clean = np.stack([ramp, 255 - ramp, rng.uniform(0, 255, ramp.shape)])
    noisy = np.clip(clean + rng.normal(0, 12, clean.shape), 0, 255)
    return clean.astype(np.uint8), noisy.astype(np.uint8)


def test_psnr_and_ssim_agree_with_scikit_image(pictures):
    clean, noisy = pictures
    psnr = reconstruction.psnr(clean, noisy)
    ssim = reconstruction.ssim(clean, noisy)
    for i, (a, b) in enumerate(zip(clean, noisy, strict=True)):
        wanted = metrics.peak_signal_noise_ratio(a, b, data_range=255)
        np.testing.assert_allclose(psnr[i], wanted, rtol=1e-12)
        wanted = metrics.structural_similarity(
            a,
            b,
            data_range=255,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        np.testing.assert_allclose(ssim[i], wanted, rtol=1e-10)


def test_equal_pictures_are_perfect(pictures):
    clean, _ = pictures
    assert (reconstruction.psnr(clean, clean) == reconstruction.MAX_PSNR).all()
    np.testing.assert_allclose(reconstruction.ssim(clean, clean), 1.0)


def test_code_use_of_counted_cases():
    assert reconstruction.code_use(np.array([32] + [0] * 7)) == {
        "usage": 1 / 8,
        "bits": 0.0,
        "perplexity": 1.0,
    }
    use = reconstruction.code_use(np.array([1] * 8 + [0] * 8))
    assert use == {"usage": 0.5, "bits": 3.0, "perplexity": 8.0}
    # Shares 1/2, 1/4, 1/4.
    assert reconstruction.code_use(np.array([2, 1, 1, 0]))["bits"] == 1.5


def test_scores_are_means_over_pictures(pictures):
    clean, noisy = pictures
    scores = reconstruction.scores(clean, noisy, np.arange(4), 4)
    assert set(scores) == {"psnr", "ssim", "usage", "bits", "perplexity"}
    assert scores["psnr"] == reconstruction.psnr(clean, noisy).mean()


@pytest.mark.parametrize(
    "change",
    [lambda x: x[:1], lambda x: x / 255.0, lambda x: x[..., :1], lambda x: x[:0]],
)
def test_pictures_that_do_not_match_are_refused(pictures, change):
    clean, noisy = pictures
    with pytest.raises(ValueError, match="reconstructions"):
        reconstruction.scores(clean, change(noisy), np.arange(4), 4)
