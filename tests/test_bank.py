"""The memory bank: built, resumed, changed, searched, and refused when it is wrong."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import tiny_job
from ml_dtypes import bfloat16
from tiny_data import make_documents
from tiny_training import mesh_of

from cm3leon_jax.data.documents import Document, Text
from cm3leon_jax.retrieval import bank_files
from cm3leon_jax.retrieval.bank import Bank
from cm3leon_jax.retrieval.bank_build import build, left
from cm3leon_jax.retrieval.search import STORAGES


class Encoder:
    """A vector drawn by the document's id."""

    size = 24

    def __init__(self, name="drawn"):
        self.name, self.embedded = name, []

    def documents(self, documents):
        self.embedded += [document.id for document in documents]
        vectors = np.stack([vector(document.id) for document in documents])
        return vectors, -vectors


def vector(name):
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    x = np.random.default_rng(seed).standard_normal(Encoder.size)
    return (x / np.linalg.norm(x)).astype(np.float32)


def exact(ids, queries, k):
    scores = queries.astype(np.float64) @ np.stack([vector(i) for i in ids]).T
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


DOCUMENTS = make_documents(90)
QUERIES = np.stack([vector(f"query {i}") for i in range(5)])
IDS = [document.id for document in DOCUMENTS]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    path = tmp_path_factory.mktemp("built") / "bank"
    build(path, Encoder(), DOCUMENTS, part_rows=40)
    return path


@pytest.fixture
def folder(built, tmp_path):
    return shutil.copytree(built, tmp_path / "bank")


def test_a_bank_finds_what_it_was_built_from(folder):
    bank = Bank.load(folder, Encoder())
    assert len(bank) == bank.rows == 90 and bank.ids == IDS
    scores, rows = bank.search(QUERIES, 10)
    np.testing.assert_array_equal(rows, exact(IDS, QUERIES, 10))
    kept = np.einsum("be,bke->bk", QUERIES, bank[rows.ravel()].reshape(5, 10, -1))
    np.testing.assert_allclose(scores, kept, rtol=1e-5)
    wanted = -np.stack([vector(IDS[i]) for i in (88, 3)])
    np.testing.assert_allclose(bank.signatures([88, 3]), wanted, atol=1e-3)
    found = bank.documents(rows[0])
    assert [document.id for document in found] == [IDS[row] for row in rows[0]]


@pytest.mark.parametrize("storage", STORAGES)
def test_a_bank_larger_than_its_blocks_is_streamed(tmp_path, storage):
    build(tmp_path, Encoder(), DOCUMENTS, storage=storage, part_rows=25)
    small = {"block_bytes": 24 * 4 * 8, "resident_bytes": 0}
    mesh = mesh_of(1, 2, 1)
    streamed = Bank.load(tmp_path, **small).search(QUERIES, 10, mesh)
    resident = Bank.load(tmp_path).search(QUERIES, 10, mesh)
    for one, other in zip(streamed, resident, strict=True):
        np.testing.assert_array_equal(one, other)


def test_documents_are_added_and_removed(folder):
    bank = Bank.load(folder)
    more = [Document((Text("new"),), id=f"new {i}") for i in range(3)]
    vectors = np.stack([vector(document.id) for document in more])
    names = [document.id for document in more]
    bank.search(QUERIES, 3)  # a bank on the devices is read again after a change
    assert bank.add(names, vectors, -vectors, more) == range(90, 93)
    best = int(bank.search(QUERIES, 1)[1][0, 0])
    assert bank.remove([bank.ids[best], "new 1"]) == 2
    for one in (bank, Bank.load(folder)):
        assert len(one) == 91 and one.rows == 93 and one.ids == IDS + names
        _, rows = one.search(np.concatenate([QUERIES, vectors]), 10)
        gone = np.isin(rows, [best, 91])
        assert not gone.any()
        wanted = exact(IDS + names, np.concatenate([QUERIES, vectors]), 12)
        for found, oracle in zip(rows, wanted, strict=True):
            kept = [row for row in oracle if row not in (best, 91)]
            assert found.tolist() == kept[:10]
        assert rows[5, 0] == 90 and rows[7, 0] == 92
        assert one.documents([92])[0].segments[0].text == "new"
    with pytest.raises(ValueError, match="has these already, .*'new 0'"):
        bank.add(["new 0"], vectors[:1], vectors[:1], more[:1])
    assert bank.add(["new 1"], vectors[1:2], vectors[1:2], more[1:2]) == range(93, 94)
    with pytest.raises(ValueError, match="does not have 'nobody': nothing"):
        bank.remove(["new 0", "nobody"])
    assert len(Bank.load(folder)) == 92


