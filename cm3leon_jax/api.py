"""`CM3Leon`: a trained system as one object with a method for every task.

Notebooks, scripts and evaluations go through it. Pictures come in as PIL images or
uint8 arrays of any mode and size, and go out as PIL images of the tokenizer's size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import jax
import numpy as np
from PIL import Image as Pillow

from cm3leon_jax import encoders, instructed, pretrained
from cm3leon_jax import workdir as workdirs
from cm3leon_jax.codec import HOLE, Codec, load_image_tokenizer, load_text_tokenizer
from cm3leon_jax.context import Retrieve
from cm3leon_jax.data.documents import Document
from cm3leon_jax.inputs import Box, Picture, Region, listed
from cm3leon_jax.models.decoder import Decoder
from cm3leon_jax.parallel.mesh import MeshConfig, make_mesh
from cm3leon_jax.retrieval.recall import Memory
from cm3leon_jax.sampling.engine import Precision
from cm3leon_jax.system import System
from cm3leon_jax.tokenizers.segmentation import SegmentationTokenizer
from cm3leon_jax.training.parts import EVERYTHING, Parts, load_finished
from cm3leon_jax.writer import Common, FillingOptions, Options, TextOptions, Writer


class CM3Leon:
    """A decoder with its tokenizers and samplers, all of one work directory.

    `batch` is at most how many prompts are decoded together (rounded up to what the
    mesh divides). `mesh` is where the decoder lies; None is one device. `memory` is
    where documents are retrieved from, if there is any. `precision` is how weights and
    cache are kept while decoding, None is as they were trained.

    Methods that write take `Common` options too: `retrieve`, `sampler`, `seed`; those
    that draw `Options`: also `candidates`, `rerank`, `return_scores` (they return a
    `Ranked` then); those that write texts `TextOptions`: also `max_text`, `candidates`.
    A text that was cut when it had `max_text` pieces ends in "…". `context.fallbacks`
    counts documents that were to be retrieved and could not be had.

    `tasks` are those that the decoder was tuned on; what needs one of them raises
    ValueError without it. Their `wording` is a number of `Task.wordings` in
    `data/task_templates.py`, where 0 is one that training uses.
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
        tasks: Collection[str] = (),
        precision: Precision | None = None,
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
        self.writer = Writer(
            *(system, decoder, codec, mesh, batch, memory),
            tasks=tasks,
            precision=precision,
        )
        self.engine, self.context = self.writer.engine, self.writer.context

    @classmethod
    def load(
        cls,
        workdir: str | Path,
        checkpoint: str | None = None,
        *,
        mesh: MeshConfig | jax.sharding.Mesh | None = None,
        batch: int = 64,
        bank: str | Path = "bank",
        precision: Precision | None = None,
        decoder: Decoder | None = None,
    ) -> CM3Leon:
        """Reads a work directory. `checkpoint` is a folder of it, or `FOLDER@STEP`:
        None is "sft" once that stage has finished, else "pretrain". `bank` is a folder
        too, of a system with retrieval; it may be any folder. `decoder`, on the mesh,
        is taken for the checkpoint's.

        `mesh` None is that of the config. FileNotFoundError for what is missing there
        (naming the stage to run), ValueError where checkpoint or tokenizers are of
        another system, or where the mesh does not cover the devices.
        """
        workdir = Path(workdir)
        system = System.load(workdir)
        if checkpoint is None:
            tuned = (workdir / "sft" / workdirs.DONE).is_file()
            checkpoint = "sft" if tuned else "pretrain"
        folder, _, step = checkpoint.partition("@")
        if step and not step.isdigit():
            raise ValueError(f"checkpoint={checkpoint!r}: the step is not a number")
        made = isinstance(mesh, jax.sharding.Mesh)
        devices = mesh if made else make_mesh(mesh or system.mesh)
        # What came after pretraining was tuned on the tasks of the section `sft`.
        sft = None if folder == "pretrain" else system.sft
        decoder = decoder or load_finished(
            workdir / folder,
            system.decoder_config,
            EVERYTHING if sft is None else Parts(sft.parts, system.layout),
            ema=sft is not None and sft.ema > 0,
            mesh=devices,
            rules=system.rules,
            step=int(step) if step else None,
            settings=system.checkpoint_settings,
            dtype=None if precision is None else precision.compute,
        )
        tokenizers = load_text_tokenizer(workdir), load_image_tokenizer(workdir)
        codec = Codec(system.layout, *tokenizers, _masks(system))
        memory = None
        if system.retrieval is not None:
            memory = Memory.load(
                workdir / bank,
                encoders.load(system.retrieval.encoder, workdir),
                skip_above=system.retrieval.skip_above,
                mesh=devices,
            )
        return cls(
            *(system, decoder, codec),
            mesh=devices,
            batch=batch,
            memory=memory,
            tasks=() if sft is None else sft.trained(workdir / folder),
            precision=precision,
        )

    @property
    def memory(self) -> Memory | None:
        """Where documents are retrieved from; another may take its place."""
        return self.context.memory

    @memory.setter
    def memory(self, memory: Memory | None) -> None:
        self.context.memory = memory

    def contrast(self, amateur: CM3Leon | None) -> None:
        """From now on samplers with `contrastive` contrast with another, smaller system
        of the same tokens; None: with this one, which does not see the text."""
        self.writer.contrast(None if amateur is None else amateur.writer)

    def retrieve(
        self, text: str | None = None, image: Picture | None = None, k: int = 2
    ) -> list[Document]:
        """The `k` documents of the memory that are nearest to a text, a picture or
        both, best first; fewer where the memory has no more. ValueError for a `k`
        that is no whole number of at least 1."""
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise ValueError(f"k={k!r} must be a whole number of at least 1")
        if text is not None and not isinstance(text, str):
            raise ValueError(
                f"text is {type(text).__name__}, not one text: call retrieve for each"
            )
        array = None if image is None else self.codec.arrays([image])[0]
        return self.context.documents(k, [text], [array])[0]

    def text_to_image(
        self, prompts: Iterable[str], **options: Unpack[Options]
    ) -> list[Pillow.Image]:
        """One picture for every prompt."""
        return pretrained.text_to_image(self.writer, prompts, **options)

    def caption(
        self,
        images: Iterable[Picture],
        *,
        style: str = "short",
        wording: int = 0,
        **options: Unpack[TextOptions],
    ) -> list[str]:
        """A caption of every picture: "short" (usually at most 64 pieces; every
        checkpoint can), "detailed" (128) or "long" (256)."""
        tuned = "caption_short" in self.writer.tasks
        if style == "short" and wording == 0 and not tuned:
            return pretrained.caption(self.writer, images, **options)
        return instructed.caption(self.writer, images, style, wording, **options)

    def answer(
        self,
        images: Iterable[Picture],
        questions: Iterable[str],
        *,
        wording: int = 0,
        **options: Unpack[TextOptions],
    ) -> list[str]:
        """The answer to a question about each picture."""
        return instructed.answer(self.writer, images, questions, wording, **options)

    def science(
        self,
        images: Iterable[Picture],
        questions: Iterable[str],
        choices: Iterable[Sequence[str]],
        *,
        contexts: Iterable[str] | None = None,
        **options: Unpack[TextOptions],
    ) -> list[str]:
        """Which of the choices answers a question about each picture: "(A)", "(B)", …
        `contexts` say what else is known."""
        return instructed.science(
            self.writer, images, questions, choices, contexts, **options
        )

    def explain(
        self,
        images: Iterable[Picture],
        questions: Iterable[str],
        choices: Iterable[Sequence[str]],
        *,
        contexts: Iterable[str] | None = None,
        **options: Unpack[TextOptions],
    ) -> list[tuple[str, str]]:
        """As `science`, thought out first: (explanation, choice), the choice empty
        where the explanation came to no end."""
        return instructed.explain(
            self.writer, images, questions, choices, contexts, **options
        )

    def infill(
        self,
        images_or_documents: Iterable[Picture] | Iterable[Document],
        masks: Iterable[Region] | None = None,
        prompts: Iterable[str] | None = None,
        **options: Unpack[FillingOptions],
    ) -> list[Pillow.Image] | list[Document]:
        """Writes what is missing.

        Pictures need `masks`: bool [Y, X] in the picture's own pixels (upright, if it
        has an EXIF orientation), True = regenerate, or boxes (x0, y0, x1, y1); every
        code cell that is touched is painted anew, the others are copied. `prompts`
        describe the whole pictures; without them there is no guidance. Returns PIL
        images.

        Documents have `<mask>` in their text, usually for at most 32 pieces each;
        returns the documents with all holes filled, those that were cut by number in
        `metadata["unfinished"]`. Of several `candidates` it is the document that is the
        likeliest as a whole.
        """
        items = listed(images_or_documents, None, "images_or_documents")
        if not any(isinstance(item, Document) for item in items):
            return pretrained.infill_pictures(
                self.writer, items, masks, prompts, **options
            )
        if masks is not None or prompts is not None:
            raise ValueError(
                f"masks and prompts are for pictures: a document has {HOLE} in its text"
            )
        documents = listed(items, Document, "images_or_documents")
        return pretrained.infill_documents(self.writer, documents, **options)

    def edit(
        self,
        images: Iterable[Picture],
        instructions: Iterable[str],
        *,
        regions: Iterable[Region] | None = None,
        wording: int = 0,
        **options: Unpack[Options],
    ) -> list[Pillow.Image]:
        """Every picture, changed as it is said.

        Within `regions`, if there are any: one for each, a box (x0, y0, x1, y1) or a
        mask (bool [Y, X]) in the picture's own pixels; all code cells outside it are
        copied. Guidance of two scales is (text, picture), by default (7.5, 1.5) as in
        paper section 1.12; of one, it weighs both together.
        """
        return instructed.edit(
            self.writer, images, instructions, regions, wording, **options
        )

    def control(
        self,
        images: Iterable[Picture],
        kind: str,
        prompts: Iterable[str] | None = None,
        *,
        strength: float = 1.0,
        wording: int = 0,
        **options: Unpack[Options],
    ) -> list[Pillow.Image]:
        """A picture for every control picture, and prompt if there are any.

        `kind` is what the control pictures are. Aligned with what is to be drawn:
        "edge", "scribble" (white on black), "segmentation" (in the palette of
        `data/controls.py`, or labels [Y, X] as `segment` gives them), "depth", "hed",
        "pose", "normal". Or pictures of which the "style", "composition" or "content"
        is taken, as much as `strength` in (0, 1] says: by thirds.
        """
        return instructed.control(
            self.writer, images, kind, prompts, strength, wording, **options
        )

    def ground(
        self,
        prompts: Iterable[str],
        boxes: Iterable[Sequence[tuple[str, Box]]],
        *,
        wording: int = 0,
        **options: Unpack[Options],
    ) -> list[Pillow.Image]:
        """A picture for every prompt with things in their places: for each prompt a
        list of (phrase, (x0, y0, x1, y1)) in pixels of the picture that is made."""
        return instructed.ground(self.writer, prompts, boxes, wording, **options)

    def write(
        self, contents: Iterable[str], *, wording: int = 0, **options: Unpack[Options]
    ) -> list[Pillow.Image]:
        """A picture of every text, spelt out."""
        return instructed.write(self.writer, contents, wording, **options)

    def variation(
        self, images: Iterable[Picture], *, wording: int = 0, **options: Unpack[Options]
    ) -> list[Pillow.Image]:
        """Another picture of the same, for every picture."""
        return instructed.variation(self.writer, images, wording, **options)

    def segment(
        self, images: Iterable[Picture], *, wording: int = 0, **options: Unpack[Common]
    ) -> list[np.ndarray]:
        """Every picture's labels, int32 [Y, X] of its centred square in the tokenizer's
        size; `classes` are their names."""
        return instructed.segment(self.writer, images, wording, **options)

    def instruct(
        self,
        task: str,
        fields: Iterable[Mapping[str, Any]],
        *,
        wording: int = 0,
        **options: Unpack[Options],
    ) -> list[str] | list[Pillow.Image] | list[np.ndarray]:
        """Any task of `data/task_templates.py`, new ones too: the fields of each prompt
        by name, but for what is to be written. Texts, pictures or labels come back."""
        return instructed.instruct(self.writer, task, fields, wording, **options)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels of `segment`: label 0 is the background."""
        masks = self.codec.masks
        return () if masks is None else masks.classes

    def generate(
        self,
        documents: Iterable[Document],
        *,
        images: int = 1,
        max_text: int = 64,
        **options: Unpack[Common],
    ) -> list[Document]:
        """Goes on where each document ends: text and whole pictures, interleaved, until
        the model ends it, or `images` pictures' and `max_text` pieces' worth of tokens
        (room, not counts: a picture may take that of text).

        What is given stays as it is. A document that ends in `Text` goes on in that
        text.
        """
        return pretrained.generate(self.writer, documents, images, max_text, **options)

    def reconstruct(self, images: Iterable[Picture]) -> list[Pillow.Image]:
        """Pictures through the image tokenizer and back: the best any task can do."""
        return self.codec.paint(self.codec.image.encode(self.codec.arrays(images)))

    def log_likelihood(
        self, documents: Iterable[Document], *, retrieve: Retrieve = 0
    ) -> list[float]:
        """log p(document) in nats, each read as `<eos> document <eos>`, given the
        documents retrieved for it, if any."""
        return pretrained.log_likelihood(self.writer, documents, retrieve)


def _masks(system: System) -> SegmentationTokenizer | None:
    """The grid of classes of a system whose vocabulary has any."""
    if system.sft is None:
        return None
    names = system.sft.class_names(system.data.source)
    if not 2 <= len(names) <= system.vocabulary.classes:
        return None
    side = system.sft.class_grid * system.image_tokenizer.model.grid
    return SegmentationTokenizer(side, names)
