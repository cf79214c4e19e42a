"""A decoder at work: prompts and documents of any number, in batches of few shapes.

A program is compiled per shape of its inputs, so all rows of a call are padded alike,
and batches have sizes from a short list (`prompts.bucket`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cm3leon_jax.models.attention import Attention, xla_attention
from cm3leon_jax.models.decoder import Decoder
from cm3leon_jax.models.layers import Shard, identity
from cm3leon_jax.parallel.rules import Rules, shard_fn
from cm3leon_jax.sampling.generate import generate
from cm3leon_jax.sampling.prompts import Prompt, bucket, stack
from cm3leon_jax.sampling.sampler import Sampler
from cm3leon_jax.training.loss import blockwise_nll
from cm3leon_jax.vocab import Layout

_LOGITS = 1 << 26  # how many `score` holds at a time: 256 MiB of them


class Engine:
    """Runs a decoder over a mesh, on which it must lie already; None is one device.

    `batch` is at most how many rows are run together, rounded up to a multiple of what
    the mesh splits the batch into. ValueError unless it is positive.
    """

    def __init__(
        self,
        decoder: Decoder,
        layout: Layout,
        rules: Rules,
        mesh: jax.sharding.Mesh | None,
        batch: int,
    ):
        if batch < 1:
            raise ValueError(f"batch={batch} must be at least 1")
        self.decoder, self.layout, self.batch = decoder, layout, batch
        # Made once: a program is compiled for each pair of such objects.
        self._shard, self._attention, self._split = identity, xla_attention, 1
        if mesh is not None:
            self._shard = shard_fn(mesh, rules)
            self._split = math.prod(mesh.shape[axis] for axis in rules.compute.batch)

    def write(
        self,
        wanted: Sequence[Prompt],
        sampler: Sampler,
        seed: int,
        image_tokens: int,
        *,
        classes: Sequence[int] | None = None,
    ) -> Iterator[np.ndarray]:
        """What the decoder writes for each prompt, in order: int32 [T], see `generate`.

        A prompt's sample depends on the seed and its number alone. Raises ValueError
        for a prompt that does not fit the context, before anything is run.
        """
        prompts = stack(wanted, self.layout, self.decoder.config.length)

        def run(rows_B: np.ndarray) -> jax.Array:
            return generate(
                self.decoder,
                prompts.take(rows_B),
                jax.random.key(seed),
                sampler,
                self.layout,
                image_tokens=image_tokens,
                classes=classes,
                index_B=rows_B,
                shard=self._shard,
                attention=self._attention,
            )

        return self._in_batches(run, len(wanted))

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
                blocks=_divisor(length, logits / _LOGITS),
                shard=self._shard,
                attention=self._attention,
            )

        return [-float(nll) for nll in self._in_batches(run, len(rows))]

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
    head = functools.partial(decoder.head, shard=shard)
    nll_BL, _ = blockwise_nll(head, hidden_BLD, tokens_BL[:, 1:], blocks)
    return jnp.sum(nll_BL * counted_BL[:, 1:], axis=1)
