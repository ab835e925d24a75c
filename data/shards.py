"""Token shards: a folder of plain binary files, read at random.

    meta.json               written last: without it the folder is not complete
    tokenizer.model         what the tokens were made with
    train_00000.bin ...     documents, each followed by its end-of-text; uint16, or uint32 past 65,536 pieces
    train_00000.idx ...     for each document of the shard the position after its end, uint64
    validation_00000.bin    likewise

A row is found by arithmetic: the order of an epoch is a permutation of row numbers, a position one number.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np

from .config import DamageLimit, DataError
from .pack import paper_rows

META = "meta.json"
VERSION = 1
VERIFY_BYTES = 1 << 30  # token files are hashed at start up to here (about 1 s), larger sets by size only
ROUNDS = 6  # of the Feistel network


def permute(
    index: np.ndarray,  # (k,) integers in [0, size)
    size: int,
    key: tuple[int, ...],
) -> np.ndarray:  # (k,) int64 in [0, size)
    """A keyed bijection of range(size), any part of it computed on its own.

    A balanced Feistel network over the next even number of bits; what falls outside goes through again (cycle
    walking), fewer than four times on average.
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)
    out = np.asarray(index).astype(np.uint64)
    todo = np.arange(out.size)
    while todo.size:
        left, right = out[todo] >> half, out[todo] & mask
        for k in keys:
            left, right = right, left ^ (_mix(right, k) & mask)
        out[todo] = (left << half) | right
        todo = todo[out[todo] >= size]
    return out.astype(np.int64)


def _mix(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """The finaliser of splitmix64: every bit of the result depends on every bit of x and of the key."""
    x = (x ^ key) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Shards:
    """One split of a prepared folder. DataError where a file is missing, cut or altered."""

    def __init__(self, folder: Path, split: str, key: str = "data.train") -> None:
        """key: the setting that names the folder."""
        meta = read_meta(folder, key)
        if not meta["splits"].get(split):
            raise DataError(
                f"data.{split}={folder}: holds no {split} tokens; prepare it with data.{split}=GLOB"
            )
        self.folder, self.meta, self.vocab_size = folder, meta, int(meta["vocab_size"])
        self._tokens, self._ends = [], []
        shards = meta["splits"][split]
        verify = sum(s["tokens"] for s in shards) * np.dtype(meta["dtype"]).itemsize <= VERIFY_BYTES
        for shard in shards:
            self._tokens.append(
                _map(key, folder, shard, ".bin", np.dtype(meta["dtype"]), shard["tokens"], verify)
            )
            self._ends.append(_map(key, folder, shard, ".idx", np.dtype("<u8"), shard["documents"], True))
        self._first_token = np.cumsum([0] + [len(t) for t in self._tokens])
        self._first_document = np.cumsum([0] + [len(e) for e in self._ends])
        self.tokens, self.documents = int(self._first_token[-1]), int(self._first_document[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from position `start` of the split, over shard borders."""
        shard = int(np.searchsorted(self._first_token, start, "right")) - 1
        at = start - int(self._first_token[shard])
        found = self._tokens[shard][at : at + count]
        if len(found) == count:
            return found
        return np.concatenate([found, self.read(start + len(found), count - len(found))])

    def document(self, number: int) -> np.ndarray:
        """The tokens of a document with its end-of-text."""
        shard = int(np.searchsorted(self._first_document, number, "right")) - 1
        n = number - int(self._first_document[shard])
        ends = self._ends[shard]
        return self._tokens[shard][int(ends[n - 1]) if n else 0 : int(ends[n])]

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.meta["splits"]["train"], sort_keys=True).encode()).hexdigest()

    def check(self, rows: np.ndarray) -> None:
        top = int(rows.max())
        if top >= self.vocab_size:
            raise DamageLimit(
                f"{self.folder}: a shard holds token {top} of a vocabulary of {self.vocab_size}; "
                "prepare it again"
            )


class ShardRows:
    """Rows of a split in a shuffled order; a position is (epoch, row)."""

    def __init__(self, shards: Shards, packing: str, seq_len: int, seed: int, pad_id: int) -> None:
        self.shards, self.packing, self.seq_len = shards, packing, seq_len
        self.seed, self.pad_id = seed, pad_id
        self.rows = shards.documents if packing == "paper" else (shards.tokens - 1) // seq_len
        if self.rows < 1:
            raise DataError(
                f"data.train={shards.folder}: its {shards.tokens} tokens do not fill one row of "
                f"seq_len={seq_len}; prepare more text or set a smaller seq_len"
            )

    def numbers(self, epoch: int, row: int, count: int) -> np.ndarray:
        """The places in the split of `count` rows from a position on; epochs roll over."""
        found: list[np.ndarray] = []
        while count:
            here = min(count, self.rows - row)
            found.append(permute(np.arange(row, row + here), self.rows, (self.seed, epoch)))
            count, row, epoch = count - here, 0, epoch + 1
        return np.concatenate(found)

    def take(self, epoch: int, row: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """x, y (count, seq_len) int64 of the rows from a position on."""
        numbers = self.numbers(epoch, row, count).tolist()
        if self.packing == "paper":
            x, y = paper_rows([self.shards.document(n) for n in numbers], self.seq_len, self.pad_id)
            self.shards.check(x)
            return x, y
        rows = np.empty((count, self.seq_len + 1), np.int64)
        for i, n in enumerate(numbers):
            rows[i] = self.shards.read(n * self.seq_len, self.seq_len + 1)
        self.shards.check(rows)
        return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])


def read_meta(folder: Path, key: str = "data.train") -> dict[str, Any]:
    path = folder / META
    try:
        meta = json.loads(path.read_text())
        if meta["version"] != VERSION or meta["dtype"] not in ("<u2", "<u4"):
            raise ValueError(f"version {meta['version']} and dtype {meta['dtype']} are not known here")
        int(meta["vocab_size"]), meta["splits"]["train"], meta["tokenizer_sha256"]
        return meta
    except FileNotFoundError:
        raise DataError(
            f"{key}={folder}: no {META} there, so not a finished folder of `python -m data.prepare`; "
            "run it, or let it end"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{key}={folder}: {path} is damaged ({error}); prepare the folder again") from None


def _map(
    key: str, folder: Path, shard: dict[str, Any], ending: str, dtype: np.dtype[Any], count: int, verify: bool
) -> np.ndarray:
    path = folder / (shard["name"] + ending)
    size = path.stat().st_size if path.is_file() else -1
    if size != count * dtype.itemsize or not count:
        state = "is missing" if size < 0 else f"has {size} bytes, {META} says {count * dtype.itemsize}"
        raise DataError(f"{key}={folder}: {path} {state}; prepare the folder again")
    with open(path, "rb") as stream:
        content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    if verify and hashlib.sha256(content).hexdigest() != shard["sha256" + ending]:
        raise DataError(
            f"{key}={folder}: the content of {path} was altered since it was prepared; prepare it again"
        )
    return np.frombuffer(content, dtype)
