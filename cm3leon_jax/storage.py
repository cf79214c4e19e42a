"""A work directory in a bucket: kept in a local folder, which is copied there.

Token caches are memory-mapped and records read at random, so what works is a local
copy, in `$CM3LEON_CACHE` (default `~/.cache/cm3leon_jax`). It is made when a command
begins, and copied back every minute and when the command ends, however it does: with
the machine at most a minute's work is lost. `mirror.json` in the bucket names the files
that belong together and is written last, so nobody sees a part of what is new; that of
the copy is what both had last. (Files that are written again, like `metrics.jsonl`, are
good in any version.) Any bucket that fsspec knows will do: `gs://`, `s3://`, …; the
extra `cloud` has the drivers.

One host writes. Jobs of several hosts need storage that all of them share, where each
writes its own part of a checkpoint: a disk, or the bucket mounted as a folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from absl import logging

from cm3leon_jax.config import write_whole

T = TypeVar("T")
MANIFEST = "mirror.json"
TRIES = 5
_UNFINISHED = re.compile(r"orbax-checkpoint-tmp|\.partial$|\.preflight-")
Entry = list[int]  # bytes, and when it was changed (ns): the version of a file


def is_url(path: str) -> bool:
    return "://" in path


class Mirror:
    """The bucket folder `url` and its copy `local`. Raises ValueError where nothing
    knows how to speak to it."""

    def __init__(self, url: str, cache: str | Path | None = None) -> None:
        self.url = url.rstrip("/")
        options = {"auto_mkdir": True} if self.url.startswith("file:") else {}
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url, **options)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"--workdir {url}: {error}; the extra `cloud` has drivers for gs:// "
                "and s3://: bash launch/setup.sh cloud"
            ) from error
        default = Path.home() / ".cache" / "cm3leon_jax"
        root = Path(cache or os.environ.get("CM3LEON_CACHE") or default)
        number = hashlib.sha256(self.url.encode()).hexdigest()[:8]
        self.local = root / f"{self.url.rsplit('/', 1)[-1]}-{number}"

    def pull(self) -> None:
        """Makes the copy what the bucket's manifest says. What was never pushed stays;
        where the bucket has gone on without it, it is put aside. OSError where the
        bucket cannot be read."""
        synced = self.local / MANIFEST
        last = json.loads(synced.read_bytes()) if synced.is_file() else {}
        wanted = self._manifest()
        aside = self.local.with_name(f"{self.local.name}-unpushed-{time.time_ns()}")
        for name, entry in self._files().items():
            if wanted in ({}, last) or wanted.get(name) == entry:
                continue
            if last.get(name) == entry:
                (self.local / name).unlink()
                continue
            logging.warning("never pushed to %s: %s, now in %s", self.url, name, aside)
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            (self.local / name).rename(aside / name)
        for name, (_, changed) in wanted.items():
            path = self.local / name
            if path.exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(path.name + ".partial")
            self._again("read", self._fs.get_file, self._at(name), str(partial))
            os.utime(partial, ns=(changed, changed))
            partial.replace(path)
        write_whole(synced, json.dumps(wanted))

    def push(self) -> None:
        """Copies what has changed, then the manifest, then forgets what is gone.

        Where a file goes away meanwhile, the rest waits for the next push.
        """
        before, now = self._manifest(), self._files()
        for name, entry in now.items():
            path = self.local / name
            if before.get(name) != entry and path.exists():
                self._again("written", self._fs.put_file, str(path), self._at(name))
            if not path.exists():
                return
        text = json.dumps(now).encode()
        if before != now:
            self._again("written", self._fs.pipe_file, self._at(MANIFEST), text)
        write_whole(self.local / MANIFEST, text)
        for name in before.keys() - now.keys():
            self._again("written", self._remove, self._at(name))

    @contextlib.contextmanager
    def kept(self, every: float = 60.0) -> Iterator[Path]:
        """The local folder, pulled; pushed every so many seconds and at the end,
        whatever that is. OSError where a first trial or the last push fails."""
        trial = self._at(f".trial-{time.time_ns()}")
        self._again("written", self._fs.pipe_file, trial, b"")
        self._again("written", self._remove, trial)
        self.pull()
        over = threading.Event()

        def work() -> None:
            while not over.wait(every):
                try:
                    self.push()
                except OSError as error:
                    logging.warning("%s; trying again in %.0f s", error, every)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield self.local
        finally:
            over.set()
            thread.join()
            self.push()

    def _remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(path)

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _manifest(self) -> dict[str, Entry]:
        def read() -> bytes:
            try:
                self._fs.invalidate_cache()
                return self._fs.cat_file(self._at(MANIFEST))
            except FileNotFoundError:
                return b"{}"  # nothing was ever put there

        return json.loads(self._again("read", read))

    def _files(self) -> dict[str, Entry]:
        found = {}
        for path in sorted(self.local.rglob("*")):
            name = path.relative_to(self.local).as_posix()
            if name == MANIFEST or _UNFINISHED.search(name):
                continue
            with contextlib.suppress(FileNotFoundError):  # removed a moment ago
                if path.is_file():
                    stat = path.stat()
                    found[name] = [stat.st_size, stat.st_mtime_ns]
        return found

    def _again(self, what: str, call: Callable[..., T], *arguments: Any) -> T:
        """`call`, tried several times; OSError that names the bucket if none helps."""
        for turn in range(TRIES):
            try:
                return call(*arguments)
            except Exception as error:  # every driver has errors of its own
                hopeless = isinstance(error, PermissionError | FileNotFoundError)
                if hopeless or turn == TRIES - 1:
                    raise OSError(
                        f"{self.url} cannot be {what} ({type(error).__name__}: {error})"
                        ": see that the bucket exists and that you may use it"
                    ) from error
                time.sleep(2.0**turn)
        raise AssertionError
