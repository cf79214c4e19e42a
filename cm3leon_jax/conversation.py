"""Tasks of systems converted from Chameleon or Anole, as those were trained to do them.

    <s> text <turn> <racm3:break>                     IMAGE × N <eoss>
    <s> <racm3:break> image <eoss> question <turn>    SAY, or TALK

A document is one turn, the model answers with the next: text, and pictures between
`<racm3:break>` and `<eoss>`. A picture is guided by three streams (paper section 2.7):
the full one, one with its pictures alone, and an empty one. Once such a system is tuned
here (`sft`) it does its tasks in the forms of its training, as any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from cm3leon_jax.codec import HOLE
from cm3leon_jax.data.documents import Document, Image, Segment, Text
from cm3leon_jax.judge import Drawing
from cm3leon_jax.sampling import prompts as forms
from cm3leon_jax.sampling.prompts import IMAGE, SAY, TALK, Prompt
from cm3leon_jax.sampling.sampler import Sampler
from cm3leon_jax.vocab import Layout
from cm3leon_jax.writer import Samplers, Writer

QUESTION = "Describe the image."


def speaks(writer: Writer) -> bool:
    """Whether a system is one of these, and not tuned here."""
    return writer.layout.turn is not None and not writer.tasks


def drawings(writer: Writer, prompts: Sequence[str]) -> list[Drawing]:
    """A picture for every prompt."""
    made = []
    for i, text in enumerate(prompts):
        pieces = writer.layout.text_ids(writer.codec.pieces(text, i))
        asked = _turn(writer.layout, [pieces])
        drawn = picture_prompt(writer.layout, asked, writer.codec.image_tokens)
        made.append(Drawing(prompt=drawn, text=text, describes=True))
    return made


def picture_prompt(layout: Layout, before: np.ndarray, image_tokens: int) -> Prompt:
    """What stands before a picture -> its codes, in three streams."""
    empty = _start(layout)
    kept = np.append(empty, (layout.brk, layout.eoss))
    shown = before[np.isin(before, kept) | forms.inside(before, layout.image)]
    streams = (np.append(ids, layout.brk) for ids in (before, shown, empty))
    script = np.full(image_tokens, IMAGE, np.int32)
    return Prompt(tuple(x.astype(np.int32) for x in streams), (script,) * 3)


def captions(
    writer: Writer,
    arrays: np.ndarray,
    samplers: Sequence[Sampler],
    longest: int,
    seed: int,
    numbers: Sequence[int] | None = None,
) -> list[np.ndarray]:
    """The text pieces that describe square pictures, at most `longest` of each."""
    question = writer.layout.text_ids(writer.codec.text.encode(QUESTION))
    pictures = [
        _picture(writer.layout, writer.layout.image_ids(codes))
        for codes in writer.codec.image.encode(arrays)
    ]
    wanted = [_talk(_turn(writer.layout, [p, question]), longest, 0) for p in pictures]
    return [
        forms.first_text(tokens, writer.layout)
        for tokens in writer.tokens(wanted, samplers, seed, numbers=numbers)
    ]


def generate(
    writer: Writer,
    documents: Sequence[Document],
    images: int,
    max_text: int,
    sampler: Samplers,
    seed: int,
    numbers: Sequence[int] | None = None,
) -> list[Document]:
    """Each document and the answer to it: text until the model begins a picture, the
    whole picture, text again, until it ends or `images` and `max_text` are used up.

    The sampler of text to image draws pictures, guided by all that stands before them.
    """
    layout, count = writer.layout, writer.codec.image_tokens
    talk = writer.samplers(sampler, Sampler(top_p=0.9), 1, "free generation")
    paint = [writer.system.sampling.text_to_image]
    streams = max(map(writer.streams, paint))
    begun = [_turn(layout, parts) for parts in _parts(writer, documents)]
    ids, words, left = list(begun), [max_text] * len(begun), [images] * len(begun)

    def room(i: int) -> int:
        return min(words[i], writer.limit - len(ids[i]))

    def talk_of(i: int) -> Prompt:
        drawable = writer.limit - len(ids[i]) - count - 1 if left[i] else 0
        return _talk(ids[i], room(i), drawable)

    for i, given in enumerate(ids):
        if len(given) >= writer.limit:
            raise ValueError(
                f"document {i} has {len(given)} tokens, which fill the context of "
                f"{writer.limit}: shorten it"
            )
    going, round_seed = list(range(len(ids))), seed
    own = going if numbers is None else list(numbers)

    def write(wanted: list[Prompt], by: Sequence[Sampler]) -> list[np.ndarray]:
        if not wanted:
            return []
        noise = [own[i] for i in going]  # whatever else goes on
        return list(writer.tokens(wanted, by, round_seed, numbers=noise))

    while going:
        round_seed += 1
        if max_text:  # else pictures alone are asked for
            going = [i for i in going if room(i) > 0]
            said = write([talk_of(i) for i in going], talk)
            for i, tokens in zip(going, said, strict=True):
                pieces = tokens[forms.inside(tokens, layout.text)]
                ids[i] = np.append(ids[i], pieces)
                words[i] -= len(pieces)
            going = [
                i for i, tokens in zip(going, said, strict=True) if layout.brk in tokens
            ]
        going = [
            i for i in going if left[i] and len(ids[i]) + count + 2 <= writer.limit
        ]
        prompts = [picture_prompt(layout, ids[i], count) for i in going]
        prompts = [forms.keep(prompt, streams) for prompt in prompts]
        drawn = write(prompts, paint)
        for i, tokens in zip(going, drawn, strict=True):
            picture = tokens[forms.inside(tokens, layout.image)]
            ids[i] = np.concatenate([ids[i], [layout.brk], picture, [layout.eoss]])
            left[i] -= 1
    written = [after[len(b) :] for after, b in zip(ids, begun, strict=True)]
    # The answer is a segment of its own, not the end of the question.
    asked = [Document((*d.segments, Text("")), d.id, d.metadata) for d in documents]
    answered = writer.codec.continued(asked, [np.asarray(w, np.int32) for w in written])
    return [Document(_whole(d.segments), d.id, d.metadata) for d in answered]


def likelihood_rows(writer: Writer, documents: Sequence[Document]) -> list[np.ndarray]:
    """Documents as they stood in training: `<s> … </s>`."""
    layout = writer.layout
    ends = np.array([layout.eos], np.int32)
    return [
        np.concatenate([_start(layout), *parts, ends])
        for parts in _parts(writer, documents)
    ]


def refuse(writer: Writer, what: str) -> None:
    """ValueError for what Chameleon was not trained on."""
    if speaks(writer):
        raise ValueError(
            f"{writer.system.name} was converted from Chameleon, which has not learnt "
            f"{what}: tune it on that task first (section sft)"
        )


def _whole(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    return tuple(s for s in segments if not (isinstance(s, Text) and not s.text))


def _parts(writer: Writer, documents: Sequence[Document]) -> list[list[np.ndarray]]:
    """The segments of documents as ids, pictures between their own two."""
    made = []
    for i, document in enumerate(documents):
        parts = []
        for segment in document.segments:
            if isinstance(segment, Image):
                if segment.codes is None:
                    (ids,) = writer.codec.ids([Document((segment,))])
                else:
                    ids = writer.layout.image_ids(segment.codes)
                parts.append(_picture(writer.layout, ids))
            elif isinstance(segment, Text) and HOLE not in segment.text:
                pieces = writer.codec.text.encode(segment.text)
                parts.append(writer.layout.text_ids(pieces))
            else:
                raise ValueError(f"document {i} has a hole or a mask: tune first (sft)")
        made.append(parts)
    return made


def _start(layout: Layout) -> np.ndarray:
    return np.array([layout.bos], np.int32)


def _picture(layout: Layout, ids: np.ndarray) -> np.ndarray:
    return np.concatenate([[layout.brk], ids.ravel(), [layout.eoss]]).astype(np.int32)


def _turn(layout: Layout, parts: Sequence[np.ndarray]) -> np.ndarray:
    ends = np.array([layout.turn], np.int32)
    return np.concatenate([_start(layout), *parts, ends])


def _talk(before: np.ndarray, longest: int, drawable: int) -> Prompt:
    """What stands before a text of at most `longest` pieces, so many of whose first
    places may begin a picture instead."""
    script = np.where(np.arange(longest) < drawable, TALK, SAY).astype(np.int32)
    return Prompt((before.astype(np.int32),), (script,))
