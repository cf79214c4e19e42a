"""The token cache: contents, index, resuming, and every way it can be the wrong one."""

import concurrent.futures
import itertools
import json
import pickle
import threading
import types
from pathlib import Path

import numpy as np
import pytest
from tiny_data import (
    GRID,
    LAYOUT,
    BlockTokenizer,
    ByteTokenizer,
    build_cache,
    make_documents,
    tokenize,
)

from cm3leon_jax import vocab
from cm3leon_jax.data import records
from cm3leon_jax.data.documents import Document, Image, Mask, Text
from cm3leon_jax.data.shards import ShardWriter
from cm3leon_jax.data.tokenization import Encoders
from cm3leon_jax.tokenizers import regions

DOCUMENTS = make_documents(23)


def _equal(a, b):
    assert a.id == b.id and len(a.regions) == len(b.regions)
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.bounds, b.bounds)
    for one, two in zip(a.regions, b.regions, strict=True):
        assert one.segment == two.segment
        np.testing.assert_array_equal(one.cells, two.cells)
        np.testing.assert_array_equal(one.codes, two.codes)


def test_a_record_is_text_break_image_and_blanked_regions():
    for document, record in zip(DOCUMENTS, tokenize(DOCUMENTS), strict=True):
        text, image = document.segments
        codes = BlockTokenizer().encode(image.array[None])[0]
        expected = [
            *LAYOUT.text_ids(list(text.text.encode())),
            LAYOUT.brk,
            *LAYOUT.image_ids(codes.ravel()),
        ]
        assert record.tokens.tolist() == expected and record.tokens.dtype == np.int32
        words = len(text.text)
        assert record.bounds.tolist() == [[0, words], [words + 1, words + 17]]
        assert len(record.regions) == 2
        for region in record.regions:
            blanked = regions.blank(image.array[None], region.cells[None])
            np.testing.assert_array_equal(
                region.codes, BlockTokenizer().encode(blanked)[0]
            )
            # Hidden content is not in the prompt: these codes say only "grey".
            assert len(set(region.codes[region.cells].tolist())) == 1


def test_regions_depend_on_seed_and_name_alone():
    both, reverse = tokenize(DOCUMENTS), tokenize(DOCUMENTS[::-1])[::-1]
    for a, b in zip(both, reverse, strict=True):
        _equal(a, b)
    other = tokenize(DOCUMENTS, seed=1)
    same = [
        (a.regions[0].cells == b.regions[0].cells).all()
        for a, b in zip(both, other, strict=True)
    ]
    assert sum(same) < len(same) / 2


def test_general_documents():
    codes = np.arange(16, dtype=np.int32).reshape(GRID)
    labels = np.ones((2, 2), np.int32)
    document = Document(
        (Image(None, codes), Text("x"), DOCUMENTS[0].segments[1], Mask(None, labels)),
        id="general",
    )
    (record,) = tokenize([document])
    assert record.bounds.tolist() == [[0, 16], [17, 18], [19, 35], [36, 40]]
    assert [region.segment for region in record.regions] == [2, 2]
    np.testing.assert_array_equal(record.tokens[36:], LAYOUT.class_ids(labels).ravel())
    index = records.index_of([record], LAYOUT)
    assert index["segments"] == 4 and index["maskable"] == 37 and index["text"].all()
    (no_text,) = tokenize([Document((DOCUMENTS[0].segments[1],), id="picture")])
    assert not records.index_of([no_text], LAYOUT)["text"].any()
    with pytest.raises(ValueError, match="empty"):
        tokenize([Document((Text(""),), id="nothing")])


def test_records_survive_their_bytes():
    for record in tokenize(DOCUMENTS):
        _equal(record, records.from_bytes(records.to_bytes(record)))


def test_the_cache_does_not_depend_on_its_shards(tmp_path):
    expected = tokenize(DOCUMENTS)
    for shards in (1, 3):
        cache = build_cache(tmp_path / str(shards), DOCUMENTS, shards=shards)
        assert len(cache) == 23 and cache.layout == LAYOUT and cache.grid == GRID
        for a, b in zip(expected, cache, strict=True):
            _equal(a, b)
        index = records.index_of(expected, LAYOUT)
        np.testing.assert_array_equal(cache.index, index)
        assert isinstance(cache.index, np.memmap)
        for a, b in zip(cache.read([20, 3, 3]), (20, 3, 3), strict=True):
            _equal(a, expected[b])
    assert index["length"].tolist() == [len(record.tokens) for record in expected]
    runs = [[len(regions.runs(r.cells)) for r in rec.regions] for rec in expected]
    assert index["runs"].tolist() == runs and index["runs"].min() > 0


def test_without_regions_the_index_has_none(tmp_path):
    cache = build_cache(tmp_path, DOCUMENTS, regions_per_image=0)
    assert cache.index["runs"].shape == (23, 0) and cache[3].regions == ()


def test_an_empty_shard_has_the_fields_of_tasks(tmp_path):
    """A split of fewer documents than shards has such."""
    records.write([], tmp_path, "test", 0, 1, LAYOUT, tasks=True)
    (path,) = tmp_path.glob("*.npy")
    assert np.load(path).dtype == records.index_dtype(0, tasks=True)


def test_a_pickled_cache_reopens_its_files(tmp_path):
    cache = build_cache(tmp_path, make_documents(200))
    data = pickle.dumps(cache)
    assert len(data) < 2_000
    again = pickle.loads(data)
    _equal(again[199], cache[199])
    np.testing.assert_array_equal(again.index, cache.index)


