"""Prompts and scripts in plain numpy: what the model reads, what it then has to write.

A script says for every position after the prompt what may stand there:

    id >= 0   this token, forced; <pad> forces nothing and is not read
    IMAGE     an image code
    TEXT      a text piece, or <eoss>: the rest of the run stays <pad>. The last
              position of a run is <eoss> at the latest, so that every span is closed
    FREE      text, <break>, whole images, <eos>: the rest of the run stays <pad>
    TALK      a text piece, or <break> or <eos>: the rest of the run stays <pad>
    SAY       as TALK, and of the same run, but no <break>
    CLASS     a class of a segmentation map, of those that the caller allows

The forms are those of training samples (paper sections 1.6, 1.7), for example

    text to image   <eos> text <break>                            IMAGE × N
    caption         <eos> <s0> <break> image <s0>                 TEXT × (max + 1)
    region          <eos> text <break> i0 <s0> i3 <s0>            IMAGE × 2  <eoss>
    edit            <eos> task <break> image <break> text <break> IMAGE × N

A guided prompt has a second stream in which the text is hidden, `<eos> <s0> <break>`;
an instruction about a picture has one between the two, in which only what the caller
said is hidden: `<eos> task <break> image <break> <s0> <break>` (paper 1.12; there it is
left out, but in training a hidden text leaves its sentinel). That of a prompt for text
has the codes of a grey picture in the place of every picture. All streams are given the
same sampled tokens. Retrieved documents stand before all of
these, in every stream: `<eos> (document <break>)×R text <break>`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from cm3leon_jax.tokenizers import regions
from cm3leon_jax.vocab import Layout

IMAGE, TEXT, FREE, CLASS, TALK, SAY = -1, -2, -3, -4, -5, -6


@dataclass(frozen=True, eq=False)
class Prompt:
    """One request: per guidance stream a prompt (any lengths) and a script (one length,
    the same sampled positions). Ids are int32."""

    streams: tuple[np.ndarray, ...]
    scripts: tuple[np.ndarray, ...]


@dataclass(frozen=True, eq=False)
class Batch:
    """B prompts of G streams as arrays, padded on the right by <pad>.

    Per stream `prefix_UL` is the prompts but for their last tokens, `length_U` and
    `last_U`. U is B, or 1 for a stream after the first that is the same in all prompts:
    it is read once for all of them. Each L, and T of `script_GBT`, is rounded up
    (`coarse`) so that few shapes are ever compiled.
    """

    prefix_UL: tuple[np.ndarray, ...]
    length_U: tuple[np.ndarray, ...]
    last_U: tuple[np.ndarray, ...]
    script_GBT: np.ndarray

    def take(self, rows_B: np.ndarray) -> Batch:
        """The prompts of these rows; one may come several times."""

        def part(arrays: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
            return tuple(a if len(a) == 1 else a[rows_B] for a in arrays)

        return Batch(
            part(self.prefix_UL),
            part(self.length_U),
            part(self.last_U),
            self.script_GBT[:, rows_B],
        )


def text_to_image(
    layout: Layout, pieces: Sequence[int], image_tokens: int, *, guided: bool = False
) -> Prompt:
    """Text pieces -> `image_tokens` image codes in raster order."""
    streams = [_ids(layout.eos, layout.text_ids(pieces), layout.brk)]
    if guided:
        streams.append(_ids(layout.eos, layout.sentinels[0], layout.brk))
    script = np.full(image_tokens, IMAGE, np.int32)
    return Prompt(tuple(streams), (script,) * len(streams))


def caption(layout: Layout, codes: np.ndarray, max_text: int) -> Prompt:
    """The codes of a picture (any shape, raster order) -> at most `max_text` pieces."""
    image_ids = layout.image_ids(codes).reshape(-1)
    return text_infill(layout, (None, [layout.brk], image_ids), max_text)


def text_infill(
    layout: Layout, parts: Sequence[Sequence[int] | np.ndarray | None], max_text: int
) -> Prompt:
    """A document with holes -> at most `max_text` pieces for each hole, in order.

    `parts` are runs of ids (text pieces as ids, `<break>`, image ids) with None for
    each hole. Raises ValueError without a hole or with more holes than sentinels.
    """
    if max_text < 1:
        raise ValueError(f"max_text={max_text} must be at least 1")
    holes = sum(part is None for part in parts)
    if holes == 0:
        raise ValueError("nothing to fill in: the document has no hole")
    sentinels = iter(_sentinels(layout, holes))
    body = [next(sentinels) if part is None else part for part in parts]
    run = np.full(max_text + 1, TEXT, np.int32)
    script = [run]
    for sentinel in _sentinels(layout, holes)[1:]:
        script += [sentinel, run]
    prompt = _ids(layout.eos, *body, layout.sentinels[0])
    return Prompt((prompt,), (_ids(*script),))


def blinded(prompt: Prompt, codes: np.ndarray, layout: Layout) -> Prompt:
    """A prompt for text with a second stream in which nothing is to be seen: `codes`,
    those of a grey picture, stand in the place of every picture's."""
    (ids,) = prompt.streams
    unseen = np.array(ids)
    places = np.flatnonzero(inside(ids, layout.image))
    unseen[places] = np.resize(layout.image_ids(codes), len(places))
    return Prompt((ids, unseen), prompt.scripts * 2)


