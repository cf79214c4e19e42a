"""What every checkpoint can do: the tasks that pretraining teaches (paper 1.6, 1.7).

Methods of `CM3Leon` with the same names say what these do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Unpack

import numpy as np
from PIL import Image as Pillow

from cm3leon_jax import conversation
from cm3leon_jax.codec import HOLE, holed, unended
from cm3leon_jax.context import Retrieve
from cm3leon_jax.data.documents import Document
from cm3leon_jax.inputs import Picture, Region, as_many, listed
from cm3leon_jax.sampling import prompts as forms
from cm3leon_jax.sampling.prompts import Prompt
from cm3leon_jax.sampling.rerank import Ranked
from cm3leon_jax.sampling.sampler import Sampler
from cm3leon_jax.writer import (
    SHORT,
    Drawing,
    Options,
    Samplers,
    Telling,
    TextOptions,
    Writer,
)

CUT = "…"  # after a text that has as many pieces as it may: it goes on
_CAPTION = 64  # pieces that a caption usually needs
_HOLE_TEXT = 32  # pieces that the hole of a document usually needs


def mapped(read: Callable[..., Any], found: Sequence[Any], *more: Any) -> list[Any]:
    """`read` of all that `Writer.tell` found, of every candidate of a `Ranked`; `more`
    has what else it is given of each."""
    return [
        dataclasses.replace(x, outputs=tuple(read(y, *rest) for y in x.outputs))
        if isinstance(x, Ranked)
        else read(x, *rest)
        for x, *rest in zip(found, *more, strict=True)
    ]


def text_to_image(
    writer: Writer, prompts: Iterable[str], **options: Unpack[Options]
) -> list[Pillow.Image]:
    codec, texts = writer.codec, listed(prompts, str, "prompts")
    if conversation.speaks(writer):
        rerank = options.get("rerank")
        if rerank is not None and rerank.likelihood > 0:
            conversation.refuse(writer, "captions in the form of rerank.likelihood")
        wanted = conversation.drawings(writer, texts)
    else:
        wanted = [
            Drawing(
                prompt=forms.text_to_image(
                    *(writer.layout, codec.pieces(text, i), codec.image_tokens),
                    guided=True,
                ),
                text=text,
                describes=True,
            )
            for i, text in enumerate(texts)
        ]
    default = writer.system.sampling.text_to_image
    return writer.draw(wanted, default, "text to image", **options)


def caption(
    writer: Writer, images: Iterable[Picture], **options: Unpack[TextOptions]
) -> list[str]:
    arrays = writer.codec.arrays(images)
    if conversation.speaks(writer):
        return _told(writer, arrays, **options)
    brk = np.array([writer.layout.brk], np.int32)
    wanted = [
        Telling(parts=[None, brk, writer.layout.image_ids(codes).ravel()], image=array)
        for codes, array in zip(writer.codec.image.encode(arrays), arrays, strict=True)
    ]
    default = writer.system.sampling.caption
    texts, longest = writer.tell(wanted, default, "a caption", _CAPTION, **options)
    return mapped(
        lambda spans: (
            writer.codec.decode_text(spans[0]) + CUT * (len(spans[0]) >= longest)
        ),
        texts,
    )


def _told(
    writer: Writer,
    arrays: np.ndarray,
    *,
    sampler: Samplers = None,
    seed: int = 0,
    max_text: int | None = None,
    candidates: int | None = None,
    retrieve: Retrieve = 0,
    return_scores: bool = False,
    numbers: Sequence[int] | None = None,
) -> list[str]:
    """Captions by a system that holds conversations."""
    if retrieve != 0 or candidates not in (None, 1) or return_scores:
        conversation.refuse(writer, "retrieve or candidates of captions")
    default = writer.system.sampling.caption
    longest = _CAPTION if max_text is None else max_text
    if longest < 1:
        raise ValueError(f"max_text={max_text} must be at least 1")
    samplers = writer.samplers(sampler, default, 1, "a caption")
    texts = conversation.captions(writer, arrays, samplers, longest, seed, numbers)
    return [
        writer.codec.decode_text(pieces) + CUT * (len(pieces) >= longest)
        for pieces in texts
    ]


def infill_pictures(
    writer: Writer,
    images: Sequence[Picture],
    masks: Iterable[Region] | None,
    prompts: Iterable[str] | None,
    **options: Unpack[Options],
) -> list[Pillow.Image]:
    conversation.refuse(writer, "to fill in")
    codec, count = writer.codec, len(images)
    masks = as_many([] if masks is None else masks, count, "masks", "pictures")
    texts: list[str | None] = [None] * count
    if prompts is not None:
        texts = [*listed(prompts, str, "prompts")]
        if len(texts) != count:
            raise ValueError(f"{count} pictures need as many prompts, or none")
    pieces = [None if t is None else codec.pieces(t, i) for i, t in enumerate(texts)]
    arrays, cells = zip(*map(codec.hidden, images, masks, range(count)), strict=True)
    wanted = [
        Drawing(
            prompt=forms.region_infill(
                writer.layout, *picture, guided=prompts is not None
            ),
            text=text,
            describes=text is not None,
            image=array,  # without what is hidden
            given=picture[:2],
        )
        for text, array, picture in zip(
            texts,
            arrays,
            zip(codec.image.encode(np.stack(arrays)), cells, pieces, strict=True),
            strict=True,
        )
    ]
    task = "infilling without prompts" if prompts is None else "infilling"
    return writer.draw(wanted, writer.system.sampling.infill, task, **options)


def infill_documents(
    writer: Writer, documents: Sequence[Document], **options: Unpack[TextOptions]
) -> list[Document]:
    conversation.refuse(writer, "to fill in")
    parts = writer.codec.parts([holed(document) for document in documents])
    for i, runs in enumerate(parts):
        if not any(run is None for run in runs):
            raise ValueError(f"document {i} has no {HOLE} in its text")
    queries = writer.context.queries(options.get("retrieve", 0), documents)
    wanted = [
        Telling(parts=runs, text=query.text, image=query.image)
        for runs, query in zip(parts, queries, strict=True)
    ]
    default = writer.system.sampling.caption  # a sampler for text
    texts, longest = writer.tell(
        wanted, default, "infilling of text", _HOLE_TEXT, **options
    )
    return mapped(
        lambda spans, document: _with_cuts(
            writer.codec.filled(document, spans),
            [n for n, span in enumerate(spans) if len(span) >= longest],
        ),
        texts,
        documents,
    )


def _with_cuts(document: Document, holes: list[int]) -> Document:
    """A document that says which of its holes were cut at the longest allowed text."""
    if not holes:
        return document
    return dataclasses.replace(
        document, metadata=document.metadata | {"unfinished": holes}
    )


def generate(
    writer: Writer,
    documents: Iterable[Document],
    images: int,
    max_text: int,
    *,
    retrieve: Retrieve = 0,
    sampler: Samplers = None,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
) -> list[Document]:
    samplers = writer.samplers(sampler, Sampler(top_p=0.9), 2, "free generation")
    if min(images, max_text) < 0 or images == max_text == 0:
        raise ValueError(
            f"images={images} and max_text={max_text} must be at least 0, and not "
            "both 0"
        )
    documents = listed(documents, Document, "documents")
    if conversation.speaks(writer):
        if not isinstance(retrieve, int) or retrieve != 0:
            conversation.refuse(writer, "to go on after retrieved documents")
        return conversation.generate(
            writer, documents, images, max_text, sampler, seed, numbers
        )
    rows = writer.context.rows_like(retrieve, documents)
    room = images * (writer.codec.image_tokens + 1)
    wanted = []
    for i, ids in enumerate(writer.codec.ids([unended(d) for d in documents])):
        left = writer.limit - len(ids) - 1
        if left < 1:
            raise ValueError(
                f"document {i} has {len(ids)} tokens, which fill the context of "
                f"{writer.limit}: shorten it"
            )
        # Texts get shorter before documents are dropped, but not too short.
        together = left - sum(len(row) + 1 for row in rows[i])
        length = min(room + max_text, max(together, min(room + SHORT, left)))
        begun = np.concatenate([[writer.layout.eos], ids])
        free = forms.free(begun, length)
        (whole,), nothing = free.streams, free.streams[0][:1]
        both = Prompt((whole, nothing), free.scripts * 2)
        wanted.append(forms.keep(both, max(map(writer.streams, samplers))))
    wanted = writer.context.before(wanted, rows)
    written = writer.tokens(wanted, samplers, seed, numbers=numbers)
    return writer.codec.continued(documents, written)


def log_likelihood(
    writer: Writer, documents: Iterable[Document], retrieve: Retrieve = 0
) -> list[float]:
    documents = listed(documents, Document, "documents")
    eos, nothing = [writer.layout.eos], (np.zeros(0, np.int32),)
    if conversation.speaks(writer):
        read = conversation.likelihood_rows(writer, documents)
    else:
        read = [np.concatenate([eos, i, eos]) for i in writer.codec.ids(documents)]
    alone = [Prompt((ids.astype(np.int32),), nothing) for ids in read]
    rows = writer.context.rows_like(retrieve, documents)
    whole = writer.context.before(alone, rows)
    starts = [
        len(after.streams[0]) - len(before.streams[0]) + 1
        for before, after in zip(alone, whole, strict=True)
    ]
    return writer.engine.score([prompt.streams[0] for prompt in whole], starts)
