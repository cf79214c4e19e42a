"""One's own data: what is chosen depends on neither workers nor interruptions."""

import itertools
import json
import os
import shutil
import time
from pathlib import Path

import own_data
import pytest
from tiny_system import tiny_config

from cm3leon_jax.data import ingest, part_files, sources
from cm3leon_jax.data.files import FolderConfig
from cm3leon_jax.data.filters import IngestConfig
from cm3leon_jax.data.tables import TableConfig
from cm3leon_jax.system import System

ALL = {"train": None, "validation": None, "test": None}
SPLITS = {"image_size": 16, "validation_percent": 25, "test_percent": 25}


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr("cm3leon_jax.data.files.RECORDS", 7)
    monkeypatch.setattr("cm3leon_jax.data.tables.RECORDS", 7)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


def _prepare(config, out, splits=ALL, kind="folder", **settings):
    chosen = IngestConfig(**{"workers": 0} | settings) if settings else None
    return ingest.prepare(sources.OWN[kind], config, out, splits, chosen)


def _folder(path, **more):
    return FolderConfig(path=str(path), **SPLITS | more)


def _ids(out, splits=ALL):
    return {s: [d.id for d in sources.read_documents(out, s)] for s in splits}


def _stored(out):
    """All that the folder of documents holds, but for the seconds that it took."""
    files = {}
    for path in sorted(out.iterdir()):
        data = path.read_bytes()
        if path.suffix == ".json" and path.name != ingest.SUMMARY:
            data = {k: v for k, v in json.loads(data).items() if k != "seconds"}
        files[path.name] = data
    return files


def test_without_filters_it_is_what_the_source_yields(tmp_path):
    own_data.folder(tmp_path / "in", 30)
    (tmp_path / "in" / "004.txt").unlink()
    config = _folder(tmp_path / "in")
    made = _prepare(config, tmp_path / "a")
    old = sources.prepare(
        config, sources.SOURCES["folder"][1], tmp_path / "b", dict(ALL)
    )
    a, b = _stored(tmp_path / "a"), _stored(tmp_path / "b")
    assert {name for name in a if name not in b} == {ingest.SUMMARY}
    for name in b:
        if name.endswith(".array_record") or name == "skipped.jsonl":
            assert a[name] == b[name], name
    # A folder that was prepared before there were filters is still valid.
    assert a["train.json"]["made_from"] == b["train.json"]["made_from"]
    for split in ALL:
        assert made[split]["documents"] == old[split]["documents"]
    again = _prepare(config, tmp_path / "b")
    assert again["train"]["documents"] == old["train"]["documents"]


