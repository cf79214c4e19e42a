"""Stages run once, refuse changed settings, and go on where they were cut off."""

import pytest
import tiny_system

from cm3leon_jax import config, stages, workdir


def test_a_stage_runs_once(tmp_path):
    runs = []

    def work():
        runs.append(1)
        return {"count": 3}

    first = workdir.run_stage(tmp_path / "s", {"a": 1}, work)
    again = workdir.run_stage(tmp_path / "s", {"a": 1}, work)
    assert len(runs) == 1 and first == again == workdir.results(tmp_path / "s")
    assert first["count"] == 3


def test_changed_inputs_are_refused_and_nothing_is_lost(tmp_path):
    kept = tmp_path / "s" / "precious"
    workdir.run_stage(
        tmp_path / "s", {"a": {"b": 1}}, lambda: {"n": kept.write_text("x")}
    )
    with pytest.raises(FileExistsError, match=r"a\.b: 1 -> 2"):
        workdir.run_stage(tmp_path / "s", {"a": {"b": 2}}, dict)
    assert kept.is_file()
    workdir.run_stage(tmp_path / "s", {"a": {"b": 2}}, dict, overwrite=True)
    assert not kept.exists()


def test_an_interrupted_stage_is_not_done_and_goes_on(tmp_path):
    def crash():
        (tmp_path / "s" / "half").touch()
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        workdir.run_stage(tmp_path / "s", {"a": 1}, crash)
    with pytest.raises(FileNotFoundError, match="has not finished"):
        workdir.results(tmp_path / "s")

    def resume():
        assert (tmp_path / "s" / "half").exists()
        return {}

    workdir.run_stage(tmp_path / "s", {"a": 1}, resume)
    assert workdir.results(tmp_path / "s")["seconds"] >= 0


def test_overwrite_says_what_it_deletes(tmp_path, caplog):
    workdir.run_stage(tmp_path / "s", {"a": 1}, dict)
    with pytest.raises(FileExistsError, match="--overwrite, which deletes that folder"):
        workdir.run_stage(tmp_path / "s", {"a": 2}, dict)
    workdir.run_stage(tmp_path / "s", {"a": 2}, dict, overwrite=True)
    assert f"deleting {tmp_path / 's'}" in caplog.text and "a: 1 -> 2" in caplog.text


def test_a_damaged_file_is_named_with_its_mend(tmp_path):
    workdir.run_stage(tmp_path / "s", {"a": 1}, dict)
    (tmp_path / "s" / workdir.DONE).write_text("{")
    with pytest.raises(ValueError, match=r"s/DONE.json is damaged.*delete it"):
        workdir.results(tmp_path / "s")
    (tmp_path / "s" / workdir.BEGUN).write_text("")
    with pytest.raises(ValueError, match=r"s/inputs.json is damaged.*anew"):
        workdir.run_stage(tmp_path / "s", {"a": 1}, dict)


EARLY = ["prepare_data", "train_text_tokenizer"]


def test_one_stage_leaves_the_config_and_the_others_alone(tmp_path):
    given = tiny_system.tiny_config()
    stages.run(given, tmp_path, EARLY)
    before = config.read(tmp_path)
    given["data"]["train"] = 65
    for names, overwrite, message in (
        (["train_text_tokenizer"], False, r"documents was made .*data.train: 64 -> 65"),
        (["train_text_tokenizer"], True, "does not make it anew: launch/run_all.py"),
        (EARLY, False, "give --overwrite, which deletes"),
    ):
        with pytest.raises(FileExistsError, match=message):
            stages.run(given, tmp_path, names, overwrite)
    assert config.read(tmp_path) == before
    assert (tmp_path / "text_tokenizer" / workdir.DONE).is_file()
    stages.run(given, tmp_path, EARLY, True)
    assert config.read(tmp_path)["data"]["train"] == 65
    assert workdir.results(tmp_path / "documents")["train"]["documents"] == 65


def test_bookkeeping_may_change_and_defaults_are_kept(tmp_path):
    given = tiny_system.tiny_config()
    stages.run(given, tmp_path, EARLY)
    given["pretrain"]["log_every"] = 9
    stages.run(given, tmp_path, EARLY)
    kept = config.read(tmp_path)
    assert kept["pretrain"]["log_every"] == 9 and kept["pretrain"]["workers"] == 0


def test_a_cloud_folder_is_refused_before_anything_is_written():
    with pytest.raises(ValueError, match="mount the bucket"):
        stages.run(tiny_system.tiny_config(), "gs://bucket/run", EARLY)


def test_a_source_without_documents_says_the_commonest_reason(tmp_path):
    (tmp_path / "pairs").mkdir()
    for i in range(20):
        (tmp_path / "pairs" / f"{i}.txt").write_text("a caption")
    given = tiny_system.tiny_config()
    settings = {"path": str(tmp_path / "pairs"), "image_size": 32}
    given["data"] = {"source": "folder", "settings": settings}
    with pytest.raises(ValueError, match="has no documents.*no picture files"):
        stages.run(given, tmp_path / "run", EARLY)
    folder = tmp_path / "run" / "documents"
    assert not (folder / workdir.DONE).exists()
    assert not (folder / "train.json").exists()  # the next run looks again
