"""Parquet and JSON lines as Hugging Face keeps them; bad rows are named, not fatal."""

import sys

import numpy as np
import own_data
import pytest

from cm3leon_jax.data import sources
from cm3leon_jax.data.documents import Document, Skipped
from cm3leon_jax.data.parts import RECORDS
from cm3leon_jax.data.tables import TableConfig

CONFIG, DOCUMENTS = sources.SOURCES["table"]
WHOLE = {"image_size": 16, "validation_percent": 0, "test_percent": 0}


def _rows(count):
    return [
        {
            "image": {"bytes": own_data.encoded(own_data.picture(i)), "path": None},
            "caption": [f"first of {i}", f"second of {i}", ""],
            "alt": None if i % 2 else f"alt of {i}",
            "key": 100 + i,
            "license": "CC0" if i else None,
        }
        for i in range(count)
    ]


def _parquet(path, rows, **options):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def _read(config, split="train"):
    found = list(DOCUMENTS(config, split))
    good = [item for item in found if isinstance(item, Document)]
    return good, {item.id: item.reason for item in found if isinstance(item, Skipped)}


def test_parquet_of_bytes_with_several_captions(tmp_path):
    _parquet(tmp_path / "t" / "train-0.parquet", _rows(5), row_group_size=2)
    config = TableConfig(path=str(tmp_path / "t"), **WHOLE)
    good, bad = _read(config)
    assert [d.id for d in good] == [f"train-0/{i}" for i in range(5)] and not bad
    assert [d.texts for d in good] == [[f"first of {i}"] for i in range(5)]
    assert good[0].pictures[0].shape == (16, 16, 3)
    fields = {"captions": ("alt", "caption"), "take": "each", "id": "key"}
    each = TableConfig(path=str(tmp_path / "t"), licence="license", **fields, **WHOLE)
    good, bad = _read(each)
    first = [d for d in good if d.id.partition("#")[0] == "100"]
    assert [d.id for d in first] == ["100", "100#1", "100#2"]
    assert [d.texts[0] for d in first] == ["alt of 0", "first of 0", "second of 0"]
    assert first[0].metadata == {} and good[-1].metadata == {"licence": "CC0"}
    assert len(good) == 3 * 3 + 2 * 2


def test_splits_are_those_of_the_files_or_of_the_names(tmp_path):
    for split in ("train", "validation"):
        _parquet(tmp_path / f"{split}-0.parquet", _rows(9))
    apart = TableConfig(
        path=str(tmp_path / "train-*.parquet"),
        validation=str(tmp_path / "validation-0.parquet"),
        image_size=16,
        validation_percent=50,
        test_percent=30,
    )
    ids = {split: [d.id for d in _read(apart, split)[0]] for split in sources.SPLITS}
    names = [f"validation:validation-0/{i}" for i in range(9)]
    assert ids["validation"] == names
    assert sorted(ids["train"] + ids["test"]) == [f"train-0/{i}" for i in range(9)]
    # Rows that are added later move no others.
    _parquet(tmp_path / "train-0.parquet", _rows(12))
    for split in ("train", "test"):
        assert [d.id for d in _read(apart, split)[0]][: len(ids[split])] == ids[split]


def test_json_lines_in_all_forms_and_faults(tmp_path):
    png = own_data.encoded(own_data.picture(0))
    (tmp_path / "secret.png").write_bytes(png)
    root = tmp_path / "set"
    (root / "pictures").mkdir(parents=True)
    (root / "pictures" / "a.png").write_bytes(png)
    code = own_data.base64_of(png)
    rows = [
        {"image": "pictures/a.png", "caption": "a path"},
        {"image": {"bytes": code}, "caption": "base64"},
        {"image": f"data:image/png;base64,{code}", "caption": "an address"},
        {"image": {"path": "pictures/a.png"}, "caption": "a path inside"},
        {"image": str(root / "pictures/a.png"), "caption": "the whole path"},
        "",
        '{"image": "pictures/a.png", "caption":',
        "[1, 2]",
        {"image": "../secret.png", "caption": "x"},
        {"image": "https://example.org/a.png", "caption": "x"},
        {"image": "pictures/b.png", "caption": "x"},
        {"image": {"bytes": "#"}, "caption": "x"},
        {"image": None, "caption": "x"},
        {"image": "pictures/a.png", "caption": 3},
        {"image": "pictures/a.png", "caption": " "},
        {"image": "pictures/a.png"},
        '{"image": "pictures/a.png", "caption": "\udcff"}',
    ]
    own_data.jsonl(root / "rows.jsonl", rows)
    good, bad = _read(TableConfig(path=str(root / "rows.jsonl"), **WHOLE))
    assert [d.id for d in good] == [f"rows/{i}" for i in range(5)]
    words = {6: "JSON", 7: "object", 8: "root", 9: "img2dataset", 10: "root"}
    words |= {11: "base64", 12: "no picture", 13: "not text", 14: "empty"}
    words |= {15: "'caption'", 16: "JSON"}
    assert sorted(bad) == sorted(f"rows/{i}" for i in words)
    for number, word in words.items():
        assert word in bad[f"rows/{number}"], bad


def test_long_files_are_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("cm3leon_jax.data.tables.RECORDS", 4)
    assert RECORDS > 4
    png = own_data.base64_of(own_data.encoded(own_data.picture(0)))
    rows = [{"image": {"bytes": png}, "caption": f"é {i}"} for i in range(11)]
    own_data.jsonl(tmp_path / "a.jsonl", rows)
    _parquet(tmp_path / "b.parquet", _rows(11), row_group_size=3)
    config = TableConfig(path=str(tmp_path), **WHOLE)
    parts = [part.name for part in sources.OWN["table"].parts(config)]
    assert parts == ["a/0", "a/4", "a/8", "b/0", "b/6"]
    names = [f"{file}/{i}" for file in "ab" for i in range(11)]
    assert [d.id for d in _read(config)[0]] == names


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_missing_column_is_named_with_those_that_are_there(tmp_path, kind):
    if kind == "parquet":
        _parquet(tmp_path / "t.parquet", _rows(2))
    else:
        own_data.jsonl(tmp_path / "t.jsonl", [{"image": "", "alt": "", "caption": ""}])
    config = TableConfig(path=str(tmp_path), captions=("text",), **WHOLE)
    with pytest.raises(ValueError, match="no column 'text'.* alt, caption.*settings"):
        list(DOCUMENTS(config, "train"))


def test_damage_costs_no_other_file(tmp_path):
    _parquet(tmp_path / "a.parquet", _rows(40), row_group_size=10)
    _parquet(tmp_path / "b.parquet", _rows(2))
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[500:30_000] = np.random.default_rng(0).bytes(29_500)
    (tmp_path / "a.parquet").write_bytes(data)
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no table")
    good, bad = _read(TableConfig(path=str(tmp_path), **WHOLE))
    assert {"b/0", "b/1"} <= {d.id for d in good}
    assert any("damaged" in why for why in bad.values()) and "c/0" in bad


def test_what_is_not_there_is_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list(DOCUMENTS(TableConfig(path="nowhere", **WHOLE), "train"))
    (tmp_path / "t.csv").write_text("a,b")
    with pytest.raises(FileNotFoundError, match="t.csv is neither"):
        list(DOCUMENTS(TableConfig(path=str(tmp_path / "t.csv"), **WHOLE), "train"))
    (tmp_path / "t.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match="setup.sh parquet"):
        list(DOCUMENTS(TableConfig(path=str(tmp_path), **WHOLE), "train"))
    with pytest.raises(ValueError, match="first or each"):
        CONFIG(path="x", image_size=8, take="random")