def test_what_is_added_for_a_while_never_reaches_the_disk(folder):
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    bank = Bank.load(folder)
    new = Document((Text("new"),), id="new")
    assert bank.add(
        ["new"], vector("new")[None], vector("new")[None], [new], keep=False
    )
    _, rows = bank.search(vector("new")[None], 1)
    assert rows.tolist() == [[90]] and bank.ids[90] == "new"
    assert bank.documents([90])[0].segments[0].text == "new"
    more = Document((Text("more"),), id="more")
    given = (["more"], vector("more")[None], vector("more")[None], [more])
    bank.add(*given, keep=False)
    assert bank.remove([IDS[0]], keep=False) == 1
    assert len(bank) == 91 and bank.documents([91])[0].id == "more"
    # What is to be kept would lose, or keep, what was not.
    another = (["other"], *given[1:])
    for change in (lambda: bank.add(*another), lambda: bank.remove(["more"])):
        with pytest.raises(ValueError, match="changed with keep=False.*load the bank"):
            change()
    other = Bank.load(folder)
    other.remove([IDS[1]], keep=False)
    with pytest.raises(ValueError, match="changed with keep=False"):
        other.add(*given)
    assert len(bank) == 91 and len(other) == 89
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_two_writers_never_lose_what_the_other_wrote(folder):
    other = Bank.load(folder)
    for name, bank in (("a", None), ("b", other), ("b", None)):
        new = ([name], vector(name)[None], vector(name)[None])
        document = Document((Text(name),), id=name)
        if bank is other:
            with pytest.raises(ValueError, match="changed since it was loaded"):
                bank.add(*new, [document])
            with pytest.raises(ValueError, match="changed since it was loaded"):
                bank.remove([IDS[0]])
            bank.add(*new, [document], keep=False)
        else:
            Bank.load(folder).add(*new, [document])
    bank = Bank.load(folder)
    assert bank.ids[90:] == ["a", "b"]
    assert [d.segments[0].text for d in bank.documents([90, 91])] == ["a", "b"]
    assert bank.search(vector("a")[None], 1)[1].tolist() == [[90]]


def test_a_row_reads_the_ids_of_its_own_part_alone(folder):
    (folder / "ids-00002.json").write_text("[]")
    bank = Bank.load(folder)
    assert [d.id for d in bank.documents([3, 79])] == [IDS[3], IDS[79]]
    with pytest.raises(ValueError, match="ids-00002.json has 0 ids, not 10"):
        bank.documents([80])


def test_a_bank_that_was_moved_names_the_folder_it_misses(tmp_path):
    kept = tmp_path / "here" / "documents"
    bank_files.store(DOCUMENTS[:5], kept, "train")
    build(tmp_path / "here" / "bank", Encoder(), DOCUMENTS[:5], kept=(kept, "train"))
    shutil.copytree(tmp_path / "here" / "bank", tmp_path / "there" / "bank")
    with pytest.raises(FileNotFoundError, match="there/bank keeps .*has no 'train'"):
        Bank.load(tmp_path / "there" / "bank")
    shutil.copytree(tmp_path / "here", tmp_path / "both")
    assert Bank.load(tmp_path / "both" / "bank").documents([4])[0].id == IDS[4]


