"""Which of several pictures is taken: candidates, their scores, their ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image as Pillow

from cm3leon_jax.codec import Codec
from cm3leon_jax.context import Context
from cm3leon_jax.sampling import prompts as forms
from cm3leon_jax.sampling import rerank as ranks
from cm3leon_jax.sampling.engine import Engine
from cm3leon_jax.sampling.prompts import Prompt
from cm3leon_jax.sampling.rerank import Ranked, Rerank

# PIL images, or a `Ranked` for each where scores are asked for.
Drawn = list[Any]


@dataclass(frozen=True, eq=False, kw_only=True)
class Drawing:
    """A picture to be drawn.

    `prompt` has all streams that guidance may need. `text` and `image` (square, uint8)
    are what documents are retrieved by; `describes`: the text says what the whole
    picture is to show. `given` are the codes of a picture and its cells (bool) that are
    to be drawn; None: all are.
    """

    prompt: Prompt
    text: str | None = None
    describes: bool = False
    image: np.ndarray | None = None
    given: tuple[np.ndarray, np.ndarray] | None = None


@dataclass(frozen=True, eq=False)
class Sketches:
    """R = P · C rows, C candidates of each of P drawings in turn, before they are
    painted.

    `whole` are the drawings' prompts with all their streams, after `rows`, the ids of
    retrieved documents. `written` are the tokens of each row, `codes_RYX` its picture.
    """

    wanted: Sequence[Drawing]
    whole: Sequence[Prompt]
    rows: Sequence[Sequence[np.ndarray]]
    written: Sequence[np.ndarray]
    codes_RYX: np.ndarray

    @property
    def candidates(self) -> int:
        return len(self.written) // len(self.wanted)

    @property
    def owners(self) -> list[int]:
        """The number of each row's drawing."""
        return [i // self.candidates for i in range(len(self.written))]


class Judge:
    """Scores candidates by the models of a system, as `weights` ask for it."""

    def __init__(self, weights: Rerank, engine: Engine, codec: Codec, context: Context):
        self.weights, self.engine = weights, engine
        self.codec, self.context = codec, context

    def check(self, wanted: Sequence[Drawing]) -> None:
        """ValueError, before anything is drawn, where there is nothing to score by."""
        asked = self.weights.parts
        for i, drawing in enumerate(wanted):
            if "gain" in asked and len(drawing.prompt.streams) < 2:
                raise ValueError(
                    f"rerank.gain: nothing says what picture {i} is to show, so there "
                    "is nothing to rank candidates by; use candidates=1"
                )
            for name in ("similarity", "likelihood"):
                if name in asked and not drawing.describes:
                    raise ValueError(
                        f"rerank.{name} needs a text that describes the whole picture, "
                        f"and picture {i} has none; use rerank=Rerank(gain=1.0)"
                    )
        if "similarity" in asked and self.context.embedder is None:
            raise ValueError(
                "rerank.similarity needs an encoder, and this system has no section "
                "`retrieval` that names one; use rerank=Rerank(gain=1.0)"
            )

    def best(self, sketches: Sketches) -> list[Pillow.Image]:
        """The best candidate of each."""
        painted = None
        if "similarity" in self.weights.parts:
            painted = self.codec.paint(sketches.codes_RYX)
        number_PC, _ = ranks.order(self.weights, self._scores(sketches, painted))
        first = np.arange(len(number_PC)) * sketches.candidates + number_PC[:, 0]
        if painted is None:
            return self.codec.paint(sketches.codes_RYX[first])
        return [painted[i] for i in first]

    def ranked(self, sketches: Sketches) -> list[Ranked[Pillow.Image]]:
        """All candidates of each, best first, with their scores."""
        painted = self.codec.paint(sketches.codes_RYX)
        parts = self._scores(sketches, painted)
        number_PC, score_PC = ranks.order(self.weights, parts)
        count = sketches.candidates
        return [
            ranks.ranked(
                painted[i * count : (i + 1) * count],
                number_PC[i],
                score_PC[i],
                {name: part_PC[i] for name, part_PC in parts.items()},
            )
            for i in range(len(number_PC))
        ]

    def _scores(
        self, sketches: Sketches, painted: Sequence[Pillow.Image] | None
    ) -> dict[str, np.ndarray]:
        """The scores that are asked for, [P, C] each."""
        asked, made = self.weights.parts, {}
        if "gain" in asked:
            prompts = [sketches.whole[p] for p in sketches.owners]
            made["gain"] = ranks.gain(self.engine, prompts, sketches.written)
        if "likelihood" in asked:
            made["likelihood"] = self._likelihood(sketches)
        if "similarity" in asked:
            assert self.context.embedder is not None and painted is not None  # checked
            made["similarity"] = ranks.similarity(
                self.context.embedder,
                [drawing.text or "" for drawing in sketches.wanted],
                [np.asarray(picture) for picture in painted],
            )
        count = sketches.candidates
        return {name: np.reshape(part, (-1, count)) for name, part in made.items()}

    def _likelihood(self, sketches: Sketches) -> np.ndarray:
        """Of each row's text as a caption of its picture, after the same documents."""
        pieces = [
            np.asarray(self.codec.pieces(drawing.text or "", i))
            for i, drawing in enumerate(sketches.wanted)
        ]
        layout, owners = self.engine.layout, sketches.owners
        captions = [
            forms.caption(layout, codes_YX, len(pieces[p]))
            for p, codes_YX in zip(owners, sketches.codes_RYX, strict=True)
        ]
        captions = self.context.before(captions, [sketches.rows[p] for p in owners])
        return ranks.likelihood(self.engine, captions, [pieces[p] for p in owners])