def test_building_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    clock = types.SimpleNamespace(monotonic=itertools.count(0, 2.0).__next__)
    monkeypatch.setattr(records, "time", clock)

    class FailsAt(BlockTokenizer):
        def __init__(self, calls):
            self.calls = calls

        def encode(self, images):
            self.calls -= 1
            if self.calls < 0:
                raise OSError("no space left on device")
            return super().encode(images)

    def build(image_tokenizer):
        return records.build(
            *(DOCUMENTS, tmp_path, "train", 4),
            encoders=Encoders(ByteTokenizer(), image_tokenizer, LAYOUT),
            regions_per_image=2,
            seed=0,
        )

    with pytest.raises(OSError, match="space"):
        build(FailsAt(2))
    assert len(list(tmp_path.glob("*.array_record"))) == 2
    with pytest.raises(FileNotFoundError, match="tokenize_data"):
        records.TokenRecords(tmp_path, "train")
    summary = build(FailsAt(2))  # only the two that are missing
    assert summary["records"] == 23
    assert summary["records_per_second"] == round(11 / summary["seconds"], 1)
    cache = records.TokenRecords(tmp_path, "train")
    assert summary["tokens"] == sum(len(record.tokens) for record in cache)
    assert build(FailsAt(0))["records_per_second"] == 0


def test_the_wrong_cache_is_refused_at_once_with_the_mend(tmp_path):
    cache = build_cache(tmp_path, DOCUMENTS)
    bigger = vocab.build(text=300, image=64, classes=4, sentinels=12)
    with pytest.raises(ValueError, match="layout.*tokenize_data"):
        records.TokenRecords(tmp_path, "train", layout=bigger)
    with pytest.raises(ValueError, match="grid.*tokenize_data"):
        records.TokenRecords(tmp_path, "train", grid=(8, 8))
    with pytest.raises(FileNotFoundError, match="tokenize_data"):
        records.TokenRecords(tmp_path, "test")
    with pytest.raises(FileNotFoundError, match="tokenize_data"):
        records.TokenRecords(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match="regions_per_image"):
        build_cache(tmp_path, DOCUMENTS, regions_per_image=1)
    with pytest.raises(ValueError, match="documents have changed"):
        build_cache(tmp_path, DOCUMENTS[:9])
    assert len(cache) == 23
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"schema": "old/0"}))
    with pytest.raises(ValueError, match="schema.*tokenize_data"):
        records.TokenRecords(tmp_path, "train")
    (tmp_path / "meta.json").write_text("[]")
    with pytest.raises(ValueError, match="meta.json"):
        records.TokenRecords(tmp_path, "train")


def test_foreign_records_and_damaged_files_are_named(tmp_path):
    cache = build_cache(tmp_path, DOCUMENTS[:4])
    path = Path(tmp_path) / "train-00001-of-00002.array_record"
    good = records.to_bytes(cache[1])
    for other in (b"?", b"\x81\xa1a\x01", good.replace(b"tokens/1", b"tokens/9")):
        with ShardWriter(path) as writer:
            writer.write(good)
            writer.write(other)
        reopened = records.TokenRecords(tmp_path, "train")
        reopened[1]
        with pytest.raises(ValueError, match="train-00001-of-00002.*record 1: "):
            reopened[3]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="train-00001-of-00002.*damaged"):
        records.TokenRecords(tmp_path, "train")
    (tmp_path / "train-index.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ValueError, match="train-index.npy is damaged"):
        records.TokenRecords(tmp_path, "train")


def test_tokenizers_and_pictures_must_fit(tmp_path):
    small = vocab.build(text=255, image=64, classes=4, sentinels=12)
    with pytest.raises(ValueError, match="text tokenizer has 256"):
        tokenize(DOCUMENTS, layout=small)
    small = vocab.build(text=256, image=63, classes=4, sentinels=12)
    with pytest.raises(ValueError, match="image tokenizer has 64"):
        tokenize(DOCUMENTS, layout=small)
    large = vocab.build(text=257, image=64, classes=4, sentinels=12)
    with pytest.raises(ValueError, match="text tokenizer has 256 .* holds 257"):
        tokenize(DOCUMENTS, layout=large)
    wide = Document((Text("x"), Image(np.zeros((8, 9, 3), np.uint8))), id="wide one")
    with pytest.raises(ValueError, match="wide one.*9x8"):
        tokenize([wide])
    coded = Document((Image(None, np.zeros((2, 2), np.int32)),), id="coarse")
    with pytest.raises(ValueError, match="coarse.*grid"):
        tokenize([coded])
    few = vocab.build(text=256, image=64, classes=4, sentinels=1)
    with pytest.raises(ValueError, match="vocab.sentinels"):
        tokenize(DOCUMENTS, layout=few)


def test_processes_of_a_job_share_the_shards_and_make_the_same(tmp_path):
    documents = make_documents(20)
    barrier = threading.Barrier(2, timeout=60)

    def one(process):
        job = records.Job(process, 2, lambda moment: barrier.wait())
        return records.build(
            *(documents, tmp_path / "two", "train", 4),
            encoders=Encoders(ByteTokenizer(), BlockTokenizer(), LAYOUT),
            regions_per_image=1,
            seed=0,
            job=job,
        )

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        made = list(pool.map(one, (0, 1)))
    build_cache(tmp_path / "one", documents, shards=4, regions_per_image=1)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == names
    for name in names:
        one_, two = ((tmp_path / run / name).read_bytes() for run in ("one", "two"))
        assert one_ == two
    assert made[0]["records"] == made[1]["records"] == 20
    assert made[0]["tokens"] == made[1]["tokens"] and made[0]["records_per_second"] > 0


@pytest.mark.parametrize(
    ("count", "shards"), [(0, 4), (4 * 65_536, 4), (4 * 65_536 + 1, 5)]
)
def test_large_splits_have_more_shards_to_share_out(count, shards):
    assert records.shards_of(count) == shards