@pytest.mark.parametrize("storage", STORAGES)
def test_numbers_that_are_none_on_disk_are_said_not_searched(tmp_path, storage):
    build(tmp_path, Encoder(), DOCUMENTS, storage=storage, part_rows=40)
    name = "scales" if storage == "int8" else "vectors"
    path = tmp_path / f"{name}-00001.npy"
    whole = np.load(path)
    for bad in (np.nan, -np.inf):
        broken = whole.copy()
        number = np.float32(bad).astype(bfloat16).view(np.uint16)
        broken[7, ...] = number if storage == "bfloat16" else bad
        np.save(path, broken)
        for size in ({}, {"resident_bytes": 0, "block_bytes": 24 * 4 * 8}):
            with pytest.raises(ValueError, match=f"{name} that are not .*delete WORKD"):
                Bank.load(tmp_path, **size).search(QUERIES, 3)
        with pytest.raises(ValueError, match="not finite numbers"):
            Bank.load(tmp_path)[[47]]
    np.save(path, whole)
    assert (Bank.load(tmp_path).search(QUERIES, 90)[1] >= 0).all()


def test_two_documents_of_one_id_are_refused(tmp_path):
    twins = [*DOCUMENTS[:50], DOCUMENTS[3]]
    with pytest.raises(ValueError, match=f"1 documents have .* another: {IDS[3]!r}"):
        build(tmp_path, Encoder(), twins, part_rows=20)
    with pytest.raises(FileNotFoundError, match="no bank is finished"):
        Bank.load(tmp_path)


class Uneven(Encoder):
    """Vectors of unequal length: rows of int8 have scales far apart."""

    def documents(self, documents):
        vectors, signatures = super().documents(documents)
        long = [1 + 9 * (IDS.index(d.id) % 4) for d in documents]
        return vectors * np.array(long, np.float32)[:, None], signatures


def test_rows_of_int8_are_scored_with_their_scales(tmp_path):
    bank = build(tmp_path, Uneven(), DOCUMENTS, storage="int8", part_rows=40)
    parts = [
        np.load(tmp_path / f"vectors-{i:05d}.npy").astype(np.float64)
        * np.load(tmp_path / f"scales-{i:05d}.npy").astype(np.float64)[:, None]
        for i in range(3)
    ]
    stored = np.concatenate(parts)
    long = np.linalg.norm(stored, axis=1)
    np.testing.assert_allclose(long[:4], [1, 10, 19, 28], rtol=0.02)
    np.testing.assert_allclose(bank[range(90)], stored, rtol=1e-6)
    wanted = QUERIES.astype(np.float64) @ stored.T
    for size in ({}, {"resident_bytes": 0, "block_bytes": 24 * 8}):
        scores, rows = Bank.load(tmp_path, **size).search(QUERIES, 10)
        oracle = np.argsort(-wanted, axis=1, kind="stable")[:, :10]
        np.testing.assert_array_equal(rows, oracle)
        np.testing.assert_allclose(
            scores, np.take_along_axis(wanted, rows, axis=1), rtol=1e-4
        )


def test_banks_are_swapped_by_loading_another(folder, tmp_path):
    build(
        tmp_path / "other",
        Encoder(),
        DOCUMENTS[:7],
        kept=(folder / "documents", "built"),
    )
    other = Bank.load(tmp_path / "other", Encoder())
    _, rows = other.search(QUERIES, 9)
    assert (rows[:, 7:] == -1).all()
    np.testing.assert_array_equal(rows[:, :7], exact(IDS[:7], QUERIES, 7))
    assert not (tmp_path / "other" / "documents").exists()
    assert other.documents([6])[0].id == IDS[6]


def test_a_build_goes_on_where_it_was_interrupted(tmp_path, built):
    class Interrupted(Encoder):
        def documents(self, documents):
            if len(self.embedded) >= 60:
                raise KeyboardInterrupt
            return super().documents(documents)

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, Interrupted(), DOCUMENTS, part_rows=30)
    with pytest.raises(FileNotFoundError, match="run the build_bank stage"):
        Bank.load(tmp_path)
    with pytest.raises(ValueError, match="encoder: drawn -> other"):
        build(tmp_path, Encoder("other"), DOCUMENTS, part_rows=30)
    with pytest.raises(ValueError, match="documents: 90 -> 89"):
        build(tmp_path, Encoder(), DOCUMENTS[:-1], part_rows=30)
    rest = Encoder()
    assert left(tmp_path, 90, 30) == 30
    bank = build(tmp_path, rest, DOCUMENTS, part_rows=30)
    assert left(tmp_path, 90, 30) == 0
    assert rest.embedded == IDS[60:]
    np.testing.assert_array_equal(bank[range(90)], Bank.load(built)[range(90)])