def region_infill(
    layout: Layout,
    codes_YX: np.ndarray,
    cells_YX: np.ndarray,
    pieces: Sequence[int] | None = None,
    *,
    guided: bool = False,
) -> Prompt:
    """A picture with hidden cells -> the codes of those cells.

    `codes_YX` must be the codes of the *blanked* picture (design 2.13), `cells_YX` is
    bool, True = hidden: each horizontal run is a span. `pieces` describe the picture;
    None hides the text too. `guided` adds the stream with hidden text, whose sentinels
    count the text first. Raises ValueError for an empty region, for more runs than
    sentinels, or for guidance without text.
    """
    if cells_YX.shape != codes_YX.shape or cells_YX.dtype != np.bool_:
        raise ValueError(
            f"cells are bool {list(codes_YX.shape)} like the codes, got "
            f"{cells_YX.dtype} {list(cells_YX.shape)}"
        )
    spans = regions.runs(cells_YX)
    if len(spans) == 0:
        raise ValueError("nothing to fill in: the mask hides no cell")
    if guided and pieces is None:
        raise ValueError("guidance needs a text that one of the two streams hides")
    image_L = layout.image_ids(codes_YX).reshape(-1)
    streams, scripts = [], []
    for text in (pieces, None) if guided else (pieces,):
        hidden = _sentinels(layout, len(spans) + (text is None))
        shown = hidden[:1] if text is None else layout.text_ids(text)
        body, script, seen = [], [], 0
        for sentinel, (start, stop) in zip(hidden[-len(spans) :], spans, strict=True):
            body += [image_L[seen:start], sentinel]
            script += [sentinel, np.full(stop - start, IMAGE, np.int32), layout.eoss]
            seen = stop
        streams.append(_ids(layout.eos, shown, layout.brk, *body, image_L[seen:]))
        scripts.append(_ids(*script))
    return Prompt(tuple(streams), tuple(scripts))


def instruction(
    layout: Layout,
    segments: Sequence[np.ndarray | None],
    said: Collection[int],
    script: np.ndarray,
) -> Prompt:
    """Segments (ids) of an instruction -> the segment after them, as `script` says.

    A segment of None is hidden. The streams are the full prompt, that without what the
    caller `said` (numbers of segments), if others tell something too, and an empty one.
    """
    streams = [_hiding(layout, segments, ())]
    if said and len(said) + 1 < len(segments):
        streams.append(_hiding(layout, segments, said))
    streams.append(_ids(layout.eos, layout.sentinels[0], layout.brk))
    return Prompt(tuple(streams), (script,) * len(streams))


