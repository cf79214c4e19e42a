"""Batches made and sent to the devices in a background thread, ahead of the loop."""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Iterates over `convert(item)` for the items of `make()`, `depth` of them ahead.

    `make` and `convert` run in the thread. An error there is raised by `next` at the
    item where it happened. A context manager: leaving it ends the thread.
    """

    def __init__(
        self, make: Callable[[], Iterator[Any]], convert: Callable[[Any], T], depth: int
    ) -> None:
        self._make, self._convert = make, convert
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        # Worker processes, which inherit this, live until a run told to stop has saved.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
        try:
            for item in self._make():
                if not self._put(("item", self._convert(item))):
                    return
            self._put(("end", None))
        except BaseException as error:  # handed to the consumer, whatever it is
            self._put(("error", error))

    def _put(self, entry: tuple[str, Any]) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Prefetch[T]:
        return self

    def __next__(self) -> T:
        kind, value = self._queue.get()
        if kind == "item":
            return value
        self._queue.put((kind, value))  # the end stays the end
        if kind == "error":
            raise value
        raise StopIteration

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join(timeout=10.0)
