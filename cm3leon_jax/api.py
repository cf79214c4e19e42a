"""`CM3Leon`: a trained system as one object with a method for every task.

Notebooks, scripts and evaluations go through it. Pictures come in as PIL images or
uint8 arrays of any mode and size, and go out as PIL images of the tokenizer's size.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Unpack

import jax
from PIL import Image as Pillow

from cm3leon_jax import encoders, pretrained
from cm3leon_jax.codec import HOLE, Codec, load_image_tokenizer, load_text_tokenizer
from cm3leon_jax.context import Retrieve
from cm3leon_jax.data.documents import Document
from cm3leon_jax.inputs import Picture, Region, listed
from cm3leon_jax.models.decoder import Decoder, abstract
from cm3leon_jax.parallel.mesh import MeshConfig, make_mesh
from cm3leon_jax.parallel.rules import shardings
from cm3leon_jax.retrieval.recall import Memory
from cm3leon_jax.system import System
from cm3leon_jax.training import checkpoint as checkpoints
from cm3leon_jax.writer import Options, TextOptions, Writer


class CM3Leon:
    """A decoder with its tokenizers and samplers, all of one work directory.

    `batch` is at most how many prompts are decoded together (rounded up to what the
    mesh divides). `mesh` is where the decoder lies; None is one device. `memory` is
    where documents are retrieved from, if there is any.

    Methods that write take `Options` too: `retrieve`, `sampler`, `seed`; those that
    write texts `TextOptions`: also `max_text`, `candidates`. A text that was cut when
    it had `max_text` pieces ends in "…". `context.fallbacks` counts documents that were
    to be retrieved and could not be had.
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
        self.writer = Writer(
            system, decoder, codec, mesh=mesh, batch=batch, memory=memory
        )
        self.context = self.writer.context

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
        self, prompts: Iterable[str], **options: Unpack[Options]
    ) -> list[Pillow.Image]:
        """One picture for every prompt."""
        return pretrained.text_to_image(self.writer, prompts, **options)

    def caption(
        self, images: Iterable[Picture], **options: Unpack[TextOptions]
    ) -> list[str]:
        """A caption of every picture, usually of at most 64 pieces."""
        return pretrained.caption(self.writer, images, **options)

    def infill(
        self,
        images_or_documents: Iterable[Picture] | Iterable[Document],
        masks: Iterable[Region] | None = None,
        prompts: Iterable[str] | None = None,
        **options: Unpack[TextOptions],
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

    def generate(
        self,
        documents: Iterable[Document],
        *,
        images: int = 1,
        max_text: int = 64,
        **options: Unpack[Options],
    ) -> list[Document]:
        """Goes on where each document ends: text and whole pictures, interleaved, until
        the model ends it, or `images` pictures' and `max_text` pieces' worth of tokens.

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
