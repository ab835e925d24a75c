"""Shards of C4 on this machine's disk: each is downloaded once, however many ranks, runs and epochs read it.

    CACHE/c4/REVISION.json          the list of a commit's files, with sizes and hashes
    CACHE/c4/REVISION/NAME          a shard, whole and of the right hash; its time of change: when last used
    CACHE/c4/REVISION/NAME.part     what has come of one
    CACHE/c4/REVISION/NAME.lock     held by the process that downloads it

The folder is bounded by data.cache_gib: the least recently used shards go. A shard that any process reads or
has read ahead is locked (shared, on its own file) and stays; what another process has open stays readable
even where locks do nothing.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from . import hub
from .archive import cache_dir, write_atomic
from .config import DamageLimit, DataConfig, DataError, is_url
from .hub import Closed, Fault, Hub, Listing, Offline, Refused

log = logging.getLogger("subspan")

REPO, FOLDER = "allenai/c4", "en"
WANTED = r"c4-(train|validation)\.[\w.-]*\.json(\.gz|\.xz|\.zst)?"
AHEAD = 2  # shards downloaded while one is read: at 1 M tokens a second a shard of 320 MB lasts 3 minutes
KEPT_S = 10.0  # how long the hub is asked for a list where one is kept
POLL_S = 0.2  # between two looks at what another process or thread does
WAY_OUT = "check the network and HF_ENDPOINT, or use data.path=FOLDER for a copy, data=local or data=sample"


def endpoint(cfg: DataConfig) -> str:
    """The hub's address: data.path if that is one, else HF_ENDPOINT, else the hub itself."""
    mirror = cfg.path if is_url(cfg.path) else os.environ.get("HF_ENDPOINT")
    return (mirror or "https://huggingface.co").rstrip("/")


def listing(cfg: DataConfig, state: dict[str, object] | None = None) -> Listing | None:
    """C4's files on the hub; None where another source is read. For one process of a run: hubs count calls.

    Of the commit that a position `state` refers to, if there is one, else the newest; the list kept in the
    cache serves when the hub cannot be asked. DataError where there is none.
    """
    if cfg.name != "c4" or cfg.path and not is_url(cfg.path):
        return None
    of = (state or {}).get("of")
    revision = of.get("data.revision") if isinstance(of, dict) else None
    kept, address = kept_listings(cfg), endpoint(cfg)
    known = [k for k in kept.values() if k.endpoint == address and not revision]
    limit_s = KEPT_S if known else hub.LIST_S
    server = Hub(address)
    try:
        revision = revision or server.newest("dataset", REPO, limit_s)
        if revision in kept:  # a commit's hash stands for its files, whoever has them
            found = replace(kept[revision], endpoint=address)
        else:
            found = server.tree("dataset", REPO, FOLDER, WANTED, revision, limit_s)
    except Refused as error:
        raise DataError(
            f"data=c4: {address} does not give the list of {REPO} ({error}); check data.path, HF_ENDPOINT "
            "and HF_TOKEN, or use data.path=FOLDER for a copy"
        ) from error
    except (Fault, Offline) as error:
        if not known:
            raise DataError(f"data=c4: {REPO} cannot be listed at {address} ({error}); {WAY_OUT}") from error
        found = known[-1]
        log.warning(
            "data=c4: %s cannot be asked (%s); reading commit %s as kept", address, error, found.revision
        )
        return found
    for split in ("train", "validation"):
        if not names(found, split):
            raise DataError(
                f"data=c4: no file c4-{split}.*.json.gz in {REPO}/{FOLDER} at {address}; "
                "check data.path and HF_ENDPOINT"
            )
    content = json.dumps(asdict(found)).encode()
    with hub.writing(_home(cfg)):
        write_atomic(_home(cfg) / f"{found.revision[:12]}.json", content)
    return found


def names(found: Listing, split: str) -> list[str]:
    return [n for n in found.files if n.startswith(f"c4-{split}.")]


