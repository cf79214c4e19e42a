"""What the loop writes down: metrics, where the time went, memory, this host's health.

    metrics.jsonl           of the first process, with TensorBoard (`metrics.py`)
    health/PROCESS.json     of every process: host, step, when, its waits and memory
    trace.request           put there (`touch`) while a run goes on, or before: the
                            first process traces some steps into trace/, for xprof

Where a job is slow, look for the host that waits longer than others for its data.
"""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from cm3leon_jax.config import write_whole
from cm3leon_jax.training.metrics import MetricWriter, Progress, Work
from cm3leon_jax.training.watch import Bad, Watch

# Stays on the host: the global row numbers, for naming a bad batch's records.
HOST_ONLY = "row"
TRACED = 5  # steps of a trace
_GIB = 2.0**30
_NOTHING = {"data": 0.0, "device": 0.0}
_PAUSES = ("evaluation", "checkpoint")  # do not count as training


def memory() -> dict[str, float]:
    """High-water marks in GiB: of this process on its host, and of its fullest device
    where the backend knows it."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    found = {"memory/host_gib": host / _GIB}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if peaks:
        found["memory/device_gib"] = max(peaks) / _GIB
    return found


class Recorder:
    """Fetches metrics one step late, has them watched, and writes them down.

    Of every logged interval: the rates of `work`; `seconds/step`, without what follows;
    `seconds/data` and `seconds/device`, of a step, that the host waited for a batch and
    for the devices; `seconds/evaluation` and `seconds/checkpoint`, in all.
    """

    def __init__(
        self,
        directory: Path,
        start: int,
        steps: int,
        work: Work,
        watch: Watch,
        name: str,
    ) -> None:
        self.directory, self.work, self.watch = directory, work, watch
        self._pending: tuple[int, int, dict, dict, bool] | None = None
        self._since: tuple[int, float] | None = None  # step and time of the last log
        self._spent = dict(_NOTHING)
        self._traced = 0  # the step after which a trace ends; 0: there is none
        first = jax.process_index() == 0
        self._writer = MetricWriter(directory, start) if first else None
        self._progress = Progress(start, steps, name) if first else None

    @contextlib.contextmanager
    def spend(self, on: str) -> Iterator[None]:
        """Counts the time inside."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            spent = self._spent[on] if on in self._spent else 0.0
            self._spent[on] = spent + time.perf_counter() - begin

    def defer(self, n: int, t: int, metrics: dict, host: dict, log: bool) -> None:
        """Step n, of batch t, is with the devices."""
        self._pending = n, t, metrics, host, log

    def settle(self) -> None:
        """Waits for the deferred step; logs it where it is due. Raises Bad."""
        if self._pending is None:
            return
        (n, t, metrics, host, log), self._pending = self._pending, None
        with self.spend("device"):
            fetched = jax.device_get(metrics)
        values = {key: float(value) for key, value in fetched.items()}
        if (reason := self.watch.fault(values)) is not None:
            rows = host[HOST_ONLY].tolist() if HOST_ONLY in host else []
            raise Bad(n, t, reason, values, rows, host)
        now = time.perf_counter()
        if self._progress is not None:
            self._progress.advance()
        if self._since is None:
            self._since = n, now  # from here on, so that compilation does not count
            self._spent = dict(_NOTHING)
        self._trace(n)
        if not log:
            return
        own = self._times(n, now) | memory()
        values |= own
        health = {"host": socket.gethostname(), "step": n, "time": time.time()} | own
        health_file = self.directory / "health" / f"{jax.process_index()}.json"
        write_whole(health_file, json.dumps(health))
        if self._writer is not None and self._progress is not None:
            self._writer.write(n, values)
            self._progress.show(_summary(values, self.work.unit))

    def _times(self, n: int, now: float) -> dict[str, float]:
        assert self._since is not None
        then, at = self._since
        if n == then:
            return {}
        spent, self._spent = self._spent, dict(_NOTHING)
        pauses = {key: spent[key] for key in _PAUSES if key in spent}
        seconds, steps = now - at - sum(pauses.values()), n - then
        self._since = n, now
        times = {"step": seconds / steps} | pauses
        times |= {key: spent[key] / steps for key in ("data", "device")}
        rates = self.work.rates(steps, seconds)
        return rates | {f"seconds/{key}": x for key, x in times.items()}

    def _trace(self, n: int) -> None:
        """Begins and ends the trace that was asked for."""
        request = self.directory / "trace.request"
        if self._traced and n >= self._traced:
            jax.profiler.stop_trace()
            self._traced = 0
        elif not self._traced and self._writer is not None and request.is_file():
            request.unlink()
            jax.profiler.start_trace(self.directory / "trace")
            self._traced = n + TRACED

    def evaluation(self, n: int, label: str, scores: Mapping[str, float]) -> None:
        """Writes down what an evaluation of step n has found."""
        values = {f"{label}/{key}": float(value) for key, value in scores.items()}
        if self._writer is not None and self._progress is not None:
            self._writer.write(n, values)
            text = "  ".join(f"{key} {value:.4g}" for key, value in values.items())
            self._progress.show(text, always=True)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._traced:
            jax.profiler.stop_trace()
        if self._writer is not None and self._progress is not None:
            self._writer.close()
            self._progress.close()


def _summary(values: Mapping[str, float], unit: str) -> str:
    rate = f"{unit}_per_second"
    text = f"loss {values['loss']:.4f}"
    return f"{text}  {values[rate]:,.0f} {unit}/s" if rate in values else text
