"""Documents to rows of a fixed length.

dense: documents, each with its end-of-text, are joined to one stream t; row i has x = t[iS : (i+1)S] and
       y = t[iS+1 : (i+1)S+1]: every token is predicted once, nothing is padded.
paper: one document a row, cut to S - 1 tokens and its end-of-text, padded on the right; the protocol of
       GaLore and its descendants. y is x shifted left, IGNORE where no token follows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

import numpy as np

IGNORE = -100  # a target that is not scored

Where = TypeVar("Where")  # what a document's place in the order is described by


class Dense(Generic[Where]):
    """Rows from (place, tokens with end-of-text) of each document, without the first `skip` tokens."""

    def __init__(self, documents: Iterator[tuple[Where, np.ndarray]], seq_len: int, skip: int = 0) -> None:
        self._documents, self._seq_len = documents, seq_len
        self._held: deque[tuple[Where, np.ndarray]] = deque()
        self._tokens, self._used = -skip, skip  # tokens held and not used; used of the first document held

    def take(self, rows: int) -> tuple[np.ndarray, np.ndarray, Where, int]:
        """x, y (rows, seq_len) int64; the next row's place: its first token's document and number in that."""
        count = rows * self._seq_len
        while self._tokens < count + 1:  # one more: the last target is the next row's first token
            self._held.append(next(self._documents))
            self._tokens += len(self._held[-1][1])
        parts = [tokens for _, tokens in self._held]
        stream = np.concatenate(parts)[self._used : self._used + count + 1].astype(np.int64)
        self._used += count
        self._tokens -= count
        while self._used >= len(self._held[0][1]):
            self._used -= len(self._held.popleft()[1])
        x, y = stream[:-1].reshape(rows, -1), stream[1:].reshape(rows, -1)
        return x, y, self._held[0][0], self._used


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
