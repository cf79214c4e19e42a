"""From prompts to pictures and texts: the one place where the decoder is asked.

Every task makes `Drawing`s or `Telling`s, whatever its form; here documents are
retrieved for them, samplers and streams chosen, and tokens read back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import jax
import numpy as np
from PIL import Image as Pillow

from cm3leon_jax.codec import Codec, Parts
from cm3leon_jax.context import Context, Retrieve
from cm3leon_jax.models.decoder import Decoder
from cm3leon_jax.retrieval.recall import Memory
from cm3leon_jax.sampling import prompts as forms
from cm3leon_jax.sampling.engine import Engine
from cm3leon_jax.sampling.prompts import Prompt
from cm3leon_jax.sampling.sampler import Sampler
from cm3leon_jax.system import System
from cm3leon_jax.vocab import Layout

SHORT = 24  # pieces of a text, before retrieved documents take the place


class Options(TypedDict, total=False):
    """How to write: what every task takes beside what it is about.

    retrieve: how many documents to retrieve for each prompt (default 0), or lists of
    documents to be used, one list for each. sampler: None is the config's for the
    task. seed: another seed, another sample (default 0).
    """

    retrieve: Retrieve
    sampler: Sampler | None
    seed: int


class DrawingOptions(Options, total=False):
    """How to draw pictures.

    numbers: those of the prompts, from which their noise follows (default 0, 1, …), for
    one who draws a long list in parts.
    """

    numbers: Sequence[int] | None


class TextOptions(Options, total=False):
    """How to write texts.

    max_text: at most so many pieces each; None is what the task usually needs, or less
    where the context is full. candidates: so many texts are written (None: as many as
    the config says) and the one is taken that is most likely together with all that
    was given, p(text) p(picture | text): the model asks itself whether it would have
    drawn that picture.
    """

    max_text: int | None
    candidates: int | None


@dataclass(frozen=True, eq=False, kw_only=True)
class Drawing:
    """A picture to be drawn.

    `prompt` has all streams that guidance may need. `text` and `image` (square, uint8)
    are what documents are retrieved by. `given` are the codes of a picture and its
    cells (bool) that are to be drawn; None: all are.
    """

    prompt: Prompt
    text: str | None = None
    image: np.ndarray | None = None
    given: tuple[np.ndarray, np.ndarray] | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Telling:
    """Holes in a document, to be filled with text.

    `parts` are its runs of ids, None for every hole; `last`: the one hole is its end,
    and what is written there ends it. `text` and `image` are what documents are
    retrieved by.
    """

    parts: Parts
    last: bool = False
    text: str | None = None
    image: np.ndarray | None = None


class Writer:
    """A decoder with its tokenizers and samplers, over a mesh; `tasks` are those that
    the decoder was tuned on."""

    def __init__(
        self,
        system: System,
        decoder: Decoder,
        codec: Codec,
        *,
        mesh: jax.sharding.Mesh | None,
        batch: int,
        memory: Memory | None,
        tasks: Collection[str] = (),
    ):
        self.tasks = frozenset(tasks)
        self.system, self.codec, self.layout = system, codec, system.layout
        self.limit = system.decoder_config.length
        self.engine = Engine(decoder, system.layout, system.rules, mesh, batch)
        self.context = Context(codec, self.limit, memory)

    def draw(
        self,
        wanted: Sequence[Drawing],
        default: Sampler,
        task: str,
        *,
        retrieve: Retrieve = 0,
        sampler: Sampler | None = None,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
    ) -> list[Pillow.Image]:
        """A picture for each; `task` is how messages call it."""
        whole = [drawing.prompt for drawing in wanted]
        sampler = sampler_for(
            sampler, default, min(len(p.streams) for p in whole), task
        )
        prompts = [forms.keep(prompt, sampler.streams) for prompt in whole]
        rows = self._rows(retrieve, wanted)
        grid, codes = self.codec.image.grid, []
        prompts = self.context.before(prompts, rows)
        written = self.tokens(prompts, sampler, seed, numbers=numbers)
        for drawing, tokens in zip(wanted, written, strict=True):
            if drawing.given is None:
                codes.append(forms.codes(tokens, self.layout).reshape(grid))
            else:
                codes.append(forms.fill(*drawing.given, tokens, self.layout))
        return self.codec.paint(np.stack(codes))

    def tell(
        self,
        wanted: Sequence[Telling],
        default: Sampler,
        task: str,
        usual: int,
        *,
        max_text: int | None = None,
        candidates: int | None = None,
        retrieve: Retrieve = 0,
        sampler: Sampler | None = None,
        seed: int = 0,
    ) -> tuple[list[list[np.ndarray]], int]:
        """The text pieces of every hole of each, and how many there may be: a text of
        that length was cut. `usual` is the longest that `task` usually needs."""
        sampler = sampler_for(sampler, default, 1, task)
        candidates = self._candidates(candidates, sampler)
        rows = self._rows(retrieve, wanted)
        if max_text is None:
            max_text = self._room(wanted, rows, usual)
        bare = [self._text_form(telling, max_text) for telling in wanted]
        prompts = self.context.before(bare, rows)
        every = [prompt for prompt in prompts for _ in range(candidates)]
        read = forms.texts if not wanted[0].last else _only_text
        texts = [
            read(tokens, self.layout) for tokens in self.tokens(every, sampler, seed)
        ]
        if candidates > 1:
            whole, starts = [], []
            for i, spans in enumerate(texts):
                k = i // candidates
                # Retrieved documents, if there are any, and the <eos> before them.
                start = len(prompts[k].streams[0]) - len(bare[k].streams[0]) + 1
                before = prompts[k].streams[0][:start]
                whole.append(self._filled(before, wanted[k].parts, spans))
                starts.append(start)
            scores = np.reshape(self.engine.score(whole, starts), (-1, candidates))
            best = np.arange(len(scores)) * candidates + scores.argmax(axis=1)
            texts = [texts[i] for i in best]
        return texts, max_text

    def label(
        self,
        wanted: Sequence[Drawing],
        default: Sampler,
        task: str,
        *,
        retrieve: Retrieve = 0,
        sampler: Sampler | None = None,
        seed: int = 0,
    ) -> list[np.ndarray]:
        """The classes that are drawn for each, in raster order."""
        sampler = sampler_for(sampler, default, 1, task)
        bare = [forms.keep(drawing.prompt, 1) for drawing in wanted]
        prompts = self.context.before(bare, self._rows(retrieve, wanted))
        classes = range(len(self.codec.masks.classes)) if self.codec.masks else None
        written = self.engine.write(
            *(prompts, sampler, seed, self.codec.image_tokens), classes=classes
        )
        inside = self.layout.classes
        return [self.layout.labels(t[forms.inside(t, inside)]) for t in written]

    def tokens(
        self,
        wanted: Sequence[Prompt],
        sampler: Sampler,
        seed: int,
        *,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[np.ndarray]:
        """What the decoder writes for each prompt, in order: tokens [T]."""
        return self.engine.write(
            *(wanted, sampler, seed, self.codec.image_tokens), numbers=numbers
        )

    def _text_form(self, telling: Telling, max_text: int) -> Prompt:
        if not telling.last:
            return forms.text_infill(self.layout, telling.parts, max_text)
        known = [part for part in telling.parts if part is not None]
        return forms.last_text(self.layout, known, max_text)

    def _rows(
        self, retrieve: Retrieve, wanted: Sequence[Drawing] | Sequence[Telling]
    ) -> list[list[np.ndarray]]:
        """The ids of the documents that stand before each."""
        return self.context.rows(
            retrieve, [w.text for w in wanted], [w.image for w in wanted]
        )

    def _candidates(self, candidates: int | None, sampler: Sampler) -> int:
        """How many texts to write: a greedy sampler would write the same again."""
        if candidates is None:
            candidates = self.system.sampling.text_candidates
        if candidates < 1:
            raise ValueError(f"candidates={candidates} must be at least 1")
        return 1 if sampler.temperature == 0 else candidates

    def _room(
        self,
        wanted: Sequence[Telling],
        rows: Sequence[Sequence[np.ndarray]],
        usual: int,
    ) -> int:
        """The longest texts that all holes have room for, at most `usual`. Documents
        before the prompt make them shorter, but not too short."""
        alone, together = [usual], [usual]
        for telling, row in zip(wanted, rows, strict=True):
            known = [part for part in telling.parts if part is not None]
            holes = max(len(telling.parts) - len(known), 1)
            # <eos>, and for each hole two sentinels and the <eoss> of its text.
            room = self.limit - sum(map(len, known)) - 1 - 3 * holes
            alone.append(room // holes)
            together.append((room - sum(len(r) + 1 for r in row)) // holes)
        return max(min(together), min(*alone, SHORT), 1)

    def _filled(
        self, before: np.ndarray, parts: Parts, spans: Sequence[np.ndarray]
    ) -> np.ndarray:
        """A whole document, its holes filled, as ids."""
        left = iter(self.layout.text_ids(span) for span in spans)
        body = [next(left) if part is None else part for part in parts]
        return np.concatenate([before, *body, [self.layout.eos]])


def _only_text(tokens_T: np.ndarray, layout: Layout) -> list[np.ndarray]:
    return [forms.first_text(tokens_T, layout)]


def sampler_for(
    given: Sampler | None, default: Sampler, streams: int, task: str
) -> Sampler:
    """The sampler of prompts that have so many streams.

    Raises ValueError where a caller asks for guidance or contrast and there is but one
    stream; that of the config may be meant for the same task with a text.
    """
    sampler = given or default
    if streams > 1 or sampler.streams == 1:
        return sampler
    if given not in (None, default):
        raise ValueError(
            f"sampler.guidance={sampler.guidance}, contrastive={sampler.contrastive}: "
            f"guidance has nothing to guide in {task}, where no prompt says what to "
            "write; use guidance=1 and no contrastive"
        )
    return dataclasses.replace(sampler, guidance=1.0, contrastive=None)
