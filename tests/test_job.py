"""A job of two processes makes, stage by stage, what one process makes."""

import json
import sys

import numpy as np
import pytest
import tiny_job
from tiny_system import tiny_config

from cm3leon_jax.tokenizers.image import ImageTokenizer
from cm3leon_jax.training import metrics

MEMBER = """
import json
from pathlib import Path
from cm3leon_jax import stages
config, directory = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
for again in range(2):  # the second time all is done
    made = stages.run(config, directory)
(directory / f"results.{jax.process_index()}").write_text(json.dumps(made))
"""


def job_config(tensor):
    c = tiny_config()
    c["mesh"] = {"tensor": tensor}
    # No k-means and no restart: their random choices turn on the last bit.
    c["image_tokenizer"]["training"] |= {"unquantised_steps": 0, "restart_until": 0}
    c["image_tokenizer"]["training"] |= {"log_every": 1, "validate_every": 3}
    return c


def losses(folder):
    return [line["loss"] for line in metrics.read(folder) if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 2])  # of 2: both processes hold the same rows
def test_two_processes_run_every_stage_like_one(tmp_path, tensor):
    one, two, given = tmp_path / "one", tmp_path / "two", tmp_path / "config.json"
    given.write_text(json.dumps(job_config(tensor)))
    tiny_job.run(MEMBER, given, one, devices=2, processes=1)
    tiny_job.run(MEMBER, given, two, devices=1)

    for name in ("documents", "tokens"):
        files = sorted(file.name for file in (one / name).glob("*.array_record"))
        assert len(files) == 3 * 4  # splits and shards
        for file in files:
            assert (one / name / file).read_bytes() == (two / name / file).read_bytes()
    for name, steps in (("image_tokenizer", 6), ("pretrain", 4)):
        assert len(losses(two / name)) == steps
        np.testing.assert_allclose(losses(two / name), losses(one / name), rtol=1e-4)

    made, first, second = (
        json.loads(path.read_text())
        for path in (one / "results.0", two / "results.0", two / "results.1")
    )
    assert first == second
    for stage, score in (("train_image_tokenizer", "psnr"), ("pretrain", "loss")):
        assert first[stage][score] == pytest.approx(made[stage][score], rel=1e-4)
    codes = np.zeros((1, 4, 4), np.int32)
    pictures = [
        ImageTokenizer.load(run / "image_tokenizer").decode(codes) for run in (one, two)
    ]
    np.testing.assert_allclose(*pictures, atol=1)


ALONE = """
import sys
who = int(sys.argv.pop())
sys.path.insert(0, "launch")
import command
command.flags.FLAGS.workdir = "unused"

def main():
    import jax
    from cm3leon_jax.parallel import distributed
    distributed.initialize()
    if jax.process_index() == who:
        raise ValueError("made by one alone")
    distributed.together("the others wait")
    return {}

command.run(main)
"""


def ends(*command):
    """(exit status, standard error) of both processes of a job of that command."""
    job = tiny_job.start([sys.executable, *map(str, command)], 2)
    try:
        said = [member.communicate(timeout=tiny_job.TIMEOUT)[1] for member in job]
    finally:
        for member in job:
            member.kill()
            member.wait()
    return [(member.returncode, text) for member, text in zip(job, said, strict=True)]


@pytest.mark.parametrize("who", [0, 1])
def test_a_mistake_of_one_process_ends_them_all(who):
    """With its status, which starts nothing again, not by JAX's abort after minutes."""
    told = ends("-c", ALONE, who)
    assert [code for code, _ in told] == [2, 2], told
    assert told[who][1].splitlines()[-1].endswith(": made by one alone")
    other = told[1 - who][1].splitlines()[-1]
    assert other.endswith(f": process {who} of 2: made by one alone")


def test_a_stage_in_which_the_first_process_fails_ends_them_all(tmp_path):
    """The others wait for documents that it alone makes."""
    (tmp_path / "documents").write_text("in the way")
    told = ends(
        *("launch/prepare_data.py", "--workdir", tmp_path),
        *("--config", "configs/shapes.py:quick"),
    )
    assert [code for code, _ in told] == [2, 2], told
    for _, said in told:
        assert f"File exists: '{tmp_path / 'documents'}'" in said.splitlines()[-1]
