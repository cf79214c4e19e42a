"""A decoder at work: prompts and documents of any number, in batches of few shapes.

A program is compiled per shape of its inputs, so all rows of a call are padded alike,
and batches have sizes from a short list (`prompts.coarse`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from cm3leon_jax.models.attention import Attention, xla_attention
from cm3leon_jax.models.cache import CacheType, Prefix
from cm3leon_jax.models.decoder import Decoder, Dtype
from cm3leon_jax.models.layers import Shard, identity
from cm3leon_jax.models.unrolled import Unrolled, Weights, unroll
from cm3leon_jax.parallel.rules import Rules, shard_fn
from cm3leon_jax.sampling.generate import generate, read
from cm3leon_jax.sampling.prompts import IMAGE, Batch, Prompt, bucket, coarse, stack
from cm3leon_jax.sampling.sampler import Sampler
from cm3leon_jax.training.loss import blockwise_nll
from cm3leon_jax.vocab import Layout

_LOGITS = 1 << 26  # how many `score` holds at a time: 256 MiB of them


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How a decoder is kept while it decodes; None is as it was trained.

    `compute` is the dtype of the arithmetic, `weights` "int8" needs `qwix`, `cache` is
    how keys and values are stored. What each costs in quality is in the README.
    """

    compute: Dtype | None = None
    weights: Weights | None = None
    cache: CacheType | None = None

    def __post_init__(self):
        for name, choices in (
            ("compute", Dtype),
            ("weights", Weights),
            ("cache", CacheType),
        ):
            value = getattr(self, name)
            if value is not None and value not in get_args(choices):
                raise ValueError(
                    f"precision.{name}={value!r}: choose None or one of "
                    f"{', '.join(get_args(choices))}"
                )

    def __str__(self) -> str:
        """What is not as it was trained: "weights=int8,cache=int8"."""
        return ",".join(f"{key}={x}" for key, x in vars(self).items() if x is not None)


