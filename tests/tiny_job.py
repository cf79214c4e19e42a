"""Jobs of several processes on this machine, for tests of what they do together."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
TIMEOUT = 600.0  # seconds
START = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", int(sys.argv.pop()))
from cm3leon_jax.parallel import distributed
distributed.initialize()
"""


def environment() -> dict[str, str]:
    """Where a child finds the package, the configs and the helpers of tests."""
    here = Path(__file__).parent
    return os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}


def free_port() -> int:
    """A port that nobody has, a moment ago."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(command: Sequence[str], processes: int) -> list[subprocess.Popen]:
    """The processes of a job, each with that command; the caller ends them."""
    address = f"127.0.0.1:{free_port()}"
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment()
            | {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]


def run(code: str, *arguments: object, devices: int, processes: int = 2) -> None:
    """Runs `code` in processes that have joined, with so many devices each.

    AssertionError with what one that failed has to say. None outlives the call.
    """
    command = [sys.executable, "-c", START + code, *map(str, arguments), str(devices)]
    members = start(command, processes)
    try:
        for member in members:
            _, err = member.communicate(timeout=TIMEOUT)
            assert member.returncode == 0, err
    finally:
        for member in members:
            member.kill()
            member.communicate()