@pytest.mark.parametrize(
    "limits, workers", [(ALL, 2), ({"train": 9, "validation": 2, "test": 3}, 0)]
)
def test_workers_and_interruptions_change_nothing(
    tmp_path, monkeypatch, limits, workers
):
    own_data.folder(tmp_path / "in", 40)
    for i in (3, 17):  # copies of pictures in other splits, and of the same one
        shutil.copy(tmp_path / "in/001.png", tmp_path / f"in/{i:03d}.png")
    config = _folder(tmp_path / "in")
    _prepare(config, tmp_path / "one", limits, duplicates=4)
    _prepare(config, tmp_path / "two", limits, duplicates=4, workers=workers)
    wanted = _stored(tmp_path / "one")
    assert _stored(tmp_path / "two") == wanted
    hashed, calls = part_files.fingerprint, itertools.count()

    def interrupted(picture):
        if next(calls) == 2 * 7 + 3:  # in the third part
            raise KeyboardInterrupt
        return hashed(picture)

    with monkeypatch.context() as patch:
        patch.setattr(part_files, "fingerprint", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _prepare(config, tmp_path / "three", limits, duplicates=4)
    kept = sorted(path.name for path in (tmp_path / "three" / "parts").iterdir())
    assert [name for name in kept if name.endswith("npz")] == [
        "000000.npz",
        "000001.npz",
    ]
    read = []
    kind = sources.OWN["folder"]
    monkeypatch.setitem(
        *(sources.OWN, "folder"),
        kind._replace(read=lambda c, p: read.append(p) or kind.read(c, p)),
    )
    _prepare(config, tmp_path / "three", limits, duplicates=4)
    assert _stored(tmp_path / "three") == wanted
    assert [part.name for part in read][:1] == ["names from 014"]


def test_parts_whose_files_changed_are_read_again(tmp_path):
    own_data.folder(tmp_path / "in", 20)
    config = _folder(tmp_path / "in", validation_percent=0, test_percent=0)
    job = part_files.Job(
        sources.OWN["folder"], config, IngestConfig(), tmp_path / "parts"
    )
    parts = list(job.kind.parts(config))
    for number, part in enumerate(parts):
        job.run(number, part)
    (tmp_path / "in" / "010.txt").write_text("another caption")
    os.utime(tmp_path / "in" / "010.txt", ns=(1, 1))
    changed = list(job.kind.parts(config))
    done = [job.is_done(number, part) for number, part in enumerate(changed)]
    assert done == [True, False, True]


def test_no_picture_of_an_evaluation_split_is_trained_on(tmp_path):
    own_data.folder(tmp_path / "in", 60)
    config = _folder(tmp_path / "in")
    _prepare(config, tmp_path / "plain", workers=0)
    ids = _ids(tmp_path / "plain")
    # Every evaluation picture comes again in train, in another size and format.
    pictures = [int(i) for s in ("test", "validation") for i in ids[s]]
    targets = ids["train"][: len(pictures)]
    for source, target in zip(pictures, targets, strict=True):
        copy = own_data.picture(source).resize((80, 60))
        (tmp_path / f"in/{target}.png").unlink()
        (tmp_path / f"in/{target}.jpg").write_bytes(
            own_data.encoded(copy, "JPEG", quality=80)
        )
    made = _prepare(config, tmp_path / "out", duplicates=4)
    found = _ids(tmp_path / "out")
    assert found["test"] == ids["test"] and found["validation"] == ids["validation"]
    assert found["train"] == [i for i in ids["train"] if i not in targets]
    assert made["train"]["rejected"] == {
        "duplicate": {"near-duplicate of '…' (test)": len(ids["test"])}
        | {"near-duplicate of '…' (validation)": len(ids["validation"])}
    }
    # Nor one of the evaluation splits of another system.
    other = own_data.folder(tmp_path / "other", 12)
    for i in range(100, 104):
        (other / f"{i}.png").write_bytes(own_data.encoded(own_data.picture(i)))
        (other / f"{i}.txt").write_text("new")
    whole = _folder(other, validation_percent=0, test_percent=0)
    against = (str(tmp_path / "plain"),)
    kept = _prepare(
        *(whole, tmp_path / "new", {"train": None}), duplicates=4, against=against
    )
    evaluated = [i for i in range(12) if i in pictures]
    assert evaluated and kept["train"]["documents"] == 16 - len(evaluated)


def test_limits_are_reached_in_spite_of_duplicates(tmp_path):
    own_data.folder(tmp_path / "in", 10)
    for i in range(10, 30):  # two parts of nothing but copies
        shutil.copy(tmp_path / f"in/{i % 10:03d}.png", tmp_path / f"in/{i:03d}.png")
        (tmp_path / f"in/{i:03d}.txt").write_text("copy")
    own_data.folder(tmp_path / "in", 10, start=30)
    config = _folder(tmp_path / "in", validation_percent=0, test_percent=0)
    _prepare(config, tmp_path / "out", {"train": 15}, duplicates=0)
    wanted = [f"{i:03d}" for i in (*range(10), *range(30, 35))]
    assert _ids(tmp_path / "out", ["train"]) == {"train": wanted}


def test_filters_and_faults_are_counted_by_reason(tmp_path):
    png = own_data.encoded(own_data.picture(0))

    def row(name, caption="a caption", size=(40, 30), **more):
        data = own_data.encoded(own_data.picture(len(name) * 7, *size))
        image = {"bytes": own_data.base64_of(data)}
        return {"image": image, "caption": caption, "id": name} | more

    rows = [
        row("good", licence="CC0", source="a book"),
        row("good", caption="the name is used"),
        row("tiny", size=(40, 11)),
        row("long", size=(200, 20)),
        row("terse", caption="x"),
        row("wordy", caption="x" * 41),
        row("some", caption=["y", "one that is fine", "z" * 50]),
        {
            "image": {"bytes": own_data.base64_of(png[:50])},
            "caption": "cut",
            "id": "cut",
        },
        {"image": None, "caption": "no picture", "id": "none"},
        {"image": None, "caption": "no name", "id": None},
    ]
    own_data.jsonl(tmp_path / "rows.jsonl", rows)
    config = TableConfig(
        **{"path": str(tmp_path / "rows.jsonl"), "id": "id", "take": "each"},
        **{"licence": "licence", "origin": "source", "image_size": 16},
        **{"validation_percent": 0, "test_percent": 0},
    )
    settings = {"smallest": 12, "aspect": 3, "shortest_caption": 2, "licence": "MIT"}
    settings |= {"longest_caption": 40}
    # A column that some rows lack is theirs to be without.
    made = _prepare(config, tmp_path / "a", {"train": None}, "table", **settings)
    assert made["train"]["documents"] == 2 and made["train"]["skipped"] == 8
    documents = sources.read_documents(tmp_path / "a", "train")
    assert [(d.id, d.texts[0]) for d in documents] == [
        ("good", "a caption"),
        ("some", "one that is fine"),
    ]
    assert documents[0].metadata == {"licence": "CC0", "source": "a book"}
    assert documents[1].metadata == {"licence": "MIT", "source": "rows.jsonl"}
    rejected = made["train"]["rejected"]
    assert {kind: sum(why.values()) for kind, why in rejected.items()} == {
        "fault": 3,
        "filter": 4,
        "duplicate": 1,
    }
    lines = (tmp_path / "a" / "skipped.jsonl").read_text().splitlines()
    why = {json.loads(line)["id"]: json.loads(line)["reason"] for line in lines}
    assert "40x11" in why["tiny"] and "3 to 1" in why["long"]
    assert "below 2" in why["terse"] and "above 40" in why["wordy"]
    summary = json.loads((tmp_path / "a" / ingest.SUMMARY).read_text())["train"]
    assert summary["documents"] == 2 and summary["rejected"] == rejected
    assert summary["licence"] == {"CC0": 1, "MIT": 1}
    assert summary["width"]["most"] == 40 and summary["characters"]["least"] == 9
    with pytest.raises(ValueError, match="cut: unusable.*faults=skip"):
        _prepare(config, tmp_path / "b", {"train": None}, "table", faults="refuse")


def test_languages_are_guessed(tmp_path):
    pytest.importorskip("py3langid")
    read = part_files.language_reader()
    assert read("a brown dog is running over the green meadow") == "en"
    assert read("ein brauner Hund läuft über die grüne Wiese") == "de"


def test_a_worker_that_is_killed_loses_no_finished_part(tmp_path):
    own_data.folder(tmp_path / "in", 20)
    config = _folder(tmp_path / "in", validation_percent=0, test_percent=0)
    kind = sources.OWN["folder"]._replace(read=_kill)
    with pytest.raises(OSError, match="fewer data.ingest.workers"):
        ingest.prepare(
            kind, config, tmp_path / "out", {"train": None}, IngestConfig(workers=2)
        )
    assert (tmp_path / "out" / "parts" / "000000.npz").is_file()
    assert not (tmp_path / "out" / "train.json").exists()


def _kill(config, part):
    finished = Path(config.path).parent / "out" / "parts" / "000000.npz"
    while "names from 007" in part.name:
        if finished.is_file():
            os._exit(9)
        time.sleep(0.1)
    yield from sources.OWN["folder"].read(config, part)


def test_settings_that_cannot_be_are_named():
    for wrong, words in (
        ({"faults": "ignore"}, "skip or refuse"),
        ({"aspect": 0.5}, "at least 1"),
        ({"duplicates": 20}, "bits"),
        ({"longest_caption": 0}, "below shortest"),
        ({"against": ("x",)}, "needs duplicates"),
        ({"workers": -1}, "negative"),
    ):
        with pytest.raises(ValueError, match=words):
            IngestConfig(**wrong)


def test_only_a_section_that_is_there_is_part_of_what_documents_depend_on():
    config = tiny_config()
    config["data"] |= {
        "source": "folder",
        "settings": {
            "path": "in",
            "image_size": config["data"]["settings"]["image_size"],
        },
    }

    def inputs(**section):
        config["data"]["ingest"] = section or None
        return System.make(System.complete(config)).stage_inputs["documents"]["data"]

    plain = inputs()
    assert set(plain) == {"source", "settings", "train", "validation", "test"}
    assert set(plain["settings"]) == {
        *("path", "image_size", "validation_percent", "test_percent")
    }
    strict, more = inputs(duplicates=4), inputs(duplicates=4, workers=3)
    assert strict["ingest"]["duplicates"] == 4 and strict == more != plain
    config["data"] |= {
        "source": "shapes",
        "settings": tiny_config()["data"]["settings"],
    }
    with pytest.raises(ValueError, match="data.ingest is for folder"):
        inputs(duplicates=4)
