"""The choice of documents: never itself, nothing alike, every hit accounted for."""

import numpy as np
import pytest

from cm3leon_jax.retrieval import strategy
from cm3leon_jax.retrieval.strategy import (
    CHOSEN,
    ITSELF,
    LIKE_CHOSEN,
    LIKE_QUERY,
    NOT_NEEDED,
    NOTHING,
    REASONS,
    TWICE,
)


def _unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype("f4")


def _bank(rng, rows=60, size=6):
    """Vectors of which some are (nearly) the same as others."""
    vectors = rng.normal(size=(rows, size))
    twins = rng.permutation(rows).reshape(-1, 2)[: rows // 4]
    vectors[twins[:, 0]] = vectors[twins[:, 1]] + 0.02 * rng.normal(
        size=(len(twins), size)
    )
    return _unit(vectors)


def _hits(rng, vectors, queries, found):
    """Two lists for each query, by disturbed versions of its vector, some cut short."""
    own = rng.choice(len(vectors), queries, replace=False)
    lists = []
    for _ in range(2):
        asked = _unit(vectors[own] + 0.3 * rng.normal(size=(queries, vectors.shape[1])))
        lists.append(np.argsort(-asked @ vectors.T, axis=1)[:, :found])
    hits = np.stack(lists, axis=1)
    short = rng.integers(0, found + 1, (queries, 2, 1))
    return own, np.where(np.arange(found) < np.maximum(short, 2), hits, -1)


def _select(own, own_BE, hits, signatures, **choice):
    return strategy.select(own, own_BE, hits, signatures.__getitem__, **choice)


def _one_by_one(own, vector, hits, vectors, per_query, skip_above):
    """The rule as it reads, for one query: the oracle."""
    chosen, rows, reasons = [], [], []
    for found, most in zip(hits, per_query, strict=True):
        mine = []
        for row in found:
            if row < 0:
                reason = NOTHING
            elif row == own:
                reason = ITSELF
            elif vector is not None and vectors[row] @ vector > skip_above:
                reason = LIKE_QUERY
            elif row in chosen:
                reason = TWICE
            elif any(vectors[row] @ vectors[other] > skip_above for other in chosen):
                reason = LIKE_CHOSEN
            elif len(mine) == most:
                reason = NOT_NEEDED
            else:
                reason = CHOSEN
                mine.append(row)
                chosen.append(row)
            reasons.append(reason)
        rows += mine + [-1] * (most - len(mine))
    return rows, reasons


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("per_query", [(1, 1), (2, 2), (3, 1), (0, 2)])
def test_a_block_is_chosen_as_one_query_after_another(seed, per_query):
    rng = np.random.default_rng(seed)
    vectors = _bank(rng)
    own, hits = _hits(rng, vectors, 40, 9)
    picked = _select(
        own, vectors[own], hits, vectors, per_query=per_query, skip_above=0.9
    )
    assert picked.rows.dtype == np.int32 and picked.rows.shape == (40, sum(per_query))
    for b in range(40):
        rows, reasons = _one_by_one(
            own[b], vectors[own[b]], hits[b], vectors, per_query, 0.9
        )
        assert picked.rows[b].tolist() == rows
        assert picked.reasons[b].ravel().tolist() == reasons
    used = np.unique(picked.reasons)
    assert {CHOSEN, ITSELF, LIKE_QUERY, NOTHING} <= set(used)
    assert TWICE in used or 0 in per_query


@pytest.mark.parametrize("skip_above", [0.3, 0.9, 2.0])
def test_never_itself_never_alike_never_twice_and_counts_add_up(skip_above):
    rng = np.random.default_rng(9)
    vectors = _bank(rng)
    own, hits = _hits(rng, vectors, 60, 12)
    picked = _select(
        own, vectors[own], hits, vectors, per_query=(2, 2), skip_above=skip_above
    )
    for b, rows in enumerate(picked.rows):
        rows = rows[rows >= 0]
        assert own[b] not in rows and len(set(rows)) == len(rows)
        assert set(rows) <= set(hits[b].ravel())
        assert (vectors[rows] @ vectors[own[b]] <= skip_above).all()
        alike = vectors[rows] @ vectors[rows].T - 2 * np.eye(len(rows))
        assert (alike <= skip_above).all()
    counts = strategy.tally(picked.reasons)
    assert list(counts) == list(REASONS) and sum(counts.values()) == hits.size
    assert counts["chosen"] == (picked.rows >= 0).sum() > 0
    assert counts["nothing found"] == (hits < 0).sum()


def test_a_question_to_the_memory_has_no_duplicates_of_itself():
    vectors = _unit(np.eye(4) + 0.01)
    hits = np.array([[[2, 1, 0]]])
    picked = _select(None, None, hits, vectors, per_query=(2,), skip_above=0.9)
    assert picked.rows.tolist() == [[2, 1]]
    same = vectors[[2, 2, 2, 3]]
    picked = _select(None, None, hits, same, per_query=(2,), skip_above=0.9)
    assert picked.rows.tolist() == [[2, -1]]
    empty = np.zeros((0, 2, 3), int)
    none = _select(None, None, empty, vectors, per_query=(2, 2), skip_above=0.9)
    assert none.rows.shape == (0, 4) and sum(strategy.tally(none.reasons).values()) == 0


def test_bad_vectors_and_shapes_are_named():
    vectors = _bank(np.random.default_rng(0))
    hits, options = np.array([[[2, 1, 0]]]), {"per_query": (2,), "skip_above": 0.9}
    broken = vectors.copy()
    broken[1, 0] = np.nan
    with pytest.raises(ValueError, match="bank are not finite"):
        _select(None, None, hits, broken, **options)
    with pytest.raises(ValueError, match="queries are not finite"):
        _select(None, broken[1:2], hits, vectors, **options)
    with pytest.raises(ValueError, match="another encoder"):
        _select(None, vectors[:1, :5], hits, vectors, **options)
    with pytest.raises(ValueError, match=r"\[2\] rows of their own"):
        _select(np.zeros(2, int), None, hits, vectors, **options)
    with pytest.raises(ValueError, match=r"per_query=\(-1,\)"):
        _select(None, None, hits, vectors, per_query=(-1,), skip_above=0.9)


def test_query_dropout_keeps_the_order_and_never_everything():
    words = list(range(20))
    kept = [strategy.dropout(words, 0.2, 0, record) for record in range(500)]
    assert all(k == sorted(k) and set(k) <= set(words) for k in kept)
    assert abs(np.mean([len(k) for k in kept]) - 16) < 0.3
    assert kept[3] == strategy.dropout(words, 0.2, 0, 3) != kept[4]
    assert strategy.dropout(words, 0.0, 0, 1) == words
    assert all(len(strategy.dropout([1], 0.9, 0, r)) == 1 for r in range(50))
    assert strategy.dropout([], 0.2, 0) == []
    with pytest.raises(ValueError, match="query_dropout=1.0"):
        strategy.dropout(words, 1.0, 0)


def test_calibration_keeps_both_promises_where_it_can():
    rng = np.random.default_rng(0)
    duplicates, same = rng.normal(0.97, 0.005, 2000), rng.normal(0.8, 0.03, 3000)
    found = strategy.calibrate(duplicates, same)
    assert found.met and (found.duplicate_pairs, found.same_entity_pairs) == (
        2000,
        3000,
    )
    assert found.duplicates == (duplicates > found.skip_above).mean() >= 0.99
    assert found.same_entity == (same > found.skip_above).mean() <= 0.01
    # A tie at the limit must not break a promise.
    found = strategy.calibrate(np.array([0.9] * 99 + [0.2]), np.array([0.5] * 100))
    assert found.met and 0.5 <= found.skip_above < 0.9
    mixed = strategy.calibrate(rng.normal(0.85, 0.05, 500), rng.normal(0.8, 0.05, 500))
    assert not mixed.met and 0.75 < mixed.skip_above < 0.9
    with pytest.raises(ValueError, match="0 duplicate pairs"):
        strategy.calibrate(np.zeros(0), same)
    with pytest.raises(ValueError, match="not finite"):
        strategy.calibrate(duplicates, np.array([np.nan]))