def test_wrong_banks_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="built with encoder drawn, not other"):
        Bank.load(folder, Encoder("other"))
    wide = Encoder()
    wide.size = 32
    with pytest.raises(ValueError, match="vectors of 24 numbers, the encoder makes 32"):
        Bank.load(folder, wide)
    with pytest.raises(ValueError, match="queries of 32 numbers in a bank of 24"):
        Bank.load(folder).search(np.ones((1, 32)), 1)
    with pytest.raises(ValueError, match="a bank of no documents"):
        build(tmp_path / "none", Encoder(), [])
    empty = Bank.load(folder)
    empty.remove(IDS)
    with pytest.raises(ValueError, match="is empty: all of it was removed"):
        empty.search(QUERIES, 1)


def test_embeddings_that_are_not_numbers_are_refused(folder, tmp_path):
    class Broken(Encoder):
        def documents(self, documents):
            vectors, signatures = super().documents(documents)
            vectors[[d.id == IDS[7] for d in documents]] = np.nan
            return vectors, signatures

    with pytest.raises(ValueError, match="1 documents are not finite.*'document 7'"):
        build(tmp_path / "new", Broken(), DOCUMENTS)
    bank = Bank.load(folder)
    with pytest.raises(ValueError, match="not finite numbers: 'x'"):
        bank.add(["x"], np.full((1, 24), np.inf), QUERIES[:1], [Document((), id="x")])
    with pytest.raises(ValueError, match="not finite numbers: 'x'"):
        bank.add(["x"], QUERIES[:1], np.full((1, 24), np.nan), [Document((), id="x")])
    with pytest.raises(ValueError, match=r"\[1, 3\], 1 documents in a bank of 24"):
        bank.add(["x"], np.ones((1, 3)), QUERIES[:1], [Document((), id="x")])
    queries = QUERIES.copy()
    queries[2, 0] = np.nan
    with pytest.raises(ValueError, match="first is query 2"):
        bank.search(queries, 1)


def test_damage_is_named(folder):
    documents = folder / "documents" / "built.json"
    kept = documents.read_text()
    documents.write_text(json.dumps({"documents": 2}))
    with pytest.raises(ValueError, match="damaged"):
        Bank.load(folder).documents([1])
    documents.write_text(kept)
    for name in ("ids-00001.json", "vectors-00002.npy", "signatures-00001.npy"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            len(Bank.load(folder).ids)
        (folder / name).write_bytes(whole)
    bank_files.save(folder / "vectors-00000.npy", np.zeros((40, 9), np.float32))
    with pytest.raises(ValueError, match=r"float32 \[40, 9\], not float32 \[40, 24\]"):
        Bank.load(folder)
    (folder / "meta.json").write_text("{}")
    with pytest.raises(ValueError, match="meta.json: KeyError"):
        Bank.load(folder)


# One of two processes: each embeds its own parts, both search.
MEMBER = """
import numpy as np
import jax
from test_bank import DOCUMENTS, IDS, QUERIES, Encoder, exact
from cm3leon_jax.retrieval.bank_build import build
encoder = Encoder()
bank = build(sys.argv[1], encoder, DOCUMENTS, part_rows=20)
mine = [i for k in range(5) if k % 2 == jax.process_index() for i in IDS[20*k:20*k+20]]
assert encoder.embedded == mine, encoder.embedded
_, rows = bank.search(QUERIES, 10)
np.testing.assert_array_equal(rows, exact(IDS, QUERIES, 10))
"""


@pytest.mark.slow
def test_two_processes_build_and_search_one_bank(tmp_path, built):
    tiny_job.run(MEMBER, tmp_path / "bank", processes=2, devices=2)
    bank = Bank.load(tmp_path / "bank", Encoder())
    assert bank.ids == IDS
    np.testing.assert_array_equal(bank[range(90)], Bank.load(built)[range(90)])
