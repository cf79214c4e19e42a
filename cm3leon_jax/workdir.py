"""Stages of a work directory: done once, skipped when nothing changed.

A stage owns one folder of the work directory and leaves `DONE.json` there when it has
finished: a hash of everything it was made from, its counts and its seconds.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import logging

from cm3leon_jax.config import config_hash

DONE = "DONE.json"


def results(directory: str | Path) -> dict[str, Any]:
    """What a finished stage left; FileNotFoundError naming the stage if it has not."""
    path = Path(directory) / DONE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: the stage '{Path(directory).name}' has not "
            "finished; run it first (launch/run_all.py runs all stages in order)"
        )
    return json.loads(path.read_text())


def run_stage(
    directory: str | Path,
    inputs: Mapping[str, Any],
    work: Callable[[], Mapping[str, Any]],
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Runs `work` unless the stage is done with the same inputs; returns its results.

    `inputs` is what the stage's output depends on (settings, hashes of the stages
    before it). Raises FileExistsError when the stage was done, or begun, with others:
    nothing is lost unless `overwrite` is given. A stage that was begun with the same
    inputs goes on, so `work` may resume from what it finds in its folder.
    """
    directory = Path(directory)
    wanted = config_hash(inputs)
    begun = directory / "inputs.json"
    if begun.is_file():
        found = json.loads(begun.read_text())
        if found["hash"] != wanted:
            if not overwrite:
                changed = _changes(found["inputs"], json.loads(_dump(inputs)))
                raise FileExistsError(
                    f"{directory} was made with other settings ({changed}): choose "
                    "another --workdir, or give --overwrite to make it anew"
                )
            shutil.rmtree(directory)
        elif (directory / DONE).is_file():
            logging.info("%s is done", directory.name)
            return results(directory)
    directory.mkdir(parents=True, exist_ok=True)
    begun.write_text(_dump({"hash": wanted, "inputs": inputs}))
    start = time.monotonic()
    made = dict(work())
    made |= {"inputs_hash": wanted, "seconds": round(time.monotonic() - start, 1)}
    finished = directory / (DONE + ".partial")
    finished.write_text(_dump(made))
    finished.rename(directory / DONE)
    return made


def _dump(value) -> str:
    return json.dumps(value, indent=1, default=list)


def _changes(old: Mapping, new: Mapping, prefix: str = "") -> str:
    """Names the first settings in which two nested dicts differ."""
    names = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            names.append(_changes(a, b, f"{prefix}{key}."))
        elif a != b:
            names.append(f"{prefix}{key}: {a} -> {b}")
    return "; ".join(name for name in names if name)
