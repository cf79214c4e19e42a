"""The bank of a system: its stages, neighbour files, changes, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import tiny_job
import tiny_system
from test_commands import launch

from cm3leon_jax import config, encoders, memory, stages, workdir
from cm3leon_jax.data import sources
from cm3leon_jax.data.documents import Document, Text
from cm3leon_jax.evaluation import neighbours as report
from cm3leon_jax.retrieval import bank_build, neighbours
from cm3leon_jax.retrieval.bank import Bank
from cm3leon_jax.retrieval.strategy import Calibration
from cm3leon_jax.system import System

STAGES = ["prepare_data", "train_text_tokenizer", "train_dual_encoder", "build_bank"]


def retrieval_config(**changes):
    c = tiny_system.tiny_config()
    c["data"] |= {"source": "entities", "train": 120, "validation": 32, "test": 8}
    c["data"]["settings"] |= {"entities": 12, "new": 3, "documents": 120}
    optimizer = {"peak": 1e-3, "warmup": 1, "steps": 2}
    model = {"image_size": 32, "patch": 16, "embed": 16, "text_vocab": 385}
    for tower in ("vision", "text"):
        model |= {f"{tower}_layers": 1, f"{tower}_width": 16, f"{tower}_heads": 2}
    model["text_length"] = 24
    encoder = {"kind": "trained", "model": model}
    encoder["training"] = {"optimizer": optimizer, "batch_size": 16}
    c["retrieval"] = {"encoder": encoder, "skip_above": 0.999} | changes
    return c


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    path = tmp_path_factory.mktemp("system")
    stages.run(retrieval_config(), path, STAGES)
    return path


def test_the_bank_holds_the_training_documents(built):
    system = System.load(built)
    embedder = encoders.load(system.retrieval.encoder, built)
    bank = Bank.load(built / "bank", embedder)
    documents = sources.read_documents(built / "documents", "train")
    assert bank.ids == [document.id for document in documents]
    np.testing.assert_allclose(
        bank[[0, 77]], embedder.documents([documents[0], documents[77]])[0], atol=1e-5
    )
    assert bank.documents([77])[0].id == documents[77].id
    before = (built / "bank" / "DONE.json").stat().st_mtime_ns
    stages.run(retrieval_config(), built, STAGES)
    assert (built / "bank" / "DONE.json").stat().st_mtime_ns == before


def test_neighbours_are_rows_of_the_bank_but_not_the_document_itself(built):
    counts = json.loads((built / "bank" / "skipped.json").read_text())
    for split, count in (("train", 120), ("validation", 32)):
        table = np.load(built / "bank" / f"neighbours-{split}.npy")
        assert table.shape == (count, 4) and table.dtype == np.int32
        assert ((table >= -1) & (table < 120)).all()
        assert (table >= 0).mean() > 0.5
        if split == "train":
            assert not (table == np.arange(120)[:, None]).any()
            assert counts[split]["itself"] > 0
        for row in table:
            assert len(set(row[row >= 0])) == (row >= 0).sum()
        of_split = counts[split]
        assert of_split["places"] == 4 * count
        assert of_split["chosen"] == (table >= 0).sum()
        assert of_split["empty"] == (table < 0).sum()


class Sameness:
    """Documents of one word; its letter says where they lie."""

    name, size = "letters", 8

    def texts(self, texts):
        return np.stack(
            [np.eye(8, dtype=np.float32)["abcdefgh".index(t[0])] for t in texts]
        )

    def images(self, images):
        return np.zeros((0, 8), np.float32)

    def documents(self, documents):
        vectors = self.texts([document.segments[0].text for document in documents])
        return vectors, vectors


def test_the_search_goes_on_behind_near_duplicates(tmp_path):
    words = ["a"] * 60 + ["b"] * 2 + ["c"]
    documents = [Document((Text(w),), id=f"{i}") for i, w in enumerate(words)]
    bank = bank_build.build(tmp_path, Sameness(), documents)
    counts = neighbours.build(
        bank, Sameness(), documents, "train", in_bank=True, per_query=(2, 2),
        skip_above=0.9, query_dropout=0.0, seed=0, part_rows=40,
    )  # fmt: skip
    table = np.load(tmp_path / "neighbours-train.npy")
    assert (table[:60] == [60, 62, -1, -1]).all()  # one of the two alike, and the other
    assert (table[60:62, :2] == [0, 62]).all() and (table[62, :2] == [0, 60]).all()
    assert counts["empty"] == 63 * 2 and counts["chosen"] == 63 * 2


def test_parts_that_are_there_are_kept_and_are_no_other(tmp_path):
    documents = [Document((Text("abcdefgh"[i % 8]),), id=f"{i}") for i in range(30)]
    bank = bank_build.build(tmp_path, Sameness(), documents)
    choice = {"in_bank": True, "per_query": (1, 1), "skip_above": 0.9}
    choice |= {"query_dropout": 0.0, "seed": 0}
    made = []
    for part_rows in (30, 7):
        folder = tmp_path / "parts"
        for path in folder.glob("*"):
            path.unlink()
        neighbours.build(
            bank, Sameness(), documents, "train", part_rows=part_rows, **choice
        )
        made.append(np.load(tmp_path / "neighbours-train.npy"))
    np.testing.assert_array_equal(made[0], made[1])
    np.save(tmp_path / "parts" / "train-00001.npy", np.full((7, 2), 5, np.int32))
    neighbours.build(bank, Sameness(), documents, "train", part_rows=7, **choice)
    table = np.load(tmp_path / "neighbours-train.npy")
    assert (table[7:14] == 5).all() and (table[:7] == made[0][:7]).all()


def test_words_are_dropped_from_queries_by_the_number_of_the_document(
    tmp_path, monkeypatch
):
    class Noting(Sameness):
        def texts(self, texts):
            self.asked += texts
            return super().texts(texts)

    words = [f"a{i} w{i} x{i} y{i} z{i}" for i in range(30)]
    documents = [Document((Text(w),), id=f"{i}") for i, w in enumerate(words)]
    monkeypatch.setattr(
        Sameness,
        "texts",
        lambda self, texts: np.eye(8, dtype=np.float32)[
            [sum(map(ord, t)) % 8 for t in texts]
        ],
    )
    bank = bank_build.build(tmp_path, Sameness(), documents)
    choice = {"in_bank": True, "per_query": (2, 0), "skip_above": 2.0}
    choice |= {"query_dropout": 0.4, "seed": 3}
    heard = []
    for at_once, part_rows in ((512, 30), (7, 30), (512, 11)):
        monkeypatch.setattr(neighbours, "_AT_ONCE", at_once)
        for path in (tmp_path / "parts").glob("*"):
            path.unlink()
        embedder = Noting()
        embedder.asked = []
        neighbours.build(
            bank, embedder, documents, "train", part_rows=part_rows, **choice
        )
        heard.append(embedder.asked)
    assert heard[0] == heard[1] == heard[2] and len(heard[0]) == 30
    missing = [
        set(w.split()) - set(t.split()) for w, t in zip(words, heard[0], strict=True)
    ]
    assert 0.3 < np.mean([len(m) for m in missing]) / 5 < 0.5
    kept = [[word[0] for word in t.split()] for t in heard[0]]
    assert len(set(map(tuple, kept))) > 8  # not the same words of each


def test_a_streamed_bank_is_read_less_often_for_the_same_neighbours(
    tmp_path, monkeypatch
):
    documents = [Document((Text("abcdefgh"[i % 8]),), id=f"{i}") for i in range(40)]
    bank_build.build(tmp_path, Sameness(), documents)
    monkeypatch.setattr(neighbours, "_AT_ONCE", 5)
    searches, real = [], Bank.search

    def search(self, queries, k, mesh=None):
        searches.append(len(queries))
        return real(self, queries, k, mesh)

    monkeypatch.setattr(Bank, "search", search)
    made = []
    for size, rounds in (({}, 8), ({"resident_bytes": 0, "block_bytes": 2048}, 1)):
        searches.clear()
        for path in (tmp_path / "parts").glob("*"):
            path.unlink()
        neighbours.build(
            Bank.load(tmp_path, **size), Sameness(), documents, "train",
            in_bank=True, per_query=(2, 0), skip_above=2.0, query_dropout=0.0, seed=0,
        )  # fmt: skip
        made.append(np.load(tmp_path / "neighbours-train.npy"))
        assert len(searches) == rounds
    np.testing.assert_array_equal(*made)


def test_a_bank_of_parts_that_were_there_has_no_rate(built, tmp_path):
    work = tmp_path / "system"
    shutil.copytree(built, work)
    rate = json.loads((work / "bank" / workdir.DONE).read_text())
    assert rate["documents_per_second"] > 0
    (work / "bank" / workdir.DONE).unlink()  # as if killed before its end
    made = stages.run(retrieval_config(), work, ["build_bank"])["build_bank"]
    assert made["documents"] == 120 and made["documents_per_second"] == 0


def test_a_damaged_bank_is_mended_as_its_message_says(built, tmp_path):
    work = tmp_path / "system"
    shutil.copytree(built, work)
    table = np.load(work / "bank" / "neighbours-train.npy")
    path = work / "bank" / "vectors-00000.npy"
    path.write_bytes(path.read_bytes()[:-8])
    stages.run(retrieval_config(), work, ["build_bank"], overwrite=True)
    with pytest.raises(ValueError, match="delete WORKDIR/bank, then run build_bank ag"):
        Bank.load(work / "bank")
    shutil.rmtree(work / "bank")
    stages.run(retrieval_config(), work, ["build_bank"])
    assert len(Bank.load(work / "bank")) == 120
    np.testing.assert_array_equal(
        np.load(work / "bank" / "neighbours-train.npy"), table
    )


def test_a_threshold_that_does_not_tell_copies_apart_is_said(
    built, tmp_path, caplog, monkeypatch
):
    work = tmp_path / "system"
    shutil.copytree(built, work, ignore=shutil.ignore_patterns("bank"))
    found = {"skip_above": 0.5, "duplicates": 0.8, "same_entity": 0.1}
    found |= {"duplicate_pairs": 9, "same_entity_pairs": 9}
    for met in (True, False):
        one = Calibration(**found, met=met)
        monkeypatch.setattr(neighbours, "thresholds", lambda *_, one=one: one)
        shutil.rmtree(work / "bank", ignore_errors=True)
        caplog.clear()
        stages.run(retrieval_config(skip_above=None), work, ["build_bank"])
        done = json.loads((work / "bank" / "DONE.json").read_text())
        assert done["met"] is met and done["skip_above"] == 0.5
        assert ("drops 80.0 % of copies (99 % wanted)" in caplog.text) is not met
        assert ("no threshold drops 99 %" in report.section(work / "bank")) is not met


def test_thresholds_need_documents_that_say_what_they_are_of(built):
    documents = sources.read_documents(built / "documents", "train")
    system = System.load(built)
    embedder = encoders.load(system.retrieval.encoder, built)
    found = neighbours.thresholds(embedder, documents[:32], documents[32:], 0)
    assert -1 <= found.skip_above <= 1 and found.same_entity_pairs > 0
    plain = [d for d in documents if "entity" not in d.metadata]
    with pytest.raises(ValueError, match="retrieval.skip_above=None.*give it a number"):
        neighbours.thresholds(embedder, plain[:10], plain[10:], 0)


def test_documents_are_added_and_removed_from_the_shell(built, tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    document = sources.read_documents(built / "documents", "validation")[0]
    from PIL import Image as Pillow

    for i in range(2):
        Pillow.fromarray(document.segments[1].array).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"{document.segments[0].text} again {i}")
    kept = Bank.load(built / "bank").ids[5]
    (tmp_path / "ids.txt").write_text(f"{kept}\n\n")
    done = launch(
        *("build_bank.py", "--workdir", built, "--add", folder),
        *("--remove", tmp_path / "ids.txt"),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == (
        {"removed": 1, "documents": 121, "added": 2, "skipped": 0}
    )
    bank = Bank.load(built / "bank")
    assert len(bank) == 121 and bank.rows == 122
    embedder = encoders.load(System.load(built).retrieval.encoder, built)
    _, rows = bank.search(embedder.documents([document])[0], 121)
    assert 5 not in rows and {120, 121} <= set(rows[0].tolist())
    assert bank.documents([121])[0].segments[0].text.endswith("again 1")
    table = np.load(built / "bank" / "neighbours-train.npy")
    assert table.max() < 120
    for arguments, message in (
        (("--add", folder), "has these already"),
        (("--add", tmp_path / "no"), "neither a split of"),
        (("--remove", tmp_path / "ids.txt"), "nothing was removed"),
        (("--add", "x", "--config", "configs/shapes.py:quick"), "no --config"),
    ):
        done = launch("build_bank.py", "--workdir", built, *arguments)
        assert done.returncode == 2 and message in done.stderr.splitlines()[-1], done


def test_a_split_can_be_added(built):
    before = Bank.load(built / "bank").rows
    made = memory.add(built, "test")
    bank = Bank.load(built / "bank")
    assert made["added"] == 8 and bank.rows == before + 8
    documents = sources.read_documents(built / "documents", "test")
    assert bank.ids[before:] == [document.id for document in documents]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"storage": "float16"}, "retrieval.storage='float16': choose one of float32"),
        ({"per_query": (0, 0)}, r"retrieval.per_query=\(0, 0\) must be two numbers"),
        ({"per_query": (2,)}, r"retrieval.per_query=\(2,\) must be two numbers"),
        ({"documents": 5}, r"retrieval.documents=5 must be 1 … 4"),
        ({"fewest": 4}, "retrieval.fewest=4"),
        ({"skip_above": 1.5}, "retrieval.skip_above=1.5"),
        ({"query_dropout": 1.0}, "retrieval.query_dropout=1.0"),
        ({"noise": 2.0}, "retrieval.noise=2.0"),
        ({"bank": 1}, "unknown setting retrieval.bank"),
        ({"encoder": {"kind": "clap"}}, "retrieval.encoder.kind='clap'"),
        ({"encoder": {"kind": "clip"}}, "retrieval.encoder.path is empty"),
        ({"encoder": {"kind": "trained"}}, "needs the sections model and training"),
    ],
)
def test_impossible_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        System.make(retrieval_config(**changes))


def test_sizes_that_must_agree(built):
    c = retrieval_config()
    c["retrieval"]["encoder"]["model"]["text_vocab"] = 384
    with pytest.raises(ValueError, match="text_vocab=384 must be vocabulary.text"):
        System.make(c)
    c = retrieval_config()
    c["retrieval"]["encoder"]["model"]["image_size"] = 64
    with pytest.raises(ValueError, match="image_size=64 and image_tokenizer"):
        System.make(c)


def test_what_depends_on_the_bank_and_what_does_not():
    plain = System.make(tiny_system.tiny_config())
    assert "bank" not in stages.stages_of(plain)
    one = System.make(retrieval_config())
    whole = System.complete(retrieval_config())
    assert whole["retrieval"]["encoder"]["model"]["mlp_ratio"] == 4
    assert System.make(whole).stage_inputs == one.stage_inputs
    of_sft = ("prepare_tasks", "tokenize_tasks", "sft")
    assert stages.stages_of(one) == [x for x in stages.STAGES if x not in of_sft]
    for changes, folders in (
        ({"storage": "int8"}, {"bank", "pretrain"}),
        ({"weight": 0.1}, {"pretrain"}),
        ({"documents": 2}, {"pretrain"}),
    ):
        other = System.make(retrieval_config(**changes)).stage_inputs
        assert {k for k in other if other[k] != one.stage_inputs[k]} == folders


def test_a_system_without_retrieval_has_no_bank(tmp_path):
    with pytest.raises(ValueError, match="has no stage build_bank"):
        stages.run(tiny_system.tiny_config(), tmp_path, ["build_bank"])
    assert not (tmp_path / config.FILE).exists()
    with pytest.raises(FileNotFoundError, match="'documents' has not finished"):
        stages.run(retrieval_config(), tmp_path, ["build_bank"])
    with pytest.raises(FileNotFoundError, match="'bank' has not finished"):
        memory.remove(tmp_path, ["x"])
    assert workdir.DONE == "DONE.json"


MEMBER = """
from pathlib import Path
from test_memory import STAGES, retrieval_config
from cm3leon_jax import stages
stages.run(retrieval_config(), Path(sys.argv[1]), STAGES)
"""


@pytest.mark.slow
def test_two_processes_build_the_bank_that_one_does(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    stages.run(retrieval_config(), one, STAGES)
    shutil.copytree(one, two, ignore=shutil.ignore_patterns("bank"))
    tiny_job.run(MEMBER, two, processes=2, devices=2)
    banks = [Bank.load(path / "bank") for path in (one, two)]
    assert banks[0].ids == banks[1].ids
    every = range(banks[0].rows)
    np.testing.assert_allclose(banks[0][every], banks[1][every], atol=1e-5)
    for split in memory.SPLITS:
        tables = [
            np.load(neighbours.file_of(path / "bank", split)) for path in (one, two)
        ]
        np.testing.assert_array_equal(*tables)
