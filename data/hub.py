"""Files of the Hugging Face hub, or of a mirror that speaks its API, over a network that fails.

Every request has time-outs. What may pass by itself (429, 5xx, a connection refused, reset, stalled or cut,
wrong bytes) is tried again after an exponential back-off with full jitter, Retry-After honoured: files
without limit, lists for a minute. Refusals (401, 403, 404) are said at once. A file goes on where it was cut,
and is renamed into place only when its size and hash are those of the list, which pins one commit of the
repository. What is read are JSON lists and data files: no script, no pickle.

Not hf_hub_download, tried (2.4) against the faults of tests/hub.py: wrong bytes pass without an error, a
5xx, an old signed address or a wrong length end it, and after a kill it starts at byte 0 again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import parse_qsl, quote, urlsplit

from .archive import one_line
from .config import DataError

log = logging.getLogger("subspan")
T = TypeVar("T")
Query = list[tuple[str, Any]]

CONNECT_S, READ_S = 10.0, 30.0  # to connect; between two arrivals of bytes
BACKOFF_S, BACKOFF_MAX_S = 1.0, 60.0  # longest wait after the first fault, and after many
LIST_S = 60.0  # how long a list is tried for
REFUSED_S = 600.0  # a file refused once others came: hubs do that for minutes, a deleted repository stays so
SAY_S = 60.0  # between two lines about the same trouble
HASHED = 1 << 20  # bytes hashed at a time


class Fault(Exception):
    """What may pass by itself; `after` seconds if the other side says when."""

    def __init__(self, reason: str, after: float = 0.0, progress: bool = False) -> None:
        super().__init__(reason)
        self.after, self.progress = after, progress  # progress: bytes have come all the same


class Refused(Fault):
    """401, 403, 404 and the like: the other side answers, and does not give it."""

    def __init__(self, reason: str, status: int) -> None:
        super().__init__(reason)
        self.status = status


class Offline(Exception):
    """HF_HUB_OFFLINE is set."""


class Closed(Exception):
    """Nobody wants it any more."""


@dataclass(frozen=True)
class Listing:
    """Files of one commit of a repository."""

    endpoint: str  # where it was listed: https://huggingface.co
    kind: str  # dataset | model
    repo: str  # allenai/c4
    folder: str  # of the files within it, en; "" for the top
    revision: str  # the commit's hash
    # name -> (bytes, "sha256:..." or, for what lies in git itself, "git:...")
    files: dict[str, tuple[int, str]]

    def url(self, name: str) -> str:
        from huggingface_hub import hf_hub_url

        path = f"{self.folder}/{name}".lstrip("/")
        return hf_hub_url(
            self.repo, path, repo_type=self.kind, revision=self.revision, endpoint=self.endpoint
        )


class Hub:
    """Requests to one endpoint until `stop` is set; then whatever waits raises Closed."""

    def __init__(self, endpoint: str, stop: threading.Event | None = None) -> None:
        self.endpoint, self.stop = endpoint, stop or threading.Event()
        self.served = False  # whether a file has come; before that a refusal is a matter of settings

    def tree(
        self, kind: str, repo: str, folder: str, wanted: str, revision: str | None, limit_s: float
    ) -> Listing:
        """The files whose name matches `wanted`, of a commit (None: the newest of main).

        Raises Fault after limit_s, Refused at once, Offline.
        """
        revision = revision or self.newest(kind, repo, limit_s)
        api = f"{self.endpoint}/api/{kind}s/{repo}/tree/{revision}" + (f"/{quote(folder)}" if folder else "")
        files: dict[str, tuple[int, str]] = {}
        query: Query | None = []
        while query is not None:  # a thousand files a page, C4 has two
            attempt = partial(self._page, api, query, wanted)
            page, query = self._insist(f"the list of {repo} at {self.endpoint}", attempt, limit_s)
            files |= page
        return Listing(self.endpoint, kind, repo, folder, revision, dict(sorted(files.items())))

    def newest(self, kind: str, repo: str, limit_s: float) -> str:
        """The hash of main's newest commit; raises as tree()."""
        api = f"{self.endpoint}/api/{kind}s/{repo}/revision/main"
        return self._insist(f"the revision of {repo} at {self.endpoint}", lambda: self._commit(api), limit_s)

    def download(self, listing: Listing, name: str, path: Path, limit_s: float | None = None) -> None:
        """A whole file at `path`, by way of path.part, which is gone on with.

        Raises Fault after limit_s, if given; Refused, at once unless files have come before, else after
        REFUSED_S; Offline; Closed. Where it cannot be written DataError, once files have come a Fault: a
        disk that fills up during a run may be emptied again.
        """
        refused_s = REFUSED_S if self.served else 0.0

        def attempt() -> None:
            try:
                self._attempt(listing, name, path)
            except OSError as error:
                if not self.served:
                    raise
                raise Fault(f"{path.parent} cannot be written ({one_line(error)})") from error

        with writing(path):
            self._insist(f"{name} from {self.endpoint}", attempt, limit_s, refused_s)
        self.served = True

    def _insist(
        self, what: str, attempt: Callable[[], T], limit_s: float | None = None, refused_s: float = 0.0
    ) -> T:
        """attempt() until it has no Fault; that is raised where the next would be later than limit_s."""
        since = refused = said = None
        failures = 0
        while not self.stop.is_set():
            try:
                result = attempt()
            except Fault as fault:
                now = time.monotonic()
                refused = (refused or now) if isinstance(fault, Refused) else None
                since = since or now
                failures = 0 if fault.progress else failures + 1
                longest = min(BACKOFF_MAX_S, BACKOFF_S * 2 ** min(failures, 30))
                wait = fault.after + random.uniform(0, longest)
                if limit_s is not None and now + wait - since > limit_s:
                    raise
                if refused and now - refused >= refused_s:
                    raise
                said = self._pause(what, fault, since, said, wait)
            else:
                if since:
                    log.warning("%s: goes on after %.0f s", what, time.monotonic() - since)
                return result
        raise Closed

    def _pause(self, what: str, fault: Fault, since: float, said: float | None, wait: float) -> float:
        """Waits, with a line at the first trouble and then one a minute; when the last was said."""
        until = time.monotonic() + wait
        while True:
            now = time.monotonic()
            if said is None or now - said >= SAY_S:
                began = time.strftime("%H:%M:%S", time.localtime(time.time() - (now - since)))
                log.warning("waiting for %s since %s: %s", what, began, fault)
                said = now
            if now >= until or pause(self.stop, min(until - now, said + SAY_S - now)):
                return said

    @contextmanager
    def _get(
        self, url: str, query: Query | None = None, headers: Mapping[str, str] | None = None
    ) -> Iterator[Any]:
        """An answer of 200 or 206 whose body is still to be read; everything that fails is a Fault."""
        from huggingface_hub import get_session
        from huggingface_hub.utils import OfflineModeIsEnabled

        client = get_session()
        library = import_module(type(client).__module__.partition(".")[0])  # httpx, since 2.0 httpx2
        sent = {"User-Agent": "subspan", "Accept-Encoding": "identity", **_authorization(), **(headers or {})}
        timeout = (CONNECT_S, READ_S, READ_S, CONNECT_S)  # connect, read, write, a free connection
        try:
            with client.stream("GET", url, params=query or None, headers=sent, timeout=timeout) as answer:
                _check(answer)
                yield answer
        except OfflineModeIsEnabled:
            raise Offline("HF_HUB_OFFLINE is set") from None
        except (library.HTTPError, library.InvalidURL, ConnectionError, TimeoutError) as error:
            raise Fault(one_line(error)) from error

    def _json(self, url: str, query: Query) -> tuple[Any, Query | None]:
        """A parsed answer, and the query of the page after it."""
        with self._get(url, query) as answer:
            body = answer.read()
            following = answer.links.get("next", {}).get("url")
        try:
            # Only the query: a mirror's link may lead to the hub itself.
            return json.loads(body), parse_qsl(urlsplit(following).query) if following else None
        except ValueError:
            raise Fault(f"no JSON from {url}") from None

    def _commit(self, api: str) -> str:
        answer, _ = self._json(api, [("expand", "sha")])
        if not isinstance(answer, dict) or not re.fullmatch("[0-9a-f]{40,64}", str(answer.get("sha"))):
            raise Fault(f"no commit in the answer of {api}")
        return str(answer["sha"])

    def _page(self, api: str, query: Query, wanted: str) -> tuple[dict[str, tuple[int, str]], Query | None]:
        """Files of one page of a list, and the query of the page after it."""
        answer, following = self._json(api, query)
        files = {}
        try:
            for entry in answer:
                name = entry["path"].rpartition("/")[2]
                if entry["type"] == "file" and re.fullmatch(wanted, name):
                    lfs = entry.get("lfs")  # what is not small has its SHA-256 here
                    digest = f"sha256:{lfs['oid']}" if lfs else f"git:{entry['oid']}"
                    files[name] = (int(entry["size"]), digest)
        except (KeyError, TypeError, ValueError):
            raise Fault(f"no list of files from {api}") from None
        return files, following

    def _attempt(self, listing: Listing, name: str, path: Path) -> None:
        size, digest = listing.files[name]
        part = path.with_name(path.name + ".part")
        have = _size(part)
        if _size(path) == size:  # where locks do nothing another process was faster
            return
        try:
            if have < size:
                self._go_on(listing.url(name), part, have, size)
            if _size(part) < size:
                raise Fault(f"cut after {_size(part)} of {size} bytes")
        except Fault as fault:
            fault.progress = _size(part) > have
            raise
        try:
            with open(part, "rb") as file:
                right = _size(part) == size and hash_of(file, digest) == digest
            if right:
                os.replace(part, path)
        except FileNotFoundError:
            raise Fault("another process renamed it") from None
        if not right:
            part.unlink(missing_ok=True)
            raise Fault("wrong bytes came, thrown away")

    def _go_on(self, url: str, part: Path, have: int, size: int) -> None:
        """Writes at explicit places: where locks do nothing, two processes write the same bytes twice."""
        with self._get(url, headers={"Range": f"bytes={have}-"} if have else None) as answer:
            at = _start(answer, have, size)
            part.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "r+b" if part.exists() else "w+b") as file:
                if at < have:
                    file.truncate(at)
                file.seek(at)
                for chunk in answer.iter_raw():  # as stored: a .gz may be declared as an encoding
                    at += len(chunk)
                    if at > size:
                        file.truncate(0)
                        raise Fault(f"more than the {size} bytes of the list came, thrown away")
                    file.write(chunk)
                    file.flush()  # a process that is killed now leaves it
                    if self.stop.is_set():
                        raise Closed


