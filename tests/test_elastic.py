"""A run goes on exactly with any number of devices and processes, with packed rows and
retrieved documents; and when a process of the job is killed."""

import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny_job
import tiny_mixing
import tiny_run

from cm3leon_jax.parallel.mesh import MeshConfig, make_mesh
from cm3leon_jax.training import metrics
from cm3leon_jax.training.checkpoint import latest_step
from cm3leon_jax.training.preemption import EXIT_CODE


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens")
    tiny_mixing.write(path)
    return path


def losses(directory):
    return [line["loss"] for line in metrics.read(directory)]


def mesh(devices, tensor=1):
    return make_mesh(MeshConfig(tensor=tensor), jax.devices()[:devices])


# Process 1 is killed as it begins to save.
KILLED = """
import os, runpy, signal, sys
from cm3leon_jax.training.checkpoint import Checkpoints
if os.environ["JAX_PROCESS_ID"] == "1":
    Checkpoints.save = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def members(tokens, directory, processes, *, devices, start=(), **settings):
    """The processes of a job; `start`: what Python is told before the script."""
    flags = {"tokens": tokens, "workdir": directory, "devices": devices} | settings
    command = [sys.executable, *start, tiny_run.__file__]
    command += [f"--{key}={value}" for key, value in flags.items()]
    address = f"127.0.0.1:{tiny_job.free_port()}"
    job = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    return [
        subprocess.Popen(
            command,
            env=tiny_job.environment()
            | job
            | {"JAX_PROCESS_ID": str(index), "CM3LEON_HEARTBEAT_TIMEOUT": "20"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]


def ends(job, seconds=300):
    """(exit status, standard error) of every process."""
    try:
        said = [member.communicate(timeout=seconds)[1] for member in job]
    finally:
        for member in job:
            member.kill()
            member.wait()
    return [(member.returncode, text) for member, text in zip(job, said, strict=True)]


@pytest.mark.slow
def test_8_devices_then_4_then_4_processes_then_2_of_2_then_1(tokens, tmp_path):
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    tiny_run.train(tokens, whole, 16, mesh(8))
    tiny_run.train(tokens, moved, 4, mesh(8))
    assert losses(moved) == losses(whole)[:4]  # bit-identical on equal devices
    tiny_run.train(tokens, moved, 7, mesh(4))
    for processes, devices, steps in ((4, 1, 10), (2, 2, 13)):
        job = members(tokens, moved, processes, devices=devices, steps=steps)
        for code, text in ends(job):
            assert code == 0, text
    tiny_run.train(tokens, moved, 16, mesh(1))
    assert len(losses(moved)) == 16
    np.testing.assert_allclose(losses(moved), losses(whole), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices", "tensor"), [(2, 2, 4), (4, 1, 2)])
def test_processes_may_hold_the_same_rows(tokens, tmp_path, processes, devices, tensor):
    """As where the mesh axis `tensor` spans hosts."""
    one, job = tmp_path / "one", tmp_path / "job"
    tiny_run.train(tokens, one, 6, mesh(4, tensor))
    sizes = {"devices": devices, "tensor": tensor, "steps": 6}
    for code, text in ends(members(tokens, job, processes, **sizes)):
        assert code == 0, text
    assert len(losses(one)) == 6
    np.testing.assert_allclose(losses(job), losses(one), rtol=1e-5)


def begun(job, directory, steps):
    """Waits until so many steps are logged."""
    deadline = time.monotonic() + 600
    while len(losses(directory)) < steps:
        ended = [member for member in job if member.poll() is not None]
        assert not ended, ended[0].communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_the_other_process_of_a_job_ends_when_one_is_killed(tokens, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    job = members(tokens, killed, 2, devices=1, steps=10**6, delay=0.2)
    begun(job, killed, 6)
    os.kill(job[1].pid, signal.SIGKILL)
    # How long that takes is a figure of tests/benchmarks/kill.py: `pair_seconds`.
    (code, said), _ = ends(job, 600)
    assert code == EXIT_CODE and "process 0 of 2: another process has ended" in said
    steps = latest_step(killed) + 4
    for code, text in ends(members(tokens, killed, 2, devices=1, steps=steps)):
        assert code == 0, text
    for code, text in ends(members(tokens, whole, 2, devices=1, steps=steps)):
        assert code == 0, text
    assert losses(killed) == losses(whole)  # to the bit


@pytest.mark.slow
def test_a_process_lost_while_saving_is_no_full_disk(tokens, tmp_path):
    options = {"devices": 1, "steps": 8, "start": ("-c", KILLED)}
    (code, said), (other, _) = ends(members(tokens, tmp_path, 2, **options), 300)
    assert other == -signal.SIGKILL
    assert code == EXIT_CODE, said
    assert "process 0 of 2: another process has ended" in said
    assert "make room" not in said


@pytest.mark.slow
def test_all_processes_stop_after_the_same_step_when_one_is_told_to(tokens, tmp_path):
    job = members(tokens, tmp_path, 2, devices=1, steps=10**6, delay=0.2, every=10**6)
    begun(job, tmp_path, 3)
    job[1].terminate()
    stopped = set()
    for code, said in ends(job, 120):
        assert code == EXIT_CODE, said
        stopped |= {int(n) for n in re.findall(r"step (\d+) is saved", said)}
    assert stopped == {latest_step(tmp_path)}
