"""Search equals a float64 oracle, on any number of devices, with ties and blocks."""

import jax
import numpy as np
import pytest
from tiny_training import mesh_of

from cm3leon_jax.retrieval import search as subject

MESHES = {1: (1, 1, 1), 2: (1, 2, 1), 4: (2, 2, 1), 8: (2, 2, 2)}


def blocks_of(vectors, mesh, rows, storage="float32", alive=None):
    stored, scale = subject.pack(vectors, storage)
    alive = np.ones(len(vectors), bool) if alive is None else alive
    for first in range(0, len(vectors), rows):
        yield subject.place(
            lambda start, stop: stored[start:stop], scale, alive, first, rows, mesh
        )


def oracle(queries, vectors, k, alive=None):
    scores = np.einsum(
        "be,me->bm", queries.astype(np.float64), vectors.astype(np.float64)
    )
    if alive is not None:
        scores[:, ~alive] = -np.inf
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def unit(rng, *shape):
    x = rng.standard_normal(shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def clusters(rng, rows, size, centres):
    """Unit vectors as encoders make them: near to each other in groups, and all of
    them in a narrow cone."""
    x = unit(rng, centres, size)[rng.integers(0, centres, rows)]
    return normal(x + 0.5 * unit(rng, rows, size) + 0.5 * unit(rng, 1, size))


def normal(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("devices", MESHES)
@pytest.mark.parametrize("rows", [1024, 64])
def test_the_ten_best_are_those_of_a_float64_oracle(devices, rows):
    rng, mesh = np.random.default_rng(0), mesh_of(*MESHES[devices])
    vectors, queries = unit(rng, 1000, 48), unit(rng, 21, 48)
    scores, found = subject.search(queries, blocks_of(vectors, mesh, rows), 10, mesh)
    np.testing.assert_array_equal(found, oracle(queries, vectors, 10))
    exact = np.einsum("be,bke->bk", queries, vectors[found])
    np.testing.assert_allclose(scores, exact, rtol=1e-5)
    assert scores.dtype == np.float32 and found.dtype == np.int64


@pytest.mark.parametrize("devices", MESHES)
@pytest.mark.parametrize("rows", [512, 64])
def test_equal_scores_are_ordered_by_row(devices, rows):
    """Whole numbers, so that scores are exact: most rows share theirs with others."""
    rng, mesh = np.random.default_rng(1), mesh_of(*MESHES[devices])
    vectors = rng.integers(-1, 2, (500, 6)).astype(np.float32)
    queries = rng.integers(-1, 2, (9, 6)).astype(np.float32)
    _, found = subject.search(queries, blocks_of(vectors, mesh, rows), 30, mesh)
    np.testing.assert_array_equal(found, oracle(queries, vectors, 30))


def test_copies_of_one_row_are_found_in_order_on_every_mesh():
    rng = np.random.default_rng(2)
    vectors, queries = unit(rng, 700, 48), unit(rng, 3, 48)
    copies = np.sort(rng.permutation(700)[:60])
    vectors[copies] = queries[0]
    for shape in MESHES.values():
        mesh = mesh_of(*shape)
        _, found = subject.search(queries, blocks_of(vectors, mesh, 256), 10, mesh)
        np.testing.assert_array_equal(found[0], copies[:10])


def test_scores_are_the_same_numbers_on_every_mesh():
    rng = np.random.default_rng(3)
    vectors, queries = unit(rng, 900, 40), unit(rng, 5, 40)
    answers = []
    for devices, rows in ((1, 1024), (2, 128), (8, 256)):
        mesh = mesh_of(*MESHES[devices])
        answers.append(
            subject.search(queries, blocks_of(vectors, mesh, rows), 10, mesh)
        )
    for scores, found in answers[1:]:
        np.testing.assert_array_equal(scores, answers[0][0])
        np.testing.assert_array_equal(found, answers[0][1])


@pytest.mark.parametrize("devices", [1, 8])
def test_more_than_a_shard_and_more_than_the_bank(devices):
    rng, mesh = np.random.default_rng(4), mesh_of(*MESHES[devices])
    vectors, queries = unit(rng, 50, 16), unit(rng, 2, 16)
    scores, found = subject.search(queries, blocks_of(vectors, mesh, 64), 60, mesh)
    np.testing.assert_array_equal(found[:, :50], oracle(queries, vectors, 50))
    assert (found[:, 50:] == -1).all() and np.isneginf(scores[:, 50:]).all()


def test_removed_rows_are_never_found():
    rng, mesh = np.random.default_rng(5), mesh_of(*MESHES[4])
    vectors, queries = unit(rng, 300, 16), unit(rng, 4, 16)
    alive = rng.random(300) < 0.5
    blocks = blocks_of(vectors, mesh, 128, alive=alive)
    _, found = subject.search(queries, blocks, 10, mesh)
    np.testing.assert_array_equal(found, oracle(queries, vectors, 10, alive))


def test_a_first_look_that_is_a_little_wrong_is_made_good(monkeypatch):
    """Scores as an accelerator rounds them: the best twelve are alike, and the first of
    equals are the worst."""
    rng, mesh = np.random.default_rng(12), mesh_of(*MESHES[1])
    vectors = 0.1 * unit(rng, 100, 8)
    vectors[20:32] = 0
    vectors[20:32, 0] = 1 + np.arange(12) * 1e-4
    query = np.eye(1, 8, dtype=np.float32)
    real = subject.jnp.einsum
    rounded = []

    def einsum(*arguments, **keywords):
        rounded.append(keywords)
        found = real(*arguments, **keywords)
        return found.astype(subject.jnp.bfloat16).astype(found.dtype)

    monkeypatch.setattr(subject.jnp, "einsum", einsum)
    subject._best.clear_cache()
    try:
        _, found = subject.search(query, blocks_of(vectors, mesh, 128), 4, mesh)
    finally:
        subject._best.clear_cache()
    assert rounded and found.tolist() == [[31, 30, 29, 28]]


@pytest.mark.parametrize("storage", subject.STORAGES)
def test_recall_of_every_storage(storage):
    rng, mesh = np.random.default_rng(6), mesh_of(*MESHES[2])
    vectors = clusters(rng, 4000, 128, 100)
    queries = normal(vectors[::80] + 0.3 * unit(rng, 50, 128))
    blocks = blocks_of(vectors, mesh, 1024, storage)
    _, found = subject.search(queries, blocks, 10, mesh)
    wanted = oracle(queries, vectors, 10)
    hits = [len(set(a) & set(b)) for a, b in zip(found, wanted, strict=True)]
    assert np.mean(hits) / 10 >= (1 if storage == "float32" else 0.95)


@pytest.mark.parametrize("storage", subject.STORAGES)
def test_a_storage_is_searched_exactly_as_it_is_stored(storage):
    rng, mesh = np.random.default_rng(7), mesh_of(*MESHES[2])
    vectors, queries = unit(rng, 400, 32), unit(rng, 5, 32)
    stored, scale = subject.pack(vectors, storage)
    assert stored.dtype == storage
    back = stored.astype(np.float64) * scale[:, None]
    np.testing.assert_allclose(back, vectors, atol=4e-3)
    blocks = blocks_of(vectors, mesh, 512, storage)
    _, found = subject.search(queries, blocks, 10, mesh)
    np.testing.assert_array_equal(found, oracle(queries, back, 10))


def test_blocks_are_read_one_after_another():
    rng, mesh = np.random.default_rng(8), mesh_of(*MESHES[2])
    vectors, queries = unit(rng, 1000, 16), unit(rng, 300, 16)
    made = []

    def watched():
        for block in blocks_of(vectors, mesh, 64):
            made.append(block.first)
            yield block

    _, found = subject.search(queries, watched(), 10, mesh)
    assert made == list(range(0, 1000, 64))
    np.testing.assert_array_equal(found, oracle(queries, vectors, 10))


def test_few_numbers_of_queries_are_compiled():
    rng, mesh = np.random.default_rng(9), mesh_of(*MESHES[1])
    blocks = list(blocks_of(unit(rng, 64, 8), mesh, 64))
    queries = unit(rng, 16, 8)
    subject.search(queries[:9], blocks, 2, mesh)
    before = subject._best._cache_size()
    for count in (10, 13, 16):
        subject.search(queries[:count], blocks, 2, mesh)
    assert subject._best._cache_size() == before


def test_approximate_search_is_for_tpus_only(monkeypatch):
    rng, mesh = np.random.default_rng(10), mesh_of(*MESHES[2])
    vectors, queries = unit(rng, 500, 16), unit(rng, 8, 16)
    calls, real = [], jax.lax.approx_max_k

    def watched(*arguments, **keywords):
        calls.append(keywords)
        return real(*arguments, **keywords)

    monkeypatch.setattr(jax.lax, "approx_max_k", watched)
    subject.search(queries, blocks_of(vectors, mesh, 512), 7, mesh)
    assert not calls
    (block,) = blocks_of(vectors, mesh, 512)
    _, found = subject._best(
        queries, block.stored_ME, block.scale_M, block.alive_M,
        k=7, mesh=mesh, recall=0.9,
    )  # fmt: skip
    assert calls == [{"recall_target": 0.9}]
    np.testing.assert_array_equal(found, oracle(queries, vectors, 7))


def test_a_small_bank_has_one_block_and_a_large_one_many():
    mesh = mesh_of(*MESHES[4])
    assert subject.block_rows(1, 64, mesh, 1 << 20) == 32
    assert subject.block_rows(100, 64, mesh, 1 << 20) == 128
    assert subject.block_rows(129, 64, mesh, 1 << 20) == 256
    assert subject.block_rows(10**6, 64, mesh, 1 << 16) == 4096


def test_what_cannot_be_searched_is_said():
    rng, mesh = np.random.default_rng(11), mesh_of(*MESHES[1])
    vectors, queries = unit(rng, 20, 8), unit(rng, 2, 8)
    with pytest.raises(ValueError, match="queries of 8 numbers in a bank of 16"):
        subject.search(queries, blocks_of(unit(rng, 9, 16), mesh, 16), 1, mesh)
    with pytest.raises(ValueError, match="bank is empty"):
        subject.search(queries, [], 1, mesh)
    with pytest.raises(ValueError, match="k=0 at least 1"):
        subject.search(queries, blocks_of(vectors, mesh, 64), 0, mesh)
    queries[1, 3] = np.nan
    with pytest.raises(ValueError, match="first is query 1"):
        subject.search(queries, blocks_of(vectors, mesh, 64), 1, mesh)
    with pytest.raises(ValueError, match="choose one of float32, bfloat16, int8"):
        subject.pack(vectors, "float16")
