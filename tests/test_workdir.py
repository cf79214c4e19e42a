"""Stages run once, refuse changed settings, and go on where they were cut off."""

import pytest

from cm3leon_jax import workdir


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
