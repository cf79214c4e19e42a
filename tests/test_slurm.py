"""launch/slurm/run.sbatch in a real Slurm: two tasks, a SIGTERM, a requeue."""

import json
import subprocess
import sys

import pytest
import slurm_cluster
import tiny_job
from tiny_system import tiny_config

from cm3leon_jax import stages, workdir
from cm3leon_jax.training import metrics

STEPS = 200
BEFORE = ("prepare_data", "train_text_tokenizer", "train_image_tokenizer")
BEFORE += ("tokenize_data",)
CONFIG = """
import json
from pathlib import Path
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(json.loads(Path(__file__).with_suffix(".json").read_text()))
"""


@pytest.mark.slow
@pytest.mark.skipif(slurm_cluster.absent() != "", reason=slurm_cluster.absent())
def test_a_job_that_is_told_to_stop_saves_is_requeued_and_goes_on(tmp_path):
    config, run = tiny_config(), tmp_path / "run"
    config["pretrain"] |= {"checkpoint_every": 10_000, "validate_every": 10_000}
    config["pretrain"]["optimizer"]["steps"] = STEPS
    stages.run(config, run, BEFORE)
    (tmp_path / "config.py").write_text(CONFIG)
    (tmp_path / "config.json").write_text(json.dumps(config))

    with slurm_cluster.cluster(tmp_path) as environment:
        own = tiny_job.environment() | {
            "SLURM_CONF": environment["SLURM_CONF"],
            "PATH": environment["PATH"],
            "CM3LEON_PYTHON": sys.executable,
            # The nodes are pretended: their names do not resolve.
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{tiny_job.free_port()}",
        }

        def slurm(*command):
            done = subprocess.run(
                list(map(str, command)),
                cwd=tiny_job.ROOT,
                env=own,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
            return done.stdout.strip()

        log = tmp_path / "job.log"
        job = slurm(
            *("sbatch", "--parsable", "--nodes=2", f"--output={log}"),
            *("launch/slurm/run.sbatch", "pretrain"),
            *("--config", tmp_path / "config.py", "--workdir", run),
        )

        def trained(steps):
            lines = metrics.read(run / "pretrain")
            assert (
                slurm("squeue", "--noheader", "--jobs", job, "--format=%T")
                or (run / "pretrain" / workdir.DONE).is_file()
            ), log.read_text()
            return sum("loss" in line for line in lines) >= steps

        slurm_cluster.wait_for(lambda: trained(5), 300, "five steps")
        slurm("scancel", "--signal=TERM", job)
        said = "exit status 75: the job is queued again"
        slurm_cluster.wait_for(lambda: said in log.read_text(), 120, said)
        stopped = [line["step"] for line in metrics.read(run / "pretrain")][-1]
        assert 5 <= stopped < STEPS
        assert (run / "pretrain" / "checkpoints" / str(stopped)).is_dir()
        done = run / "pretrain" / workdir.DONE
        slurm_cluster.wait_for(done.is_file, 400, "the job's end")
        slurm_cluster.wait_for(
            lambda: "COMPLETED" in slurm("scontrol", "show", "job", job), 60, "success"
        )
        assert "Restarts=1" in slurm("scontrol", "show", "job", job)

    logged = [x["step"] for x in metrics.read(run / "pretrain") if "loss" in x]
    assert logged == list(range(1, STEPS + 1))
    results = [x for x in log.read_text().splitlines() if x.startswith("{")]
    made = json.loads(results[-1])
    assert made["pretrain"]["steps"] == STEPS
