"""The command line: one clear line for a mistake, one JSON object for a result."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_system
from PIL import Image as Pillow

from cm3leon_jax import config, stages

LAUNCH = Path(__file__).parent.parent / "launch"
QUICK = "configs/shapes.py:quick"


def launch(script, *arguments):
    return subprocess.run(
        [sys.executable, str(LAUNCH / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=LAUNCH.parent,
        check=False,
    )


def size(path):
    with Pillow.open(path) as picture:
        return picture.size


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("system")
    stages.run(tiny_system.tiny_config(), path)
    Pillow.new("RGB", (40, 32), "red").save(path / "red.png")
    (path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    return path


@pytest.mark.parametrize(
    "config, message",
    [
        ("shapes.py:quik", "choose from quick, tuned, pretrained, full, study"),
        ("coco_fid30k.py:x", "choose from inception, offline"),
        ("icons.py:quick", "has no variants: leave out :quick"),
    ],
)
def test_variants_that_a_protocol_lacks_are_one_line(tmp_path, config, message):
    done = launch(
        *("evaluate.py", "--config", f"configs/eval/{config}", "--workdir", tmp_path)
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert config in done.stderr and message in done.stderr


def test_mistakes_end_in_one_line_that_says_the_mend(workdir, tmp_path):
    sample = ("sample.py", "--workdir", workdir)
    picture = ("--image", workdir / "red.png")
    for arguments, message in (
        (("pretrain.py", "--config", QUICK), "--workdir must have a value"),
        (
            ("pretrain.py", "--config", f"{QUICK}k", "--workdir", tmp_path),
            "choose from ['quick', 'study', 'full']",
        ),
        (
            ("pretrain.py", f"--config={QUICK}", "--config.pretrain.bach=1")
            + ("--workdir", tmp_path),
            "unknown setting pretrain.bach; pretrain has batch_size, ",
        ),
        (
            ("pretrain.py", "--config", QUICK, "--workdir", tmp_path / "new"),
            "the stage 'tokens' has not finished",
        ),
        (
            ("pretrain.py", "--config", QUICK, "--workdir", workdir),
            "choose another --workdir, or give --overwrite, which deletes",
        ),
        (
            ("pretrain.py", "--config", QUICK, "--workdir", "ftpx://bucket/run"),
            "drivers for gs:",
        ),
        (
            ("run_all.py", "--config", QUICK, "--config.protocol=configs/eval/no.py")
            + ("--workdir", tmp_path / "unwritten"),
            "protocol=configs/eval/no.py",
        ),
        (("evaluate.py", "--workdir", workdir), "give a protocol"),
        (
            ("sample.py", "--workdir", tmp_path / "none", "--prompt", "x")
            + ("--out", "x.png"),
            "not a work directory",
        ),
        ((*sample, "--task", "caption"), "--task caption needs --image"),
        ((*sample, "--task", "caption", "--prompt", "x"), "--prompt is not for"),
        (
            (*sample, "--prompt", "x", "--prompt", "y", "--out", tmp_path / "a.png"),
            "give a folder for several pictures",
        ),
        ((*sample, "--task", "draw"), "should be one of"),
        ((*sample, "--prompt", "a red circle"), "--out FILE.png"),
        (
            (*sample, "--task", "caption", "--image", workdir / "broken.png"),
            "is not a picture",
        ),
        (
            (
                *sample,
                "--task",
                "infill",
                *picture,
                "--box",
                "9,9,3,3",
                "--out",
                "x.png",
            ),
            "x0 < x1 and y0 < y1 inside 40x32",
        ),
        (
            (*sample, "--prompt", "x", "--out", "x.png", "--top_p", "2"),
            "sampler.top_p=2.0 must be in (0, 1]",
        ),
    ):
        done = launch(*arguments)
        assert done.returncode == 2, done
        assert message in done.stderr.splitlines()[-1], done.stderr
        assert "Traceback" not in done.stderr and not done.stdout
    assert not (tmp_path / "unwritten").exists()


def test_settings_that_no_config_file_writes_can_be_given(tmp_path):
    given = ("--config.pretrain.workers=1", "--config.decoder.norm_eps=1e-4")
    given += ("--config.data.settings.max_objects=2", "--config.mesh.tensor=1")
    given += ("--config.rules.store.embed=fsdp", "--config.vocabulary.total=1024")
    given += ("--config.decoder.post_norm=false",)
    done = launch(
        *("run_all.py", "--config", QUICK, *given),
        *("--config.protocol=configs/eval/no.py", "--workdir", tmp_path),
    )
    assert "no.py does not exist" in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.slow
def test_data_workers_do_not_run_the_script_again(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "w")
    shutil.rmtree(tmp_path / "w" / "pretrain")
    settings = config.read(tmp_path / "w")
    settings["pretrain"]["workers"] = 1
    config.write(tmp_path / "w", settings)
    done = launch("pretrain.py", "--workdir", tmp_path / "w")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["pretrain"]["steps"] == 4


def test_results_are_one_line_of_json(workdir, tmp_path):
    sample = ("sample.py", "--workdir", workdir)
    drawn = launch(*sample, "--prompt", "a red circle", "--out", tmp_path / "a.png")
    assert json.loads(drawn.stdout.splitlines()[-1]) == {
        "pictures": [str(tmp_path / "a.png")]
    }
    assert size(tmp_path / "a.png") == (32, 32)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\na blue square\n")
    several = launch(*sample, "--prompts", prompts, "--out", tmp_path / "many")
    assert len(json.loads(several.stdout)["pictures"]) == 2
    infill = launch(
        *(*sample, "--task", "infill", "--image", workdir / "red.png"),
        *("--box", "4,0,20,16", "--out", tmp_path / "b.png"),
    )
    assert size(tmp_path / "b.png") == (32, 32), infill
    text = launch(*sample, "--task", "infill", "--document", "a <mask> circle")
    assert json.loads(text.stdout)["texts"][0].startswith("a ")
