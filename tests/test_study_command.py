"""launch/study.py: which runs share what, and the whole of it in small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cm3leon_jax.evaluation.study import NATS
from cm3leon_jax.system import System
from cm3leon_jax.training.flops import pair_flops
from configs import shapes

ROOT = Path(__file__).parent.parent
SMALL = {
    "data.settings.entities": 60,
    "data.settings.new": 10,
    "data.settings.documents": 600,
    "data.settings.head": 10,
    "data.train": 600,
    "data.validation": 40,
    "data.test": 60,
    "image_tokenizer.validation_pictures": 8,
    "image_tokenizer.model.channels": 16,
    "image_tokenizer.training.optimizer.steps": 6,
    "image_tokenizer.training.optimizer.warmup": 2,
    "image_tokenizer.training.unquantised_steps": 2,
    "image_tokenizer.training.restart_until": 5,
    "retrieval.encoder.training.optimizer.steps": 4,
    "retrieval.encoder.training.optimizer.warmup": 1,
    "retrieval.encoder.training.batch_size": 16,
    "retrieval.encoder.model.vision_layers": 1,
    "retrieval.encoder.model.text_layers": 1,
    "decoder.layers": 1,
    "decoder.width": 32,
    "decoder.heads": 2,
    "decoder.mlp": 64,
    "pretrain.optimizer.steps": 10,  # of which a fifth is more than the warmup
    "pretrain.optimizer.warmup": 1,
    "pretrain.checkpoint_every": 5,
    "pretrain.validation_batches": 1,
}


@pytest.fixture(scope="module")
def study():
    """The script as a module, as its neighbours import `command`."""
    path = ROOT / "launch" / "study.py"
    program = (
        f"import sys, json; sys.argv = ['study.py']; sys.path[:0] = [{str(ROOT)!r}, "
        f"{str(path.parent)!r}]\n"
        "import study\n"
        "from configs import shapes\n"
        "from cm3leon_jax.system import System\n"
        "whole = System.complete(shapes.get_config('study').to_dict())\n"
        "made = {n: study._config(whole, n) for n in study.RUNS}\n"
        "system = System.make(whole)\n"
        "from cm3leon_jax.evaluation.study import retriever_flops\n"
        "extra = retriever_flops(system)\n"
        "study._check_checkpoints(system.pretrain)\n"
        "import dataclasses\n"
        "few = dataclasses.replace(system.pretrain, keep=11)\n"
        "try:\n"
        "    study._check_checkpoints(few)\n"
        "except ValueError as error:\n"
        "    extra['refused'] = str(error)\n"
        "print(json.dumps([made, extra]))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


def test_runs_differ_in_pretraining_alone(study):
    configs, _ = study
    whole = System.make(shapes.get_config("study").to_dict()).stage_inputs
    seen = set()
    for name, config in configs.items():
        made = System.make(config).stage_inputs
        differing = {key for key in made if made[key] != whole[key]}
        assert differing <= {"pretrain"}, name
        assert name.startswith("baseline") == ("bank" not in made)
        seen.add(json.dumps(made["pretrain"], sort_keys=True))
    assert len(seen) == len(configs) == 12


def test_the_retriever_costs_less_than_a_run(study):
    _, extra = study
    assert 1e12 < extra["retriever"] < 2e13 and 1e11 < extra["bank"] < 1e13
    system = System.make(shapes.get_config("study").to_dict())
    encoder = system.retrieval.encoder
    seen = encoder.training.batch_size * encoder.training.optimizer.steps
    once = pair_flops(encoder.model)
    more = pair_flops(encoder.model, encoder.training.views) - once
    assert extra["retriever"] == pytest.approx(3 * (once + more) * seen, rel=1e-12)
    # A vector for each document and its queries, and two searches of all vectors.
    size, documents = encoder.model.embed, system.data.train
    search = 2 * (2 * documents * size)
    assert extra["bank"] == pytest.approx(documents * (2 * once + search), rel=1e-12)


def test_a_study_keeps_every_checkpoint(study):
    _, extra = study
    assert "pretrain.keep=11 of the 12 checkpoints" in extra["refused"]


def test_runs_of_other_settings_are_left_out(tmp_path):
    """What is collected is of the config that is asked for, and of its protocol."""
    program = (
        f"import sys, json; sys.argv = ['study.py']; sys.path[:0] = [{str(ROOT)!r}, "
        f"{str(ROOT / 'launch')!r}]\n"
        "import study\n"
        "from pathlib import Path\n"
        "from configs import shapes\n"
        "from cm3leon_jax.config import config_hash\n"
        "from cm3leon_jax.evaluation.protocol import result_file\n"
        "from cm3leon_jax.system import System\n"
        "whole = System.complete(shapes.get_config('study').to_dict())\n"
        f"root = Path({str(tmp_path)!r})\n"
        "def put(path, **found):\n"
        "    path.parent.mkdir(parents=True, exist_ok=True)\n"
        "    path.write_text(json.dumps(found))\n"
        "for name in ('retrieval-0', 'baseline-0', 'noisy'):\n"
        "    mine = study._config(whole, name)\n"
        "    if name == 'noisy': mine['pretrain']['optimizer']['peak'] = 1.0\n"
        "    made = config_hash(System.make(mine).stage_inputs['pretrain'])\n"
        "    folder = root / 'runs' / name\n"
        "    point = {'step': 1, 'flops': 1e12, 'nats': 2.0}\n"
        "    put(folder / 'pretrain/DONE.json', inputs_hash=made, seconds=1.0)\n"
        "    put(folder / 'curve.json', inputs_hash=made, points=[point])\n"
        "    path = result_file(folder, study._protocol(mine), 'pretrain')\n"
        "    score = {'likelihood/nats@0': {'value': 2.0}}\n"
        "    put(path, inputs_hash=made, scores=score)\n"
        "    other = path.with_name('entities-000000.pretrain.json')\n"
        "    put(other, inputs_hash=made, scores={})\n"
        "found = study._collect(whole, root)\n"
        "print(json.dumps({n: run['nats'] for n, run in found['runs'].items()}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "retrieval-0": {"0": 2.0},
        "baseline-0": {"0": 2.0},
    }
    assert "study: noisy was made with other settings: left out" in done.stderr


@pytest.mark.slow
def test_the_whole_study_in_small(tmp_path):
    flags = [f"--config.{key}={value}" for key, value in SMALL.items()]
    line = [
        *(sys.executable, "launch/study.py", "--config", "configs/shapes.py:study"),
        *("--workdir", str(tmp_path), "--runs", "retrieval-0,baseline-0", *flags),
    ]
    found = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    said = json.loads(found.stdout.splitlines()[-1])
    assert said["runs"] == ["retrieval-0", "baseline-0"]
    result = json.loads((tmp_path / "study.json").read_text())
    for run in result["runs"].values():
        assert [point["step"] for point in run["curve"]] == [5, 10]
        assert run["curve"][1]["flops"] == 2 * run["curve"][0]["flops"]
    assert set(result["runs"]["retrieval-0"]["nats"]) == set(NATS)
    assert set(result["runs"]["baseline-0"]["nats"]) == {"0"}
    assert "entity/tail@2_oracle" in result["runs"]["retrieval-0"]["scores"]
    assert "<svg" in (tmp_path / "study.html").read_text()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("DONE.json")}
    curves = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("curve.json")}
    again = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert again.returncode == 0, again.stderr
    assert all(p.stat().st_mtime_ns == t for p, t in (before | curves).items())
