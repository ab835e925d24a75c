"""Batches of tokens in one global order, whatever the number of ranks and workers.

Every rank goes through the same rows and keeps its contiguous share of each step's; of token shards it reads
only that share. A batch carries the position after it; a loader started there goes on with the next token.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .ahead import Ahead
from .cache import listing
from .config import DataConfig, DataError, globs
from .evalset import EvalSet, eval_set, first
from .files import Damage
from .hub import Listing
from .pack import IGNORE, Dense, Mixed, Paper, dense_rows, group_rows, groups, paper_rows
from .shards import ShardRows, Shards
from .source import Cursor, Source, text_sources
from .tokenizer import Tokenizer, check_size, find_tokenizer
from .worker import Pool

log = logging.getLogger("subspan")

CHUNK = 64  # documents handed to a tokenizing process at a time: about 35 ms of work
DEPTH = 4  # batches ready ahead of the consumer


@dataclass
class Batch:
    x: Tensor  # (rows, seq_len) int64 on the CPU, pinned if asked
    y: Tensor  # (rows, seq_len) int64: the next token, IGNORE where none is scored
    state: dict[str, Any]  # the position after this batch over all ranks; JSON
    valid: int  # targets here that are scored
    digest: int  # CRC-32(x, place in the step) summed over rows: adds up over ranks to one number a step


class Rows(Protocol):
    """The endless global order of rows from one position on."""

    damage: Damage

    def take(self, count: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """x, y (high - low, seq_len) of rows [low, high) of the next `count`; the position after all."""
        ...

    def close(self) -> None: ...


def build(
    cfg: DataConfig, *, vocab_size: int, seq_len: int, seed: int, files: Listing | None = None
) -> Dataset:
    """The data of a run: files found, tokenizer found, fetched or trained. DataError for what cannot work.

    `files` is what data.listing returned to the first rank; without it this process asks the hub itself.
    """
    problems = cfg.problems()
    if seed < 0:
        problems.append(f"seed={seed}: a seed is not negative; give 0 or more")
    if problems:
        raise DataError("\n".join(problems))
    return Dataset(cfg, vocab_size, seq_len, seed, files or listing(cfg))


class Dataset:
    """Training rows and validation tokens of one configuration."""

    def __init__(
        self, cfg: DataConfig, vocab_size: int, seq_len: int, seed: int, files: Listing | None = None
    ) -> None:
        self.cfg, self.seq_len, self.seed = cfg, seq_len, seed
        self._eval: dict[int, EvalSet] = {}
        self._shards: tuple[ShardRows, Shards] | None = None
        if cfg.name == "tokens":
            self.tokenizer, self._shards = self._open_shards(vocab_size)
            content = self._shards[0].shards.fingerprint()
        else:
            self._train, self._validation = text_sources(cfg, seed, files)
            self.tokenizer = find_tokenizer(cfg, self._train, vocab_size)
            content = self._train.fingerprint()
        # What a position refers to; another value means another order.
        self._identity = {
            "data": cfg.name,
            "data.train": content,
            "data.tokenizer": self.tokenizer.sha256,
            "data.packing": cfg.packing,
            "seed": seed,
            "seq_len": seq_len,
        }
        if files is not None:
            self._identity["data.revision"] = files.revision

    def loader(
        self, rows: int, rank: int = 0, world: int = 1, state: dict[str, Any] | None = None, pin: bool = False
    ) -> Loader:
        """Batches of this rank's rows // world of `rows` a step over all ranks, from a batch's `state` on."""
        if rows < world or rows % world:
            raise ValueError(f"rows={rows} do not divide among {world} ranks; give a multiple of {world}")
        state = dict(state or {})
        known = state.pop("of", self._identity)
        for key, value in self._identity.items():
            if known.get(key, value) != value:  # data.revision: unknown where a copy in a folder was read
                raise DataError(
                    f"{key}={value}: the checkpoint was saved with {known[key]}, "
                    "its position in the data means nothing here; "
                    "give back what it had, or start another run with run.name=NAME"
                )
        stream: Rows
        if self._shards is not None:
            stream = _ShardStream(self._shards[0], state)
        else:
            damage = Damage(quiet=rank > 0)
            stream = _TextStream(self._train, self._pool(), self.cfg.packing, self.seq_len, state, damage)
        return Loader(stream, rows, rank, world, pin, self._identity)

    def check_position(self, state: dict[str, Any] | None) -> None:
        """DataError where `state` cannot be a position of such data; that it is this data's `loader` sees."""
        if not state:
            return
        found = {key: value for key, value in state.items() if key != "of"}
        if self._shards is not None:
            needed, may, limits = {"epoch", "row"}, set(), {"row": self._shards[0].rows}
        else:
            needed, may = {*Cursor.__dataclass_fields__, "document"}, {"token", "group", "row"}
            limits = {"file": len(self._train.files) + 1, "row": group_rows(self.seq_len) + 1}
        odd = [key for key in needed | {*found} if key not in found or key not in needed | may]
        odd += [f"{k}={v!r}" for k, v in found.items() if type(v) is not int]
        odd += [f"{k}={v}" for k, v in found.items() if type(v) is int and not 0 <= v < limits.get(k, 2**62)]
        if odd or not isinstance(state.get("of"), dict):
            raise DataError(f"no position in this data ({', '.join(sorted(odd))[:200] or 'of'})")

    def validation(self, max_tokens: int = 10_000_000) -> EvalSet:
        """The first max_tokens targets of the validation text, in file order and in the run's own packing.

        dense: every token is scored exactly once, except the very first. paper: one document a row, as in
        training, so that its first token and what is cut from a long one are not scored; the last row may be
        scored in part. DataError where there is no text.
        """
        if max_tokens not in self._eval:
            rows = self._paper_rows if self.cfg.packing == "paper" else self._dense_rows
            self._eval[max_tokens] = eval_set(*rows(max_tokens), self.tokenizer)
        return self._eval[max_tokens]

    def _paper_rows(self, limit: int) -> tuple[np.ndarray, np.ndarray]:
        documents = first(self._validation_documents(), limit, lambda n: min(n, self.seq_len) - 1)
        x, y = paper_rows(documents, self.seq_len, self.tokenizer.pad_id)
        y.flat[np.flatnonzero(y != IGNORE)[limit:]] = IGNORE
        if self._shards is not None:
            self._shards[1].check(x)
        return x, y

    def _dense_rows(self, limit: int) -> tuple[np.ndarray, np.ndarray]:
        if self._shards is not None:
            shards = self._shards[1]
            tokens = shards.read(0, min(limit + 1, shards.tokens))
            shards.check(tokens)
        else:
            tokens = np.concatenate(first(self._validation_documents(), limit + 1, lambda n: n))[: limit + 1]
        return dense_rows(tokens, self.seq_len, self.tokenizer.pad_id)

    def _validation_documents(self) -> Generator[np.ndarray, None, None]:
        """Tokens with an end-of-text of each validation document, in file order; DataError if none."""
        if self._shards is not None:
            shards = self._shards[1]
            yield from map(shards.document, range(shards.documents))
            return
        pool, tokens = self._pool(), None
        try:
            for _, tokens in encoded(chunked(self._validation.documents(Damage())), pool):
                yield tokens
        finally:
            pool.close()
        if tokens is None:
            raise DataError(
                f"data.validation={self.cfg.validation}: holds no text to evaluate on; name other files"
            )

    def _pool(self) -> Pool:
        return Pool(self.tokenizer, default_workers() if self.cfg.workers is None else self.cfg.workers)

    def _open_shards(self, vocab_size: int) -> tuple[Tokenizer, tuple[ShardRows, Shards]]:
        folder = _folder("data.train", self.cfg.train)
        train = Shards(folder, "train")
        tokenizer = Tokenizer(folder / "tokenizer.model")
        validation = Shards(folder, "validation") if self.cfg.validation is None else None
        if validation is None:
            held_out = _folder("data.validation", self.cfg.validation)
            validation = Shards(held_out, "validation", "data.validation")
        for shards in (train, validation):
            if shards.meta["tokenizer_sha256"] != tokenizer.sha256:
                raise DataError(
                    f"data.validation={shards.folder}: its tokens were made with another tokenizer "
                    f"than {tokenizer.path}; prepare both with one tokenizer"
                )
        check_size(tokenizer, str(tokenizer.path), vocab_size)
        rows = ShardRows(train, self.cfg.packing, self.seq_len, self.seed, tokenizer.pad_id)
        return tokenizer, (rows, validation)


