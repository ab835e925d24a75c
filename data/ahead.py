"""An iterator that runs ahead of its consumer in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar, cast

T = TypeVar("T")


class Ahead(Generic[T]):
    """Endless items, at most `depth` of them made ahead; an error in the thread is raised here, as it was."""

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._items = items
        self._ready: queue.Queue[tuple[T, None] | tuple[None, BaseException]] = queue.Queue(depth)
        self._closed = threading.Event()
        self._error: BaseException | None = None
        # A daemon: a read over the network may hang, and must not keep the process.
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Ahead[T]:
        return self

    def __next__(self) -> T:
        return cast(T, self.wait(lambda: False))

    def wait(self, asked: Callable[[], bool]) -> T | None:
        """The next item; None if asked() is true while none is ready."""
        while not self._closed.is_set():
            if self._error is not None:
                raise self._error
            try:
                item, self._error = self._ready.get(timeout=0.1)
            except queue.Empty:
                if asked():
                    return None
                continue
            if self._error is None:
                return item
        raise ValueError("the loader is closed")

    def close(self) -> None:
        """Ask the thread to end; join() waits for it."""
        self._closed.set()

    def join(self) -> None:
        self._thread.join(timeout=10)

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._put((item, None)):
                    return
        except BaseException as error:
            self._put((None, error))

    def _put(self, item: tuple[T, None] | tuple[None, BaseException]) -> bool:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                pass
        return False