def kept_listings(cfg: DataConfig) -> dict[str, Listing]:
    """Commit -> list, those that a run used last at the end."""
    found = {}
    for path in sorted(_home(cfg).glob("*.json"), key=lambda p: p.stat().st_mtime):
        try:
            one = Listing(**json.loads(path.read_text()))
            one = Listing(
                **{**asdict(one), "files": {n: (int(s), str(d)) for n, (s, d) in one.files.items()}}
            )
            found[one.revision] = one
        except (OSError, ValueError, TypeError, AttributeError) as error:
            log.warning("data=c4: the list kept in %s is damaged (%s)", path, error)
    return found


def _home(cfg: DataConfig) -> Path:
    return cache_dir(cfg) / "c4"


class Shelf:
    """The cached files of one list. DataError where the bound is below two shards."""

    def __init__(self, files: Listing, cfg: DataConfig) -> None:
        self.files, self.root = files, _home(cfg)
        self.folder = self.root / files.revision[:12]
        self.limit = round(cfg.cache_gib * 2**30)
        largest = max(size for size, _ in files.files.values())
        if self.limit < 2 * largest:
            raise DataError(
                f"data.cache_gib={cfg.cache_gib:g}: holds less than two shards of {largest / 2**30:.3g} GiB, "
                f"one to read and one to download; give {2 * largest / 2**30:.3g} or more"
            )
        self.ahead = min(AHEAD, self.limit // largest - 1)
        self._checked: set[tuple[str, int]] = set()  # (name, inode) whose hash this process has seen
        self._crowded = False

    def open(self, name: str, server: Hub, busy: Iterable[str]) -> BinaryIO:
        """The file for reading, whole and right, downloaded if it is not there; `busy` are not removed.

        Locked against removal by others until it is closed. Raises as Hub.download().
        """
        path = self.folder / name
        while (file := self._cached(path)) is None:
            with self._turn(path, server.stop):
                if not path.exists():
                    self._make_room(name, {*busy, name})
                    server.download(self.files, name, path)
                    with suppress(FileNotFoundError):  # removed by another process already
                        self._checked.add((name, path.stat().st_ino))
        return file

    def _cached(self, path: Path) -> BinaryIO | None:
        """None if it is not there, or damaged and therefore removed."""
        try:
            file = open(path, "rb")
        except FileNotFoundError:
            return None
        lock(file, fcntl.LOCK_SH)
        state, (size, digest) = os.fstat(file.fileno()), self.files.files[path.name]
        mark = (path.name, state.st_ino)
        if state.st_size != size or mark not in self._checked and hub.hash_of(file, digest) != digest:
            log.warning("data=c4: %s is damaged, fetching it again", path)
            file.close()
            path.unlink(missing_ok=True)
            return None
        self._checked.add(mark)
        with suppress(PermissionError):  # somebody else's
            os.utime(file.fileno())
        return file

    @contextmanager
    def _turn(self, path: Path, stop: threading.Event) -> Iterator[None]:
        """One process at a time; Closed if `stop` comes first."""
        with hub.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(f"{path}.lock", "ab")
        with file:
            since = said = time.monotonic()
            while not lock(file, fcntl.LOCK_EX):
                if stop.wait(POLL_S):
                    raise Closed
                if time.monotonic() - said >= hub.SAY_S:
                    said = time.monotonic()
                    log.warning("waiting %.0f s for the process that downloads %s", said - since, path.name)
            yield

    def _make_room(self, name: str, busy: set[str]) -> None:
        """Removes the least recently used files until this one fits."""
        with hub.writing(self.root), open(self.root / ".lock", "ab") as file:
            while not lock(file, fcntl.LOCK_EX):
                time.sleep(POLL_S)  # held for as long as a few files are removed
            part = self.folder / f"{name}.part"
            found = sorted((f for f in self._stored() if f[0] != part), key=lambda f: f[2])
            excess = sum(size for _, size, _ in found) + self.files.files[name][0] - self.limit
            for path, size, _ in found:
                ours = path.parent == self.folder and path.name.removesuffix(".part") in busy
                if excess > 0 and not ours and _remove(path):
                    excess -= size
        if excess > 0 and not self._crowded:
            self._crowded = True
            log.warning(
                "data.cache_gib: %d MB too little for all that is read from %s", excess >> 20, self.root
            )

    def _stored(self) -> Iterator[tuple[Path, int, float]]:
        """(path, bytes, when last used) of every file that counts; what is coming counts as whole."""
        for path in self.root.glob("*/c4-*"):
            with suppress(FileNotFoundError):  # another process removes files too
                state, size = path.stat(), 0
                if path.suffix == ".part":
                    size, _ = self.files.files.get(path.stem, (0, ""))
                if path.suffix != ".lock":
                    yield path, max(size, state.st_size), state.st_mtime


class Opener:
    """Files of a shelf in the order that one reader asks for them; a thread downloads what comes next.

    A daemon: it may hang in a read for READ_S, and must not keep the process.
    """

    def __init__(self, shelf: Shelf) -> None:
        self._shelf, self._stop = shelf, threading.Event()
        self._server = Hub(shelf.files.endpoint, self._stop)
        self._changed = threading.Condition()
        self._reading = ""
        self._wanted: list[str] = []  # in the order in which they will be asked for
        self._ready: dict[str, BinaryIO] = {}  # open, so that no other process removes them
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="download", daemon=True)

    def open(self, name: str, following: Iterable[str] = ()) -> BinaryIO:
        """The file, as soon as it is there; the next few of `following` are downloaded meanwhile."""
        with self._changed:
            if not self._thread.ident:
                self._thread.start()
            self._reading, self._wanted = name, [name, *islice(following, self._shelf.ahead)]
            for other in set(self._ready) - set(self._wanted):
                self._ready.pop(other).close()
            self._changed.notify_all()
            while name not in self._ready:
                if self._error is not None:
                    raise self._error
                if self._stop.is_set():
                    raise ValueError("the loader is closed")
                self._changed.wait(POLL_S)
            self._wanted = self._wanted[1:]
            self._changed.notify_all()
            return self._ready.pop(name)

    def close(self) -> None:
        """At once, whatever the thread waits for."""
        self._stop.set()
        with self._changed:
            while self._ready:
                self._ready.popitem()[1].close()
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                with self._changed:
                    name = next((n for n in self._wanted if n not in self._ready), None)
                    busy = [self._reading, *self._wanted]
                    if name is None:
                        self._changed.wait(POLL_S)
                if name is not None:
                    self._keep(name, self._shelf.open(name, self._server, busy))
        except Closed:
            pass
        except Refused as error:
            self._fail(error, f"does not give {name} ({error}); check HF_TOKEN and data.path, or wait")
        except Offline as error:
            self._fail(error, f"may not be asked for {name} ({error}); unset it, or use data.path=FOLDER")
        except BaseException as error:
            self._error = error

    def _keep(self, name: str, file: BinaryIO) -> None:
        with self._changed:
            if self._stop.is_set() or name not in self._wanted:
                file.close()
            else:
                self._ready[name] = file
            self._changed.notify_all()

    def _fail(self, error: Exception, reason: str) -> None:
        """Before anything was downloaded it is a matter of settings, later the run's end."""
        kind = DamageLimit if self._server.served else DataError
        self._error = kind(f"data=c4: {self._server.endpoint} {reason}")
        self._error.__cause__ = error


def lock(file: BinaryIO, kind: int) -> bool:
    """False where another has it; True also on a file system without locks."""
    try:
        fcntl.flock(file.fileno(), kind | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def _remove(path: Path) -> bool:
    """Unless some process reads or downloads it."""
    try:
        with open(f"{path.with_suffix('')}.lock" if path.suffix == ".part" else path, "r+b") as file:
            if not lock(file, fcntl.LOCK_EX):
                return False
            path.unlink()
    except OSError:  # gone already, or not ours to remove
        return False
    return True
