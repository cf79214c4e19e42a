"""What every launch script shares: its flags, its errors, its last line.

    --config FILE.py[:variant]      one system (or, for evaluate.py, one protocol)
    --config.section.key=value      any setting of it, overridden
    --workdir DIR                   the work directory
    --overwrite                     make a stage anew whose settings have changed

A mistake of the user ends in one line that says the mend (exit status 2); the last
line on standard output is one JSON object with the results.
"""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags, logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for `configs`

WORKDIR = flags.DEFINE_string("workdir", None, "The work directory.", required=True)
OVERWRITE = flags.DEFINE_bool(
    "overwrite", False, "Make stages anew whose settings have changed."
)
_MISTAKES = (ValueError, OSError, FloatingPointError)


def define_config(**options: Any) -> Any:
    """The flag --config; its value is an `ml_collections.ConfigDict`."""
    from ml_collections import config_flags

    return config_flags.DEFINE_config_file("config", **options)


def run(main: Callable[[], dict[str, Any]]) -> None:
    """Parses the flags, runs `main`, prints its results as one line of JSON."""

    def wrapped(arguments: list[str]) -> None:
        if len(arguments) > 1:
            fail(f"unexpected argument {arguments[1]!r}; see --help")
        try:
            results = main()
        except _MISTAKES as error:
            if logging.level_debug():
                raise
            fail(str(error))
        print(json.dumps(results), flush=True)

    logging.set_verbosity(logging.WARNING)
    try:
        app.run(wrapped, flags_parser=_parse)
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from the last checkpoint")


def _parse(arguments: list[str]) -> list[str]:
    try:
        return flags.FLAGS(arguments)
    except (AttributeError, KeyError) as error:  # of --config.section.key=value
        fail(f"unknown setting {str(error).strip(chr(34))}; see the config file")
    except (flags.Error, OSError, ValueError) as error:
        fail(str(error).strip().splitlines()[-1].removeprefix("ValueError: "))


def fail(message: str) -> Any:
    """One line on standard error, and exit status 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


def run_stages(*names: str) -> None:
    """The whole of a script that runs stages of `cm3leon_jax.stages` in order."""
    config_flag = define_config()

    def main() -> dict[str, Any]:
        from cm3leon_jax import stages

        config = given_config(config_flag)
        return stages.run(config, Path(WORKDIR.value), names, OVERWRITE.value)

    run(main)


def given_config(flag: Any) -> dict[str, Any]:
    """The config of --config, or, without one, that of the work directory.

    Joins the other processes of a job first, before anything touches a device.
    """
    from cm3leon_jax import config as configs
    from cm3leon_jax.parallel import distributed

    distributed.initialize()
    if flag.value is None:
        return configs.read(WORKDIR.value)
    return flag.value.to_dict()


def read_config_file(name: str) -> dict[str, Any]:
    """`FILE.py[:variant]`, relative to the repository, as a plain dict."""
    path, _, variant = name.partition(":")
    get_config = runpy.run_path(str(ROOT / path))["get_config"]
    return get_config(*([variant] if variant else [])).to_dict()
