"""Which of the found documents to use (paper section 1.8): pure numpy.

A query asks the memory bank in some ways (a pair: by its text and by its picture) and
takes a few documents from each list of hits, best first, but

* never itself,
* no near-duplicate of the query, of which the answer could be copied,
* no near-duplicate of a document already chosen, which would say nothing new.

Everything that was found is either chosen or passed over for exactly one reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cm3leon_jax.data.hashing import uniform

# What became of a hit, by its number in `Selection.reasons`.
REASONS = (
    "chosen",
    "not needed",  # enough had been chosen
    "itself",
    "duplicate of the query",
    "already chosen",  # the other list had it too
    "duplicate of a chosen document",
    "nothing found",  # fewer hits than asked for, -1 in the list
)
CHOSEN, NOT_NEEDED, ITSELF, LIKE_QUERY, TWICE, LIKE_CHOSEN, NOTHING = range(7)
_DROP = 301  # purpose of the random numbers of `dropout`


@dataclass(frozen=True, eq=False)
class Selection:
    """What was chosen for each query, and why not the rest.

    rows: int32 [B, sum(per_query)], bank rows by way of asking, best first; -1 where
    there were too few. reasons: int8 [B, Q, K], an index into `REASONS` for each hit.
    """

    rows: np.ndarray
    reasons: np.ndarray


def select(
    own_B: np.ndarray | None,
    own_BE: np.ndarray | None,
    hits_BQK: np.ndarray,
    signatures: Callable[[np.ndarray], np.ndarray],
    *,
    per_query: Sequence[int],
    skip_above: float,
) -> Selection:
    """Up to so many hits of each of Q lists (`per_query`) for each of B queries.

    own_B: the bank row that a query is itself, -1 (or None for all) if it is not in
    the bank. own_BE: signatures of the queries; None skips no duplicates of them, as
    when a prompt is looked up in the memory. hits_BQK: bank rows, best first, -1 for
    none. signatures: rows [N] -> unit vectors float [N, E]. A score above `skip_above`
    (inner product of two signatures) makes two documents near-duplicates. Raises
    ValueError for shapes that do not fit and for vectors that are not finite.
    """
    hits_BQK = np.asarray(hits_BQK, np.int64)
    if hits_BQK.ndim != 3 or len(per_query) != hits_BQK.shape[1] or min(per_query) < 0:
        raise ValueError(
            f"hits are [queries, ways of asking, found], got {list(hits_BQK.shape)}; "
            f"per_query={per_query} must be a number of at least 0 for each way"
        )
    queries, ways, found = hits_BQK.shape
    own = np.full(queries, -1) if own_B is None else np.asarray(own_B, np.int64)
    if own.shape != (queries,):
        raise ValueError(f"{queries} queries have {list(own.shape)} rows of their own")
    rows_BN = hits_BQK.reshape(queries, ways * found)
    there_BN = rows_BN >= 0
    candidates_BNE = _of(signatures, rows_BN)
    like_query_BN = np.zeros_like(there_BN)
    if own_BE is not None:
        own_BE = _finite(np.asarray(own_BE, np.float32), "the queries")
        if own_BE.shape != (queries, candidates_BNE.shape[-1]):
            raise ValueError(
                f"signatures of the queries are {list(own_BE.shape)}, those of the "
                f"bank have {candidates_BNE.shape[-1]} numbers: another encoder made "
                "them"
            )
        scores_BN = np.einsum("BNE,BE->BN", candidates_BNE, own_BE)
        like_query_BN = scores_BN > skip_above
    reasons_BN = np.full((queries, ways * found), NOT_NEEDED, np.int8)
    twice_BN, like_BN = np.zeros_like(there_BN), np.zeros_like(there_BN)
    chosen_BR = np.full((queries, sum(per_query)), -1, np.int32)
    starts = np.cumsum([0, *per_query])
    every = np.arange(queries)
    for way in range(ways):
        count_B = np.zeros(queries, np.int64)
        for n in range(way * found, (way + 1) * found):
            row_B = rows_BN[:, n]
            reason_B = np.select(
                [
                    ~there_BN[:, n],
                    row_B == own,
                    like_query_BN[:, n],
                    twice_BN[:, n],
                    like_BN[:, n],
                    count_B >= per_query[way],
                ],
                [NOTHING, ITSELF, LIKE_QUERY, TWICE, LIKE_CHOSEN, NOT_NEEDED],
                CHOSEN,
            )
            reasons_BN[:, n] = reason_B
            take_B = reason_B == CHOSEN
            # Of the few that are chosen only: all with all would be N times the work.
            twice_BN[take_B] |= rows_BN[take_B] == row_B[take_B, None]
            scores_TN = np.einsum(
                "TNE,TE->TN", candidates_BNE[take_B], candidates_BNE[take_B, n]
            )
            like_BN[take_B] |= scores_TN > skip_above
            slot_B = starts[way] + count_B
            chosen_BR[every[take_B], slot_B[take_B]] = row_B[take_B]
            count_B += take_B
    return Selection(chosen_BR, reasons_BN.reshape(hits_BQK.shape))


def _of(
    signatures: Callable[[np.ndarray], np.ndarray], rows_BN: np.ndarray
) -> np.ndarray:
    """Float32 [B, N, E]; row 0 stands in where there is none."""
    rows = np.maximum(rows_BN, 0).reshape(-1)
    found = _finite(np.asarray(signatures(rows), np.float32), "the bank")
    return found.reshape(*rows_BN.shape, found.shape[-1])


def _finite(vectors: np.ndarray, whose: str) -> np.ndarray:
    if not np.isfinite(vectors).all():
        raise ValueError(
            f"signatures of {whose} are not finite numbers: nothing is near to those, "
            "embed the documents again"
        )
    return vectors


def tally(reasons: np.ndarray) -> dict[str, int]:
    """How many hits there were of each of `REASONS`; they add up to all hits."""
    counts = np.bincount(np.asarray(reasons).ravel(), minlength=len(REASONS))
    return dict(zip(REASONS, counts.tolist(), strict=True))


def dropout(tokens: Sequence[Any], share: float, *counters: int) -> list[Any]:
    """A query without about `share` of its tokens, at least one of which stays.

    In training only: a query that is told less finds more varied documents. Which ones
    go depends on `counters` (seed, record) alone.
    """
    if not 0 <= share < 1:
        raise ValueError(f"retrieval.query_dropout={share} must be within [0, 1)")
    draws = uniform(*counters, _DROP, np.arange(len(tokens)))
    kept = draws >= share
    if len(tokens):
        kept[int(draws.argmax())] = True
    return [token for token, stays in zip(tokens, kept, strict=True) if stays]


@dataclass(frozen=True)
class Calibration:
    """A threshold between near-duplicates and other documents of the same thing.

    skip_above: the threshold. duplicates, same_entity: the shares of each that it
    drops, of how many pairs. met: it drops at least 99 % and at most 1 %.
    """

    skip_above: float
    duplicates: float
    same_entity: float
    duplicate_pairs: int
    same_entity_pairs: int
    met: bool


def calibrate(
    duplicates: np.ndarray,
    same_entity: np.ndarray,
    *,
    drop: float = 0.99,
    spare: float = 0.01,
) -> Calibration:
    """The threshold that drops at least `drop` of the duplicates and at most `spare`
    of the other pairs, halfway between the two limits; where no threshold does both,
    the one with the fewest wrong (`met` is False then).

    Both are scores (inner products of signatures) of validation pairs: of the
    same document in two versions, and of different documents of the same thing. Raises
    ValueError for none of either, or scores that are not finite.
    """
    parts = []
    for name, scores in (("duplicate", duplicates), ("same-entity", same_entity)):
        scores = np.sort(np.asarray(scores, np.float64).ravel())
        if not len(scores) or not np.isfinite(scores).all():
            raise ValueError(
                f"{len(scores)} {name} pairs, or scores that are not finite: the "
                "threshold needs pairs of both kinds"
            )
        parts.append(scores)
    wanted, spared = parts
    # Dropped is what lies above: `most` of the duplicates may lie at or below it.
    most = int(np.floor((1 - drop) * len(wanted) + 1e-9))
    high = wanted[most]  # the threshold must be less
    keep = int(np.ceil((1 - spare) * len(spared) - 1e-9))
    low = spared[keep - 1] if keep else -np.inf  # and at least this
    if low < high:
        threshold = (max(low, -1.0) + high) / 2
    else:
        levels = np.unique(np.concatenate([wanted, spared]))
        missed = np.searchsorted(wanted, levels, side="right") / len(wanted)
        lost = 1 - np.searchsorted(spared, levels, side="right") / len(spared)
        threshold = levels[int((missed + lost).argmin())]
    dropped, wrong = (float((part > threshold).mean()) for part in parts)
    return Calibration(
        float(threshold), dropped, wrong, len(wanted), len(spared),
        dropped >= drop and wrong <= spare,
    )  # fmt: skip
