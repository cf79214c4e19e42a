"""Pictures in a folder or in webdataset tars, each with a .txt or .json beside it."""

from __future__ import annotations

import itertools
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cm3leon_jax.config import config_hash
from cm3leon_jax.data.documents import Skipped
from cm3leon_jax.data.parts import RECORDS, FilesConfig, Found, Kind, Part, Raw, facts
from cm3leon_jax.data.pictures import read_caption

_PICTURES = (".jpg", ".jpeg", ".png", ".webp")
_SUFFIXES = (*_PICTURES, ".txt", ".json")
_CAPTIONS = ("caption", "text")  # of a .json


@dataclass(frozen=True, kw_only=True)
class FolderConfig(FilesConfig):
    """`path`: a folder, searched to any depth, of pictures with a .txt or .json beside
    each: the caption, or an object with "caption" and perhaps "licence", "source"."""


@dataclass(frozen=True, kw_only=True)
class WebdatasetConfig(FilesConfig):
    """`path`: a .tar, or a folder of them, with KEY.jpg|png|webp and KEY.txt or .json
    inside, in any order."""


def folder_parts(config: FolderConfig) -> Iterator[Part]:
    """So many names at a time, in their order."""
    root = Path(config.path)
    if not root.is_dir():
        raise FileNotFoundError(f"data.settings.path={config.path} is not a folder")
    files = sorted(
        (path.relative_to(root).with_suffix("").as_posix(), path.suffix.lower(), path)
        for path in root.rglob("*")
        if path.suffix.lower() in _SUFFIXES
    )
    groups = itertools.groupby(files, key=lambda file: file[0])
    named = [(name, [file[1:] for file in group]) for name, group in groups]
    # A .json alone describes the set.
    named = [item for item in named if {suffix for suffix, _ in item[1]} != {".json"}]
    for start in range(0, len(named), RECORDS):
        chunk = named[start : start + RECORDS]
        times = [stamp_of(path) for _, group in chunk for _, path in group]
        stamp = config_hash({"files": times})
        yield Part(f"names from {chunk[0][0]}", tuple(chunk), stamp=stamp)


def read_folder(config: FolderConfig, part: Part) -> Iterator[Raw]:
    """The records of some names."""
    for name, group in part.where:
        parts = [(suffix, path.read_bytes) for suffix, path in group]
        yield Raw(name, partial(_load, parts))


def webdataset_parts(config: WebdatasetConfig) -> Iterator[Part]:
    """The tars, in order of their names."""
    root = Path(config.path)
    tars = sorted(root.glob("*.tar")) if root.is_dir() else [root]
    if not tars or not tars[0].is_file():
        raise FileNotFoundError(
            f"data.settings.path={config.path}: no .tar files there"
        )
    for path in tars:
        yield Part(path.stem, (path,), stamp=stamp_of(path), source=path.name)


def read_tar(config: WebdatasetConfig, part: Part) -> Iterator[Raw | Skipped]:
    """The records of a tar, by the first member of each; damage comes last."""
    (path,) = part.where
    try:
        with tarfile.open(path) as tar:
            # All headers first: a tar may hold all pictures before any caption.
            groups: dict[str, list[tarfile.TarInfo]] = {}
            damage = None
            try:
                for member in tar:
                    if member.isfile():
                        groups.setdefault(_key(path, member), []).append(member)
            except (tarfile.TarError, OSError, EOFError) as error:
                damage = error
            for name, members in groups.items():
                yield Raw(name, partial(_load, [_opened(tar, m) for m in members]))
            if damage:
                raise damage
    except (tarfile.TarError, OSError, EOFError) as error:
        yield Skipped(path.stem, f"the rest of {path.name} is damaged: {error}")


def stamp_of(path: Path) -> str:
    """Changes when a file does; a link to nowhere is found out when it is read."""
    try:
        state = path.stat()
    except OSError:
        return "none"
    return f"{state.st_size}-{state.st_mtime_ns}"


def _key(path: Path, member: tarfile.TarInfo) -> str:
    folder, _, file = member.name.rpartition("/")
    return f"{path.stem}/{folder}{'/' if folder else ''}{file.split('.')[0]}"


def _opened(
    tar: tarfile.TarFile, member: tarfile.TarInfo
) -> tuple[str, Callable[[], bytes]]:
    suffix = member.name.rpartition("/")[2].partition(".")[2].lower()
    return f".{suffix}", partial(_member_bytes, tar, member)


def _member_bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    try:
        file = tar.extractfile(member)
        return file.read() if file else b""
    except (tarfile.TarError, EOFError) as error:
        raise OSError(f"{member.name} is damaged: {error}") from error


def _load(parts: Sequence[tuple[str, Callable[[], bytes]]]) -> Found:
    """One record out of (suffix, read) of the files that share a name."""

    def of(*suffixes: str) -> list[Callable[[], bytes]]:
        return [read for suffix, read in parts if suffix in suffixes]

    pictures, texts, described = of(*_PICTURES), of(".txt"), of(".json")
    for what, found in (("picture", pictures), ("caption", texts or described)):
        if len(found) != 1:
            raise ValueError(f"{len(found) or 'no'} {what} files of this name")
    values = _described(described)
    if texts:
        caption = read_caption(texts[0]())
    else:
        given = [values[key] for key in _CAPTIONS if key in values]
        if not given or not isinstance(given[0], str):
            raise ValueError('no "caption" in the .json of this name')
        caption = given[0]
    return Found(pictures[0](), (caption,), facts(values))


def _described(files: Iterable[Callable[[], bytes]]) -> dict:
    for read in files:
        try:
            values = json.loads(read())
        except ValueError as error:
            raise ValueError(f"the .json of this name is damaged: {error}") from None
        if not isinstance(values, dict):
            raise ValueError("the .json of this name is not an object")
        return values
    return {}


FOLDER = Kind(FolderConfig, folder_parts, read_folder)
WEBDATASET = Kind(WebdatasetConfig, webdataset_parts, read_tar)
