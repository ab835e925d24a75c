"""Documents to rows of a fixed length.

dense: documents, each with its end-of-text, are joined to one stream t; row i has x = t[iS : (i+1)S] and
       y = t[iS+1 : (i+1)S+1]: every token is predicted once, nothing is padded.
paper: one document a row, cut to S - 1 tokens and its end-of-text, padded on the right; the protocol of
       GaLore and its descendants. y is x shifted left, IGNORE where no token follows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np

IGNORE = -100  # a target that is not scored
GROUP_TOKENS = 1 << 20  # rows permuted together: 16 MB of memory, at most a second of tokenizing at a start

Where = TypeVar("Where")  # what a document's place in the order is described by


class Dense(Generic[Where]):
    """Rows from (place, tokens with end-of-text) of each document, without the first `skip` tokens."""

    def __init__(self, documents: Iterator[tuple[Where, np.ndarray]], seq_len: int, skip: int = 0) -> None:
        self._documents, self._seq_len = documents, seq_len
        self._held: deque[tuple[Where, np.ndarray]] = deque()
        self._tokens, self._used = -skip, skip  # tokens held and not used; used of the first document held

    def place(self) -> tuple[Where, int]:
        """The next row's: its first token's document, and the token's number in that."""
        self._hold(1)
        while self._used >= len(self._held[0][1]):
            self._used -= len(self._held.popleft()[1])
        return self._held[0][0], self._used

    def _hold(self, tokens: int) -> None:
        while self._tokens < tokens:
            self._held.append(next(self._documents))
            self._tokens += len(self._held[-1][1])

    def take(self, rows: int) -> tuple[np.ndarray, np.ndarray, Where, int]:
        """x, y (rows, seq_len) int64; then the place of the next row."""
        count = rows * self._seq_len
        self._hold(count + 1)  # one more: the last target is the next row's first token
        parts = [tokens for _, tokens in self._held]
        stream = np.concatenate(parts)[self._used : self._used + count + 1].astype(np.int64)
        self._used += count
        self._tokens -= count
        return stream[:-1].reshape(rows, -1), stream[1:].reshape(rows, -1), *self.place()


class Mixed(Generic[Where]):
    """Dense rows in groups of about 2^20 tokens, each group permuted by (seed, group).

    Without it a document's rows would follow each other, and a small batch be of one document. A position is
    where its group begins in the stream, the group's number, and the rows of it that are used.
    """

    def __init__(self, groups: Iterator[Group[Where]], seed: int, group: int = 0, row: int = 0) -> None:
        self._groups, self._seed = groups, seed
        self._group, self._row = group, row
        self._rows: Group[Where] | None = None

    def take(self, rows: int) -> tuple[np.ndarray, np.ndarray, Where, int, int, int]:
        """x, y (rows, seq_len) int64; then the place of the next row: group's first document, token in that,
        group, row."""
        xs, ys = [], []
        while rows:
            held = self._rows = self._rows or self._begin()
            part = slice(self._row, self._row + rows)
            xs.append(held.x[part])
            ys.append(held.y[part])
            rows -= len(xs[-1])
            self._row += len(xs[-1])
            place = held.start
            if self._row == len(held.x):
                self._group, self._row, self._rows, place = self._group + 1, 0, None, held.end
        return np.concatenate(xs), np.concatenate(ys), *place, self._group, self._row

    def _begin(self) -> Group[Where]:
        group = next(self._groups)
        order = permutation(len(group.x), self._seed, self._group)
        return replace(group, x=group.x[order], y=group.y[order])


@dataclass(frozen=True)
class Group(Generic[Where]):
    x: np.ndarray  # (rows, seq_len) int64
    y: np.ndarray
    start: tuple[Where, int]  # the first row's place in the stream: document, token in that
    end: tuple[Where, int]  # and the next group's


def groups(dense: Dense[Where], size: int) -> Iterator[Group[Where]]:
    """The stream's rows, `size` at a time."""
    while True:
        start = dense.place()
        x, y, document, token = dense.take(size)
        yield Group(x, y, start, (document, token))


def group_rows(seq_len: int) -> int:
    """Rows of a group of Mixed."""
    return max(1, GROUP_TOKENS // seq_len)


def permutation(n: int, *key: int) -> np.ndarray:
    """Of 0..n-1, a function of the key.

    From the raw words of a counter-based generator: the same in every numpy, unlike Generator.permutation.
    """
    random = np.random.Philox(np.random.SeedSequence(key))
    return np.argsort(random.random_raw(n), kind="stable")


class Paper(Generic[Where]):
    """Rows from (place, tokens with end-of-text) of each document."""

    def __init__(self, documents: Iterator[tuple[Where, np.ndarray]], seq_len: int, pad_id: int) -> None:
        self._documents, self._seq_len, self._pad_id = documents, seq_len, pad_id
        self._next: tuple[Where, np.ndarray] | None = None

    def take(self, rows: int) -> tuple[np.ndarray, np.ndarray, Where, int]:
        """x, y (rows, seq_len) int64; then the place of the next row's document, and 0."""
        taken = []
        here = self._next or next(self._documents)
        for _ in range(rows):
            taken.append(here[1])
            here = next(self._documents)
        self._next = here
        x, y = paper_rows(taken, self._seq_len, self._pad_id)
        return x, y, here[0], 0


def dense_rows(tokens: np.ndarray, seq_len: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """x, y (rows, seq_len) int32 of one stream that ends: the last row is padded, its y with IGNORE."""
    count = len(tokens) - 1
    size = -(-count // seq_len) * seq_len
    x, y = np.full(size, pad_id, np.int32), np.full(size, IGNORE, np.int32)
    x[:count], y[:count] = tokens[:-1], tokens[1:]
    return x.reshape(-1, seq_len), y.reshape(-1, seq_len)


def paper_rows(documents: list[np.ndarray], seq_len: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """x, y (documents, seq_len) int64 from tokens that end with an end-of-text."""
    x = np.full((len(documents), seq_len), pad_id, np.int64)
    y = np.full((len(documents), seq_len), IGNORE, np.int64)
    for i, tokens in enumerate(documents):
        n = min(len(tokens), seq_len)
        x[i, : n - 1] = tokens[: n - 1]
        x[i, n - 1] = tokens[-1]
        y[i, : n - 1] = x[i, 1:n]
    return x, y
