"""How the processes of a job find each other, and what they say when they cannot."""

import concurrent.futures
import re
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest
import tiny_job

from cm3leon_jax.parallel import distributed, preflight
from cm3leon_jax.parallel.distributed import Membership, membership

SLURM = {"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4"}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "1", "TPU_WORKER_HOSTNAMES": "localhost"}, None),
        # The shell of salloc: no others will come.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, None),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "host:1234",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "1",
            },
            ("host:1234", 2, 1),
        ),
        # `sbatch --nodes=1 launch/slurm/run.sbatch`: a step of one task.
        (SLURM | {"SLURM_NTASKS": "1", "JAX_COORDINATOR_ADDRESS": "10.0.0.1:99"}, None),
        # One task of several that another launcher has started as steps.
        (
            SLURM
            | {"SLURM_NTASKS": "1", "JAX_COORDINATOR_ADDRESS": "h:1"}
            | {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            ("h:1", 2, 1),
        ),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:99"}, ("10.0.0.1:99", 4, 1)),
        (
            SLURM | {"SLURM_STEP_NODELIST": "gpu[07-09,12],c1", "SLURM_JOB_ID": "5000"},
            ("gpu07:62344", 4, 1),
        ),
        (
            SLURM | {"SLURM_STEP_NODELIST": "a1,b[1-2]", "SLURM_JOB_ID": "1"},
            ("a1:61441", 4, 1),
        ),
        (
            {"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": "1"},
            ("t0:8476", 2, 1),
        ),
        (
            {
                "TPU_WORKER_HOSTNAMES": "u0,u1",
                "TPU_WORKER_ID": "1",
                "MEGASCALE_COORDINATOR_ADDRESS": "t0:8080",
                "MEGASCALE_NUM_SLICES": "3",
                "MEGASCALE_SLICE_ID": "2",
            },
            ("t0:8476", 6, 5),
        ),
    ],
)
def test_a_job_is_known_by_its_environment(environment, found):
    assert membership(environment) == (found and Membership(*found))


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, "JAX_NUM_PROCESSES"),
        (SLURM, "SLURM_JOB_ID"),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "h:1",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "2",
            },
            "process 2 of 2",
        ),
    ],
)
def test_half_an_environment_is_refused(environment, said):
    with pytest.raises(ValueError, match=said):
        membership(environment)


