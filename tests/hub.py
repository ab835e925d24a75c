"""A hub for tests: the calls that are used, redirects to signed addresses, faults by plan; a small C4."""

import gzip
import hashlib
import http.server
import json
import random
import re
import socket
import struct
import threading
import time
from collections import Counter, deque
from urllib.parse import parse_qs, urlsplit

from data import DataConfig, build, cache, hub

C4, T5, LLAMA = "datasets/allenai/c4", "google-t5/t5-base", "hf-internal-testing/llama-tokenizer"
SHARDS = {"train": 4, "validation": 2}
TEXTS = {
    s: [[f"{s} {f} {d}: the river and the hill." for d in range(60)] for f in range(n)]
    for s, n in SHARDS.items()
}
REVISION = "5e" * 20
PAGE = 3  # files a page of a list; the hub has a thousand
# What may happen to a request for a file: a status, RST, a signed address that is old, silence after half of
# the bytes, their end after half, one bit flipped, too few bytes declared, more bytes than declared.
FAULTS = ("429", "500", "503", "reset", "expired", "stall", "cut", "wrong", "short", "long")
STATUS = {str(n): n for n in (404, 429, 500, 503)}


class StandIn:
    """Repositories over http: `files` maps OWNER/NAME/PATH, datasets below datasets/, to bytes.

    `plan` holds what happens to the next requests for files, None for nothing; `api_plan` likewise for lists.
    While `down` connections are closed without an answer; `refuses` is a status for every request.
    """

    def __init__(self):
        self.files, self.revision = {}, REVISION
        self.plan, self.api_plan = deque(), deque()
        self.hits, self.requests = Counter(), []  # faults that happened; (path, Range) of every request
        self.down, self.refuses, self.token = False, None, None
        self.unstall, self.stall_s = threading.Event(), 5
        self._lock, self._signed = threading.Lock(), 0
        self._servers = [_serve(self, Front), _serve(self, Store)]
        self.address, self.store = (f"http://127.0.0.1:{s.server_port}" for s in self._servers)

    def close(self):
        self.unstall.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add(self, repo, files):
        self.files.update({f"{repo}/{path}": content for path, content in files.items()})

    def next(self, plan, names):
        """The next fault, if it is one that happens at this place."""
        with self._lock:
            if not plan or plan[0] not in names:
                return None
            fault = plan.popleft()
            if fault:
                self.hits[fault] += 1
            return fault

    def sign(self):
        with self._lock:
            self._signed += 1
            return self._signed

    def seeded(self, seed, count):
        """A plan with every fault, `count` more and some quiet, less than there are files."""
        rng = random.Random(seed)
        plan = [*FAULTS, *(rng.choice(FAULTS) for _ in range(count)), *[None] * 4]
        rng.shuffle(plan)
        self.plan.extend(plan)

    def downloads(self):
        """name -> how often it was asked for, from the start or a place within."""
        return Counter(p.rpartition("/")[2] for p, _ in self.requests if "/store/" in p)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StandIn

    def do_GET(self):
        self.hub.requests.append((self.path, self.headers["Range"]))
        if self.hub.down:
            return self.reset()
        if self.hub.refuses:
            return self.answer(b"{}", self.hub.refuses)
        self.reply(urlsplit(self.path))

    def fail(self, fault):
        if fault in STATUS:
            self.answer(b"{}", STATUS[fault], {"Retry-After": "0"} if fault != "500" else {})
        elif fault == "reset":
            self.reset()

    def answer(self, body, status=200, headers=(), sent=None):
        """`sent`: the bytes that really go out; less than declared is a cut."""
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if sent is None else sent)

    def reset(self):
        """RST instead of an answer."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def log_message(self, *_):
        pass


class Front(Handler):
    """The hub itself: lists, and redirects to the store."""

    def reply(self, url):
        path, query = url.path.strip("/"), parse_qs(url.query)
        if path.startswith("api/"):
            fault = self.hub.next(self.hub.api_plan, (*STATUS, "reset"))
            return self.fail(fault) if fault else self.api(path.removeprefix("api/"), query)
        fault = self.hub.next(self.hub.plan, (*STATUS, "reset"))
        if fault:
            return self.fail(fault)
        if self.hub.token and self.headers["Authorization"] != f"Bearer {self.hub.token}":
            return self.answer(b"{}", 401)
        file = re.fullmatch(rf"(.*)/resolve/{self.hub.revision}/(.*)", path)
        if not file or f"{file[1]}/{file[2]}" not in self.hub.files:
            return self.answer(b"{}", 404)
        place = f"{self.hub.store}/store/{self.hub.sign()}/{file[1]}/{file[2]}"
        self.answer(b"", 302, {"Location": place})

    def api(self, path, query):
        commit = re.fullmatch(r"(?:models/|(?=datasets/))(.*)/revision/main", path)
        if commit:
            known = any(name.startswith(commit[1]) for name in self.hub.files)
            body = json.dumps({"id": commit[1], "sha": self.hub.revision}).encode()
            return self.answer(body if known else b"{}", 200 if known else 404)
        tree = re.fullmatch(rf"(?:models/|(?=datasets/))(.*)/tree/{self.hub.revision}(/.*)?", path)
        if not tree:
            return self.answer(b"{}", 404)
        folder = f"{tree[1]}{tree[2] or ''}/"
        names = sorted(n for n in self.hub.files if n.startswith(folder) and "/" not in n[len(folder) :])
        at = int(query.get("cursor", ["0"])[0])
        more = {}
        if at + PAGE < len(names):
            link = f"https://huggingface.co/{path}?cursor={at + PAGE}"  # as a mirror that passes it on
            more = {"Link": f'<{link}>; rel="next"'}
        entries = [self.entry(n, n.removeprefix(f"{tree[1]}/")) for n in names[at : at + PAGE]]
        self.answer(json.dumps(entries).encode(), 200, more)

    def entry(self, name, path):
        """Small files are in git itself and have no SHA-256, as on the hub."""
        content = self.hub.files[name]
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry = {"type": "file", "path": path, "size": len(content), "oid": git}
        if name.startswith("datasets/"):
            lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            entry |= {"oid": "0" * 40, "lfs": lfs}
        return entry


class Store(Handler):
    """Where the hub redirects to."""

    def reply(self, url):
        content = self.hub.files[url.path.removeprefix("/store/").partition("/")[2]]
        if self.headers["Authorization"]:
            return self.answer(b"the token is the hub's", 400)
        start, headers, status = 0, {}, 200
        span = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        if span:
            start, status = int(span[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        fault = self.hub.next(self.hub.plan, (None, *FAULTS))
        if fault in (*STATUS, "reset"):
            return self.fail(fault)
        if fault == "expired":
            return self.answer(b"", 403)
        if fault == "short":
            return self.answer(content[:-7], 200)
        if fault == "long":  # and does not say so
            self.close_connection = True
            self.send_response(status)
            self.send_header("Connection", "close")
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            return self.wfile.write(body + b"1234567")
        if fault == "wrong":
            body = bytes([*body[:-1], body[-1] ^ 1])
        if fault in ("cut", "stall"):
            self.close_connection = True
            self.answer(body, status, headers, body[: len(body) // 2])
            if fault == "stall":
                self.wfile.flush()
                self.hub.unstall.wait(self.hub.stall_s)
            return None
        return self.answer(body, status, headers)


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):  # the other side has gone, which is what it is for
        pass


def _serve(hub, kind):
    server = Server(("127.0.0.1", 0), type(kind.__name__, (kind,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


def shard(texts):
    return "".join(json.dumps({"text": t, "url": "x"}) + "\n" for t in texts).encode()


def layout(ending=".gz", pack=gzip.compress):
    """Name -> content of a small C4."""
    return {
        f"c4-{split}.{i:05d}-of-{len(shards):05d}.json{ending}": pack(shard(texts))
        for split, shards in TEXTS.items()
        for i, texts in enumerate(shards)
    }


def until(condition):
    """Waits for what a thread or a process does; fails where it never does."""
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never happened")


def quick(monkeypatch):
    """Short time-outs and waits on our side."""
    for name, value in dict(READ_S=0.2, BACKOFF_S=0.01, BACKOFF_MAX_S=0.05, LIST_S=0.3).items():
        monkeypatch.setattr(hub, name, value)
    monkeypatch.setattr(cache, "POLL_S", 0.01)
    monkeypatch.setattr(cache, "KEPT_S", 0.1)


def c4(folder, **settings):
    """The dataset of data=c4 with its cache in `folder`."""
    cfg = DataConfig("c4", cache=str(folder / "cache"), workers=0, **settings)
    return build(cfg, vocab_size=300, seq_len=16, seed=0)


def digests(data, count=60, state=None):
    """Of so many batches; 60 are three epochs of dense rows."""
    with data.loader(8, state=state) as batches:
        return [next(batches).digest for _ in range(count)]
