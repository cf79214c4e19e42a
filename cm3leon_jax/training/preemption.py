"""A notice that the machine is taken away: SIGTERM, as Slurm, Kubernetes and clouds
send it. The run saves and ends with a code that says it is to be started again."""

from __future__ import annotations

import itertools
import signal
import sys
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

# sysexits.h: try again later. The launch files turn it into a requeue.
EXIT_CODE = 75

# Where all processes of a job are, whatever run they are in: the number of a look.
_looks = itertools.count(1)


class Preempted(SystemExit):
    """Ends the process with `EXIT_CODE`; all that was done is saved.

    Not an Exception: no stage may take it for a mistake, and none is finished by it.
    """

    def __init__(self, name: str, step: int) -> None:
        super().__init__(EXIT_CODE)
        print(
            f"{name}: stopped by SIGTERM, step {step} is saved; the same command goes "
            "on from there",
            file=sys.stderr,
            flush=True,
        )


class Notice:
    """Whether the run has been told to stop; a context manager, in the main thread.

    In a job of several processes JAX listens itself (from `jax.distributed.initialize`
    on), and has all of them stop after the same step, whichever got the signal.
    """

    def __init__(self) -> None:
        self._signalled = False

    def reached(self) -> bool:
        """Whether to save and stop now; every process asks after every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(next(_looks))
        return self._signalled

    def __enter__(self) -> Notice:
        self._before: Any = None
        main = threading.current_thread() is threading.main_thread()
        if main and jax.process_count() == 1:
            self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def _receive(self, *_: Any) -> None:
        self._signalled = True

    def __exit__(self, *_: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
