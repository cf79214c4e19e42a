"""From a config file's sections to validated settings, and back to `config.json`.

`ml_collections` stops here: the rest of the package sees frozen dataclasses only.
Files of JSON are written whole or not at all.
"""

import dataclasses
import hashlib
import json
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

T = typing.TypeVar("T")
FILE = "config.json"


def make(cls: type[T], section: Mapping[str, Any], name: str) -> T:
    """Builds the dataclass `cls` from a section of the config; `name` is its path.

    Nested dataclasses are built from nested sections, lists become tuples, and whole
    numbers floats where floats are wanted. The path of the whole config is "". Raises
    ValueError that names the setting which is unknown, missing or impossible.
    """
    fields = {f.name: f for f in dataclasses.fields(cast(Any, cls)) if f.init}
    unknown = sorted(set(section) - set(fields))
    if unknown:
        raise ValueError(unknown_setting(name, unknown[0], fields))
    required = {key for key, f in fields.items() if _default(f) is dataclasses.MISSING}
    missing = sorted(required - set(section))
    if missing:
        raise ValueError(f"missing setting {join(name, missing[0])}")
    kinds = typing.get_type_hints(cls)
    values = {
        key: _value(value, kinds[key], join(name, key))
        for key, value in section.items()
    }
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        if str(error).startswith(f"{name}.") or not name:
            raise
        raise ValueError(f"in {name}: {error}") from error


def complete(cls: type, section: Mapping[str, Any]) -> dict[str, Any]:
    """`section` of `cls` with every default that it leaves out, nested ones too."""
    kinds = typing.get_type_hints(cls)
    whole = dict(section)
    for field in dataclasses.fields(cast(Any, cls)):
        kind = kinds[field.name]
        if field.name in section:
            value = section[field.name]
            if (nested := _section(kind)) and isinstance(value, Mapping):
                whole[field.name] = complete(nested, value)
        elif (value := _default(field)) is not dataclasses.MISSING:
            whole[field.name] = _plain(value)
    return whole


def join(name: str, key: str) -> str:
    """The path of a setting of the section at path `name`."""
    return f"{name}.{key}" if name else key


def unknown_setting(name: str, key: str, known: typing.Iterable[str]) -> str:
    """The message for a setting that does not exist, with those that do."""
    section = name or "the config"
    return f"unknown setting {join(name, key)}; {section} has {', '.join(known)}"


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _is_dataclass(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _section(kind: Any) -> type | None:
    """The dataclass of a setting that is a section, or is one or None."""
    arms = typing.get_args(kind) if _is_union(kind) else (kind,)
    return next((arm for arm in arms if _is_dataclass(arm)), None)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value


def _value(value: Any, kind: Any, name: str) -> Any:
    """The value of a field of type `kind`; ValueError where it is none of that type."""
    if (nested := _section(kind)) and isinstance(value, Mapping):
        return make(nested, value, name)
    if isinstance(value, (list, tuple)):
        value = _tuples(value)
    elif isinstance(value, Mapping):
        value = dict(value)
    arms = typing.get_args(kind) if _is_union(kind) else (kind,)
    if float in arms and int not in arms and type(value) is int:
        value = float(value)
    if tuple[float, ...] in arms and isinstance(value, tuple):
        value = tuple(float(x) if type(x) is int else x for x in value)
    if not any(_fits(value, arm) for arm in arms):
        wanted = " or ".join(_words(arm) for arm in arms)
        raise ValueError(f"{name}={value!r} must be {wanted}")
    return value


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a simple type; what is no simple type is let through."""
    if kind in (int, float, str, bool):
        return type(value) is kind
    if _is_dataclass(kind):
        return isinstance(value, kind)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and isinstance(value, tuple) and arguments[1:] == (...,):
        return all(_fits(item, arguments[0]) for item in value)
    if kind is tuple or origin is tuple:
        return isinstance(value, tuple)
    if kind is dict or origin is dict:
        return isinstance(value, dict)
    return value is None if kind is type(None) else True


def _words(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a string", bool: "a bool"}
    if kind is type(None):
        return "None"
    if kind in names:
        return names[kind]
    if _is_dataclass(kind) or typing.get_origin(kind) is dict:
        return "a section"
    return str(kind) if typing.get_origin(kind) else kind.__name__


def _tuples(value):
    if isinstance(value, (list, tuple)):
        return tuple(_tuples(v) for v in value)
    return value


def essential(section: Any) -> dict[str, Any]:
    """A settings dataclass as a dict, without what its `BOOKKEEPING` lists: what is
    left changes the result, so finished work must agree with it."""
    values = dataclasses.asdict(section)
    return {key: x for key, x in values.items() if key not in section.BOOKKEEPING}


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
    return read_json(path, "give --config, which writes it again")


def write(workdir: str | Path, config: Mapping[str, Any]) -> None:
    """Leaves the config in a work directory (created if need be)."""
    write_whole(Path(workdir) / FILE, json.dumps(config, indent=1, default=list))


def read_json(path: Path, mend: str) -> Any:
    """The contents of a JSON file; ValueError with the mend where it is damaged."""
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): {mend}") from error


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file (and its folder) so that it is never seen in part.

    A kill or a full disk leaves what was there before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        data = content if isinstance(content, bytes) else content.encode()
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
