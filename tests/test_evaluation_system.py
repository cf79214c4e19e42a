"""Protocols on a real, tiny system: in training, in jobs, in the studies' commands."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_job
import tiny_sets
from test_public import Network
from tiny_system import tiny_config

from cm3leon_jax import config, stages
from cm3leon_jax.evaluation import public_job
from cm3leon_jax.evaluation.page import show
from cm3leon_jax.evaluation.protocol import Protocol
from cm3leon_jax.evaluation.public_sets import PublicConfig
from cm3leon_jax.training import metrics

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
PROTOCOL = Protocol(
    **{"name": "tiny", "world": "pairs", "split": "test", "documents": 12},
    **{"tasks": ("likelihood", "caption"), "shown": 2, "seed": 0},
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("system")
    stages.run(tiny_config(), path, protocols=[PROTOCOL], every=2)
    return path


def values(result):
    return {key: score["value"] for key, score in result["scores"].items()}


def test_what_is_measured_in_training_is_what_its_checkpoint_has(workdir):
    lines = [x for x in metrics.read(workdir / "pretrain") if "tiny/caption/words" in x]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        name = f"pretrain@{line['step']}"
        (file,) = workdir.glob(f"eval/tiny-*.{name}.json")
        inside = json.loads(file.read_text())
        after = stages.evaluate(workdir, PROTOCOL, name)
        assert values(after) == pytest.approx(values(inside), rel=1e-4)
        assert (
            line["tiny/likelihood/nats"] == inside["scores"]["likelihood/nats"]["value"]
        )
    assert list(workdir.glob("samples/tiny-*/caption/sheet.png"))


MEMBER = """
import json
from pathlib import Path
from cm3leon_jax import config, stages
from cm3leon_jax.evaluation import kept
from cm3leon_jax.evaluation.page import show
from cm3leon_jax.evaluation.protocol import Protocol
kept.PART = 4
protocol = config.make(Protocol, json.loads(sys.argv[1]), "protocol")
stages.evaluate(Path(sys.argv[2]), protocol, "pretrain")
"""


def test_a_job_of_two_measures_what_one_does(workdir, tmp_path):
    found = []
    settings = {
        key: getattr(PROTOCOL, key)
        for key in ("world", "split", "documents", "tasks", "shown", "seed")
    }
    for processes, devices in ((1, 2), (2, 1)):
        given = json.dumps(settings | {"name": f"of-{processes}"})
        tiny_job.run(MEMBER, given, workdir, devices=devices, processes=processes)
        (file,) = workdir.glob(f"eval/of-{processes}-*.json")
        found.append(values(json.loads(file.read_text())))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_public_sets_are_asked_of_a_real_system(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(public_job.features, "efficientnet_lite0", Network)
    tiny_sets.coco_prompts(tmp_path)

    def protocol(task, name, **settings):
        public = PublicConfig(
            set=name, image_size=32, features="efficientnet_lite0", **settings
        )
        return Protocol(
            **{"name": task, "world": "public", "split": "x", "documents": 20},
            **{"tasks": (task,), "shown": 2, "seed": 0, "public": public},
        )

    drawn = protocol("text_to_image", "coco_prompts", metrics=("fid",))
    drawn = stages.evaluate(workdir, drawn, "pretrain", data=tmp_path)
    assert set(drawn["scores"]) == {"text_to_image/frechet_mean@0"}
    tiny_sets.pictures(tmp_path, "images/{}.jpg")
    kept = protocol("reconstruction", "pictures", metrics=("fid",))
    kept = stages.evaluate(workdir, kept, "image_tokenizer", data=tmp_path)
    assert {"reconstruction/psnr", "reconstruction/codes_usage"} < set(kept["scores"])
    with pytest.raises(FileNotFoundError, match="lacks dataset_coco.json: put the set"):
        stages.evaluate(
            workdir, protocol("caption", "coco_karpathy"), "pretrain", data=tmp_path
        )


def test_a_checkpoint_of_another_vocabulary_is_refused(workdir, tmp_path):
    other = config.read(workdir)
    other["vocabulary"]["sentinels"] += 128
    config.write(tmp_path, other)
    for path in workdir.iterdir():
        if path.is_dir():
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(ValueError, match="other settings|was made with|layout"):
        stages.evaluate(tmp_path, PROTOCOL, "pretrain")


def launch(script, *arguments):
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_training_efficiency_measures_every_checkpoint(workdir, tmp_path):
    protocol = tmp_path / "protocol.py"
    source = ROOT / "configs/eval/training_efficiency.py"
    protocol.write_text(source.read_text())
    made = launch(
        *("training_efficiency.py", "--config", protocol, "--config.documents=10"),
        *("--workdir", workdir, "--baseline", workdir),
    )
    assert made["ratio"] == {"training": 1.0}
    assert len(made["curves"][0]) == len(made["curves"][1]) == 2
    kept = json.loads((workdir / "training_efficiency.json").read_text())
    assert kept["curves"] == made["curves"]


def test_the_tokenizer_study_runs_in_the_small(tmp_path):
    given = tmp_path / "tiny.py"
    given.write_text(
        "from ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict({tiny_config()!r}).lock()\n"
    )
    arguments = ("--config", given, "--workdir", tmp_path / "study")
    arguments += ("--codebooks", "16,256", "--factors", "16")
    arguments += ("--tokenizer_steps", "4", "--steps", "2")
    for _ in range(2):  # the second time all is done
        launch("tokenizer_study.py", *arguments)
    made = json.loads((tmp_path / "study/study.json").read_text())
    assert list(made["runs"]) == ["f16-16", "f16-256"]
    for run in made["runs"].values():
        assert run["tokens"] == 4 and "text_to_image/objects" in run["scores"]
        assert 0 < run["tokenizer"]["usage"] <= 1
    page = (tmp_path / "study/study.html").read_text()
    assert page.count("<tr>") == 3 and "f16-256" in page
    # More codes are dearer: what is the same are the updates, and the page says so.
    small, large = (run["flops"] for run in made["runs"].values())
    assert small < large and "same updates" in page and "same FLOPs" not in page
    assert "TFLOPs" in page and f"<td>{show(large / 1e12)}</td>" in page