def _hiding(
    layout: Layout, segments: Sequence[np.ndarray | None], hidden: Collection[int]
) -> np.ndarray:
    seen = [None if n in hidden else ids for n, ids in enumerate(segments)]
    sentinels = iter(_sentinels(layout, sum(ids is None for ids in seen)))
    shown = (next(sentinels) if ids is None else ids for ids in seen)
    return _ids(layout.eos, *(part for ids in shown for part in (ids, layout.brk)))


def last_text(
    layout: Layout, parts: Sequence[Sequence[int] | np.ndarray], max_text: int
) -> Prompt:
    """A document that ends in the middle of a text -> at most `max_text` pieces more.

    They end at <eos>. `first_text` reads what was written.
    """
    if max_text < 1:
        raise ValueError(f"max_text={max_text} must be at least 1")
    return free(_ids(layout.eos, *parts), max_text + 1)


def first_text(tokens_T: np.ndarray, layout: Layout) -> np.ndarray:
    """The text pieces that stand before anything else."""
    ends = np.append(np.flatnonzero(~inside(tokens_T, layout.text)), len(tokens_T))
    return layout.pieces(tokens_T[: ends[0]])


def after(
    prompt: Prompt, documents: Sequence[np.ndarray], layout: Layout, limit: int
) -> tuple[Prompt, int]:
    """A prompt after retrieved documents (their ids), and how many of them it has.

    The last ones are left out, whole, where the context of `limit` would not hold them
    with all that is to be written. Guidance hides the text, never the documents: both
    streams have them, so that it strengthens what the text says.
    """
    pairs = list(zip(prompt.streams, prompt.scripts, strict=True))
    need = max(len(ids) + int((s != layout.pad).sum()) for ids, s in pairs)
    ends = np.cumsum([len(document) + 1 for document in documents])
    count = int(np.searchsorted(ends, limit - need, side="right"))
    parts = [part for document in documents[:count] for part in (document, layout.brk)]
    streams = (_ids(ids[:1], *parts, ids[1:]) for ids in prompt.streams)
    return Prompt(tuple(streams), prompt.scripts), count


def keep(prompt: Prompt, streams: int) -> Prompt:
    """A prompt with only so many of its streams: one is the full prompt, two are that
    and the unconditional stream (the last). ValueError where it has other numbers."""
    kept = {1: [0], 2: [0, -1], len(prompt.streams): range(len(prompt.streams))}
    if streams > len(prompt.streams) or streams not in kept:
        raise ValueError(
            f"guidance over {streams} streams, but the prompt has "
            f"{len(prompt.streams)}: give a scale for each step between them, or one"
        )
    return Prompt(
        tuple(prompt.streams[g] for g in kept[streams]),
        tuple(prompt.scripts[g] for g in kept[streams]),
    )


def free(prompt: Sequence[int] | np.ndarray, length: int) -> Prompt:
    """Ids of the beginning of a document -> at most `length` tokens after it."""
    return Prompt((_ids(prompt),), (np.full(length, FREE, np.int32),))


