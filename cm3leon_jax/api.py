"""`CM3Leon`: a trained system as one object with a method for every task.

Notebooks, scripts and evaluations go through it. Pictures come in as PIL images or
uint8 arrays of any mode and size, and go out as PIL images of the tokenizer's size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image as Pillow

from cm3leon_jax.codec import (
    HOLE,
    Codec,
    Picture,
    listed,
    load_image_tokenizer,
    load_text_tokenizer,
)
from cm3leon_jax.data.documents import Document, Text
from cm3leon_jax.models.decoder import Decoder
from cm3leon_jax.sampling import prompts as forms
from cm3leon_jax.sampling.generate import generate
from cm3leon_jax.sampling.prompts import Prompt
from cm3leon_jax.sampling.sampler import Sampler
from cm3leon_jax.system import System
from cm3leon_jax.tokenizers import regions
from cm3leon_jax.training import checkpoint as checkpoints
from cm3leon_jax.training.loss import token_nll


class CM3Leon:
    """A decoder with its tokenizers and samplers, all of one work directory.

    `batch` is how many prompts are decoded together.
    """

    def __init__(
        self,
        system: System,
        decoder: Decoder,
        codec: Codec,
        *,
        batch: int = 64,
    ):
        self.system, self.decoder, self.batch = system, decoder, batch
        self.codec, self.layout = codec, system.layout

    @classmethod
    def load(cls, workdir: str | Path, checkpoint: str = "pretrain") -> CM3Leon:
        """Reads a work directory. `checkpoint` is a folder of it, or `FOLDER@STEP`.

        Raises FileNotFoundError for what is missing there (naming the stage to run) and
        ValueError where checkpoint or tokenizers are of another system.
        """
        workdir = Path(workdir)
        system = System.load(workdir)
        folder, _, step = checkpoint.partition("@")
        if step and not step.isdigit():
            raise ValueError(f"checkpoint={checkpoint!r}: the step is not a number")
        abstract = jax.eval_shape(lambda: Decoder(system.decoder_config, nnx.Rngs(0)))
        return cls(
            system,
            checkpoints.load_model(
                workdir / folder, abstract, int(step) if step else None
            ),
            Codec(
                system.layout,
                load_text_tokenizer(workdir),
                load_image_tokenizer(workdir),
            ),
        )

    def text_to_image(
        self, prompts: Sequence[str], *, sampler: Sampler | None = None, seed: int = 0
    ) -> list[Pillow.Image]:
        """One picture for every prompt."""
        sampler = sampler or self.system.sampling.text_to_image
        wanted = [
            forms.text_to_image(
                self.layout,
                self.codec.pieces(prompt, i),
                self.codec.image_tokens,
                guided=sampler.guidance != 1,
            )
            for i, prompt in enumerate(listed(prompts, str, "prompts"))
        ]
        codes = [forms.codes(t, self.layout) for t in self._run(wanted, sampler, seed)]
        return self.codec.paint(np.reshape(codes, (-1, *self.codec.image.grid)))

    def caption(
        self,
        images: Sequence[Picture],
        *,
        max_text: int | None = None,
        sampler: Sampler | None = None,
        seed: int = 0,
    ) -> list[str]:
        """A caption of every picture, of at most `max_text` pieces (default: all that
        the context holds)."""
        sampler = sampler or self.system.sampling.caption
        room = self.system.decoder_config.length - self.codec.image_tokens - 5
        codes = self.codec.image.encode(self.codec.arrays(images))
        wanted = [forms.caption(self.layout, c, max_text or room) for c in codes]
        return [
            self.codec.decode_text(forms.texts(tokens, self.layout)[0])
            for tokens in self._run(wanted, sampler, seed)
        ]

    def infill(
        self,
        images_or_documents: Sequence[Picture | Document],
        masks: Sequence[np.ndarray] | None = None,
        prompts: Sequence[str] | None = None,
        *,
        max_text: int = 32,
        sampler: Sampler | None = None,
        seed: int = 0,
    ) -> list[Any]:
        """Writes what is missing.

        Pictures need `masks`: bool [Y, X] in the picture's own pixels, True =
        regenerate; every code cell that a mask touches is painted anew, the others are
        copied. `prompts` describe the whole pictures. Returns PIL images.

        Documents have `<mask>` in their text, at most `max_text` pieces each; returns
        the documents with all holes filled.
        """
        items = listed(images_or_documents, None, "images_or_documents")
        sampler = sampler or self.system.sampling.infill
        if isinstance(items[0], Document):
            return self._infill_text(items, max_text, sampler, seed)
        if masks is None or len(masks) != len(items):
            raise ValueError(f"{len(items)} pictures need as many masks")
        if prompts is not None and len(prompts) != len(items):
            raise ValueError(f"{len(items)} pictures need as many prompts, or none")
        cells = np.stack(
            [
                self.codec.cells(mask, picture, i)
                for i, (mask, picture) in enumerate(zip(masks, items, strict=True))
            ]
        )
        codes = self.codec.image.encode(regions.blank(self.codec.arrays(items), cells))
        wanted = []
        for i in range(len(items)):
            text = None if prompts is None else self.codec.pieces(prompts[i], i)
            guided = sampler.guidance != 1 and text is not None
            wanted.append(
                forms.region_infill(
                    self.layout, codes[i], cells[i], text, guided=guided
                )
            )
        if prompts is None:  # nothing to guide towards
            sampler = Sampler(
                temperature=sampler.temperature,
                top_p=sampler.top_p,
                top_k=sampler.top_k,
            )
        filled = [
            forms.fill(codes[i], cells[i], tokens, self.layout)
            for i, tokens in enumerate(self._run(wanted, sampler, seed))
        ]
        return self.codec.paint(np.stack(filled))

    def generate(
        self,
        documents: Sequence[Document],
        *,
        images: int = 1,
        max_text: int = 64,
        sampler: Sampler | None = None,
        seed: int = 0,
    ) -> list[Document]:
        """Goes on where each document ends: text and whole pictures, interleaved, until
        the model ends it, or `images` pictures' and `max_text` pieces' worth of tokens.

        A document that ends in `Text` goes on in that text.
        """
        sampler = sampler or Sampler(temperature=1.0, top_p=0.9)
        room = images * (self.codec.image_tokens + 1) + max_text
        begun = [self.codec.ids(d) for d in listed(documents, Document, "documents")]
        wanted = [
            forms.free(
                np.concatenate([[self.layout.eos], ids]),
                min(room, self.system.decoder_config.length - len(ids) - 1),
            )
            for ids in begun
        ]
        written = self._run(wanted, sampler, seed)
        return [
            self.codec.document(np.concatenate([ids, tokens]))
            for ids, tokens in zip(begun, written, strict=True)
        ]

    def reconstruct(self, images: Sequence[Picture]) -> list[Pillow.Image]:
        """Pictures through the image tokenizer and back: the best any task can do."""
        return self.codec.paint(self.codec.image.encode(self.codec.arrays(images)))

    def log_likelihood(self, documents: Sequence[Document]) -> list[float]:
        """log p(document) in nats, each read as `<eos> document <eos>`."""
        eos = [self.layout.eos]
        rows = [
            np.concatenate([eos, self.codec.ids(d), eos])
            for d in listed(documents, Document, "documents")
        ]
        length = max(len(row) for row in rows)
        if length - 1 > self.system.decoder_config.length:
            raise ValueError(
                f"a document has {length} tokens, more than the context of "
                f"{self.system.decoder_config.length}"
            )
        scores = []
        for chunk in _chunks(rows, self.batch):
            tokens = np.full((len(chunk), length), self.layout.pad, np.int32)
            for row, ids in zip(tokens, chunk, strict=True):
                row[: len(ids)] = ids
            nll = _row_nll(self.decoder, tokens, self.layout.pad)
            scores += (-np.asarray(nll, np.float64)).tolist()
        return scores

    def _run(
        self, wanted: Sequence[Prompt], sampler: Sampler, seed: int
    ) -> Iterable[np.ndarray]:
        """Decodes prompts in batches of one size; tokens [T] of each, in order."""
        limit, size = self.system.decoder_config.length, min(self.batch, len(wanted))
        for start in range(0, len(wanted), size):
            chunk = list(wanted[start : start + size])
            # The last batch is filled up, so that it compiles nothing of its own.
            filled = chunk + [chunk[-1]] * (size - len(chunk))
            tokens = generate(
                self.decoder,
                forms.stack(filled, self.layout, limit),
                jax.random.key(seed),
                sampler,
                self.layout,
                image_tokens=self.codec.image_tokens,
                index_B=start + np.arange(size),
            )
            yield from np.asarray(tokens)[: len(chunk)]

    def _infill_text(self, documents, max_text, sampler, seed) -> list[Document]:
        wanted = []
        for i, document in enumerate(documents):
            if not isinstance(document, Document):
                raise ValueError(f"item {i} is no Document, but item 0 is")
            parts = self.codec.parts(document)
            if not any(part is None for part in parts):
                raise ValueError(f"document {i} has no {HOLE} in its text")
            wanted.append(forms.text_infill(self.layout, parts, max_text))
        plain = Sampler(
            temperature=sampler.temperature, top_p=sampler.top_p, top_k=sampler.top_k
        )
        filled = []
        for document, tokens in zip(
            documents, self._run(wanted, plain, seed), strict=True
        ):
            found = iter(forms.texts(tokens, self.layout))
            fill = _filler(lambda found=found: self.codec.decode_text(next(found)))
            segments = tuple(
                Text(re.sub(re.escape(HOLE), fill, s.text))
                if isinstance(s, Text)
                else s
                for s in document.segments
            )
            filled.append(Document(segments, document.id, document.metadata))
        return filled


def _filler(next_text: Callable[[], str]) -> Callable[[re.Match], str]:
    return lambda _: next_text()


def _chunks(values: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (values[i : i + size] for i in range(0, len(values), size))


@jax.jit
def _row_nll(decoder: Decoder, tokens_BL: jax.Array, pad: int) -> jax.Array:
    nll_BL, _ = token_nll(decoder(tokens_BL[:, :-1]), tokens_BL[:, 1:])
    return jnp.sum(nll_BL * (tokens_BL[:, 1:] != pad), axis=1)