def default_workers() -> int:
    """0 without a GPU; with one up to 4 of the cores that the ranks of this machine share."""
    if not torch.cuda.is_available():
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(4, (cores - 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _folder(key: str, value: Any) -> Path:
    names = globs(value)
    folder = Path(names[0]).expanduser()
    if len(names) != 1 or not os.path.isdir(folder):
        raise DataError(f"{key}={value}: not one folder; give the folder that `python -m data.prepare` wrote")
    return folder


def chunked(texts: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
    """Chunks for the pool, tagged with nothing worth knowing."""
    chunk: list[str] = []
    for text in texts:
        chunk.append(text)
        if len(chunk) == CHUNK:
            yield 0, chunk
            chunk = []
    if chunk:
        yield 0, chunk


def encoded(
    chunks: Iterator[tuple[Any, list[str]]], pool: Pool
) -> Iterator[tuple[tuple[Any, int], np.ndarray]]:
    """((tag, number in the chunk), tokens with an end-of-text, int32) of each document that has any token."""
    eos = np.array([pool.tokenizer.eos_id], np.int32)
    for tag, batch in pool.map(chunks):
        for number, tokens in enumerate(batch):
            if len(tokens):
                yield (tag, number), np.concatenate([tokens, eos])


class _TextStream:
    """Rows of tokenized documents.

    Position: the block's Cursor, the document in it, the token in that. For dense packing these say where a
    group of rows begins; the group's number and the rows of it that are used are added.
    """

    def __init__(
        self, source: Source, pool: Pool, packing: str, seq_len: int, state: dict[str, Any], damage: Damage
    ) -> None:
        self.damage, self._source, self._pool = damage, source, pool
        document, token, group, row = (state.pop(k, 0) for k in ("document", "token", "group", "row"))
        self._opener = source.opener()
        documents = encoded(self._chunks(Cursor(**state), document), pool)
        self._pack: Mixed[Any] | Paper[Any]
        self._groups: Ahead[Any] | None = None
        if packing == "dense":  # the next group is tokenized while one is trained on
            self._groups = Ahead(groups(Dense(documents, seq_len, token), group_rows(seq_len)), 1)
            self._pack = Mixed(self._groups, source.seed, group, row)
        else:
            self._pack = Paper(documents, seq_len, pool.tokenizer.pad_id)

    def _chunks(self, at: Cursor, first: int) -> Iterator[tuple[tuple[Cursor, int], list[str]]]:
        for cursor, texts in self._source.blocks(at, self.damage, self._opener):
            for i in range(first, len(texts), CHUNK):
                yield (cursor, i), texts[i : i + CHUNK]
            first = 0

    def take(self, count: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        x, y, ((cursor, first), number), *rest = self._pack.take(count)
        place = dict(zip(("token", "group", "row"), rest, strict=False))
        return x[low:high], y[low:high], {**asdict(cursor), "document": first + number, **place}

    def close(self) -> None:
        if self._opener is not None:
            self._opener.close()
        if self._groups is not None:
            self._groups.close()
        self._pool.close()
        if self._groups is not None:
            self._groups.join()


class _ShardStream:
    """Rows of token shards. Position: epoch and row."""

    def __init__(self, rows: ShardRows, state: dict[str, Any]) -> None:
        self.damage, self._rows = Damage(), rows
        self._epoch, self._row = state.get("epoch", 0), state.get("row", 0)

    def take(self, count: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        x, y = self._rows.take(*self._at(low), high - low)
        self._epoch, self._row = self._at(count)
        return x, y, {"epoch": self._epoch, "row": self._row}

    def _at(self, ahead: int) -> tuple[int, int]:
        epochs, row = divmod(self._row + ahead, self._rows.rows)
        return self._epoch + epochs, row

    def close(self) -> None:
        pass


class Loader:
    """An endless iterator of Batch, made ahead in a thread; an error there is raised here, with its type."""

    def __init__(
        self, stream: Rows, rows: int, rank: int, world: int, pin: bool, identity: dict[str, Any]
    ) -> None:
        self._stream, self._identity, self._pin = stream, identity, pin
        share = rows // world
        self._share = (rows, rank * share, (rank + 1) * share)
        self._ahead = Ahead(self._batches(), DEPTH)

    @property
    def damaged(self) -> int:
        """Places of damaged input that this loader skipped, what it read ahead included."""
        return self._stream.damage.skipped

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        return next(self._ahead)

    def wait(self, asked: Callable[[], bool]) -> Batch | None:
        """The next batch; None if asked() turns true while none is ready, as in an outage of the hub."""
        return self._ahead.wait(asked)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads and the tokenizing processes."""
        self._ahead.close()
        self._stream.close()
        self._ahead.join()

    def _batches(self) -> Iterator[Batch]:
        while True:
            x, y, state = self._stream.take(*self._share)
            state["of"] = self._identity
            digest = sum(zlib.crc32(row.tobytes(), place) for place, row in enumerate(x, self._share[1]))
            yield Batch(self._tensor(x), self._tensor(y), state, int((y != IGNORE).sum()), digest)

    def _tensor(self, rows: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(rows))
        return tensor.pin_memory() if self._pin else tensor