def stack(prompts: Sequence[Prompt], layout: Layout, limit: int) -> Batch:
    """Prompts of one number of streams as a batch.

    `limit` is the decoder's length. Raises ValueError for a prompt that with its script
    does not fit, naming the prompt.
    """
    if not prompts:
        raise ValueError("no prompts: give at least one")
    streams = len(prompts[0].streams)
    if any(len(p.streams) != streams for p in prompts):
        raise ValueError("prompts with and without guidance in one batch: split them")
    for i, prompt in enumerate(prompts):
        for ids, script in zip(prompt.streams, prompt.scripts, strict=True):
            total = len(ids) + int((script != layout.pad).sum())
            if total > limit:
                raise ValueError(
                    f"prompt {i} has {len(ids)} tokens and {total - len(ids)} to come, "
                    f"but the context holds {limit}: shorten the text, or let "
                    "less be written"
                )
            if len(ids) == 0 or len(script) != len(prompt.scripts[0]):
                raise ValueError(f"prompt {i}: an empty stream or unequal scripts")
            if not np.array_equal(_sampled(script), _sampled(prompt.scripts[0])):
                raise ValueError(f"prompt {i}: its streams sample at other positions")
    steps = coarse(max(len(p.scripts[0]) for p in prompts))
    script_GBT = np.full((streams, len(prompts), steps), layout.pad, np.int32)
    for b, prompt in enumerate(prompts):
        for g, script in enumerate(prompt.scripts):
            script_GBT[g, b, : len(script)] = script
    prefix, length, last = [], [], []
    for g in range(streams):
        each = [prompt.streams[g] for prompt in prompts]
        # Full prompts are not compared: what one gets must not hang on the others.
        if g > 0 and all(np.array_equal(ids, each[0]) for ids in each):
            each = each[:1]
        longest = max(len(ids) for ids in each) - 1
        tokens_UL = np.full((len(each), coarse(longest)), layout.pad, np.int32)
        tokens_UL = tokens_UL[:, : max(limit - 1, 1)]
        for row_L, ids in zip(tokens_UL, each, strict=True):
            row_L[: len(ids) - 1] = ids[:-1]
        prefix.append(tokens_UL)
        length.append(np.array([len(ids) - 1 for ids in each], np.int32))
        last.append(np.array([ids[-1] for ids in each], np.int32))
    return Batch(tuple(prefix), tuple(length), tuple(last), script_GBT)


def bucket(length: int) -> int:
    """The next of 8, 12, 16, 24, 32, 48, 64, …: at most half as much again."""
    size = 8
    while size < length:
        size += size // 2 if size & (size - 1) == 0 else size // 3
    return size


def coarse(length: int) -> int:
    """The next of 8, 16, 32, 64, 96, 128, 192, 256, …: `bucket` without 12, 24 and 48,
    whose programs would take longer to compile than the padding that they save."""
    size = bucket(length)
    return size if size >= 64 or size & (size - 1) == 0 else bucket(size + 1)


def texts(tokens_T: np.ndarray, layout: Layout) -> list[np.ndarray]:
    """The text pieces of each span that `generate` wrote, in the order written."""
    spans, run = [], []
    for token in tokens_T.tolist():
        if token == layout.eoss:
            spans.append(layout.pieces(run))
            run = []
        elif token in layout.text:
            run.append(token)
    return spans


def codes(tokens_T: np.ndarray, layout: Layout) -> np.ndarray:
    """The image codes that `generate` wrote, in order, int32."""
    return layout.codes(tokens_T[inside(tokens_T, layout.image)])


def fill(
    codes_YX: np.ndarray, cells_YX: np.ndarray, tokens_T: np.ndarray, layout: Layout
) -> np.ndarray:
    """A picture's codes with its hidden cells filled: visible codes are copied."""
    filled_YX = np.array(codes_YX, np.int32)
    filled_YX[cells_YX] = codes(tokens_T, layout)
    return filled_YX


def _ids(*parts) -> np.ndarray:
    return np.concatenate([np.atleast_1d(np.asarray(p, np.int32)) for p in parts])


def inside(ids: np.ndarray, part: range) -> np.ndarray:
    """Which ids are of a part of the vocabulary."""
    return (ids >= part.start) & (ids < part.stop)


def _sampled(script: np.ndarray) -> np.ndarray:
    return np.where(script < 0, script, 0)


def _sentinels(layout: Layout, count: int) -> list[int]:
    if count > len(layout.sentinels):
        raise ValueError(
            f"{count} spans need as many sentinels, but the vocabulary has "
            f"{len(layout.sentinels)}: hide a simpler region"
        )
    return list(layout.sentinels[:count])
