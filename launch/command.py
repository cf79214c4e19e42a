"""What every launch script shares: its flags, its errors, its last line.

    --config FILE.py[:variant]      one system (or, for evaluate.py, one protocol)
    --config.section.key=value      any setting of it, overridden
    --workdir DIR                   the work directory; gs://… and s3://… of one host
    --overwrite                     delete and make anew what has other settings

A mistake of the user ends in one line that says the mend (exit status 2), and if one
process of a job makes it, it ends the others as well; a job whose processes have not
met ends with 69, for another try. A run that was told to stop (SIGTERM), or whose job
has lost a process, ends with exit status 75: the same command goes on. The last line on
standard output is one JSON object with the results.
"""

import ast
import contextlib
import dataclasses
import inspect
import json
import os
import runpy
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import app, flags, logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for `configs`

WORKDIR = flags.DEFINE_string("workdir", None, "The work directory.", required=True)
OVERWRITE = flags.DEFINE_bool(
    "overwrite",
    False,
    "Delete the folders of stages made with other settings, and make them anew.",
)
_MISTAKES = (ValueError, OSError, FloatingPointError)
_TOLD = "cm3leon_mistake"  # where the processes of a job look for each other's
_ending = threading.Lock()  # of the thread that ends this process of a job


Complete = Callable[[dict[str, Any]], dict[str, Any]]


def complete_system(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a system with all its defaults."""
    from cm3leon_jax.system import System

    return System.complete(config)


def complete_protocol(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a protocol with all its defaults."""
    from cm3leon_jax import config as configs
    from cm3leon_jax.evaluation.protocol import Protocol

    return configs.complete(Protocol, config)


def define_config(complete: Complete) -> Any:
    """The flag --config; its value is an `ml_collections.ConfigDict`.

    `complete` writes the defaults out, so that each can be given on the command line.
    """
    from ml_collections import config_flags

    config_flags.register_flag_parser_for_type(type(None), _Literal())
    holder = config_flags.DEFINE_config_file("config")
    flag = flags.FLAGS["config"]
    flag.parser = _Completed(flag.parser, complete)
    return holder


class _Literal(flags.ArgumentParser):
    """For settings whose default is None, so that their type is not known here."""

    def parse(self, argument: str) -> Any:
        try:
            return ast.literal_eval(argument)
        except (SyntaxError, ValueError):
            return argument

    def flag_type(self) -> str:
        return "number, string or None"


class _Completed(flags.ArgumentParser):
    """Reads a config file and fills it up; knows the overrides that do not exist."""

    def __init__(self, parser: Any, complete: Complete) -> None:
        self._parser, self._complete = parser, complete

    def parse(self, argument: str) -> Any:
        from ml_collections import ConfigDict

        if isinstance(argument, str):
            _check_variant(argument)
        config = self._parser.parse(argument)
        if isinstance(config, ConfigDict):  # else it says on use why it is none
            config = ConfigDict(self._complete(config.to_dict())).lock()
            for given in sys.argv[1:]:
                if given.startswith("--config."):
                    _check_path(config, given.split("=")[0].removeprefix("--config."))
        return config

    def flag_type(self) -> str:
        return self._parser.flag_type()


def _check_variant(name: str) -> None:
    """ValueError for `FILE.py:variant` of a file that has others, or none."""
    path, _, variant = name.partition(":")
    if not variant or not Path(path).is_file():
        return
    module = runpy.run_path(path)
    if not inspect.signature(module["get_config"]).parameters:
        raise ValueError(f"{path} has no variants: leave out :{variant}")
    known = module.get("VARIANTS")  # where they are not a file's own affair
    if known is not None and variant not in known:
        raise ValueError(f"variant {variant!r}: choose from {', '.join(known)}")


def _check_path(config: Any, path: str) -> None:
    from ml_collections import ConfigDict

    from cm3leon_jax.config import unknown_setting

    *sections, last = path.split(".")
    node = config
    for depth, key in enumerate((*sections, last)):
        name = ".".join(sections[:depth])
        if not isinstance(node, ConfigDict):
            fail(f"{name} is a setting, not a section: there is no {path}")
        if key not in node:
            fail(unknown_setting(name, key, node))
        node = node[key]


def run(main: Callable[[], dict[str, Any]]) -> None:
    """Parses the flags, runs `main`, prints its results as one line of JSON."""

    def wrapped(arguments: list[str]) -> None:
        if len(arguments) > 1:
            fail(f"unexpected argument {arguments[1]!r}; see --help")
        try:
            with _listening(), _local_workdir():
                results = main()
        except (*_MISTAKES, RuntimeError) as error:
            _leave_a_lost_job(error)
            if logging.level_debug() or not isinstance(error, _MISTAKES):
                raise
            fail(str(error), _status(error))
        print(json.dumps(results), flush=True)

    logging.set_verbosity(logging.WARNING)
    try:
        app.run(wrapped, flags_parser=_parse)
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from the last checkpoint")


def _parse(arguments: list[str]) -> list[str]:
    try:
        return flags.FLAGS(arguments)
    except (flags.Error, OSError, ValueError) as error:
        fail(str(error).strip().splitlines()[-1].removeprefix("ValueError: "))


def fail(message: str, status: int = 2) -> Any:
    """One line on standard error, and that exit status; the whole job ends with it."""
    if (job := _job()) is not None:
        _end(job, message, f"process {job.process_id} of {job.num_processes}: ")
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)


