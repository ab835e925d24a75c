"""Saving beside training: a step waits for one copy into host memory, a thread writes it to disk.

A save that fails (disk full, read-only, a quota) is said and the run goes on with the newest good one; one
that is due while the last is still being written is left out. `last` is different: it waits, and what fails
is raised. Rank 0 only.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint

log = logging.getLogger("subspan")
Tensors = Mapping[str, Mapping[str, Tensor]]
GIB = 2**30
ALIGN = 64  # bytes between the tensors' starts in the host copy
SPARE = GIB  # host memory that the copy must leave free


class SaveFailed(RuntimeError):
    """The last save could not be written; names the reason, the way out and what there is."""


class Saver:
    """newest: step of the newest save known to be on disk; stall_s: how long the last one held training."""

    def __init__(self, run: Path, keep_last: int, newest: int = 0) -> None:
        self.run, self.keep_last, self.newest, self.stall_s = run, keep_last, newest, 0.0
        self.saved_at = time.monotonic()  # when the last one was asked for
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._step = newest  # being written
        self._buffer: Tensor | None = None
        self._sync_only = self._pinned = False

    def reserve(self, tensors: Tensors) -> None:
        """Host memory for the copy, page-locked where a GPU copies into it; none where it would not fit."""
        some = next(iter(next(iter(tensors.values())).values()))
        size = sum(padded(t) for named in tensors.values() for t in named.values())
        if self._buffer is not None and self._buffer.numel() >= size or self._sync_only:
            return
        if size + SPARE > available():
            self._sync_only = True
            log.warning(
                "saves hold training while they are written: a copy in memory needs %s, %s is available",
                *map(in_words, (size, available())),
            )
            return
        self._buffer = torch.empty(size, dtype=torch.uint8)
        if some.is_cuda:  # in place: the allocator for pinned memory rounds up to a power of two
            self._pinned = int(torch.cuda.cudart().cudaHostRegister(self._buffer.data_ptr(), size, 0)) == 0

    def save(self, step: int, tensors: Tensors, texts: Mapping[str, str], *, last: bool = False) -> None:
        """Starts a save of `step`, or leaves it out if one is under way. last: returns when it is on disk.

        The tensors may change as soon as this returns. SaveFailed only with last=True."""
        self.poll(wait=last)
        if self._thread is not None:
            log.warning(
                "step %d is not saved: step %d is still being written (a slow disk?)", step, self._step
            )
            return
        begun = self.saved_at = time.monotonic()
        need, there = checkpoint.size_of(tensors), checkpoint.free(self.run)
        self._step, self._error = step, None
        if need > there:
            self._error = OSError(f"it needs {in_words(need)}, the disk has {in_words(there)} free")
        else:
            self.reserve(tensors)
            kept = tensors if self._buffer is None else self._copy(tensors)
            self._thread = threading.Thread(target=self._write, args=(step, kept, dict(texts)), daemon=True)
            self._thread.start()
        self.poll(wait=last or self._buffer is None, last=last)
        self.stall_s = time.monotonic() - begun

    def poll(self, wait: bool = False, last: bool = False) -> None:
        """Takes note of a write that has ended; wait: of one that is under way too."""
        if self._thread is not None:
            if not wait and self._thread.is_alive():
                return
            self._thread.join()
            self._thread = None
            if self._error is None:
                self.newest = self._step
        error, self._error = self._error, None
        if error is None:
            return
        kept = f"the newest save is step {self.newest}" if self.newest else "there is no save yet"
        said = f"step {self._step} is not saved: {reason(error)}; {kept}"
        if last:
            raise SaveFailed(said)
        log.warning("%s, the run goes on. Free some space, or lower keep_last", said)

    def _copy(self, tensors: Tensors) -> Tensors:
        assert self._buffer is not None
        at, kept = 0, dict[str, dict[str, Tensor]]()
        for file, named in tensors.items():
            kept[file] = {}
            for name, t in named.items():
                size = t.numel() * t.itemsize
                place = self._buffer[at : at + size].view(t.dtype).view(t.shape)
                place.copy_(t.detach(), non_blocking=True)
                kept[file][name] = place
                at += padded(t)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return kept

    def _write(self, step: int, tensors: Tensors, texts: Mapping[str, str]) -> None:
        try:
            checkpoint.write(self.run, step, tensors, texts, keep_last=self.keep_last)
        except BaseException as error:
            self._error = error
            tmp = checkpoint.folder(self.run, step)
            shutil.rmtree(tmp.with_name(tmp.name + ".tmp"), ignore_errors=True)

    def close(self) -> None:
        """Waits for the save under way, and gives the host memory back."""
        self.poll(wait=True)
        if self._pinned and self._buffer is not None:
            torch.cuda.cudart().cudaHostUnregister(self._buffer.data_ptr())
        self._buffer, self._pinned = None, False


def padded(t: Tensor) -> int:
    return -(-t.numel() * t.itemsize // ALIGN) * ALIGN


def in_words(count: float) -> str:
    """Of bytes: 17.2 GiB, 0.5 MiB."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"


def reason(error: BaseException) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def available() -> float:
    """Bytes of host memory that can be had without swapping; inf where the system does not say."""
    try:
        with open("/proc/meminfo") as f:
            fields = dict(line.split(":") for line in f)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
