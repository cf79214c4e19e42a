"""launch/tasks_study.py: what a single-task run sees, and which runs there are."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_tasks

from cm3leon_jax.data import task_sources
from cm3leon_jax.data.task_mixture import TaskMixture
from cm3leon_jax.evaluation import task_report
from cm3leon_jax.system import System
from cm3leon_jax.workdir import DONE

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


def test_a_run_on_some_tasks_can_do_those_alone(monkeypatch, tmp_path):
    monkeypatch.setitem(task_sources.SOURCES, "shapes", tiny_tasks.WORLD)
    config = tiny_tasks.tiny_config()
    assert System.make(config).sft.trained(tmp_path) == tiny_tasks.NAMES
    config["sft"]["only"] = ("edit",)
    assert System.make(config).sft.trained(tmp_path) == ("edit",)
    config["sft"]["start"] = "elsewhere/sft"  # which had the others
    assert System.make(config).sft.trained(tmp_path) == tiny_tasks.NAMES
    (tmp_path / DONE).write_text('{"trained": ["answer", "edit"]}')  # it had one other
    assert System.make(config).sft.trained(tmp_path) == ("answer", "edit")


def test_runs_differ_in_tuning_alone():
    program = (
        f"import sys, json; sys.argv = ['x']; sys.path[:0] = [{str(ROOT)!r}, "
        f"{str(ROOT / 'launch')!r}]\n"
        "import tasks_study\n"
        "from configs import shapes\n"
        "from cm3leon_jax.system import System\n"
        "whole = System.complete(shapes.get_config('full').to_dict())\n"
        "def share(some): return 0.04 * len(some)\n"
        "runs = tasks_study.runs_of(whole, 'variation', 'W', share, "
        "('variation', 'edit', 'reconstruction'))\n"
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
        others = {"order-autoregressive": {"tasks", "task_tokens"}}
        others["class-before"] = {"task_tokens"}
        changed = {key for key in made if made[key] != before[key]}
        assert changed == {"sft"} | others.get(name, set()), name
        seen.add(json.dumps(made["sft"], sort_keys=True, default=list))
    assert len(seen) == len(runs) == len(whole["sft"]["tasks"]) + 7
    assert runs["without"][1] == ["edit", "reconstruction"]
    alone = runs["alone-edit"][0]
    assert alone["only"] == ["edit"]
    assert runs["added-mixed"][0]["start"].endswith("without/sft")
    assert runs["class-added"][0]["start"].endswith("class-before/sft")
    assert runs["class-before"][0]["classes"][-1] == "diamond"
    both = [runs[f"order-{name}"][0] for name in ("cm3", "autoregressive")]
    assert both[0]["only"] == both[1]["only"] and "answer" in both[0]["only"]


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


def test_less_of_a_seam_is_no_loss(tmp_path):
    few, many = ({"value": v, "low": v, "high": v, "n": 9} for v in (1.1, 1.9))
    seams = {"seams_offgrid": {"together": few, "alone": many}}
    study = {"tasks": {"infill": seams}}
    (tmp_path / task_report.STUDY).write_text(json.dumps(study))
    page = task_report.section(tmp_path, [])
    assert "+0.800" in page and "lost</b>" not in page


SMALL = {
    "data.train": 120,
    "data.validation": 20,
    "data.test": 20,
    "image_tokenizer.validation_pictures": 8,
    "image_tokenizer.model.channels": 16,
    "image_tokenizer.training.optimizer.steps": 6,
    "image_tokenizer.training.optimizer.warmup": 2,
    "image_tokenizer.training.unquantised_steps": 2,
    "image_tokenizer.training.restart_until": 5,
    "decoder.layers": 1,
    "decoder.width": 32,
    "decoder.heads": 2,
    "decoder.mlp": 64,
    "pretrain.optimizer.steps": 4,
    "pretrain.optimizer.warmup": 1,
    "pretrain.validation_batches": 1,
    "sft.examples.train": 24,
    "sft.examples.validation": 12,
    "sft.examples.test": 12,
    "sft.optimizer.steps": 40,
    "sft.optimizer.warmup": 4,
    "sft.validation_batches": 1,
    "sampling.text_candidates": 1,
}
PROTOCOL = """from ml_collections import ConfigDict
def get_config():
    return ConfigDict({"name": "tiny", "world": "shape_tasks", "split": "test",
        "documents": 4, "tasks": ("answer", "segment"), "shown": 1, "seed": 0})
"""


@pytest.mark.slow
def test_the_whole_study_in_small(tmp_path):
    (tmp_path / "tiny.py").write_text(PROTOCOL)
    runs = ("order-cm3", "order-autoregressive", "class-added", "alone-segment")
    arguments = [
        *("--config", "configs/shapes.py:full", "--workdir", tmp_path / "run"),
        *(
            "--protocol",
            tmp_path / "tiny.py",
            "--runs",
            ",".join((*runs, "added-alone")),
        ),
        *(f"--config.{key}={value}" for key, value in SMALL.items()),
    ]
    found = subprocess.run(
        [sys.executable, ROOT / "launch" / "tasks_study.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert found.returncode == 0, found.stderr
    result = json.loads(
        Path(json.loads(found.stdout.splitlines()[-1])["study"]).read_text()
    )
    assert set(result["orders"]) == {"CM3", "autoregressive"}
    for scores in result["orders"].values():
        assert {"answer/accuracy", "caption/objects", "science/accuracy"} <= set(scores)
    assert set(result["classes"]) == {"before", "after", "at once"}
    assert "segment/iou/star" not in result["classes"]["before"]
    assert set(result["added"]["runs"]) == {"before", "alone"}
    assert set(result["tasks"]) == {"segment"}
    # Only what differs is made anew.
    study = tmp_path / "run" / "study"
    own = {
        name: {
            f.name
            for f in (study / name).iterdir()
            if f.is_dir() and not f.is_symlink()
        }
        for name in (*runs, "class-before")
    }
    made = {name: folders - {"eval", "samples"} for name, folders in own.items()}
    assert made["order-autoregressive"] == {"tasks", "task_tokens", "sft"}
    assert made["class-before"] == {"task_tokens", "sft"}
    assert made["order-cm3"] == made["class-added"] == made["alone-segment"] == {"sft"}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "CM3 or autoregressive" in page and "A class added" in page
