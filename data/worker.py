"""Tokenizing in other processes, results in the order of the input.

A plain child process per worker, fed through its pipes by one thread each. Not multiprocessing: a spawned
worker there imports the training script (torch: 2 s and 300 MB each) and outlives a parent that was killed; a
child that reads its standard input sees the end of it, whatever ended the parent.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, cast

import numpy as np

from .tokenizer import Tokenizer


class Pool:
    """`workers` tokenizing processes; 0: the calling thread does it."""

    def __init__(self, tokenizer: Tokenizer, workers: int) -> None:
        self.tokenizer, self.workers = tokenizer, workers
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="tokenize") if workers else None
        self._mine = threading.local()
        self._children: list[subprocess.Popen[bytes]] = []

    def map(self, chunks: Iterable[tuple[Any, list[str]]]) -> Iterator[tuple[Any, list[np.ndarray]]]:
        """(tag, texts) -> (tag, their tokens), in order; 2 chunks a worker are under way at a time."""
        if self._threads is None:
            for tag, texts in chunks:
                yield tag, self.tokenizer.encode_batch(texts)
            return
        pending: deque[tuple[Any, Future[list[np.ndarray]]]] = deque()
        for tag, texts in chunks:
            pending.append((tag, self._threads.submit(self._ask, texts)))
            if len(pending) > 2 * self.workers:
                tag, result = pending.popleft()
                yield tag, result.result()
        for tag, result in pending:
            yield tag, result.result()

    def close(self) -> None:
        for child in self._children:
            child.kill()  # it holds nothing worth keeping
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for child in self._children:
            child.kill()  # again: one may have been starting
            child.wait()
            for pipe in (child.stdin, child.stdout):
                try:
                    pipe.close() if pipe else None
                except OSError:  # what was left to write has no reader now
                    pass
        self._children = []

    def _ask(self, texts: list[str]) -> list[np.ndarray]:
        child = getattr(self._mine, "child", None)
        if child is None:
            child = self._mine.child = self._start()
        sink, source = cast(BinaryIO, child.stdin), cast(BinaryIO, child.stdout)
        try:
            pickle.dump(texts, sink, protocol=5)
            sink.flush()
            lengths, flat = pickle.load(source)
        except (OSError, EOFError, pickle.UnpicklingError):
            raise RuntimeError(
                f"a tokenizing process ended by itself (exit status {child.wait()}; -9: out of memory?)"
            ) from None
        return np.split(flat, np.cumsum(lengths)[:-1])

    def _start(self) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        start = f"import signal as s; s.signal(s.SIGINT, s.SIG_IGN); from {__name__} import serve; serve()"
        child = subprocess.Popen(
            [sys.executable, "-c", start, str(self.tokenizer.path)],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._children.append(child)
        return child


def serve() -> None:
    """The child: lists of texts in, (lengths, flat ids) out, until the end of its standard input."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # meant for the parent, which saves and then closes the pipe
    tokenizer = Tokenizer(sys.argv[1])
    source: BinaryIO = sys.stdin.buffer
    sink: BinaryIO = sys.stdout.buffer
    while True:
        try:
            texts = pickle.load(source)
        except EOFError:
            return
        ids = tokenizer.encode_batch(texts)
        try:
            pickle.dump(([len(i) for i in ids], np.concatenate(ids)), sink, protocol=5)
            sink.flush()
        except OSError:  # nobody reads any more
            os._exit(0)
