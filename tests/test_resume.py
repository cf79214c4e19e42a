"""A run that is killed without warning goes on as if nothing had happened."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_job
import tiny_training as tiny

from cm3leon_jax.training import metrics
from cm3leon_jax.training.checkpoint import latest_step

STEPS = 16

# Eight devices and the mesh 1x2x1, like the test process; data after step 9 comes
# slowly, so that the kill falls between a checkpoint and the end.
CHILD = """
import sys, time
import jax
jax.config.update("jax_num_cpu_devices", 8)
import tiny_training as tiny

def slow(start):
    for t, batch in enumerate(tiny.batches(start), start):
        if t > 9:
            time.sleep(0.5)
        yield batch

tiny.train(sys.argv[1], tiny.mesh_of(1, 2, 1), int(sys.argv[2]), batches=slow)
"""


def losses(directory: Path) -> list[dict]:
    """Everything logged that says nothing of time or memory."""
    measured = re.compile("per_second|seconds/|memory/")
    return [
        {key: value for key, value in line.items() if not measured.search(key)}
        for line in metrics.read(directory)
    ]


def test_losses_after_kill_9_are_bit_identical(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(killed), str(STEPS)],
        env=tiny_job.environment(),
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 600  # against hanging alone
        while not (killed / "checkpoints" / "8").is_dir() or len(losses(killed)) < 10:
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert latest_step(killed) == 8
    cut = losses(killed)
    assert 10 <= len(cut) < STEPS  # more was done than was saved
    tiny.train(whole, tiny.mesh_of(1, 2, 1), STEPS)
    tiny.train(killed, tiny.mesh_of(1, 2, 1), STEPS)
    assert len(losses(whole)) == STEPS
    assert losses(killed) == losses(whole)
    assert cut == losses(whole)[: len(cut)]


# One of two processes.
MEMBER = """
import tiny_training as tiny
part = slice(jax.process_index() * 4, (jax.process_index() + 1) * 4)

def ours(start):
    for batch in tiny.batches(start):
        yield {key: value[part] for key, value in batch.items()}

for steps in (4, 8):
    tiny.train(sys.argv[1], tiny.mesh_of(2, 2, 1), steps, batches=ours)
"""


@pytest.mark.slow
def test_two_processes_train_save_and_resume_like_one(tmp_path):
    tiny_job.run(MEMBER, tmp_path / "two", devices=2)
    tiny.train(tmp_path / "one", tiny.mesh_of(2, 2, 1), 8)
    two, one = losses(tmp_path / "two"), losses(tmp_path / "one")
    np.testing.assert_allclose(
        [line["loss"] for line in two], [line["loss"] for line in one], rtol=1e-5
    )
