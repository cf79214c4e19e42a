"""Multi-host start-up: one process per host, before anything touches a device."""

from __future__ import annotations

import os

import jax
from jax.experimental import multihost_utils


def initialize() -> None:
    """Joins the other processes of this job; does nothing in a job of one process.

    A job of several is recognised by its environment:
    * `JAX_COORDINATOR_ADDRESS` (host:port) with `JAX_NUM_PROCESSES` and
      `JAX_PROCESS_ID`: any launcher;
    * `SLURM_NTASKS` > 1 in a step of a job (`srun`; the shell of `salloc` is none, and
      would wait for others that never come): Slurm; `JAX_COORDINATOR_ADDRESS`
      overrides the first node's name where that does not resolve;
    * `TPU_WORKER_HOSTNAMES` with several names, or `MEGASCALE_COORDINATOR_ADDRESS`:
      Cloud TPU slices.

    Raises ValueError where a coordinator is given without the numbers of the processes.
    """
    environment = os.environ
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    in_step = "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment
    slurm = in_step and int(environment.get("SLURM_NTASKS", "1")) > 1
    tpu = (
        "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or "MEGASCALE_COORDINATOR_ADDRESS" in environment
    )
    if address and not slurm and not tpu:
        try:
            count = int(environment["JAX_NUM_PROCESSES"])
            process = int(environment["JAX_PROCESS_ID"])
        except (KeyError, ValueError) as error:
            raise ValueError(
                "JAX_COORDINATOR_ADDRESS is set: also set JAX_NUM_PROCESSES and "
                f"JAX_PROCESS_ID to whole numbers ({error})"
            ) from error
        if count > 1:
            jax.distributed.initialize(address, count, process)
    elif slurm or tpu:
        jax.distributed.initialize(coordinator_address=address)


def together(moment: str) -> None:
    """Waits until every process of the job has come to the moment of that name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(moment)
