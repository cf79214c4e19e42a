r"""Training that is killed at random moments goes on exactly as if it had not been.

    python tests/benchmarks/kill.py [--kills 50] [--terms 20] [--pairs 3]

A tiny decoder on packed rows with retrieved documents, checkpoints every four updates
(`tests/tiny_run.py`, the loop and the exit statuses of launch/pretrain.py). Its process
gets SIGKILL, every other time while a checkpoint is being written, else at a random
moment; then SIGTERM, after which it must have saved and end with status 75; of a job of
two processes one gets SIGKILL, and the other must end by itself, say why, and with 75.
After each the same command is run again. Every loss ever logged is compared with that
of a run that nobody disturbed. The last line is one JSON object:

kill_exact, term_exact, pair_exact   times after which all losses were bit-identical
while_saving                         SIGKILLs that left a half-written checkpoint
pair_seconds                         the longest that a process outlived its other half
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny_job
import tiny_mixing

from cm3leon_jax.training import metrics
from cm3leon_jax.training.checkpoint import latest_step

ROOT = Path(__file__).parents[2]
AGAIN = 75
PATIENCE = 600.0  # seconds


class Run:
    """One run directory, and the command that goes on with it."""

    def __init__(self, folder, name, processes=1):
        self.directory, self.tokens = folder / name, folder / "tokens"
        self.cache, self.processes = folder / "compiled", processes

    def start(self, steps, delay=0.0):
        flags = {"tokens": self.tokens, "workdir": self.directory, "steps": steps}
        flags |= {"delay": delay, "devices": 1}
        command = [sys.executable, str(ROOT / "tests" / "tiny_run.py")]
        command += [f"--{key}={value}" for key, value in flags.items()]
        environment = tiny_job.environment() | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "CM3LEON_HEARTBEAT_TIMEOUT": "30",
        }
        address, members = f"127.0.0.1:{tiny_job.free_port()}", []
        for index in range(self.processes):
            if self.processes > 1:
                environment |= {
                    "JAX_COORDINATOR_ADDRESS": address,
                    "JAX_NUM_PROCESSES": str(self.processes),
                    "JAX_PROCESS_ID": str(index),
                }
            with (self.directory.with_suffix(f".{index}.log")).open("w") as log:
                members.append(
                    subprocess.Popen(
                        command, env=environment, stdout=subprocess.DEVNULL, stderr=log
                    )
                )
        return members

    def said(self, index=0):
        return self.directory.with_suffix(f".{index}.log").read_text()

    def losses(self):
        lines = metrics.read(self.directory)
        return {line["step"]: line["loss"] for line in lines if "loss" in line}

    def reach(self, members, step):
        """Waits until a step is logged; the processes must still run."""
        deadline = time.monotonic() + PATIENCE
        while max(self.losses(), default=0) < step:
            if any(member.poll() is not None for member in members):
                raise SystemExit(f"ended early: {self.said()}")
            if time.monotonic() > deadline:
                raise SystemExit(f"no step {step} in {PATIENCE:.0f} s")
            time.sleep(0.02)

    def finish(self, members):
        for index, member in enumerate(members):
            if member.wait(PATIENCE):
                raise SystemExit(f"failed: {self.said(index)}")

    def half_written(self):
        return list((self.directory / "checkpoints").glob("*tmp*"))


def checked(run, wanted, what):
    """1 if all losses of a run are the wanted ones, to the bit."""
    found = run.losses()
    wrong = [n for n, loss in found.items() if wanted[n] != loss]
    gap = sorted(set(range(1, max(found, default=0) + 1)) - set(found))
    if wrong or gap:
        print(f"{what}: other losses at {wrong[:5]}, none at {gap[:5]}", flush=True)
    return int(not wrong and not gap)


def disturb(run, given, rng, wanted, count, kind):
    """So many signals, on one run after another; counts of what came out."""
    exact = saving = saved = 0
    for turn in range(count):
        if max(run.losses(), default=0) > given.steps // 2:
            run = Run(run.directory.parent, f"{kind}-{turn}")
        done = latest_step(run.directory) if run.losses() else 0
        members = run.start(given.steps, given.delay)
        run.reach(members, done + 1)
        if kind == "kill" and turn % 2:
            deadline = time.monotonic() + 30
            while not run.half_written() and time.monotonic() < deadline:
                time.sleep(0.001)
        else:
            time.sleep(rng.uniform(0.0, given.moment))
        number = signal.SIGKILL if kind == "kill" else signal.SIGTERM
        os.kill(members[0].pid, number)
        code = members[0].wait(PATIENCE)
        if kind == "kill":
            saving += bool(run.half_written())
        else:
            last = max(run.losses())
            saved += code == AGAIN and latest_step(run.directory) == last
        # The next steps, from what is left.
        begin = latest_step(run.directory) if _any(run) else 0
        run.finish(run.start(begin + 2))
        good = checked(run, wanted, f"{kind} {turn}")
        exact += good
        print(f"{kind} {turn}: at step {begin}, exact {good}", flush=True)
    return exact, saving, saved


def _any(run):
    folder = run.directory / "checkpoints"
    return folder.is_dir() and any(p.name.isdigit() for p in folder.iterdir())


def pairs(folder, given, rng):
    """One of two processes is killed; (exact, ended well, longest seconds)."""
    whole = Run(folder, "two", 2)
    whole.finish(whole.start(given.steps // 4))
    wanted, exact, well, longest = whole.losses(), 0, 0, 0.0
    for turn in range(given.pairs):
        run = Run(folder, f"pair-{turn}", 2)
        members = run.start(given.steps, given.delay)
        run.reach(members, 6)
        time.sleep(rng.uniform(0.0, given.moment / 2))
        victim = turn % 2
        os.kill(members[victim].pid, signal.SIGKILL)
        began = time.monotonic()
        code = members[1 - victim].wait(PATIENCE)
        longest = max(longest, time.monotonic() - began)
        members[victim].wait()
        clear = "another process has ended" in run.said(1 - victim)
        well += code == AGAIN and clear
        run.finish(run.start(latest_step(run.directory) + 2))
        exact += checked(run, wanted, f"pair {turn}")
        print(f"pair {turn}: status {code}, clear {clear}", flush=True)
    return exact, well, round(longest, 1)


def main(given):
    rng = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_mixing.write(folder / "tokens")
        whole = Run(folder, "whole")
        whole.finish(whole.start(given.steps + 4))
        wanted = whole.losses()
        killed, saving, _ = disturb(
            Run(folder, "kill"), given, rng, wanted, given.kills, "kill"
        )
        termed, _, saved = disturb(
            Run(folder, "term"), given, rng, wanted, given.terms, "term"
        )
        both, well, longest = pairs(folder, given, rng) if given.pairs else (0, 0, 0)
    print(
        json.dumps(
            {
                "kills": given.kills,
                "kill_exact": killed,
                "while_saving": saving,
                "terms": given.terms,
                "term_exact": termed,
                "term_saved_with_status_75": saved,
                "pairs": given.pairs,
                "pair_exact": both,
                "pair_ended_with_a_message": well,
                "pair_seconds": longest,
                "seed": given.seed,
                "cores": os.cpu_count(),
            }
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--terms", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--delay", type=float, default=0.05)
    parser.add_argument("--moment", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
