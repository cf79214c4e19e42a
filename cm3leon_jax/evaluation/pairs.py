"""Captioned pictures of any kind: what can be scored without knowing what they show."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image as Pillow

from cm3leon_jax.api import CM3Leon
from cm3leon_jax.data.documents import Document, Image, Text
from cm3leon_jax.evaluation import oracle, perplexity
from cm3leon_jax.evaluation.protocol import Evaluator, Outcome, Sample, interval
from cm3leon_jax.evaluation.reconstruction import psnr, ssim
from cm3leon_jax.tokenizers import regions

SHOWN = 24  # pictures drawn where nothing is scored: no report shows more


def reconstruction(model: CM3Leon, documents: Sequence[Document], _: int) -> Outcome:
    """`psnr` in dB and `ssim` of pictures through the image tokenizer and back."""
    originals, _texts = _parts(documents)
    painted = model.reconstruct(list(originals))
    made = np.stack([np.asarray(picture) for picture in painted])
    n = len(originals)
    return Outcome(
        {
            "psnr": interval(psnr(originals, made), np.mean, n),
            "ssim": interval(ssim(originals, made), np.mean, n),
        },
        [
            Sample(
                text=text,
                pictures={"original": Pillow.fromarray(original), "reconstruction": b},
            )
            for text, original, b in zip(_texts, originals, painted, strict=True)
        ],
    )


def likelihood(model: CM3Leon, documents: Sequence[Document], _: int) -> Outcome:
    """`nats`: per document; `match`: how often two pictures and their captions are
    likelier than with the captions exchanged (chance 0.5)."""
    pairs = [document.segments for document in documents]
    # The captions' own likelihoods cancel: each occurs once on either side.
    others = [pairs[i ^ 1] for i in range(len(pairs) - len(pairs) % 2)]
    crossed = [
        Document((other[0], own[1])) for own, other in zip(pairs, others, strict=False)
    ]
    straight = np.array(model.log_likelihood([Document(pair) for pair in pairs]))
    exchanged = np.array(model.log_likelihood(crossed))
    gain = (straight[: len(exchanged)] - exchanged).reshape(-1, 2).sum(1)
    return Outcome(
        {
            "nats": interval(-straight, np.mean, len(straight)),
            "match": interval((gain > 0).astype(float), np.mean, len(gain)),
        }
    )


def text_to_image(model: CM3Leon, documents: Sequence[Document], seed: int) -> Outcome:
    """Samples only, of the first 24 documents."""
    originals, texts = _parts(documents[:SHOWN])
    painted = model.text_to_image(texts, seed=seed)
    return Outcome(
        samples=[
            Sample(
                text=text, pictures={"picture": a, "the artist's": Pillow.fromarray(b)}
            )
            for text, a, b in zip(texts, painted, originals, strict=True)
        ]
    )


def caption(model: CM3Leon, documents: Sequence[Document], seed: int) -> Outcome:
    """`words`: F1 of the caption's words against the artist's, and samples."""
    originals, texts = _parts(documents)
    found = model.caption(list(originals), seed=seed)
    counts = np.array([overlap(a, b) for a, b in zip(texts, found, strict=True)])
    return Outcome(
        {"words": interval(counts, oracle.f1, len(counts))},
        [
            Sample(
                text=made,
                pictures={"picture": Pillow.fromarray(picture)},
                note=f"the artist's: {text}",
            )
            for made, text, picture in zip(found, texts, originals, strict=True)
        ],
    )


def infill(model: CM3Leon, documents: Sequence[Document], seed: int) -> Outcome:
    """`hidden_psnr`: of the hidden box against the original, and samples."""
    originals, texts = _parts(documents)
    rng = np.random.default_rng(seed)
    size = originals.shape[1]
    masks = np.zeros(originals.shape[:3], bool)
    for mask in masks:
        height, width = rng.integers(size // 2, 3 * size // 4, 2)
        y, x = rng.integers(size - height), rng.integers(size - width)
        mask[y : y + height, x : x + width] = True
    painted: Any = model.infill(list(originals), list(masks), texts, seed=seed)
    made = np.stack([np.asarray(picture) for picture in painted])
    values = [
        psnr(a[m].reshape(1, 1, -1, 3), b[m].reshape(1, 1, -1, 3))[0]
        for a, b, m in zip(originals, made, masks, strict=True)
    ]
    blanked = np.where(masks[..., None], regions.GREY, originals).astype(np.uint8)
    return Outcome(
        {"hidden_psnr": interval(np.array(values), np.mean, len(values))},
        [
            Sample(
                text=text,
                pictures={
                    "blanked": Pillow.fromarray(a),
                    "infilled": b,
                    "original": Pillow.fromarray(c),
                },
            )
            for text, a, b, c in zip(texts, blanked, painted, originals, strict=True)
        ],
    )


TASKS: dict[str, Evaluator] = {
    "reconstruction": reconstruction,
    "likelihood": likelihood,
    "perplexity": lambda model, some, _: Outcome(perplexity.scores(model, some)),
    "text_to_image": text_to_image,
    "caption": caption,
    "infill": infill,
}


def _parts(documents: Sequence[Any]) -> tuple[np.ndarray, list[str]]:
    """Pictures uint8 [B, Y, X, 3] and captions of `text <break> image` documents."""
    for document in documents:
        kinds = tuple(type(segment) for segment in document.segments)
        if kinds != (Text, Image):
            raise ValueError(f"document {document.id!r} is no pair of text and image")
    pictures = np.stack([d.segments[1].array for d in documents])
    return pictures, [d.segments[0].text for d in documents]


def overlap(wanted: str, found: str) -> tuple[int, int, int]:
    """Words in both texts, in `found` and in `wanted`."""
    a, b = (set(text.replace(",", " ").lower().split()) for text in (wanted, found))
    return len(a & b), len(b), len(a)
