"""Commands, and a copy of the checkout to run them in, as on a fresh machine."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def call(*command: str, cwd: Path, env: dict | None = None, seconds: int = 60):
    # What the test process set for itself is not part of a fresh machine.
    outside = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV",)}
    return subprocess.run(
        command,
        cwd=cwd,
        env=outside | (env or {}),
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def succeed(
    *command: str, cwd: Path, env: dict | None = None, seconds: int = 60
) -> str:
    done = call(*command, cwd=cwd, env=env, seconds=seconds)
    assert done.returncode == 0, (
        f"{command}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    )
    return done.stdout


def copy_of_the_tree(target: Path) -> Path:
    """Every file that git would carry, committed or not, and nothing else."""
    command = ("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    names = succeed(*command, cwd=ROOT).split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target
