"""Scores of vectors of texts and pictures in one space (`retrieval.embed.Embedder`).

All but `edited` take float [B, E], of any length, and give float64 [B].
"""

from collections.abc import Sequence

import numpy as np

from cm3leon_jax.evaluation.protocol import Score, interval
from cm3leon_jax.retrieval.embed import Embedder


def key(name: str, measure: str = "clip_score") -> str:
    """What a measure is called with an embedder of this name: "clip_score" with a CLIP
    ("clip-…"), with others "clip_score" of nothing, but "trained_score" and so on."""
    kind = name.partition("-")[0]
    return measure if kind == "clip" else f"{kind}_{measure.removeprefix('clip_')}"


def clip_score(image_BE: np.ndarray, text_BE: np.ndarray) -> np.ndarray:
    """100 max(cosine, 0): Hessel et al. 2021 (arXiv:2104.08718), who have 2.5 in place
    of 100."""
    return 100 * np.maximum(similarity(image_BE, text_BE), 0)


def directional(
    before_BE: np.ndarray,
    after_BE: np.ndarray,
    text_before_BE: np.ndarray,
    text_after_BE: np.ndarray,
) -> np.ndarray:
    """Does the picture change as its caption does? The cosine of the two changes (Gal
    et al. 2021, arXiv:2108.00946); 0 where either changes nothing."""
    return similarity(
        _units(after_BE) - _units(before_BE),
        _units(text_after_BE) - _units(text_before_BE),
    )


def edited(
    embedder: Embedder,
    before: Sequence[np.ndarray],
    after: Sequence[np.ndarray],
    texts_before: Sequence[str],
    texts_after: Sequence[str],
) -> dict[str, Score]:
    """Of edited pictures: `directional`, and `similarity` to what they were (Brooks et
    al. 2023, arXiv:2211.09800, who plot the two); named after the encoder."""
    images = embedder.images(before), embedder.images(after)
    values = {
        "directional": directional(
            *images, embedder.texts(texts_before), embedder.texts(texts_after)
        ),
        "similarity": similarity(*images),
    }
    return {
        key(embedder.name, f"clip_{name}"): interval(found, np.mean, len(found))
        for name, found in values.items()
    }


def similarity(a_BE: np.ndarray, b_BE: np.ndarray) -> np.ndarray:
    """The cosine; 0 for a vector of length 0. ValueError where they don't match."""
    if np.shape(a_BE) != np.shape(b_BE) or np.ndim(a_BE) != 2:
        raise ValueError(f"vectors {np.shape(a_BE)} and {np.shape(b_BE)} do not match")
    if not (np.isfinite(a_BE).all() and np.isfinite(b_BE).all()):
        raise ValueError("vectors that are not finite have no direction")
    return (_units(a_BE) * _units(b_BE)).sum(1)


def _units(x_BE: np.ndarray) -> np.ndarray:
    x_BE = np.asarray(x_BE, np.float64)
    length_B1 = np.linalg.norm(x_BE, axis=1, keepdims=True)
    # Unit vectors in float32 differ by about 1e-7 where they are the same.
    return np.where(length_B1 > 1e-6, x_BE / np.maximum(length_B1, 1e-6), 0.0)