def pause(stop: threading.Event, seconds: float) -> bool:
    """Waits; True if `stop` was set meanwhile."""
    return stop.wait(seconds)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """DataError for what the disk says; whatever the network does is a Fault by then."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"data.cache: {path} cannot be written ({one_line(error)}); free space, lower data.cache_gib, "
            "or name another folder with data.cache"
        ) from error


def hash_of(file: BinaryIO, like: str) -> str:
    """The hash of an open file in the form of `like`: sha256:..., or git:..., which is that of a blob."""
    kind, size = like.partition(":")[0], os.fstat(file.fileno()).st_size
    content = hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % size)
    file.seek(0)
    while block := file.read(HASHED):
        content.update(block)
    file.seek(0)
    return f"{kind}:{content.hexdigest()}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _authorization() -> dict[str, str]:
    """HF_TOKEN, or the token of a login. Not build_hf_headers: it makes a request of its own first."""
    from huggingface_hub import constants, get_token

    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _check(answer: Any) -> None:
    """Raises unless the answer brings what was asked for."""
    status = answer.status_code
    if status in (200, 206):
        return
    # The signed address that the hub redirects to may have expired: the next attempt is given a new one.
    origins = {(a.url.host, a.url.port) for a in (answer, *answer.history)}
    if 400 <= status < 500 and status not in (408, 416, 425, 429) and len(origins) == 1:
        raise Refused(f"HTTP {status} {answer.reason_phrase}", status)
    raise Fault(f"HTTP {status} {answer.reason_phrase}", retry_after(answer.headers))


def _start(answer: Any, have: int, size: int) -> int:
    """Where the bytes of an answer belong: at `have` as asked, or at 0 if the whole file comes."""
    if answer.status_code == 206:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("content-range", ""))
        if not span or (int(span[1]), int(span[2])) != (have, size):
            raise Fault(f"{answer.headers.get('content-range')} came for bytes {have} of {size}")
        return have
    length = answer.headers.get("content-length", str(size))
    if length != str(size):
        raise Fault(f"wrong length: {length} bytes where the list has {size}")
    return 0


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the other side asks to wait for: Retry-After as a number or a date, or RateLimit's t."""
    text = headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        spent = re.search(r"r=0;\s*t=(\d+)", headers.get("ratelimit", ""))
        return float(spent[1]) if spent else 0.0
