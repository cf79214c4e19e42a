"""Multi-host start-up: one process per host, before anything touches a device."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils

from cm3leon_jax.parallel import preflight

TPU_PORT = 8476
START = "CM3LEON_START_TIMEOUT"
HEARTBEAT = "CM3LEON_HEARTBEAT_TIMEOUT"
_LOST = re.compile(
    "gloo|nccl|peer|connection|heartbeat|unavailable|deadline|coordination|socket"
)
# Of a ValueError, which NumPy raises where a collective has failed to make an array;
# TensorStore does too, but where storage cannot be reached.
_COLLECTIVE = re.compile("[A-Z_]+: .*(Gloo|NCCL)")


class Membership(NamedTuple):
    """Where the processes of a job meet, how many there are, and which this one is."""

    address: str
    count: int
    process: int


def membership(environment: Mapping[str, str]) -> Membership | None:
    """What the environment says of the job; None for a job of one process.

    * `JAX_COORDINATOR_ADDRESS` (host:port) with `JAX_NUM_PROCESSES` and
      `JAX_PROCESS_ID`: any launcher, the Jobs of `launch/gke/`;
    * `SLURM_NTASKS` > 1 in a step of a job (`srun`; the shell of `salloc` is none, and
      would wait for others that never come), with `JAX_COORDINATOR_ADDRESS`, which
      `launch/slurm/` sets, or else the first node of `SLURM_STEP_NODELIST`;
    * `TPU_WORKER_HOSTNAMES` with several names and `TPU_WORKER_ID`, or those of several
      slices (`MEGASCALE_…`): Cloud TPU on GKE.

    Raises ValueError where it says a part only.
    """
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    try:
        in_step = "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment
        if in_step and (count := int(environment.get("SLURM_NTASKS", "1"))) > 1:
            if address is None:
                # Ports differ, so that jobs may share a node.
                port = 61440 + int(environment["SLURM_JOB_ID"]) % 4096
                address = f"{_first_node(environment['SLURM_STEP_NODELIST'])}:{port}"
            process = int(environment["SLURM_PROCID"])
        elif names := _tpu_workers(environment):
            slices = int(environment.get("MEGASCALE_NUM_SLICES", "1"))
            slice_id = int(environment.get("MEGASCALE_SLICE_ID", "0"))
            count = slices * len(names)
            process = slice_id * len(names) + int(environment["TPU_WORKER_ID"])
            if address is None:
                first = environment.get("MEGASCALE_COORDINATOR_ADDRESS", names[0])
                address = f"{first.partition(':')[0]}:{TPU_PORT}"
        elif address is None or (in_step and "JAX_NUM_PROCESSES" not in environment):
            return None  # launch/slurm/ gives a step of one task an address too
        else:
            count = int(environment["JAX_NUM_PROCESSES"])
            process = int(environment["JAX_PROCESS_ID"])
    except (KeyError, ValueError) as error:
        raise ValueError(
            "a job of several processes needs JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID (whole numbers), or what Slurm or "
            f"GKE set: {error}"
        ) from error
    if count < 2:
        return None
    assert address is not None
    if not 0 <= process < count:
        raise ValueError(f"process {process} of {count}: they count from 0")
    return Membership(address, count, process)


def _first_node(nodes: str) -> str:
    """`gpu[07-09,12],cpu1` -> `gpu07`."""
    found = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    assert found is not None
    return "".join(part or "" for part in found.groups())


def _tpu_workers(environment: Mapping[str, str]) -> list[str]:
    names = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    several = len(names) > 1 or "MEGASCALE_COORDINATOR_ADDRESS" in environment
    return names if several else []


def initialize(
    facts: Mapping[str, Any] | None = None, shared: str | Path | None = None
) -> None:
    """Joins the other processes of this job; does nothing in a job of one process.

    All of them meet first (`preflight.py`): versions, source and `facts` must be the
    same, and `shared` the same folder. The environment may say how many seconds to wait
    for them (`CM3LEON_START_TIMEOUT`, 300), and after how many without a sign of life a
    process is given up (`CM3LEON_HEARTBEAT_TIMEOUT`, 100). Raises as `membership` and
    `preflight.meet`.
    """
    job = membership(os.environ)
    if job is None:
        return
    start, heartbeat = _seconds(START, 300), _seconds(HEARTBEAT, 100)
    own = preflight.facts() | dict(facts or {})
    preflight.meet(*job, own, shared, timeout=start)
    jax.distributed.initialize(
        *job,
        # JAX's own look at Slurm gives a process one device of its node.
        cluster_detection_method="deactivate",
        initialization_timeout=start,
        heartbeat_timeout_seconds=heartbeat,
    )


def _seconds(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdigit() or int(value) < 1:
        raise ValueError(f"{name}={value} must be a number of seconds")
    return int(value)


def together(moment: str) -> None:
    """Waits until every process of the job has come to the moment of that name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(moment)


def peer_lost(error: BaseException) -> str | None:
    """What to say where an error, of JAX or as NumPy hands it on, is that another
    process is gone, else None."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        lost = _LOST.search(str(error).lower())
    else:
        lost = isinstance(error, ValueError) and _COLLECTIVE.match(str(error))
    if not lost or jax.process_count() == 1:
        return None
    said = str(error).strip().splitlines()[0][:200]
    return (
        f"process {jax.process_index()} of {jax.process_count()}: another process has "
        f"ended or cannot be reached ({said}); started again, the job goes on from the "
        "last checkpoint"
    )
