"""Losses that are watched: numbers that are none, and spikes; and the batches that were
skipped for them, in `bad_batches.jsonl` of the run.

What is decided depends on the losses before it only, and these are part of a
checkpoint, so a run that was stopped decides as if it had not been.
"""

from __future__ import annotations

import collections
import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

FILE = "bad_batches.jsonl"
WINDOW = 100  # losses that a spike is compared with
FEWEST = 20


@dataclass(eq=False)
class Bad(Exception):
    """Step `step` has gone bad with batch `batch`, of these `rows`, on this process
    `host`; `reason` in words."""

    step: int
    batch: int
    reason: str
    metrics: Mapping[str, float]
    rows: list[int]
    host: dict[str, Any]

    def report(self, skipped: bool, records: list[str]) -> dict[str, Any]:
        """A line of the file; `records` are the ids of the batch's records."""
        return {
            "batch": self.batch,
            "step": self.step,
            "reason": self.reason,
            "skipped": skipped,
            "metrics": {key: repr(value) for key, value in self.metrics.items()},
            "rows": self.rows,
            "records": records,
        }


class Watch:
    """Says what is wrong with the metrics of a step.

    `spike`: nats above the median of the last losses that are too many; 0 looks for
    none. `recent` are the last losses, of which a checkpoint keeps a copy.
    """

    def __init__(self, spike: float, recent: Iterable[float] = ()) -> None:
        self.spike = spike
        self.recent = collections.deque(recent, WINDOW)

    def fault(self, metrics: Mapping[str, float]) -> str | None:
        """None where the step is good; its loss then belongs to the others."""
        for key, value in metrics.items():
            seen = key == "loss" or key.startswith("grad_norm")
            if seen and not math.isfinite(value):
                return f"{key} {value}"
        loss = metrics["loss"]
        if self.spike and len(self.recent) >= FEWEST:
            usual = statistics.median(self.recent)
            if loss > usual + self.spike:
                return f"loss {loss:.4f}, usually {usual:.4f}"
        self.recent.append(loss)
        return None


class BadBatches:
    """The file, of which every process of a job writes its own: the rows that it had.

    What the first one wrote is read when a run begins.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        first = self._directory / FILE
        lines = first.read_text().split("\n")[:-1] if first.is_file() else []
        self.skipped = {
            line["batch"] for line in map(json.loads, lines) if line["skipped"]
        }

    @property
    def path(self) -> Path:
        """The file of this process."""
        me = jax.process_index()
        return self._directory / (f"{FILE}.{me}" if me else FILE)

    def since(self, position: int) -> int:
        """How many batches from `position` on are skipped."""
        return sum(batch >= position for batch in self.skipped)

    def add(self, report: Mapping[str, Any]) -> None:
        """One line; its `batch` is skipped from now on if it says so."""
        with self.path.open("a") as file:
            file.write(json.dumps(report) + "\n")
        if report["skipped"]:
            self.skipped.add(report["batch"])
