"""How well an image tokenizer keeps pictures, and how much its codes say.

Pictures are uint8 [B, Y, X, 3]; values are means over pictures.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage

MAX_PSNR = 100.0  # stands for equal pictures, whose ratio is infinite


def psnr(images_BYXC: np.ndarray, made_BYXC: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each picture, float64 [B], at most 100."""
    _check(images_BYXC, made_BYXC)
    difference = images_BYXC.astype(np.float64) - made_BYXC
    mse_B = np.square(difference).mean((1, 2, 3))
    least = 255.0**2 / 10 ** (MAX_PSNR / 10)
    return 10 * np.log10(255.0**2 / np.maximum(mse_B, least))


def ssim(images_BYXC: np.ndarray, made_BYXC: np.ndarray) -> np.ndarray:
    """Structural similarity of each picture, float64 [B] in [-1, 1].

    Wang et al. 2004: Gaussian window of 11x11 and sigma 1.5, population covariance,
    K1 = 0.01, K2 = 0.03, mean over channels and over windows inside the picture.
    """
    _check(images_BYXC, made_BYXC)
    pad = 5
    if min(images_BYXC.shape[1:3]) <= 2 * pad:
        raise ValueError(f"SSIM needs pictures of {2 * pad + 1} pixels a side or more")

    def smooth(x_BYXC: np.ndarray) -> np.ndarray:
        for axis in (1, 2):
            x_BYXC = ndimage.gaussian_filter1d(x_BYXC, 1.5, axis=axis, radius=pad)
        return x_BYXC[:, pad:-pad, pad:-pad]

    a, b = images_BYXC.astype(np.float64), made_BYXC.astype(np.float64)
    mean_a, mean_b = smooth(a), smooth(b)
    variances = smooth(a * a) - mean_a**2 + smooth(b * b) - mean_b**2
    covariance = smooth(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variances + c2)
    return (luminance * structure).mean((1, 2, 3))


def code_use(count_Z: np.ndarray) -> dict[str, float]:
    """Of how often each code was seen: `usage`, the share of the codebook in use;
    `bits` per code, the entropy of the frequencies; `perplexity`, 2 to that power."""
    share = count_Z[count_Z > 0] / count_Z.sum()
    bits = float(-(share * np.log2(share)).sum())
    usage = len(share) / len(count_Z)
    return {"usage": usage, "bits": bits, "perplexity": math.exp2(bits)}


def scores(
    images_BYXC: np.ndarray, made_BYXC: np.ndarray, codes: np.ndarray, codebook: int
) -> dict[str, float]:
    """All of the above: `psnr`, `ssim`, `usage`, `bits`, `perplexity`."""
    return {
        "psnr": float(psnr(images_BYXC, made_BYXC).mean()),
        "ssim": float(ssim(images_BYXC, made_BYXC).mean()),
        **code_use(np.bincount(np.ravel(codes), minlength=codebook)),
    }


def _check(images_BYXC: np.ndarray, made_BYXC: np.ndarray) -> None:
    for name, array in (("pictures", images_BYXC), ("reconstructions", made_BYXC)):
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
            raise ValueError(f"{name} are {array.dtype} {list(array.shape)}: not uint8")
    if images_BYXC.shape != made_BYXC.shape or not len(images_BYXC):
        raise ValueError(
            f"{list(made_BYXC.shape)} reconstructions of {list(images_BYXC.shape)} "
            "pictures: they must match, and there must be some"
        )
