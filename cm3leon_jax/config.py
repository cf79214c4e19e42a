"""From a config file's sections to validated settings, and back to `config.json`.

`ml_collections` stops here: the rest of the package sees frozen dataclasses only.
"""

import dataclasses
import hashlib
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

T = typing.TypeVar("T")
FILE = "config.json"


def make(cls: type[T], section: Mapping[str, Any], name: str) -> T:
    """Builds the dataclass `cls` from a section of the config named `name`.

    Nested dataclasses are built from nested sections and lists become tuples. Raises
    ValueError that names the setting which is unknown, missing or impossible.
    """
    fields = {f.name: f for f in dataclasses.fields(cast(Any, cls)) if f.init}
    unknown = sorted(set(section) - set(fields))
    if unknown:
        raise ValueError(
            f"unknown setting {name}.{unknown[0]}; {name} has {', '.join(fields)}"
        )
    required = {
        key
        for key, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(section))
    if missing:
        raise ValueError(f"missing setting {name}.{missing[0]}")
    types = typing.get_type_hints(cls)
    values = {}
    for key, value in section.items():
        kind = types[key]
        if isinstance(value, Mapping):
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                value = make(cast(type, kind), value, f"{name}.{key}")
            else:
                value = dict(value)
        elif isinstance(value, (list, tuple)):
            value = _tuples(value)
        values[key] = value
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error


def _tuples(value):
    if isinstance(value, (list, tuple)):
        return tuple(_tuples(v) for v in value)
    return value


def config_hash(config: Mapping[str, Any]) -> str:
    """12 hex digits that name the contents of a config or of a section."""
    text = json.dumps(config, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read(workdir: str | Path) -> dict[str, Any]:
    """The config that a work directory was made with."""
    path = Path(workdir) / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: {workdir} is not a work directory; make one with "
            "launch/run_all.py --config configs/shapes.py:quick --workdir DIR"
        )
    return json.loads(path.read_text())


def write(workdir: str | Path, config: Mapping[str, Any]) -> None:
    """Leaves the config in a work directory (created if need be)."""
    Path(workdir).mkdir(parents=True, exist_ok=True)
    (Path(workdir) / FILE).write_text(json.dumps(config, indent=1, default=list))
