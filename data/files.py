"""Documents from files: json, jsonl, parquet or txt, each plain, .gz, .xz or .zst.

json and jsonl: one object a line with a string "text"; a .json that starts with "[" is one array of them.
parquet: the column "text". txt: pieces of whole paragraphs of at least 8 kB; a text without blank lines is
cut at a line end past 16 kB, a longer line at a space.

Damaged input is skipped, counted and named with file and line; it never changes the order of the rest.
"""

from __future__ import annotations

import io
import itertools
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from .archive import BROKEN, Watched, one_line, open_raw, split_name, unpacked
from .config import DamageLimit

log = logging.getLogger("subspan")

PIECE_BYTES = 8192  # of a txt file: about 2,000 tokens
DAMAGE_MIN, DAMAGE_SHARE = 100, 0.01  # the run stops past max(100, 1% of the documents read)
NAMED_DAMAGE = 20  # places logged one by one; after that only counts


@dataclass
class Damage:
    """Documents read and places of damaged input skipped in this epoch; raises DamageLimit past the limit.

    Each epoch is judged by itself: going over the same places again is no new damage.
    """

    documents: int = 0
    damaged: int = 0
    quiet: bool = False
    skipped: int = 0  # places over all epochs that this object has seen
    places: list[str] = field(default_factory=list)  # the last few

    def report(self, file: str, line: int, reason: str) -> None:
        """`line` counts from 1: a line, a row or an item of the file; 0: the file as a whole."""
        self.damaged += 1
        self.skipped += 1
        place = f"{file}:{line}" if line else file
        self.places = [*self.places[-4:], f"{place} ({reason})"]
        if not self.quiet and self.skipped <= NAMED_DAMAGE:
            log.warning("skipped damaged input at %s: %s", place, reason)
        elif not self.quiet and self.skipped % 100 == 0:
            log.warning("skipped damaged input at %d places so far, last at %s", self.skipped, place)
        if self.damaged > max(DAMAGE_MIN, DAMAGE_SHARE * self.documents):
            raise DamageLimit(
                f"{self.damaged} damaged places beside {self.documents} good documents, more than "
                f"{DAMAGE_MIN} and {DAMAGE_SHARE:.0%}; the last: {'; '.join(self.places)}"
            )


def documents(
    path: str, start: int, damage: Damage, opened: BinaryIO | None = None
) -> Iterator[tuple[int, str]]:
    """The good documents of a file after its first `start` records, as (its record, from 1, and text).

    `opened` is the file where its owner opens it; closed in the end.

    A record is a line, an array item, a parquet row or a piece of text, so that a position is one number.
    """
    kind, packed = split_name(path)
    with opened or open_raw(path) as raw, unpacked(raw, packed) as stream:
        if kind == ".parquet":
            found = _parquet(stream, bool(packed), path, start, damage)
        elif kind == ".txt":
            found = _text(stream, path, start, damage)
        else:
            found = _json(stream, kind, path, start, damage)
        for record, text in found:
            if text.strip():  # a document without any text is skipped without a word
                damage.documents += 1
                yield record, text


def _lines(stream: BinaryIO, path: str, damage: Damage, number: int = 0) -> Iterator[bytes]:
    """Lines up to the end or to damage, which is reported with the number of the cut line and yields b""."""
    iterator = iter(stream)
    while True:
        try:
            line = next(iterator, b"")
        except BROKEN as error:
            damage.report(path, number + 1, one_line(error))
            yield b""
            return
        if not line:
            if number == 0:
                damage.report(path, 0, "empty file")
            return
        number += 1
        yield line


def _text_of(item: Any) -> str:
    if not isinstance(item, dict) or not isinstance(item.get("text"), str):
        raise ValueError('not an object with a string "text"')
    text = item["text"]
    if not text.isascii():
        text.encode()  # half a surrogate pair, or bytes that are not UTF-8
    return text


def _json(stream: BinaryIO, kind: str, path: str, start: int, damage: Damage) -> Iterator[tuple[int, str]]:
    lines = _lines(stream, path, damage)
    first = next(lines, b"").removeprefix(b"\xef\xbb\xbf")
    if kind == ".json" and first.lstrip()[:1] == b"[":
        yield from _array(itertools.chain([first], lines), path, start, damage)
        return
    for number, line in enumerate(itertools.islice(itertools.chain([first], lines), start, None), start + 1):
        if not line.strip():
            continue
        try:
            text = _text_of(json.loads(line.decode()))
        except (ValueError, RecursionError) as error:
            damage.report(path, number, one_line(error))
        else:
            yield number, text


