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
