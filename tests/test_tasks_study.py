"""launch/tasks_study.py: what a single-task run sees, and which runs there are."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_tasks

from cm3leon_jax.data.task_mixture import TaskMixture
from cm3leon_jax.evaluation import task_report
from cm3leon_jax.system import System

ROOT = Path(__file__).parent.parent


def test_a_single_task_sees_exactly_its_samples_of_the_mixture():
    counts, weights = [20, 7, 31], [1.0, 3.0, 0.5]
    whole = TaskMixture(counts, weights, seed=3)
    owners = np.repeat(np.arange(3), counts)
    for only in ([0], [1], [2], [0, 2]):
        some = TaskMixture(counts, weights, seed=3, only=only)
        for epoch in (0, 1, 5):
            records, passes = whole.locate(epoch, np.arange(whole.size))
            mine = np.isin(owners[records], only)
            assert some.size == mine.sum()
            found = some.locate(epoch, np.arange(some.size))
            np.testing.assert_array_equal(found[0], records[mine])
            np.testing.assert_array_equal(found[1], passes[mine])
            backwards = np.arange(some.size)[::-1]
            again = some.locate(epoch, backwards)
            np.testing.assert_array_equal(again[0], found[0][::-1])


def test_only_tasks_that_there_are():
    config = tiny_tasks.tiny_config()
    config["sft"]["only"] = ("edit", "write")
    with pytest.raises(ValueError, match="sft.only: 'write' is not one of sft.tasks"):
        System.make(config)


def test_runs_differ_in_tuning_alone():
    program = (
        f"import sys, json; sys.argv = ['x']; sys.path[:0] = [{str(ROOT)!r}, "
        f"{str(ROOT / 'launch')!r}]\n"
        "import tasks_study\n"
        "from configs import shapes\n"
        "from cm3leon_jax.system import System\n"
        "whole = System.complete(shapes.get_config('full').to_dict())\n"
        "shares = dict.fromkeys(whole['sft']['tasks'], 0.05)\n"
        "runs = tasks_study.runs_of(whole, 'variation', 'W', shares)\n"
        "print(json.dumps([whole, runs]))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT
    )
    assert found.returncode == 0, found.stderr
    whole, runs = json.loads(found.stdout.splitlines()[-1])
    before = System.make(whole).stage_inputs
    seen = set()
    for name, (changes, _) in runs.items():
        config = json.loads(json.dumps(whole))
        steps = changes.pop("steps")
        config["sft"] |= changes
        config["sft"]["optimizer"]["steps"] = steps
        config["sft"]["optimizer"]["warmup"] = min(steps, 10)
        made = System.make(config).stage_inputs
        assert {key for key in made if made[key] != before[key]} == {"sft"}, name
        seen.add(json.dumps(made["sft"], sort_keys=True, default=list))
    assert len(seen) == len(runs) == len(whole["sft"]["tasks"]) + 3
    alone = runs["alone-edit"][0]
    assert alone["only"] == ["edit"]
    assert runs["added-mixed"][0]["start"].endswith("without/sft")


def test_the_report_compares_together_and_alone(tmp_path):
    score = {"value": 0.9, "low": 0.88, "high": 0.92, "n": 1000}
    worse = score | {"value": 0.7}
    study = {
        "tasks": {"edit": {"changed": {"together": worse, "alone": score}}},
        "added": {
            "task": "ground",
            "runs": {"before": {"edit/kept": score}, "mixed": {"edit/kept": worse}},
        },
    }
    (tmp_path / task_report.STUDY).write_text(json.dumps(study))
    scores = {"edit/changed": score, "edit/changed_unseen_wording": worse}
    page = task_report.section(tmp_path, [{"scores": scores, "stale": ""}])
    assert "edit/changed" in page and "-0.200 <b>lost</b>" in page
    assert "0.92</td>" in page and "added to a tuned checkpoint" in page
    assert task_report.section(tmp_path / "nothing", []) == ""