class Engine:
    """Runs a decoder over a mesh, on which it must lie already; None is one device.

    `batch` is at most how many rows (candidates of prompts) are run together, rounded
    up to what the mesh splits the batch into. ValueError unless it is positive.
    `amateur` is another decoder of the same vocabulary: contrastive samplers contrast
    with it, after the same prompts, instead of with the last stream of each prompt.
    """

    def __init__(
        self,
        decoder: Decoder,
        layout: Layout,
        rules: Rules,
        mesh: jax.sharding.Mesh | None,
        batch: int,
        *,
        precision: Precision | None = None,
        amateur: Decoder | None = None,
    ):
        if batch < 1:
            raise ValueError(f"batch={batch} must be at least 1")
        self.decoder, self.layout, self.batch = decoder, layout, batch
        self.precision, self.amateur = precision or Precision(), amateur
        self._unrolled: list[tuple[Decoder, Unrolled]] = []
        self._sizes: dict[tuple, set[int]] = {}  # of batches of each form of prompts
        # Made once: a program is compiled for each pair of such objects.
        self._shard, self._attention, self._split = identity, xla_attention, 1
        if mesh is not None and mesh.size > 1:
            self._shard = shard_fn(mesh, rules)
            self._split = math.prod(mesh.shape[axis] for axis in rules.compute.batch)

    def _laid_out(self, decoder: Decoder) -> Unrolled:
        """A decoder as it decodes: made when it is first used."""
        for known, unrolled in self._unrolled:
            if known is decoder:
                return unrolled
        unrolled = unroll(
            decoder,
            dtype=self.precision.compute,
            weights=self.precision.weights,
            shard=self._shard,
        )
        current = [pair for pair in self._unrolled if pair[0] is self.decoder]
        self._unrolled = [*current, (decoder, unrolled)]
        return unrolled

    def write(
        self,
        wanted: Sequence[Prompt],
        sampler: Sampler | Sequence[Sampler],
        seed: int,
        image_tokens: int,
        *,
        candidates: int = 1,
        classes: Sequence[int] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[np.ndarray]:
        """What the decoder writes: int32 [T] for each candidate of each prompt, the
        candidates of a prompt after each other; see `generate`. They come as batches
        finish; of several there is a progress bar on a terminal.

        Several samplers take turns: candidate c is by number c mod s. A sample
        depends on the seed, the number of its prompt (`numbers`, default 0, 1, …) and
        of its candidate alone. A prompt is read once for all its candidates, and a
        stream that is the same in every prompt once for all prompts. Raises ValueError
        for a prompt that does not fit the context, before anything is run.
        """
        if not isinstance(seed, Integral) or not 0 <= seed < 1 << 32:
            raise ValueError(f"seed={seed!r} must be a whole number below 2**32")
        each = [sampler] if isinstance(sampler, Sampler) else list(sampler)
        if not 0 < len(each) <= candidates:
            raise ValueError(
                f"candidates={candidates} cannot be split among {len(each)} samplers: "
                "give at least one candidate for each sampler"
            )
        numbers_B = np.arange(len(wanted)) if numbers is None else np.asarray(numbers)
        if numbers_B.shape != (len(wanted),):
            raise ValueError(
                f"{len(wanted)} prompts need as many numbers, got {numbers_B.shape}"
            )
        limit, amateur = self.decoder.config.length, None
        if self.amateur is not None and any(s.contrastive for s in each):
            amateur = self.amateur
            limit = min(limit, amateur.config.length)
            wanted = [_read_twice(prompt) for prompt in wanted]
        prompts = stack(wanted, self.layout, limit)
        samplers = [each[c % len(each)] for c in range(candidates)]
        key = jax.random.key(seed)
        rows = self._write(
            *(prompts, samplers, amateur, numbers_B, key, image_tokens, classes)
        )
        bar = tqdm.tqdm(
            rows,
            total=len(wanted) * candidates,
            unit="image" if (prompts.script_GBT == IMAGE).any() else "text",
            disable=None if len(wanted) * candidates > self.batch else True,
            leave=False,
            delay=1,
        )
        return iter(bar)

    def _write(
        self,
        prompts: Batch,
        samplers: list[Sampler],
        amateur: Decoder | None,
        numbers_B: np.ndarray,
        key: jax.Array,
        image_tokens: int,
        classes: Sequence[int] | None,
    ) -> Iterator[np.ndarray]:
        count, candidates = len(numbers_B), len(samplers)
        # As many candidates at a time as go into a batch, in equal parts.
        together = -(-candidates // -(-candidates // self.batch))
        size = self._size(count, together)
        if size > 1:  # a program for up to four times as many serves these too
            form = (together, prompts.script_GBT.shape[::2])
            form += tuple((len(x) == 1, x.shape[1]) for x in prompts.prefix_UL)
            known = self._sizes.setdefault(form, set())
            size = min((n for n in known if size <= n <= 4 * size), default=size)
            known.add(size)
        model = self._laid_out(self.decoder)
        options: dict[str, Any] = dict(
            amateur=None if amateur is None else self._laid_out(amateur),
            cache=self.precision.cache,
            shard=self._shard,
            attention=self._attention,
        )
        shared: list[Prefix | None] = []
        for start in range(0, count, size):
            rows_P = np.minimum(np.arange(start, start + size), count - 1)
            batch = prompts.take(rows_P)
            prefixes = read(model, batch, known=shared, **options)
            shared = [
                prefix if len(tokens_UL) == 1 else None
                for prefix, tokens_UL in zip(prefixes, prompts.prefix_UL, strict=True)
            ]
            parts = []
            for first in range(0, candidates, together):
                candidate_C = np.arange(first, first + together)
                tokens_BT = generate(
                    model,
                    batch,
                    key,
                    [samplers[min(c, candidates - 1)] for c in candidate_C] * size,
                    self.layout,
                    image_tokens=image_tokens,
                    classes=classes,
                    index_B=numbers_B[rows_P],
                    candidate_C=candidate_C,
                    prefixes=prefixes,
                    **options,
                )
                parts.append(np.asarray(tokens_BT).reshape(size, together, -1))
            tokens_PCT = np.concatenate(parts, axis=1)[: count - start, :candidates]
            yield from tokens_PCT.reshape(-1, tokens_PCT.shape[-1])

    def _size(self, prompts: int, candidates: int) -> int:
        """How many prompts are run together."""
        size = min(coarse(prompts), max(self.batch // candidates, 1))
        if prompts == 1:
            size = 1
        if size == 1 and candidates % self._split == 0:
            return size
        return -(-size // self._split) * self._split

    def score(
        self,
        rows: Sequence[np.ndarray],
        counted: Sequence[int] | Sequence[np.ndarray] | None = None,
    ) -> list[float]:
        """log p in nats of each row of ids, of any lengths: of those from a number on,
        or of those where bool arrays say so, given all before; the first one is always
        given. Default: all the others.

        Raises ValueError for a row that does not fit the context.
        """
        limit, longest = self.decoder.config.length, max(len(row) for row in rows)
        if longest - 1 > limit:
            raise ValueError(
                f"a document has {longest} tokens, more than the context of {limit}"
            )
        if counted is not None and len(counted) != len(rows):
            raise ValueError(
                f"{len(rows)} rows need as many starts or arrays, got {len(counted)}"
            )
        length = min(bucket(longest - 1), limit)
        tokens_BL = np.full((len(rows), length + 1), self.layout.pad, np.int32)
        counted_BL = np.zeros(tokens_BL.shape, bool)
        for i, ids in enumerate(rows):
            tokens_BL[i, : len(ids)] = ids
            which = np.asarray(1 if counted is None else counted[i])
            if which.ndim == 0:
                which = np.arange(len(ids)) >= which
            counted_BL[i, 1 : len(ids)] = which[1:]

        def run(rows_B: np.ndarray) -> jax.Array:
            logits = len(rows_B) * length * self.layout.size
            return _row_nll(
                self.decoder,
                tokens_BL[rows_B],
                counted_BL[rows_B],
                blocks=_divisor(self.layout.size, logits / _LOGITS),
                shard=self._shard,
                attention=self._attention,
            )

        return [-float(nll) for nll in self._in_batches(run, len(rows))]

    def chances(
        self, rows: Sequence[np.ndarray], starts: Sequence[int], among: range
    ) -> Iterator[np.ndarray]:
        """How likely each id of `among` was in the place of those from a number on of
        each row of ids, if it had to be one of them: float32 [n, len(among)].

        All rows have equally many ids from their start on.
        """
        length = min(bucket(max(map(len, rows)) - 1), self.decoder.config.length)
        (count,) = {len(row) - n for row, n in zip(rows, starts, strict=True)}
        tokens_BL = np.full((len(rows), length), self.layout.pad, np.int32)
        for row_L, ids in zip(tokens_BL, rows, strict=True):
            row_L[: len(ids) - 1] = ids[:-1]
        places_BT = np.asarray(starts)[:, None] - 1 + np.arange(count)

        def run(rows_B: np.ndarray) -> jax.Array:
            return _chances(
                *(self.decoder, tokens_BL[rows_B], places_BT[rows_B]),
                among=among,
                shard=self._shard,
                attention=self._attention,
            )

        return self._in_batches(run, len(rows))

    def _in_batches(
        self, run: Callable[[np.ndarray], jax.Array], count: int
    ) -> Iterator[np.ndarray]:
        """What `run` (of row numbers) gives for each of `count` rows, in order. A batch
        that is not full is filled up by the last row."""
        size = min(self.batch, bucket(count))
        size = -(-size // self._split) * self._split
        for start in range(0, count, size):
            rows_B = np.minimum(np.arange(start, start + size), count - 1)
            yield from np.asarray(run(rows_B))[: count - start]


def _read_twice(prompt: Prompt) -> Prompt:
    """The prompt with its full stream once more, for the amateur."""
    return Prompt(
        (*prompt.streams, prompt.streams[0]), (*prompt.scripts, prompt.scripts[0])
    )


def _divisor(length: int, least: float) -> int:
    """The smallest divisor of `length` that is at least `least`, or `length`."""
    fitting = (n for n in range(1, length) if n >= least and length % n == 0)
    return next(fitting, length)


@functools.partial(jax.jit, static_argnames=("blocks", "shard", "attention"))
def _row_nll(
    decoder: Decoder,
    tokens_BL: jax.Array,
    counted_BL: jax.Array,
    *,
    blocks: int,
    shard: Shard,
    attention: Attention,
) -> jax.Array:
    """Nats per row of the tokens that count."""
    hidden_BLD = decoder.hidden(tokens_BL[:, :-1], shard=shard, attention=attention)
    nll_BL, _ = blockwise_nll(
        decoder.head_weight(), hidden_BLD, tokens_BL[:, 1:], blocks, shard
    )
    return jnp.sum(nll_BL * counted_BL[:, 1:], axis=1)


@functools.partial(jax.jit, static_argnames=("among", "shard", "attention"))
def _chances(
    decoder: Decoder,
    tokens_BL: jax.Array,
    places_BT: jax.Array,
    *,
    among: range,
    shard: Shard,
    attention: Attention,
) -> jax.Array:
    """Float32 [B, T, len(among)]: what comes after each of the places."""
    hidden_BLD = decoder.hidden(tokens_BL, shard=shard, attention=attention)
    hidden_BTD = jnp.take_along_axis(hidden_BLD, places_BT[..., None], axis=1)
    w_DC = decoder.head_weight()[:, among.start : among.stop]
    logits_BTC = jnp.einsum(
        "BTD,DC->BTC", hidden_BTD, w_DC, preferred_element_type=jnp.float32
    )
    return jax.nn.softmax(logits_BTC, axis=-1)