def _job() -> Any:
    """JAX's own state of the job that this process has joined, else None.

    The only way to its key-value store, by which a process reaches the others whatever
    they wait for.
    """
    module = sys.modules.get("jax._src.distributed")
    state = getattr(module, "global_state", None)
    # Asked before it is connected, as it is when this is set, the store aborts.
    return state if getattr(state, "preemption_sync_manager", None) else None


def _end(job: Any, message: str, teller: str = "") -> None:
    """Ends this process of a job with status 2 when all know of the mistake; `teller`
    says whose it is to those who do not.

    JAX would wait minutes for the others, then abort them all as if they had crashed.
    """
    _ending.acquire()
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    with contextlib.suppress(Exception):  # where process 0 is gone, JAX ends the rest
        if teller:
            job.client.key_value_set(f"{_TOLD}/{job.process_id}", teller + message)
        job.client.wait_at_barrier(_TOLD, 30_000)
    time.sleep(float(job.process_id == 0))  # with it goes what the others still hear
    os._exit(2)


@contextlib.contextmanager
def _listening() -> Iterator[None]:
    """Looks every second whether another process of the job has made a mistake."""
    over = threading.Event()

    def listen() -> None:
        while not over.wait(1.0):
            with contextlib.suppress(RuntimeError):  # not yet there, or no more
                if (job := _job()) is not None:
                    for _, message in job.client.key_value_dir_get(_TOLD):
                        if not _ending.locked():
                            _end(job, message)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(5.0)


def _status(error: Exception) -> int:
    from cm3leon_jax.parallel import preflight

    return preflight.EXIT_CODE if isinstance(error, preflight.NotMet) else 2


@contextlib.contextmanager
def _local_workdir() -> Iterator[None]:
    """Has --workdir be a folder: its copy on this machine, where it is in a bucket."""
    from cm3leon_jax import storage

    # convert.py has no work directory, but folders of its own.
    given = WORKDIR.value if "workdir" in flags.FLAGS else None
    if given is None or not storage.is_url(given):
        yield
        return
    from cm3leon_jax.parallel import distributed

    if distributed.membership(os.environ) is not None:
        raise ValueError(
            f"--workdir={given} serves one host: for several give a folder on storage "
            "that all of them mount"
        )
    with storage.Mirror(given).kept() as folder:
        flags.FLAGS.workdir = str(folder)
        yield


def _leave_a_lost_job(error: Exception) -> None:
    """Ends this process where the error is that another one of the job is gone."""
    from cm3leon_jax.parallel.distributed import peer_lost
    from cm3leon_jax.training.preemption import EXIT_CODE

    if said := peer_lost(error):
        print(f"{Path(sys.argv[0]).name}: {said}", file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)  # JAX would wait for the other process first


def run_stages(*names: str) -> None:
    """The whole of a script that runs stages of `cm3leon_jax.stages` in order."""
    config_flag = define_config(complete_system)
    measured = _define_protocols() if {"pretrain", "sft"} & set(names) else dict

    def main() -> dict[str, Any]:
        from cm3leon_jax import stages

        config = given_config(config_flag)
        return stages.run(
            *(config, Path(WORKDIR.value), names, OVERWRITE.value), **measured()
        )

    run(main)


def _define_protocols() -> Callable[[], dict[str, Any]]:
    """Flags of what is measured while a decoder trains; a function that reads them."""
    files = flags.DEFINE_list(
        "evaluate", [], "Protocols to measure while it trains: FILE.py[:variant], …"
    )
    every = flags.DEFINE_integer(
        "evaluate_every", 1000, "Updates from one to the next.", lower_bound=1
    )
    documents = flags.DEFINE_integer(
        "evaluate_documents", None, "Of each protocol, so many at most.", lower_bound=1
    )

    def read() -> dict[str, Any]:
        from cm3leon_jax import stages

        protocols = [read_protocol(name, "--evaluate") for name in files.value]
        if documents.value is not None:
            protocols = [
                dataclasses.replace(p, documents=min(documents.value, p.documents))
                for p in protocols
            ]
        for protocol in protocols:
            stages.check_protocol(protocol)
        return {"protocols": protocols, "every": every.value}

    return read


def read_protocol(name: str, setting: str) -> Any:
    """The `Protocol` of a config file; `setting` is where its name comes from."""
    from cm3leon_jax import config as configs
    from cm3leon_jax.evaluation.protocol import Protocol

    return configs.make(Protocol, read_config_file(name, setting), "protocol")


def given_config(flag: Any) -> dict[str, Any]:
    """The config of --config, or, without one, that of the work directory.

    Joins the other processes of a job, which must have the same, before anything
    touches a device.
    """
    from cm3leon_jax import config as configs
    from cm3leon_jax.parallel import distributed

    config = configs.read(WORKDIR.value) if flag.value is None else flag.value.to_dict()
    distributed.initialize({"config": configs.config_hash(config)}, WORKDIR.value)
    return config


def read_config_file(name: str, setting: str) -> dict[str, Any]:
    """`FILE.py[:variant]`, relative to the repository, as a plain dict.

    `setting` is where the name comes from, for the error.
    """
    path, _, variant = name.partition(":")
    if not (ROOT / path).is_file():
        raise FileNotFoundError(f"{setting}={name}: {ROOT / path} does not exist")
    _check_variant(str(ROOT / name))
    get_config = runpy.run_path(str(ROOT / path))["get_config"]
    return get_config(*([variant] if variant else [])).to_dict()
