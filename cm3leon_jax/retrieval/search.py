"""Exact maximum inner product search over a memory bank sharded on the mesh.

The rows of a block lie over all devices. Each device scores its own and keeps the best
few, these are gathered, and the best of all remain (`shard_map`). Blocks come one after
another, so a bank may be larger than all devices together: a list of blocks stays where
it is, a generator of blocks is read from disk while the block before is searched.

The answer does not depend on the number of devices: what the matrix product finds is
scored once more, row by row, in float32, and equal scores are ordered by row number.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Storage = Literal["float32", "bfloat16", "int8"]
STORAGES: tuple[str, ...] = get_args(Storage)

_QUERIES = 256  # scored together
_MARGIN = 8  # more rows than asked for are scored once more
_LEAST = 8  # queries, and rows on a device: fewer take another path of the libraries


@dataclass(frozen=True, eq=False)
class Block:
    """Some consecutive rows of a bank, on the mesh.

    stored_ME: their vectors in the type of storage. scale_M: float32, what to multiply
    them with. alive_M: False for rows that are removed, or fill the block up. first:
    the number of its first row.
    """

    stored_ME: jax.Array
    scale_M: jax.Array
    alive_M: jax.Array
    first: int


def pack(vectors_ME: np.ndarray, storage: str) -> tuple[np.ndarray, np.ndarray]:
    """Float vectors -> (as they are stored [M, E], scales float32 [M]).

    int8 has a scale a row, so that the largest number of the row is 127; those of the
    float types are 1. Raises ValueError for another storage.
    """
    vectors_ME = np.asarray(vectors_ME, np.float32)
    scale_M = np.ones(len(vectors_ME), np.float32)
    if storage == "float32":
        return vectors_ME, scale_M
    if storage == "bfloat16":
        return vectors_ME.astype(jnp.bfloat16), scale_M
    if storage != "int8":
        raise ValueError(
            f"retrieval.storage={storage!r}: choose one of {', '.join(STORAGES)}"
        )
    largest_M = np.abs(vectors_ME).max(axis=1, initial=0)
    scale_M = np.where(largest_M > 0, largest_M / 127, 1).astype(np.float32)
    return np.rint(vectors_ME / scale_M[:, None]).astype(np.int8), scale_M


def block_rows(rows: int, row_bytes: int, mesh: Mesh, block_bytes: int) -> int:
    """Rows of a block that takes up to `block_bytes` on a device.

    A small bank has one block of the next power of two, so that a document more is no
    reason to compile again.
    """
    wanted = 1 << max(0, math.ceil(rows / mesh.size) - 1).bit_length()
    fitting = block_bytes // row_bytes // _LEAST * _LEAST
    return max(_LEAST, min(wanted, fitting)) * mesh.size


def place(
    stored: Callable[[int, int], np.ndarray],
    scale_M: np.ndarray,
    alive_M: np.ndarray,
    first: int,
    rows: int,
    mesh: Mesh,
) -> Block:
    """Puts the `rows` rows from number `first` on the mesh as one block.

    `stored(start, stop)` reads vectors by row number; every process is asked for the
    rows of its own devices only. `scale_M`, `alive_M` are of the whole bank, which may
    end inside the block. `rows` must be a multiple of the number of devices.
    """
    total = len(scale_M)
    sharding = NamedSharding(mesh, P(mesh.axis_names))
    width = stored(first, first).shape[1:]

    def put(read: Callable[[int, int], np.ndarray], shape: tuple) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(rows)
            found = read(min(first + start, total), min(first + stop, total))
            short = stop - start - len(found)
            if not short:
                return found
            return np.pad(found, ((0, short), *((0, 0),) * (len(shape) - 1)))

        return jax.make_array_from_callback(shape, sharding, part)

    return Block(
        put(stored, (rows, *width)),
        put(lambda start, stop: scale_M[start:stop], (rows,)),
        put(lambda start, stop: alive_M[start:stop], (rows,)),
        first,
    )


def search(
    queries_BE: np.ndarray,
    blocks: Iterable[Block],
    k: int,
    mesh: Mesh,
    *,
    recall: float = 0.99,
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of a bank with the largest inner products with each query.

    Returns (scores float32 [B, k], rows int64 [B, k]), best first, equal scores by row
    number; -inf and -1 where the bank has fewer than k rows. All processes of a job ask
    for the same queries and get the same answer. `recall` is the share of the best rows
    that the first look must find on TPUs, where less than 1 is much faster
    (`approx_max_k`); elsewhere it always finds all. Raises ValueError for queries that
    are not finite or not of the bank's size, and for a bank without blocks.
    """
    queries_BE = _checked(queries_BE, k)
    approximate = mesh.devices.flat[0].platform == "tpu" and recall < 1
    answer = _Best(len(queries_BE), k)
    chunks = [queries_BE[i : i + _QUERIES] for i in range(0, len(queries_BE), _QUERIES)]
    put = [_replicated(_filled(chunk), mesh) for chunk in chunks]
    before: tuple[int, list] | None = None
    for block in blocks:
        if block.stored_ME.shape[1] != queries_BE.shape[1]:
            raise ValueError(
                f"queries of {queries_BE.shape[1]} numbers in a bank of "
                f"{block.stored_ME.shape[1]}: another encoder made them"
            )
        found = [
            _best(
                chunk_BE, block.stored_ME, block.scale_M, block.alive_M,
                k=k, mesh=mesh, recall=recall if approximate else None,
            )
            for chunk_BE in put
        ]  # fmt: skip
        if before is not None:  # while the devices work on this one
            answer.add(*before)
        before = block.first, found
    if before is None:
        raise ValueError("the bank is empty: there is nothing to search")
    answer.add(*before)
    return answer.scores_Bk, answer.rows_Bk


