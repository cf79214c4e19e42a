"""What a run leaves to be read: metrics.jsonl, TensorBoard, progress on the terminal.

`metrics.jsonl` has one dict a line, always with `step`; values that are not finite
(the loss of a group without tokens) are left out. A resumed run first removes the
lines after the step it resumes from, so that the file reads as if nothing happened.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

FILE = "metrics.jsonl"

# Dense bfloat16 FLOP/s of one device, from the vendors' data sheets, by the first
# entry that `jax.Device.device_kind` starts with.
PEAK_FLOPS = {
    "TPU v6 lite": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
    "TPU v3": 123e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
}


def peak_flops(device: Any) -> float | None:
    """Peak FLOP/s of a `jax.Device`, None where it is not known (a CPU)."""
    for kind, peak in PEAK_FLOPS.items():
        if device.device_kind.startswith(kind):
            return peak
    return None


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one step does: so many `unit`s, and floating-point operations.

    `peak_flops` is of all devices together; utilisation is reported where both it and
    `flops_per_step` are known.
    """

    unit: str
    per_step: int
    flops_per_step: float | None = None
    peak_flops: float | None = None

    def rates(self, steps: int, seconds: float) -> dict[str, float]:
        """`{unit}_per_second`, and `mfu` in [0, 1], of `steps` steps in `seconds`."""
        rates = {f"{self.unit}_per_second": self.per_step * steps / seconds}
        if self.flops_per_step is not None and self.peak_flops is not None:
            rates["mfu"] = self.flops_per_step * steps / seconds / self.peak_flops
        return rates


def read(directory: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, without a last one cut off by a kill."""
    path = Path(directory) / FILE
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")[:-1]  # a whole line ends in a newline
    return [json.loads(line) for line in lines]


class MetricWriter:
    """Appends to `metrics.jsonl` and to TensorBoard's event files, from `step` on.

    Also to Weights & Biases (`pip install wandb`), where the environment names a
    project of theirs, WANDB_PROJECT; their own variables say all else.
    """

    def __init__(self, directory: str | Path, step: int) -> None:
        from tensorboardX import SummaryWriter  # slow to import, and one process writes

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._wandb = _wandb_run(directory)
        kept = [line for line in read(directory) if line["step"] <= step]
        path, new = directory / FILE, directory / f"{FILE}.new"
        new.write_text("".join(json.dumps(line) + "\n" for line in kept))
        new.replace(path)
        self._file = path.open("a")
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        finite = {key: value for key, value in metrics.items() if math.isfinite(value)}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()  # with the operating system: survives a killed process
        for key, value in finite.items():
            self._board.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(finite, step=step)

    def close(self) -> None:
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _wandb_run(directory: Path) -> Any:
    """The run of a directory at Weights & Biases, the same one when it is resumed."""
    project = os.environ.get("WANDB_PROJECT")
    if not project:
        return None
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            "WANDB_PROJECT is set, but wandb is not installed: pip install wandb, or "
            "unset it"
        ) from error
    path = directory.absolute()
    number = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    name = "/".join(path.parts[-2:])
    return wandb.init(
        project=project, id=number, name=name, dir=directory, resume="allow"
    )


class Progress:
    """A bar on a terminal; elsewhere a plain line now and then. Writes to stderr."""

    SECONDS_BETWEEN_LINES = 5.0

    def __init__(self, start: int, steps: int, name: str) -> None:
        self.step, self.steps, self.name = start, steps, name
        self._begin: tuple[int, float] | None = (
            None  # after the first step: it compiles
        )
        self._last_line = -math.inf
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=steps, initial=start, desc=name, unit="step", dynamic_ncols=True
            )

    def advance(self) -> None:
        """One more step is done."""
        self.step += 1
        if self._begin is None:
            self._begin = self.step, time.perf_counter()
        if self._bar is not None:
            self._bar.update()

    def show(self, text: str, *, always: bool = False) -> None:
        """Shows `text` beside the bar, or as a line with the time that is left."""
        if self._bar is not None:
            self._bar.set_postfix_str(text)
            return
        now = time.perf_counter()
        due = now - self._last_line >= self.SECONDS_BETWEEN_LINES
        if not (due or always):
            return
        self._last_line = now
        left = ""
        if self._begin is not None and self.step > self._begin[0]:
            pace = (now - self._begin[1]) / (self.step - self._begin[0])
            left = f"  {pace * (self.steps - self.step):,.0f} s left"
        print(
            f"{self.name} {self.step}/{self.steps}  {text}{left}",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
