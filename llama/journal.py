"""Files of a run that a full or failing disk must not end it over."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger("subspan")


class Journal:
    """Whole lines at the end of a file. What the disk refuses waits in memory and is tried with the next.

    metrics.jsonl is told of a full disk by OSError like everything else, and must not end a run of weeks.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.waiting, self.refused = path, b"", False
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._size = os.fstat(self._fd).st_size  # of whole lines

    def write(self, lines: str) -> None:
        self.waiting += lines.encode()
        if not self.waiting:
            return
        try:
            if os.fstat(self._fd).st_size > self._size:  # a part of a line, of a write that failed
                os.ftruncate(self._fd, self._size)
            left = self.waiting
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError as e:
            if not self.refused:
                log.warning("%s: %s; its rows wait in memory, the run goes on", self.path, e.strerror)
            self.refused = True
            return
        self._size += len(self.waiting)
        self.waiting, self.refused = b"", False

    def sync(self) -> None:
        """Everything written is on disk; what is not has been said."""
        self.write("")
        with contextlib.suppress(OSError):
            os.fsync(self._fd)

    def close(self) -> None:
        self.write("")
        if self.waiting:
            log.warning("%s: its last %d rows could not be written", self.path, self.waiting.count(b"\n"))
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._size)
        os.close(self._fd)


@contextlib.contextmanager
def allowed_to_fail(what: Path) -> Iterator[None]:
    """A file that a run can do without: the disk's refusal is said, and the run goes on."""
    try:
        yield
    except OSError as e:
        log.warning("%s: %s; the run goes on without it", what, e.strerror or e)
