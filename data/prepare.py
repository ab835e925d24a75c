"""Tokenize once: text to a folder of token shards that data=tokens reads.

    python -m data.prepare data=local data.train='text/*.jsonl' data.validation=held_out.jsonl out=FOLDER
    python train.py data=tokens data.train=FOLDER

Also data=c4 and data=sample; data.tokenizer, workers, cache, cache_gib and path as in train.py.
vocab_size (32000) is the model's: the size of a tokenizer that is trained, the limit of any other.
Documents keep the files' order; the shuffle is made when the shards are read. meta.json is written last: a
folder that has it is complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from .archive import write_atomic
from .cache import listing
from .config import DamageLimit, DataConfig, DataError
from .files import Damage
from .loader import chunked, default_workers, encoded
from .shards import META, VERSION
from .source import Source, text_sources
from .tokenizer import Tokenizer, find_tokenizer
from .worker import Pool

SHARD_TOKENS = 100_000_000
KEYS = ("train", "validation", "tokenizer", "workers", "cache", "cache_gib", "path")
USAGE = "python -m data.prepare data=local data.train=GLOB data.validation=GLOB out=FOLDER"


def prepare(cfg: DataConfig, out: Path, vocab_size: int, seed: int = 0) -> dict[str, Any]:
    """Write both splits to the folder `out`, new or unfinished; returns meta.json's content. DataError."""
    problems = cfg.problems()
    if cfg.name == "tokens":
        problems = ["data=tokens: is what this command writes; read text with data=local, c4 or sample"]
    if problems:
        raise DataError("\n".join(problems))
    _claim(out)
    train, validation = text_sources(cfg, seed, listing(cfg))
    tokenizer = find_tokenizer(cfg, train, vocab_size)
    write_atomic(out / "tokenizer.model", tokenizer.path.read_bytes())
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    pool = Pool(tokenizer, default_workers() if cfg.workers is None else cfg.workers)
    damage = Damage()
    try:
        splits = {
            name: _write_split(out, name, source, damage, pool, dtype)
            for name, source in (("train", train), ("validation", validation))
        }
    finally:
        pool.close()
    meta = _meta(tokenizer, dtype, damage, splits)
    write_atomic(out / META, (json.dumps(meta, indent=1) + "\n").encode())
    return meta


def _meta(
    tokenizer: Tokenizer, dtype: np.dtype[Any], damage: Damage, splits: dict[str, Any]
) -> dict[str, Any]:
    return {
        "version": VERSION,
        "dtype": dtype.str,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "tokenizer_sha256": tokenizer.sha256,
        "documents_damaged": damage.skipped,
        "splits": splits,
    }


def _claim(out: Path) -> None:
    """A folder that is new, empty or ours and unfinished; nothing of anybody else's is overwritten."""
    if out.exists() and not out.is_dir():
        raise DataError(f"out={out}: is a file; name a new folder")
    names = [p.name for p in out.iterdir()] if out.exists() else []
    if META in names:
        raise DataError(f"out={out}: holds prepared tokens already; name another folder or delete that one")
    strange = [n for n in names if not n.startswith(("train_", "validation_", "tokenizer.model", META))]
    if strange:
        raise DataError(f"out={out}: holds other files ({strange[0]}); name a new or empty folder")
    for name in names:
        (out / name).unlink()
    out.mkdir(parents=True, exist_ok=True)


def _write_split(
    out: Path, split: str, source: Source, damage: Damage, pool: Pool, dtype: np.dtype[Any]
) -> list[dict[str, Any]]:
    shards: list[dict[str, Any]] = []
    held: list[np.ndarray] = []
    size = 0
    progress = _Progress(split, damage)
    for _, tokens in encoded(chunked(source.documents(damage, ahead=True)), pool):
        held.append(tokens.astype(dtype))
        size += len(tokens)
        progress.add(len(tokens))
        if size >= SHARD_TOKENS:
            shards.append(_write_shard(out, f"{split}_{len(shards):05d}", held))
            held, size = [], 0
    if held:
        shards.append(_write_shard(out, f"{split}_{len(shards):05d}", held))
    progress.end()
    if not shards:
        raise DataError(f"data.{split}: its files hold no text; name other files")
    return shards