def test_one_process_starts_nothing(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("must not be called")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    monkeypatch.setattr(preflight, "meet", fail)
    for name in ("JAX_COORDINATOR_ADDRESS", "SLURM_NTASKS", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    distributed.initialize()


def meet(members, *, count=None, timeout=20.0):
    """What each process of (number, facts, shared) gets out of a meeting: None, or its
    error."""
    address = f"127.0.0.1:{tiny_job.free_port()}"

    def one(member):
        number, facts, shared = member
        threading.current_thread().name = str(number)
        try:
            preflight.meet(
                *(address, count or len(members), number, facts, shared, timeout)
            )
        except Exception as error:
            return error
        return None

    with concurrent.futures.ThreadPoolExecutor(len(members)) as pool:
        return list(pool.map(one, members))


def test_processes_that_are_the_same_meet(tmp_path):
    facts = preflight.facts()
    assert facts["jax"] == jax.__version__ and len(facts["source"]) == 12
    members = [(n, facts, tmp_path) for n in (2, 0, 1)]
    assert meet(members) == [None] * 3
    assert not list(tmp_path.iterdir())


def test_every_process_hears_which_host_differs_in_what(tmp_path):
    members = [(n, {"config": "aa", "jax": "1"}, tmp_path) for n in range(3)]
    members[2] = (2, {"config": "bb", "jax": "1"}, tmp_path)
    host = socket.gethostname()
    for error in meet(members):
        assert isinstance(error, ValueError)
        said = f"process 2 on {host} has config bb, process 0 on {host} aa"
        assert said in str(error) and "jax" not in str(error)


def test_a_host_that_does_not_see_the_work_directory_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "VISIBLE", 0.3)
    members = [
        (0, {}, tmp_path / "a"),
        (1, {}, tmp_path / "b"),
        (2, {}, tmp_path / "a"),
    ]
    for error in meet(members):
        assert "process 1 on" in str(error) and "does not see" in str(error)
        assert "process 2" not in str(error)


def test_a_clock_that_is_wrong_is_named(monkeypatch):
    now = time.time

    def clock():
        return now() + 500 * (threading.current_thread().name == "1")

    monkeypatch.setattr(time, "time", clock)
    for error in meet([(n, {}, None) for n in range(3)]):
        assert isinstance(error, ValueError)
        assert re.search(
            r"the clock of process 1 on \S+ is \+(499|500|501) s", str(error)
        )
        assert "process 2" not in str(error)


def test_numbers_that_do_not_count_the_processes_are_named():
    first, second = meet([(0, {}, None), (5, {}, None)])
    for error in (first, second):
        assert isinstance(error, ValueError)
        assert "process 5 on" in str(error) and "there are 2, 0 to 1" in str(error)
    for error in meet([(0, {}, None), (1, {}, None), (1, {}, None)]):
        assert isinstance(error, preflight.NotMet)
        assert re.search("process 1 is there twice|went away", str(error))


def test_a_bucket_is_no_work_directory_of_several_hosts(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "launch/prepare_data.py", "--workdir", "gs://none/run"),
            *("--config", "configs/shapes.py:quick"),
        ],
        cwd=tiny_job.ROOT,
        env=tiny_job.environment()
        | {
            "JAX_COORDINATOR_ADDRESS": "127.0.0.1:9",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": "0",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    [line] = done.stderr.strip().splitlines()
    assert "--workdir=gs://none/run serves one host" in line


def test_a_missing_host_is_named_after_the_time_out():
    began = time.monotonic()
    first, second = meet([(0, {}, None), (2, {}, None)], count=3, timeout=1.5)
    for error in (first, second):
        assert isinstance(error, preflight.NotMet)
        assert "process 1 of 3 is missing" in str(error)
    assert time.monotonic() - began < 15
    [alone] = meet([(1, {}, None)], count=2, timeout=0.5)
    assert isinstance(alone, preflight.NotMet)
    assert "cannot reach process 0" in str(alone)


def test_a_host_that_goes_away_is_no_mistake_of_the_others(monkeypatch):
    """They may start again: another error than for what differs."""
    sees = preflight._sees

    def leave(shared, name):
        if threading.current_thread().name == "1":
            raise OSError("gone")
        return sees(shared, name)

    monkeypatch.setattr(preflight, "_sees", leave)
    for error in meet([(n, {}, None) for n in range(3)]):
        assert isinstance(error, preflight.NotMet)
        assert re.search("process 1 on .*(does not answer|went away)", str(error))


def test_a_port_that_is_taken_is_named_with_its_mend():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"cannot listen on port {port}.*set JAX_"):
            preflight.meet(f"127.0.0.1:{port}", 2, 0, {}, timeout=1.0)
    with pytest.raises(ValueError, match="host:port"):
        preflight.meet("somewhere", 2, 0, {})


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", b'{"a": 1}\n', b""])
def test_a_stranger_at_the_port_disturbs_nobody(said, monkeypatch):
    monkeypatch.setattr(preflight, "HELLO", 0.5)
    address = f"127.0.0.1:{tiny_job.free_port()}"
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(preflight.meet, address, 2, 0, {})
        host, port = address.split(":")
        deadline = time.monotonic() + 10
        while True:
            try:
                stranger = socket.create_connection((host, int(port)))
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        with stranger:
            stranger.sendall(said)
            second = pool.submit(preflight.meet, address, 2, 1, {})
            assert first.result(20) is None and second.result(20) is None


def test_the_command_ends_with_one_line_where_a_host_is_missing(tmp_path):
    """Exit status 69, not that of a mistake, and nothing made."""
    done = subprocess.run(
        [
            *(sys.executable, "launch/prepare_data.py", "--workdir", tmp_path / "run"),
            *("--config", "configs/shapes.py:quick"),
        ],
        cwd=tiny_job.ROOT,
        env=tiny_job.environment()
        | {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{tiny_job.free_port()}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": "0",
            "CM3LEON_START_TIMEOUT": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == preflight.EXIT_CODE == 69
    [line] = done.stderr.strip().splitlines()
    assert "process 1 of 2 is missing" in line
    assert not (tmp_path / "run" / "documents").exists()


def test_only_a_lost_process_is_called_lost(monkeypatch):
    error = jax.errors.JaxRuntimeError(
        "UNKNOWN: Gloo all-reduce failed: closed by peer"
    )
    assert distributed.peer_lost(error) is None  # there is no other process
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert "goes on from the last checkpoint" in str(distributed.peer_lost(error))
    other = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    assert distributed.peer_lost(other) is None
    assert distributed.peer_lost(RuntimeError("connection")) is None
    # As NumPy says it.
    error = ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")
    assert "goes on from the last checkpoint" in str(distributed.peer_lost(error))
    for said in ("UNAVAILABLE: connection timed out", "no connection: Gloo", "peer"):
        assert distributed.peer_lost(ValueError(said)) is None


def test_a_mistake_starts_no_backend_to_ask_who_is_there(monkeypatch):
    def fail():
        raise AssertionError("must not be called")

    monkeypatch.setattr(jax, "process_count", fail)
    assert distributed.peer_lost(ValueError("batch_size=3")) is None