def _checked(queries_BE: np.ndarray, k: int) -> np.ndarray:
    queries_BE = np.asarray(queries_BE, np.float32)
    if queries_BE.ndim != 2 or k < 1:
        raise ValueError(
            f"queries are [B, E], not {list(queries_BE.shape)}, and k={k} at least 1"
        )
    bad = np.flatnonzero(~np.isfinite(queries_BE).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{len(bad)} queries are not finite numbers (the first is query {bad[0]}): "
            "nothing is near to those"
        )
    return queries_BE


def _filled(chunk_BE: np.ndarray) -> np.ndarray:
    """Rows of zeros added, so that few numbers of queries are ever compiled."""
    wanted = max(_LEAST, 1 << (len(chunk_BE) - 1).bit_length())
    return np.pad(chunk_BE, ((0, wanted - len(chunk_BE)), (0, 0)))


def _replicated(array: np.ndarray, mesh: Mesh) -> jax.Array:
    sharding = NamedSharding(mesh, P())
    return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])


class _Best:
    """The best rows of the blocks so far, on the host."""

    def __init__(self, queries: int, k: int):
        self.scores_Bk = np.full((queries, k), -np.inf, np.float32)
        self.rows_Bk = np.full((queries, k), -1, np.int64)

    def add(self, first: int, found: Sequence[tuple[jax.Array, jax.Array]]) -> None:
        k, queries = self.rows_Bk.shape[1], len(self.rows_Bk)
        score = np.concatenate([np.asarray(score) for score, _ in found])[:queries]
        row = np.concatenate([np.asarray(row) for _, row in found])[:queries]
        row = np.where(np.isneginf(score), -1, row.astype(np.int64) + first)
        score = np.concatenate([self.scores_Bk, score], axis=1)
        row = np.concatenate([self.rows_Bk, row], axis=1)
        # Stable, and earlier blocks stand first: equal scores stay ordered by row.
        order = np.argsort(-score, axis=1, kind="stable")[:, :k]
        self.scores_Bk = np.take_along_axis(score, order, axis=1)
        self.rows_Bk = np.take_along_axis(row, order, axis=1)


@functools.partial(jax.jit, static_argnames=("k", "mesh", "recall"))
def _best(
    queries_BE: jax.Array,
    stored_ME: jax.Array,
    scale_M: jax.Array,
    alive_M: jax.Array,
    *,
    k: int,
    mesh: Mesh,
    recall: float | None,
) -> tuple[jax.Array, jax.Array]:
    """(scores, rows in the block) of the best of one block, the same on all devices."""
    axes = mesh.axis_names

    def local(q_BE, x_ME, scale_M, alive_M):
        rows = len(x_ME)
        near = min(k + _MARGIN, rows)
        # Rows in bfloat16 or int8 are exact in what accelerators multiply by default;
        # rounding the queries is made good below.
        precision = "highest" if x_ME.dtype == jnp.float32 else None
        score_BM = scale_M * jnp.einsum(
            "BE,ME->BM", q_BE, x_ME.astype(jnp.float32), precision=precision
        )
        score_BM = jnp.where(alive_M, score_BM, -jnp.inf)
        if recall is None:
            row_Bn = jax.lax.top_k(score_BM, near)[1]
        else:
            row_Bn = jax.lax.approx_max_k(score_BM, near, recall_target=recall)[1]
        row_Bn = jnp.sort(row_Bn)  # top_k puts the first of equals first
        x_BnE = x_ME[row_Bn].astype(jnp.float32)
        score_Bn = (q_BE[:, None] * x_BnE).sum(-1) * scale_M[row_Bn]
        score_Bn = jnp.where(alive_M[row_Bn], score_Bn, -jnp.inf)
        score_Bk, row_Bk = _top(score_Bn, row_Bn, min(k, near))
        row_Bk += jax.lax.axis_index(axes) * rows
        everywhere = functools.partial(
            jax.lax.all_gather, axis_name=axes, axis=1, tiled=True
        )
        scores, rows = everywhere(score_Bk), everywhere(row_Bk)
        return _top(scores, rows, min(k, scores.shape[1]))

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(), P(axes), P(axes), P(axes)),
        out_specs=P(),
        check_vma=False,  # gathered by hand: it cannot see that all devices agree
    )(queries_BE, stored_ME, scale_M, alive_M)


def _top(score_BN: jax.Array, row_BN: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    score_Bk, place_Bk = jax.lax.top_k(score_BN, k)
    return score_Bk, jnp.take_along_axis(row_BN, place_Bk, axis=1)
