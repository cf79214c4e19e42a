"""`CM3Leon`: a trained system as one object with a method for every task.

Notebooks, scripts and evaluations go through it. Pictures come in as PIL images or
uint8 arrays of any mode and size, and go out as PIL images of the tokenizer's size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image as Pillow

from cm3leon_jax import encoders
from cm3leon_jax.codec import (
    HOLE,
    Codec,
    Picture,
    listed,
    load_image_tokenizer,
    load_text_tokenizer,
    unended,
)
from cm3leon_jax.context import Context, Retrieve
from cm3leon_jax.data.documents import Document
from cm3leon_jax.models.decoder import Decoder, abstract
from cm3leon_jax.parallel.mesh import MeshConfig, make_mesh
from cm3leon_jax.parallel.rules import shardings
from cm3leon_jax.retrieval.recall import Memory
from cm3leon_jax.sampling import prompts as forms
from cm3leon_jax.sampling.engine import Engine
from cm3leon_jax.sampling.prompts import Prompt
from cm3leon_jax.sampling.sampler import Sampler
from cm3leon_jax.system import System
from cm3leon_jax.training import checkpoint as checkpoints

_CAPTION = 64  # pieces of a caption, where the context holds so many
_SHORT = 24  # and so many before retrieved documents take the place


class CM3Leon:
    """A decoder with its tokenizers and samplers, all of one work directory.

    `batch` is at most how many prompts are decoded together (rounded up to what the
    mesh divides). `mesh` is where the decoder lies; None is one device. `memory` is
    where documents are retrieved from, if there is any.

    `retrieve` of a method is how many documents to retrieve for each prompt (0: none),
    or lists of documents to be used, one list for each. `context.fallbacks` counts
    those that could not be had.
    """

    def __init__(
        self,
        system: System,
        decoder: Decoder,
        codec: Codec,
        *,
        mesh: jax.sharding.Mesh | None = None,
        batch: int = 64,
        memory: Memory | None = None,
    ):
        picture = system.image_tokenizer.model
        wanted = (picture.image_size, (picture.grid, picture.grid))
        found = (codec.image.image_size, tuple(codec.image.grid))
        if found != wanted:
            raise ValueError(
                f"the image tokenizer has (image_size, grid) = {found}, the config "
                f"{wanted}: they are of different systems"
            )
        self.system, self.decoder = system, decoder
        self.codec, self.layout = codec, system.layout
        self.engine = Engine(decoder, system.layout, system.rules, mesh, batch)
        self.context = Context(codec, system.decoder_config.length, memory)

    @classmethod
    def load(
        cls,
        workdir: str | Path,
        checkpoint: str = "pretrain",
        *,
        mesh: MeshConfig | None = None,
        batch: int = 64,
        bank: str | Path = "bank",
    ) -> CM3Leon:
        """Reads a work directory. `checkpoint` is a folder of it, or `FOLDER@STEP`,
        and so is `bank`, of a system with retrieval; it may be any folder.

        `mesh` None is that of the config. Raises FileNotFoundError for what is missing
        there (naming the stage to run) and ValueError where checkpoint or tokenizers
        are of another system, or where the mesh does not cover the devices.
        """
        workdir = Path(workdir)
        system = System.load(workdir)
        folder, _, step = checkpoint.partition("@")
        if step and not step.isdigit():
            raise ValueError(f"checkpoint={checkpoint!r}: the step is not a number")
        devices = make_mesh(system.mesh if mesh is None else mesh)
        shapes = abstract(system.decoder_config)
        decoder = checkpoints.load_model(
            workdir / folder,
            jax.tree.map(
                lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
                shapes,
                shardings(shapes, devices, system.rules),
            ),
            int(step) if step else None,
            settings=system.checkpoint_settings,
        )
        codec = Codec(
            system.layout, load_text_tokenizer(workdir), load_image_tokenizer(workdir)
        )
        memory = None
        if system.retrieval is not None:
            memory = Memory.load(
                workdir / bank,
                encoders.load(system.retrieval.encoder, workdir),
                skip_above=system.retrieval.skip_above,
                mesh=devices,
            )
        return cls(system, decoder, codec, mesh=devices, batch=batch, memory=memory)

    @property
    def memory(self) -> Memory | None:
        """Where documents are retrieved from; another may take its place."""
        return self.context.memory

    @memory.setter
    def memory(self, memory: Memory | None) -> None:
        self.context.memory = memory

    def retrieve(
        self, text: str | None = None, image: Picture | None = None, k: int = 2
    ) -> list[Document]:
        """The `k` documents of the memory that are nearest to a text, a picture or
        both, best first; fewer where the memory has no more."""
        array = None if image is None else self.codec.arrays([image])[0]
        return self.context.documents(k, [text], [array])[0]

    def text_to_image(
        self,
        prompts: Iterable[str],
        *,
        retrieve: Retrieve = 0,
        sampler: Sampler | None = None,
        seed: int = 0,
    ) -> list[Pillow.Image]:
        """One picture for every prompt."""
        sampler = sampler or self.system.sampling.text_to_image
        prompts = listed(prompts, str, "prompts")
        found = self.context.documents(retrieve, prompts, [None] * len(prompts))
        wanted = [
            forms.text_to_image(
                self.layout,
                self.codec.pieces(prompt, i),
                self.codec.image_tokens,
                guided=sampler.guidance != 1,
            )
            for i, prompt in enumerate(prompts)
        ]
        wanted = self.context.before(wanted, self.context.ids(found))
        codes = [forms.codes(t, self.layout) for t in self._run(wanted, sampler, seed)]
        return self.codec.paint(np.reshape(codes, (-1, *self.codec.image.grid)))

    def caption(
        self,
        images: Iterable[Picture],
        *,
        max_text: int | None = None,
        candidates: int | None = None,
        retrieve: Retrieve = 0,
        sampler: Sampler | None = None,
        seed: int = 0,
    ) -> list[str]:
        """A caption of every picture, of at most `max_text` pieces (default: 64, or
        what the context holds if that is less).

        Of several `candidates` (default: the config's) the one is returned that is most
        likely together with its picture, p(caption) p(picture | caption): the model
        asks itself whether it would have drawn that picture.
        """
        sampler = _unguided(sampler, self.system.sampling.caption, "a caption")
        candidates = self._candidates(candidates, sampler)
        arrays = self.codec.arrays(images)
        found = self.context.documents(retrieve, [None] * len(arrays), list(arrays))
        rows = self.context.ids(found)
        if max_text is None:
            room = self.system.decoder_config.length - self.codec.image_tokens - 5
            longest = max(sum(len(ids) + 1 for ids in row) for row in rows)
            max_text = min(max(room - longest, min(room, _SHORT)), _CAPTION)
        codes = self.codec.image.encode(arrays)
        bare = [forms.caption(self.layout, c, max_text) for c in codes]
        wanted = self.context.before(bare, rows)
        texts = [
            forms.texts(tokens, self.layout)[0]
            for tokens in self._run(_each(wanted, candidates), sampler, seed)
        ]
        if candidates > 1:
            pairs, starts = [], []
            for i, pieces in enumerate(texts):
                prompt, k = wanted[i // candidates], i // candidates
                # Retrieved documents, if there are any, and the <eos> before them.
                start = len(prompt.streams[0]) - len(bare[k].streams[0]) + 1
                image = self.layout.image_ids(codes[k]).ravel()
                own = (self.layout.text_ids(pieces), [self.layout.brk], image)
                before, end = prompt.streams[0][:start], [self.layout.eos]
                pairs.append(np.concatenate([before, *own, end]))
                starts.append(start)
            texts = [texts[i] for i in self._likeliest(pairs, starts, candidates)]
        return [self.codec.decode_text(pieces) for pieces in texts]

    def _candidates(self, candidates: int | None, sampler: Sampler) -> int:
        """How many texts to write: a greedy sampler would write the same again."""
        if candidates is None:
            candidates = self.system.sampling.text_candidates
        if candidates < 1:
            raise ValueError(f"candidates={candidates} must be at least 1")
        return 1 if sampler.temperature == 0 else candidates

    def _likeliest(
        self, rows: list[np.ndarray], starts: list[int], candidates: int
    ) -> list[int]:
        """Of each `candidates` rows of ids in turn, the number of the likeliest."""
        scores = np.reshape(self.engine.score(rows, starts), (-1, candidates))
        return (np.arange(len(scores)) * candidates + scores.argmax(axis=1)).tolist()

    def infill(
        self,
        images_or_documents: Iterable[Picture] | Iterable[Document],
        masks: Iterable[np.ndarray] | None = None,
        prompts: Iterable[str] | None = None,
        *,
        max_text: int = 32,
        candidates: int | None = None,
        sampler: Sampler | None = None,
        seed: int = 0,
    ) -> list[Pillow.Image] | list[Document]:
        """Writes what is missing.

        Pictures need `masks`: bool [Y, X] in the picture's own pixels (upright, if it
        has an EXIF orientation), True = regenerate; every code cell that a mask touches
        is painted anew, the others are copied. `prompts` describe the whole pictures;
        without them there is no guidance. Returns PIL images.

        Documents have `<mask>` in their text, at most `max_text` pieces each; returns
        the documents with all holes filled: of several `candidates` (default: the
        config's) the document that is the likeliest as a whole.
        """
        name = "images_or_documents"
        items = listed(images_or_documents, None, name)
        if any(isinstance(item, Document) for item in items):
            if masks is not None or prompts is not None:
                raise ValueError(
                    f"masks and prompts are for pictures: a document has {HOLE} in its "
                    "text"
                )
            documents = listed(items, Document, name)
            return self._infill_text(documents, max_text, candidates, sampler, seed)
        masks = [] if masks is None else list(masks)
        if len(masks) != len(items):
            raise ValueError(f"{len(items)} pictures need as many masks")
        if prompts is None:
            default = self.system.sampling.infill
            sampler = _unguided(sampler, default, "infilling without prompts")
            texts = [None] * len(items)
        else:
            sampler = sampler or self.system.sampling.infill
            prompts = listed(prompts, str, "prompts")
            texts = [self.codec.pieces(prompt, i) for i, prompt in enumerate(prompts)]
        if len(texts) != len(items):
            raise ValueError(f"{len(items)} pictures need as many prompts, or none")
        arrays, cells = zip(
            *map(self.codec.hidden, items, masks, range(len(items))), strict=True
        )
        codes = self.codec.image.encode(np.stack(arrays))
        guided = sampler.guidance != 1
        wanted = [
            forms.region_infill(self.layout, *picture, guided=guided)
            for picture in zip(codes, cells, texts, strict=True)
        ]
        filled = [
            forms.fill(codes[i], cells[i], tokens, self.layout)
            for i, tokens in enumerate(self._run(wanted, sampler, seed))
        ]
        return self.codec.paint(np.stack(filled))

    def _infill_text(
        self,
        documents: Sequence[Document],
        max_text: int,
        candidates: int | None,
        sampler: Sampler | None,
        seed: int,
    ) -> list[Document]:
        default = self.system.sampling.caption  # a sampler for text
        sampler = _unguided(sampler, default, "infilling of text")
        candidates = self._candidates(candidates, sampler)
        wanted, every = [], self.codec.parts(documents)
        for i, parts in enumerate(every):
            if not any(part is None for part in parts):
                raise ValueError(f"document {i} has no {HOLE} in its text")
            wanted.append(forms.text_infill(self.layout, parts, max_text))
        texts = [
            forms.texts(tokens, self.layout)
            for tokens in self._run(_each(wanted, candidates), sampler, seed)
        ]
        if candidates > 1:
            rows = []
            for i, spans in enumerate(texts):
                left = iter(self.layout.text_ids(span) for span in spans)
                parts = every[i // candidates]
                body = [next(left) if part is None else part for part in parts]
                eos = [self.layout.eos]
                rows.append(np.concatenate([eos, *body, eos]))
            best = self._likeliest(rows, [1] * len(rows), candidates)
            texts = [texts[i] for i in best]
        return [
            self.codec.filled(document, spans)
            for document, spans in zip(documents, texts, strict=True)
        ]

    def generate(
        self,
        documents: Iterable[Document],
        *,
        images: int = 1,
        max_text: int = 64,
        sampler: Sampler | None = None,
        seed: int = 0,
    ) -> list[Document]:
        """Goes on where each document ends: text and whole pictures, interleaved, until
        the model ends it, or `images` pictures' and `max_text` pieces' worth of tokens.

        What is given stays as it is. A document that ends in `Text` goes on in that
        text.
        """
        sampler = _unguided(sampler, Sampler(top_p=0.9), "free generation")
        if min(images, max_text) < 0 or images == max_text == 0:
            raise ValueError(
                f"images={images} and max_text={max_text} must be at least 0, and not "
                "both 0"
            )
        room = images * (self.codec.image_tokens + 1) + max_text
        limit = self.system.decoder_config.length
        documents = listed(documents, Document, "documents")
        wanted = []
        for i, ids in enumerate(self.codec.ids([unended(d) for d in documents])):
            left = limit - len(ids) - 1
            if left < 1:
                raise ValueError(
                    f"document {i} has {len(ids)} tokens, which fill the context of "
                    f"{limit}: shorten it"
                )
            begun = np.concatenate([[self.layout.eos], ids])
            wanted.append(forms.free(begun, min(room, left)))
        return self.codec.continued(documents, self._run(wanted, sampler, seed))

    def reconstruct(self, images: Iterable[Picture]) -> list[Pillow.Image]:
        """Pictures through the image tokenizer and back: the best any task can do."""
        return self.codec.paint(self.codec.image.encode(self.codec.arrays(images)))

    def log_likelihood(self, documents: Iterable[Document]) -> list[float]:
        """log p(document) in nats, each read as `<eos> document <eos>`."""
        eos = [self.layout.eos]
        rows = [
            np.concatenate([eos, ids, eos])
            for ids in self.codec.ids(listed(documents, Document, "documents"))
        ]
        return self.engine.score(rows)

    def _run(
        self, wanted: Sequence[Prompt], sampler: Sampler, seed: int
    ) -> Iterator[np.ndarray]:
        """What the model writes for each prompt, in order: tokens [T]."""
        return self.engine.write(wanted, sampler, seed, self.codec.image_tokens)


def _unguided(given: Sampler | None, default: Sampler, task: str) -> Sampler:
    """The sampler of a task that has no text to guide by.

    Raises ValueError where a caller asks for guidance; that of the config may be meant
    for the same task with text.
    """
    if given not in (None, default) and given.guidance != 1:
        raise ValueError(
            f"sampler.guidance={given.guidance}: guidance has nothing to guide in "
            f"{task}, where no prompt says what to write; use guidance=1"
        )
    return dataclasses.replace(given or default, guidance=1.0)


def _each(prompts: Sequence[Prompt], times: int) -> list[Prompt]:
    """Every prompt so many times in a row."""
    return [prompt for prompt in prompts for _ in range(times)]
