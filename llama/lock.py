"""One process at a time in a run folder, and signals that ask for a clean end."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import time
from pathlib import Path
from types import FrameType
from typing import IO


class InUse(RuntimeError):
    """Another process trains in the folder; names it."""


class Lock:
    """Held from `take` until `release` or the end of the process, however that comes.

    The kernel keeps it, so nothing is left over by a killed process. Some network file systems know no locks:
    `take` says so by False.
    """

    def __init__(self) -> None:
        self._file: IO[str] | None = None

    def take(self, folder: Path) -> bool:
        """Raises InUse; OSError where the folder may not be written."""
        file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - open while it is held
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read(200).strip() or "another process"
            file.close()
            raise InUse(f"{folder} is in use by {who}") from None
        except OSError:
            file.close()
            return False
        self._file = file
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}\n")
        file.flush()
        return True

    @property
    def held(self) -> bool:
        return self._file is not None

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class Signals:
    """SIGTERM, SIGUSR1 and Ctrl-C ask for a save and a clean end at the next step; a second Ctrl-C kills."""

    def __init__(self) -> None:
        self.asked, self.name = False, "stopped"
        for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(s, self.note)

    def note(self, number: int, frame: FrameType | None) -> None:
        self.asked, self.name = True, signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
