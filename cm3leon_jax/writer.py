"""From prompts to pictures and texts: the one place where the decoder is asked.

Every task makes `Drawing`s or `Telling`s, whatever its form; here documents are
retrieved for them, samplers and streams chosen, and tokens read back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import jax
import numpy as np

from cm3leon_jax.codec import Codec, Parts
from cm3leon_jax.context import Context, Retrieve
from cm3leon_jax.data.task_templates import Task
from cm3leon_jax.judge import Drawing, Drawn, Judge, Sketches
from cm3leon_jax.models.decoder import Decoder
from cm3leon_jax.retrieval.recall import Memory
from cm3leon_jax.sampling import prompts as forms
from cm3leon_jax.sampling.engine import Engine, Precision
from cm3leon_jax.sampling.prompts import Prompt
from cm3leon_jax.sampling.rerank import Rerank, ranked
from cm3leon_jax.sampling.sampler import Sampler
from cm3leon_jax.system import SamplingConfig, System
from cm3leon_jax.vocab import Layout

SHORT = 24  # pieces of a text, before retrieved documents take the place
Samplers = Sampler | tuple[Sampler, ...] | None


class Common(TypedDict, total=False):
    """How to write: what every task takes beside what it is about.

    retrieve: how many documents to retrieve for each prompt (default 0), or lists of
    documents to be used, one list for each. sampler: None is the config's for the task;
    a tuple of samplers splits candidates evenly, number n is by sampler n mod their
    number. seed: another seed, another sample (default 0).
    """

    retrieve: Retrieve
    sampler: Samplers
    seed: int


class Options(Common, total=False):
    """How to draw pictures.

    candidates: so many are drawn for each prompt (None: one), and the best is taken.
    rerank: by which scores; None is the config's. return_scores: return a `Ranked` for
    each prompt instead of a picture: all its candidates with their scores.
    """

    candidates: int | None
    rerank: Rerank | None
    return_scores: bool


class TextOptions(Common, total=False):
    """How to write texts.

    max_text: at most so many pieces each; None is what the task usually needs, or less
    where the context is full. candidates: so many texts are written (None: as many as
    the config says) and the one is taken that is most likely together with all that
    was given, p(text) p(picture | text): the model asks itself whether it would have
    drawn that picture. return_scores: return a `Ranked` for each prompt instead of a
    text: all its candidates with those log-likelihoods in nats.
    """

    max_text: int | None
    candidates: int | None
    return_scores: bool


class FillingOptions(Options, TextOptions, total=False):
    """How to fill in what may be pictures or texts."""


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
        mesh: jax.sharding.Mesh | None,
        batch: int,
        memory: Memory | None,
        *,
        tasks: Collection[str] = (),
        precision: Precision | None = None,
    ):
        self.tasks = frozenset(tasks)
        self.system, self.codec, self.layout = system, codec, system.layout
        self.limit = system.decoder_config.length
        self.engine = Engine(
            *(decoder, system.layout, system.rules, mesh, batch), precision=precision
        )
        self.context = Context(codec, self.limit, memory)

    def contrast(self, amateur: Writer | None) -> None:
        """Contrastive samplers contrast with another's decoder; None: with this one's.

        ValueError where the two do not have the same tokens.
        """
        if amateur is not None:
            mine, other = (
                (
                    s.layout,
                    *(
                        s.stage_inputs[f"{kind}_tokenizer"]
                        for kind in ("text", "image")
                    ),
                )
                for s in (self.system, amateur.system)
            )
            if mine != other:
                raise ValueError(
                    f"the amateur {amateur.system.name} has other tokens than "
                    f"{self.system.name}: vocabulary and tokenizers must be the same"
                )
        self.engine.amateur = None if amateur is None else amateur.engine.decoder

    def draw(
        self,
        wanted: Sequence[Drawing],
        default: Sampler,
        task: str,
        *,
        retrieve: Retrieve = 0,
        sampler: Samplers = None,
        candidates: int | None = None,
        rerank: Rerank | None = None,
        return_scores: bool = False,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
    ) -> Drawn:
        """A picture for each; `task` is how messages call it."""
        candidates = 1 if candidates is None else _whole(candidates)
        known = min(len(drawing.prompt.streams) for drawing in wanted)
        samplers = self.samplers(sampler, default, known, task)
        judge = None
        if candidates > 1 or return_scores:
            weights = rerank or self.system.sampling.rerank
            judge = Judge(weights, self.engine, self.codec, self.context)
            judge.check(wanted)
        rows = self._rows(retrieve, wanted)
        whole = self.context.before([drawing.prompt for drawing in wanted], rows)
        streams = max(map(self.streams, samplers))
        prompts = [forms.keep(prompt, streams) for prompt in whole]
        written = list(self.tokens(prompts, samplers, seed, candidates, numbers))
        codes = np.stack(
            [
                self._codes(wanted[i // candidates], tokens)
                for i, tokens in enumerate(written)
            ]
        )
        if judge is None:
            return self.codec.paint(codes)
        sketches = Sketches(wanted, whole, rows, written, codes)
        return judge.ranked(sketches) if return_scores else judge.best(sketches)

    def _codes(self, drawing: Drawing, tokens_T: np.ndarray) -> np.ndarray:
        """The codes of a whole picture, [Y, X]."""
        if drawing.given is not None:
            return forms.fill(*drawing.given, tokens_T, self.layout)
        return forms.codes(tokens_T, self.layout).reshape(self.codec.image.grid)

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
        sampler: Samplers = None,
        return_scores: bool = False,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
    ) -> tuple[list[Any], int]:
        """The text pieces of every hole of each, or a `Ranked` of such lists, and how
        many there may be: a text of that length was cut. `usual` is the longest that
        `task` usually needs."""
        seen = all(self._shows_a_picture(telling) for telling in wanted)
        samplers = self.samplers(sampler, default, 2 if seen else 1, task)
        candidates = self._candidates(candidates, samplers)
        rows = self._rows(retrieve, wanted)
        if max_text is None:
            max_text = self._room(wanted, rows, usual)
        bare = [self.text_form(telling, max_text) for telling in wanted]
        streams = max(map(self.streams, samplers))
        if streams > 1:
            grey = self.codec.grey
            bare = [forms.blinded(prompt, grey, self.layout) for prompt in bare]
            bare = [forms.keep(prompt, streams) for prompt in bare]
        prompts = self.context.before(bare, rows)
        read = forms.texts if not wanted[0].last else _only_text
        texts = [
            read(tokens, self.layout)
            for tokens in self.tokens(prompts, samplers, seed, candidates, numbers)
        ]
        if candidates > 1 or return_scores:
            whole, starts = [], []
            for i, spans in enumerate(texts):
                k = i // candidates
                # Retrieved documents, if there are any, and the <eos> before them.
                start = len(prompts[k].streams[0]) - len(bare[k].streams[0]) + 1
                before = prompts[k].streams[0][:start]
                whole.append(self._filled(before, wanted[k].parts, spans))
                starts.append(start)
            scores = np.reshape(self.engine.score(whole, starts), (-1, candidates))
            number_PC = np.argsort(-scores, axis=1, kind="stable")
            every = [
                ranked(texts[i * candidates :][:candidates], order, score, {})
                for i, (order, score) in enumerate(zip(number_PC, scores, strict=True))
            ]
            texts = every if return_scores else [found.outputs[0] for found in every]
        return texts, max_text

    def label(
        self,
        wanted: Sequence[Drawing],
        classes: int,
        default: Sampler,
        task: str,
        *,
        retrieve: Retrieve = 0,
        sampler: Samplers = None,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
    ) -> list[np.ndarray]:
        """How likely each of the first `classes` is in each cell, given those that were
        drawn before: float32 [cells in raster order, classes] for each."""
        samplers = self.samplers(sampler, default, 1, task)
        bare = [forms.keep(drawing.prompt, 1) for drawing in wanted]
        prompts = self.context.before(bare, self._rows(retrieve, wanted))
        written = self.engine.write(
            *(prompts, samplers, seed, self.codec.image_tokens),
            classes=range(classes),
            numbers=numbers,
        )
        before = [prompt.streams[0] for prompt in prompts]
        inside = self.layout.classes
        rows = [
            np.concatenate([ids, tokens[forms.inside(tokens, inside)]])
            for ids, tokens in zip(before, written, strict=True)
        ]
        return list(self.engine.chances(rows, [*map(len, before)], inside[:classes]))

    def tokens(
        self,
        wanted: Sequence[Prompt],
        samplers: Sequence[Sampler],
        seed: int,
        candidates: int = 1,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[np.ndarray]:
        """What the decoder writes for each candidate of each prompt: tokens [T]."""
        return self.engine.write(
            *(wanted, samplers, seed, self.codec.image_tokens),
            candidates=candidates,
            numbers=numbers,
        )

    def samplers(
        self, given: Samplers, default: Sampler, streams: int, task: str
    ) -> list[Sampler]:
        """Those of prompts that have so many streams.

        Raises ValueError where a caller asks for guidance or contrast and there is but
        one stream; that of the config may be meant for the same task with a text.
        """
        every = given if isinstance(given, tuple) else (given or default,)
        if not every:
            raise ValueError("sampler=(): give at least one")
        if not all(isinstance(sampler, Sampler) for sampler in every):
            raise ValueError(f"sampler={given!r} must be a Sampler or a tuple of them")
        made = []
        for sampler in every:
            if streams == 1 < self.streams(sampler):
                if given is not None and sampler != default:
                    raise ValueError(
                        f"sampler.guidance={sampler.guidance}, contrastive="
                        f"{sampler.contrastive}: guidance has nothing to guide in "
                        f"{task}, where no prompt says what to write; use guidance=1 "
                        "and no contrastive"
                    )
                sampler = dataclasses.replace(sampler, guidance=1.0, contrastive=None)
            made.append(sampler)
        return made

    def streams(self, sampler: Sampler) -> int:
        """How many a prompt needs; an amateur that is another model has its own."""
        other = self.engine.amateur is not None and sampler.contrastive is not None
        return 1 if other else sampler.streams

    def _shows_a_picture(self, telling: Telling) -> bool:
        known = [part for part in telling.parts if part is not None]
        return any(forms.inside(part, self.layout.image).any() for part in known)

    def text_form(self, telling: Telling, max_text: int) -> Prompt:
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

    def _candidates(self, candidates: int | None, samplers: Sequence[Sampler]) -> int:
        """How many texts to write: a greedy sampler would write the same again."""
        candidates = None if candidates is None else _whole(candidates)
        if all(sampler.temperature == 0 for sampler in samplers):
            return len(samplers)
        if candidates is None:
            return max(self.system.sampling.text_candidates, len(samplers))
        return candidates

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


def usual_sampler(sampling: SamplingConfig, spec: Task) -> Sampler:
    """The config's for a task of that kind."""
    if spec.writes_text:
        return sampling.caption if spec.name.startswith("caption") else sampling.answer
    if spec.output in spec.masks:
        return sampling.segment
    if spec.name in ("edit", "edit_region"):  # guided by picture and text (paper 1.12)
        return sampling.edit
    return sampling.control if len(spec.images) > 1 else sampling.text_to_image


def _whole(candidates: int) -> int:
    """So many, as an int; ValueError where there cannot be so many."""
    number = isinstance(candidates, int | np.integer) and candidates is not True
    if not number or candidates < 1:
        raise ValueError(
            f"candidates={candidates!r} must be at least 1, a whole number"
        )
    return int(candidates)


def _only_text(tokens_T: np.ndarray, layout: Layout) -> list[np.ndarray]:
    return [forms.first_text(tokens_T, layout)]