def _array(lines: Iterator[bytes], path: str, start: int, damage: Damage) -> Iterator[tuple[int, str]]:
    """Items of one JSON array; past one that is not JSON nothing can be told apart, so it ends there."""
    parts = list(lines)
    cut = parts[-1] == b""  # by damage that is already counted
    body = b"".join(parts).decode("utf-8", "surrogateescape").strip()
    decoder, at, number = json.JSONDecoder(), 1, 0
    skip = " \t\r\n,"
    while True:
        while at < len(body) and body[at] in skip:
            at += 1
        if body[at : at + 1] == "]":
            return
        number += 1
        try:
            item, at = decoder.raw_decode(body, at)
        except (ValueError, RecursionError) as error:
            return None if cut else damage.report(path, number, one_line(error))
        if number <= start:
            continue
        try:
            text = _text_of(item)
        except ValueError as error:
            damage.report(path, number, one_line(error))
        else:
            yield number, text


def _text(stream: BinaryIO, path: str, start: int, damage: Damage) -> Iterator[tuple[int, str]]:
    for number, (line, piece) in enumerate(_pieces(_lines(stream, path, damage)), 1):
        if number <= start:
            continue
        try:
            yield number, piece.decode("utf-8-sig" if number == 1 else "utf-8").strip("\r\n")
        except UnicodeDecodeError as error:
            damage.report(path, line + piece.count(b"\n", 0, error.start), one_line(error))


def _pieces(lines: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
    """(number of its first line, bytes) of each piece."""
    piece, first, size, number = [], 1, 0, 0
    for number, whole in enumerate(lines, 1):
        if not whole:
            return  # the archive is damaged here: what is left of the piece is not whole
        for line in _cut(whole):
            piece.append(line)
            size += len(line)
            if size >= (2 * PIECE_BYTES if line.strip() else PIECE_BYTES):
                yield first, b"".join(piece)
                piece, size, first = [], 0, number + line.endswith(b"\n")
    if piece:
        yield first, b"".join(piece)


def _cut(line: bytes) -> Iterator[bytes]:
    """A line in stretches of at most 16 kB: cut after a space where there is one, else between characters."""
    limit, at = 2 * PIECE_BYTES, 0
    while len(line) - at > limit:
        end = line.rfind(b" ", at, at + limit) + 1
        if end <= at:
            end = at + limit
            while end > at + limit - 4 and line[end] & 0xC0 == 0x80:  # inside a UTF-8 character
                end -= 1
        yield line[at:end]
        at = end
    yield line[at:]


def _parquet(
    stream: BinaryIO, packed: bool, path: str, start: int, damage: Damage
) -> Iterator[tuple[int, str]]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    watched = Watched(stream)
    try:
        table = pq.ParquetFile(io.BytesIO(stream.read()) if packed else watched)
        if "text" not in table.schema_arrow.names:
            raise ValueError('no column "text"')
        kind = table.schema_arrow.field("text").type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ValueError(f'column "text" is {kind}, not string')
    except (*BROKEN, pa.ArrowException, ValueError, OSError) as error:
        if watched.failed:
            raise
        return damage.report(path, 0, one_line(error))
    first = 0
    for group in range(table.num_row_groups):
        last = first + table.metadata.row_group(group).num_rows
        if last > start:
            yield from _row_group(table, watched, group, first, start, path, damage)
        first = last


def _row_group(
    table: Any, watched: Watched, group: int, row: int, start: int, path: str, damage: Damage
) -> Iterator[tuple[int, str]]:
    import pyarrow as pa  # type: ignore[import-untyped]

    batches = table.iter_batches(batch_size=1024, row_groups=[group], columns=["text"])
    while True:
        try:
            batch = next(batches, None)
        except (pa.ArrowException, ValueError, OSError) as error:
            if watched.failed:
                raise
            return damage.report(path, row + 1, f"rest of row group {group}: {one_line(error)}")
        if batch is None:
            return
        for value in batch.column(0).cast(pa.large_binary()).to_pylist():
            row += 1
            if row <= start:
                continue
            try:
                if value is None:
                    raise ValueError("no text")
                text = value.decode()
            except ValueError as error:
                damage.report(path, row, one_line(error))
            else:
                yield row, text
