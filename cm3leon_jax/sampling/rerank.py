"""The best of several candidates: which picture fits its text? (paper 1.10, 1.11)

Three answers, and any weighted sum of them: a dual encoder's, the decoder's as a
painter (how much likelier does the text make the picture?), and the decoder's as a
reader (how likely is the text to be the picture's caption?).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from cm3leon_jax.retrieval.embed import Embedder
from cm3leon_jax.sampling.engine import Engine
from cm3leon_jax.sampling.prompts import Prompt

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Rerank:
    """By what candidates are ranked: weights >= 0 of scores, at least one above 0.

    similarity: cosine of the text's and the picture's vectors by a dual encoder, in
        [-1, 1].
    gain: log p(picture | prompt) - log p(picture | what the unconditional stream reads)
        in nats, summed over the tokens that were sampled.
    likelihood: log p(text | picture) in nats: the text as a caption of the picture.
    """

    similarity: float = 0.0
    gain: float = 0.0
    likelihood: float = 0.0

    def __post_init__(self):
        for name, weight in dataclasses.asdict(self).items():
            if not 0 <= weight < np.inf:
                raise ValueError(f"rerank.{name}={weight} must be >= 0 (0 is unused)")
        if not self.parts:
            names = ", ".join(f"rerank.{f.name}" for f in dataclasses.fields(self))
            raise ValueError(f"{names} are all 0: at least one must be > 0")

    @property
    def parts(self) -> dict[str, float]:
        """The scores that are asked for, with their weights."""
        weights = dataclasses.asdict(self)
        return {name: weight for name, weight in weights.items() if weight > 0}


@dataclass(frozen=True, eq=False, kw_only=True)
class Ranked(Generic[T]):
    """The candidates of one prompt, best first; everything else in the same order.

    `numbers` tell which they were (of several samplers s, number n is by sampler
    n mod s), `scores` are the weighted sums of `parts`.
    """

    outputs: tuple[T, ...]
    numbers: tuple[int, ...]
    scores: tuple[float, ...]
    parts: dict[str, tuple[float, ...]]


def gain(
    engine: Engine, prompts: Sequence[Prompt], written: Sequence[np.ndarray]
) -> np.ndarray:
    """log p(written | first stream) - log p(written | last stream) of each prompt."""
    for i, prompt in enumerate(prompts):
        if len(prompt.streams) < 2:
            raise ValueError(
                f"rerank.gain compares with an unconditional stream, but prompt {i} "
                "has none: there is no text to be hidden"
            )
    # In one call: the two have the same lengths.
    both = log_likelihoods(
        engine, [*prompts, *map(_last, prompts)], [*written, *written]
    )
    return both[: len(prompts)] - both[len(prompts) :]


def likelihood(
    engine: Engine, prompts: Sequence[Prompt], pieces: Sequence[np.ndarray]
) -> np.ndarray:
    """log p(text | picture): `prompts` ask for captions, `pieces` are what should be
    written, which its <eoss> ends."""
    layout = engine.layout
    texts = [np.append(layout.text_ids(text), layout.eoss) for text in pieces]
    return log_likelihoods(engine, prompts, texts)


def log_likelihoods(
    engine: Engine, prompts: Sequence[Prompt], written: Sequence[np.ndarray]
) -> np.ndarray:
    """log p in nats of what was written after the first stream of each prompt, float64;
    tokens that the script forced are given, not counted."""
    rows, counted = [], []
    for prompt, tokens in zip(prompts, written, strict=True):
        ids, script = prompt.streams[0], prompt.scripts[0][: len(tokens)]
        tokens = np.where(script < 0, tokens[: len(script)], script)
        tokens = tokens[: np.flatnonzero(tokens != engine.layout.pad).max() + 1]
        rows.append(np.concatenate([ids, tokens]))
        sampled = (script[: len(tokens)] < 0) & (tokens != engine.layout.pad)
        counted.append(np.concatenate([np.zeros(len(ids), bool), sampled]))
    return np.array(engine.score(rows, counted), np.float64)


def similarity(
    embedder: Embedder, texts: Sequence[str], images: Sequence[np.ndarray]
) -> np.ndarray:
    """Cosines [P, C] of P texts with C pictures each, uint8 [P · C, Y, X, 3]."""
    text_PE = embedder.texts(texts)
    image_PCE = embedder.images(images).reshape(len(texts), -1, embedder.size)
    return np.einsum("PE,PCE->PC", text_PE, image_PCE)


def order(
    weights: Rerank, parts: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the candidates, best first, and the scores of all: both [P, C].

    `parts` are [P, C] each, by name. Of equal candidates the first is taken.
    """
    score_PC = sum(weight * parts[name] for name, weight in weights.parts.items())
    score_PC = np.asarray(score_PC, np.float64)
    return np.argsort(-score_PC, axis=1, kind="stable"), score_PC


def ranked(
    outputs: Sequence[T],
    number_C: np.ndarray,
    score_C: np.ndarray,
    parts: Mapping[str, np.ndarray],
) -> Ranked[T]:
    """One prompt's candidates in the `order` given; arrays are in their own order."""
    return Ranked(
        outputs=tuple(outputs[n] for n in number_C),
        numbers=tuple(number_C.tolist()),
        scores=tuple(score_C[number_C].tolist()),
        parts={name: tuple(x[number_C].tolist()) for name, x in parts.items()},
    )


def _last(prompt: Prompt) -> Prompt:
    """The prompt that the last stream reads."""
    return Prompt(prompt.streams[-1:], prompt.scripts[-1:])
