"""What a model has written is kept on disk, part by part, until a result is final.

A run that was interrupted asks for the missing parts only, and the processes of a job
share the parts out. A part is named by a digest of everything it follows from, and its
samples' noise by their numbers: a result depends neither on how often a run was
interrupted nor on how many processes or devices there are.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import jax
import msgpack
import numpy as np
import tqdm
from PIL import Image as Pillow

from cm3leon_jax.config import write_whole
from cm3leon_jax.data.documents import Document, from_bytes, to_bytes
from cm3leon_jax.parallel.distributed import together
from cm3leon_jax.retrieval.embed import Embedder

PART = 128  # prompts; the same everywhere, whatever the devices
# Methods whose samples follow from the numbers of their prompts, and the others.
_DRAWN = (
    *("text_to_image", "caption", "answer", "science", "explain", "infill", "edit"),
    *("control", "ground", "write", "variation", "segment"),
)
_PLAIN = ("reconstruct", "log_likelihood")
# Options that have an entry for every prompt.
_EACH = ("masks", "prompts", "questions", "choices", "contexts", "instructions") + (
    *("regions", "boxes", "retrieve", "numbers"),
)


def digest(value: Any) -> str:
    """12 hex digits that name a value: numbers, texts, arrays, pictures, documents,
    and dataclasses, mappings, sequences and sets of them."""
    found = hashlib.sha256()
    _feed(found.update, value)
    return found.hexdigest()[:12]


def _feed(update: Callable[[bytes], None], value: Any) -> None:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Pillow.Image):
        value = np.asarray(value.convert() if value.mode == "P" else value)
    if isinstance(value, np.ndarray):
        update(f"{value.dtype.str}{value.shape}".encode())
        update(np.ascontiguousarray(value).tobytes())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        update(type(value).__name__.encode())
        names = [field.name for field in dataclasses.fields(value)]
        _feed(update, {name: getattr(value, name) for name in names})
    elif isinstance(value, Mapping):
        update(f"{{{len(value)}".encode())
        for key in sorted(value, key=str):
            update(f"{key!r}:".encode())
            _feed(update, value[key])
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes | range):
        update(f"[{len(value)}".encode())
        for item in value:
            _feed(update, item)
    elif isinstance(value, Set):
        update(f"<{len(value)}{sorted(map(digest, value))}".encode())
    else:
        update(f"{value!r},".encode())


def pack(value: Any) -> bytes:
    """Anything that models and metrics give: texts, numbers, arrays, pictures,
    documents, and tuples, lists and mappings of them."""
    return msgpack.Packer(default=_packed).pack(value)


def unpack(data: bytes) -> Any:
    """What was packed; lists come back as tuples."""
    return msgpack.unpackb(
        data, object_hook=_unpacked, use_list=False, strict_map_key=False
    )


def _packed(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        data = np.ascontiguousarray(value).tobytes()
        return {"*array": [value.dtype.str, value.shape, data]}
    if isinstance(value, Pillow.Image):
        out = io.BytesIO()
        value.save(out, "PNG", compress_level=1)
        return {"*picture": out.getvalue()}
    if isinstance(value, Document):
        return {"*document": to_bytes(value)}
    raise ValueError(f"a {type(value).__name__} cannot be kept")


def _unpacked(found: dict) -> Any:
    if "*array" in found:
        kind, shape, data = found["*array"]
        return np.frombuffer(data, kind).reshape(shape).copy()
    if "*picture" in found:
        return Pillow.open(io.BytesIO(found["*picture"])).copy()
    if "*document" in found:
        return from_bytes(found["*document"])
    return found


class Parts:
    """The parts in a folder, shared by all processes of a job."""

    def __init__(self, folder: Path):
        self.folder = folder

    def run(
        self, keys: Sequence[Any], work: Callable[[int], Any], name: str = "parts"
    ) -> Iterator[Any]:
        """`work(i)` for each key, in order: read where it is there, else made, each by
        one process of the job. `keys` say all that a part follows from, of which there
        is one at a time in memory."""
        files = [self.folder / f"{digest(key)}.part" for key in keys]
        index, count = jax.process_index(), jax.process_count()
        missing = [i for i in range(index, len(files), count) if not files[i].is_file()]
        bar = tqdm.tqdm(missing, name, disable=None, leave=False, delay=1)
        for i in bar:
            write_whole(files[i], pack(work(i)))
        together(name)
        for file in files:
            try:
                yield unpack(file.read_bytes())
            except (ValueError, msgpack.UnpackException) as error:
                raise ValueError(
                    f"{file} is damaged ({error}): delete it, and run the same again"
                ) from error


def write_result(path: Path, found: dict[str, Any]) -> None:
    """A result and, beside it, the draws of its bootstrap; they say which result they
    are of: a kill may leave the old one beside new draws."""
    drawn = {k: x for k, x in found["scores"].items() if hasattr(x, "draws")}
    arrays: dict[str, Any] = {k: x.draws.astype(np.float32) for k, x in drawn.items()}
    rows = json.dumps({key: score.names for key, score in drawn.items()})
    np.savez_compressed(file := io.BytesIO(), of=digest(found), rows=rows, **arrays)
    write_whole(path.with_suffix(".npz"), file.getvalue())
    write_whole(path, json.dumps(found, indent=1))


class Kept:
    """A model (`CM3Leon`) whose answers to lists of prompts are `parts`; all else is
    the model's own. `identity` is what its answers follow from beside the prompts,
    `encoder` what sees texts and pictures in one space, if not the memory's does."""

    def __init__(
        self, model: Any, parts: Parts, identity: str, encoder: Embedder | None = None
    ):
        self.model, self.parts, self.identity = model, parts, identity
        self._encoder = encoder
        # Digests of what is `note`d, and those of earlier results.
        self.seen: dict[str, str] = {}
        self.known: dict[str, str] = {}

    @property
    def embedder(self) -> Embedder | None:
        """None where there is none whose texts and pictures share their axes."""
        memory = getattr(self.model, "memory", None)
        found = memory.embedder if self._encoder is None and memory else self._encoder
        return None if found is None or found.name.startswith("frozen-") else found

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.model, name)
        if name in (*_DRAWN, *_PLAIN):
            return functools.partial(self._ask, name, found)
        return found

    def _ask(
        self, name: str, method: Callable[..., Any], *given: Any, **options: Any
    ) -> Any:
        """What `method` answers, asked for a part of its prompts at a time."""
        first = list(given[0])
        if options.get("return_scores"):  # all candidates: too much to keep
            return method(first, *given[1:], **options)
        count = len(first)
        if name in _DRAWN:
            options.setdefault("numbers", range(count))
        memory = getattr(self.model, "memory", None)
        about = [self.identity, name, memory is not None and len(memory)]

        def asked(start: int) -> tuple[list[Any], dict[str, Any]]:
            own = slice(start, start + PART)
            return (
                [first[own], *(_cut(value, own, count) for value in given[1:])],
                {
                    key: _cut(value, own, count) if key in _EACH else value
                    for key, value in options.items()
                },
            )

        starts = range(0, count, PART)
        keys = ((about, *asked(start)) for start in starts)

        def work(i: int) -> Any:
            values, named = asked(starts[i])
            return method(*values, **named)

        names = [digest(key) for key in keys]  # not all of them at once in memory
        return [x for part in self.parts.run(names, work, name) for x in part]


def note(model: Any, name: str, examples: Any) -> None:
    """These are what a model is asked, or scored by, beside the protocol's documents:
    the result will have their digest. ValueError where earlier ones have another."""
    if isinstance(model, Kept):
        model.seen[name] = found = digest(examples)
        if model.known.get(name, found) != found:
            raise ValueError(
                f"examples of {name} are others than in earlier results of this "
                "protocol here: delete those results, or give --overwrite"
            )


def _cut(value: Any, own: slice, count: int) -> Any:
    """The entries of a part, where there is one for every prompt."""
    if isinstance(value, list | tuple | range | np.ndarray) and len(value) == count:
        return value[own]
    return value