def _write_shard(out: Path, name: str, held: list[np.ndarray]) -> dict[str, Any]:
    tokens = np.concatenate(held)
    ends = np.cumsum([len(d) for d in held]).astype("<u8")
    shard: dict[str, Any] = {"name": name, "tokens": len(tokens), "documents": len(ends)}
    for ending, array in ((".bin", tokens), (".idx", ends)):
        with open(out / (name + ending), "wb") as file:
            file.write(array.data)
            file.flush()
            os.fsync(file.fileno())
        shard["sha256" + ending] = hashlib.sha256(array.data).hexdigest()
    return shard


class _Progress:
    """One line on the terminal, rewritten twice a second; a plain line at the end elsewhere."""

    def __init__(self, split: str, damage: Damage) -> None:
        self.split, self.damage, self.tokens = split, damage, 0
        self.start = self.shown = time.monotonic()

    def add(self, tokens: int) -> None:
        self.tokens += tokens
        if sys.stderr.isatty() and time.monotonic() - self.shown > 0.5:
            self.shown = time.monotonic()
            print(f"\r{self._text():<79}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        print(("\r" if sys.stderr.isatty() else "") + f"{self._text():<79}".rstrip(), file=sys.stderr)

    def _text(self) -> str:
        rate = self.tokens / max(time.monotonic() - self.start, 1e-3)
        lost = f", {self.damage.skipped} damaged" if self.damage.skipped else ""
        return f"{self.split}: {self.tokens / 1e6:.1f} M tokens, {rate / 1e6:.2f} M tokens/s{lost}"


def parse(argv: list[str]) -> tuple[DataConfig, Path, int]:
    """(configuration, out, vocab_size) from key=value arguments; DataError with one line per problem."""
    cfg, out, vocab_size = DataConfig(), "", 32000
    problems: list[str] = []
    for argument in argv:
        key, given, value = argument.partition("=")
        short = key.removeprefix("data.")
        if not given:
            problems.append(f"{argument}: not key=value; usage: {USAGE}")
        elif key == "out":
            out = value
        elif key == "data":
            cfg.name = value
        elif key in ("vocab_size", "data.workers"):
            if not value.isdecimal() or (key == "vocab_size" and not int(value)):
                problems.append(f"{key}={value}: not a whole number; give one, such as {key}=4")
            elif key == "vocab_size":
                vocab_size = int(value)
            else:
                cfg.workers = int(value)
        elif key == "data.cache_gib":
            try:
                cfg.cache_gib = float(value)
            except ValueError:
                problems.append(f"{key}={value}: not a number; give GiB, such as {key}=50")
        elif key == f"data.{short}" and short in KEYS:
            setattr(cfg, short, _names(value) if short in ("train", "validation") else value)
        else:
            known = ", ".join(["data", *(f"data.{k}" for k in KEYS), "out", "vocab_size"])
            problems.append(f"{argument}: no such key here; known are {known}")
    if not out:
        problems.append(f"out=: no folder to write to; usage: {USAGE}")
    if problems:
        raise DataError("\n".join(problems))
    return cfg, Path(out).expanduser(), vocab_size


def _names(value: str) -> Any:
    """[a,b] is a list, as on train.py's command line."""
    if value.startswith("[") and value.endswith("]"):
        return [name.strip().strip("'\"") for name in value[1:-1].split(",")]
    return value


def main(argv: list[str]) -> int:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    if not argv or set(argv) & {"-h", "--help"}:
        print(__doc__)
        return 0 if argv else 2
    try:
        cfg, out, vocab_size = parse(argv)
        meta = prepare(cfg, out, vocab_size)
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    except DamageLimit as error:
        print(error, file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("interrupted; the folder is not complete", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"out={error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    counts = {name: sum(s["tokens"] for s in shards) for name, shards in meta["splits"].items()}
    print(
        f"{out}: {counts['train']:,} training and {counts['validation']:,} validation tokens, {meta['dtype']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
