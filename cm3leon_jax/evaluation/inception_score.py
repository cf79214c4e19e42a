"""The Inception score: are single pictures of a clear class, and all of many?

Salimans et al. 2016 (arXiv:1606.03498): exp of the mean divergence of p(class given
picture) from p(class), over ten parts of the pictures in a fixed random order. With
other classes than those of the standard Inception it has another scale and name.
"""

import numpy as np
from scipy.special import log_softmax

from cm3leon_jax.evaluation.protocol import Score

_ORDER = 2020  # seed of the order, that of torch-fidelity


def score(logits_NK: np.ndarray, splits: int = 10) -> Score:
    """From logits without the bias (`Features.logits`); `spread` is the customary ±,
    the standard deviation over the parts."""
    n = len(logits_NK)
    if n < splits or not np.isfinite(logits_NK).all():
        raise ValueError(f"{n} finite logits for {splits} parts: each needs a picture")
    order = np.random.RandomState(_ORDER).permutation(n)
    found = []
    for i in range(splits):
        own_B = order[i * n // splits : (i + 1) * n // splits]
        log_BK = log_softmax(np.asarray(logits_NK[own_B], np.float64), axis=1)
        p_BK = np.exp(log_BK)
        divergence_BK = p_BK * (log_BK - np.log(p_BK.mean(0)))
        found.append(np.exp(divergence_BK.sum(1).mean()))
    value, spread = float(np.mean(found)), float(np.std(found))
    half = 1.96 * spread / splits**0.5
    return {
        "value": round(value, 5),
        "low": round(value - half, 5),
        "high": round(value + half, 5),
        "n": n,
        "spread": round(spread, 5),
    }
