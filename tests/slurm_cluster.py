"""A Slurm of two pretended nodes on this machine, for tests of launch/slurm/."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import tiny_job

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "squeue")
NODES = ("d1", "d2")
ENV = os.environ | {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}


def absent() -> str:
    """Why there can be no cluster here; empty where there can."""
    missing = [x for x in PROGRAMS if shutil.which(x, path=ENV["PATH"]) is None]
    if missing:
        return f"{', '.join(missing)} not found: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "only root may start Slurm's daemons"


@contextlib.contextmanager
def cluster(directory: Path) -> Iterator[dict[str, str]]:
    """The environment of its commands. The daemons end with the context."""
    name, user = socket.gethostname(), "root"
    run = Path("/run/munge-of-tests")  # munged wants safe folders above its socket
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(mode=0o755)
    nodes = [
        f"NodeName={node} NodeHostname={name} NodeAddr=127.0.0.1 "
        f"Port={tiny_job.free_port()} CPUs=1 RealMemory=2000"
        for node in NODES
    ]
    config = directory / "slurm.conf"
    config.write_text(
        "\n".join(
            [
                "ClusterName=tests",
                f"SlurmctldHost={name}(127.0.0.1)",
                f"SlurmctldPort={tiny_job.free_port()}",
                f"SlurmUser={user}",
                f"SlurmdUser={user}",
                # A requeued job waits until its old credential has expired.
                f"AuthInfo=socket={run}/munge.sock,cred_expire=5",
                "AuthType=auth/munge",
                "CredType=cred/munge",
                "ProctrackType=proctrack/linuxproc",
                "TaskPlugin=task/none",
                "SelectType=select/cons_tres",
                "ReturnToService=2",
                "MailProg=/bin/true",
                "KillWait=5",
                "SchedulerParameters=batch_sched_delay=1,sched_interval=2",
                f"StateSaveLocation={directory}/state",
                f"SlurmctldPidFile={directory}/slurmctld.pid",
                f"SlurmctldLogFile={directory}/slurmctld.log",
                f"SlurmdSpoolDir={directory}/spool-%n",
                f"SlurmdPidFile={directory}/slurmd-%n.pid",
                f"SlurmdLogFile={directory}/slurmd-%n.log",
                *nodes,
                f"PartitionName=all Nodes={','.join(NODES)} Default=YES State=UP",
            ]
        )
        + "\n"
    )
    environment = ENV | {"SLURM_CONF": str(config)}
    key = run / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    daemons = [
        ["munged", "--foreground", "--force", f"--socket={run}/munge.sock"]
        + [f"--key-file={key}", f"--pid-file={run}/pid", f"--log-file={run}/log"]
        + [f"--seed-file={run}/seed"],
        ["slurmctld", "-D", "-f", str(config)],
        *(["slurmd", "-D", "-N", node, "-f", str(config)] for node in NODES),
    ]
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, run, ignore_errors=True)
        for command in daemons:
            # In a session of its own: what the daemon starts does not outlive it.
            daemon = subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            stack.callback(_end, daemon)
            if command[0] == "munged":
                wait_for((run / "munge.sock").exists, 10, "munged")
        wait_for(lambda: _idle(environment), 60, "two idle nodes")
        yield environment


def _end(daemon: subprocess.Popen) -> None:
    daemon.terminate()
    try:
        daemon.wait(10)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _idle(environment: dict[str, str]) -> bool:
    done = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%T"],
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.stdout.split() == ["idle"] * len(NODES)


def wait_for(condition, seconds: float, what: str) -> None:
    """Returns once `condition()` holds; AssertionError after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not after {seconds:.0f} s"
        time.sleep(0.2)
