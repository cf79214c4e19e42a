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

from cm3leon_jax.config import config_hash, read_json, write_whole

DONE = "DONE.json"
BEGUN = "inputs.json"


def results(directory: str | Path) -> dict[str, Any]:
    """What a finished stage left; FileNotFoundError naming the stage if it has not."""
    path = Path(directory) / DONE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: the stage '{Path(directory).name}' has not "
            "finished; run it first (launch/run_all.py runs all stages in order)"
        )
    return read_json(path, "delete it and run the stage again, which then goes on")


def changes(directory: str | Path, inputs: Mapping[str, Any]) -> str:
    """In which settings `inputs` differ from those a stage was begun with, in words.

    Empty where they are the same or the stage was never begun.
    """
    begun = Path(directory) / BEGUN
    if not begun.is_file():
        return ""
    found = read_json(begun, f"delete {directory} to make it anew")
    if found["hash"] == config_hash(inputs):
        return ""
    return _changes(found["inputs"], json.loads(_dump(inputs))) or "in its form"


def is_done(directory: str | Path, inputs: Mapping[str, Any]) -> bool:
    """Whether a stage has finished with these inputs."""
    directory = Path(directory)
    begun = (directory / BEGUN).is_file() and (directory / DONE).is_file()
    return begun and not changes(directory, inputs)


def refusal(directory: str | Path, changed: str) -> FileExistsError:
    """The error for a stage that was made with other settings."""
    return FileExistsError(
        f"{directory} was made with other settings ({changed}): choose another "
        "--workdir, or give --overwrite, which deletes that folder and makes it anew"
    )


def delete(directory: str | Path, changed: str) -> None:
    """Deletes a stage's folder, saying so."""
    logging.warning("deleting %s, made with other settings (%s)", directory, changed)
    shutil.rmtree(directory)


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
    changed = changes(directory, inputs)
    if changed:
        if not overwrite:
            raise refusal(directory, changed)
        delete(directory, changed)
    if is_done(directory, inputs):
        logging.info("%s is done", directory.name)
        return results(directory)
    wanted = config_hash(inputs)
    write_whole(directory / BEGUN, _dump({"hash": wanted, "inputs": inputs}))
    start = time.monotonic()
    made = dict(work())
    made |= {"inputs_hash": wanted, "seconds": round(time.monotonic() - start, 1)}
    write_whole(directory / DONE, _dump(made))
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
