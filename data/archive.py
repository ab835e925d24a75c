"""The bytes of a file on disk, plain, .gz, .xz or .zst; files written whole or not at all."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import tempfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, cast

from .config import DataConfig, DataError

FORMATS = (".json", ".jsonl", ".parquet", ".txt")
PACKED = (".gz", ".xz", ".zst")
# What the decompressors say of bad input, and nothing that a failing disk or network says.
BROKEN = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


def split_name(path: str) -> tuple[str, str]:
    """(format, compression) by the name's endings, e.g. ('.jsonl', '.gz'); DataError for what is not read."""
    stem, packed = os.path.splitext(path.lower())
    if packed not in PACKED:
        stem, packed = path.lower(), ""
    kind = os.path.splitext(stem)[1]
    if kind not in FORMATS:
        raise DataError(
            f"{path}: not a kind of file that can be read; "
            f"known are {' '.join(FORMATS)}, plain or with {' '.join(PACKED)}"
        )
    return kind, packed


def one_line(error: BaseException) -> str:
    """An error's type and text, fit for a message of one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def open_raw(path: str) -> BinaryIO:
    """The stored bytes."""
    return open(path, "rb")


def cache_dir(cfg: DataConfig) -> Path:
    """data.cache, or subspan under the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cfg.cache or os.path.join(home, "subspan")).expanduser()


def write_atomic(path: Path, content: bytes) -> None:
    """Written aside and renamed: whoever looks, several ranks at once included, sees a whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as aside:
        aside.write(content)
        aside.flush()
        os.fsync(aside.fileno())
    os.chmod(aside.name, 0o644)
    os.replace(aside.name, path)


def unpacked(raw: BinaryIO, packed: str) -> BinaryIO:
    """The decompressed bytes. Reading raises one of BROKEN where the archive is damaged."""
    if packed == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if packed == ".xz":
        return cast(BinaryIO, lzma.LZMAFile(raw))
    if packed == ".zst":
        return io.BufferedReader(_Zstd(raw), 1 << 18)
    return raw


class _Zstd(io.RawIOBase):
    """zstd through pyarrow, any number of frames.

    Arrow's reader drops what it had already unpacked when it meets damage (up to the size asked for), so the
    stretch before the damage is read again byte by byte; then the damage is raised, as gzip and lzma do.
    """

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self._done, self._broken = raw, 0, False
        self._restart()

    def _restart(self) -> None:
        import pyarrow as pa  # type: ignore[import-untyped]

        self._raw.seek(0)
        self._file = Watched(self._raw)
        self._stream = pa.CompressedInputStream(pa.PythonFile(self._file, mode="r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._broken:
            raise EOFError("truncated or corrupt zstd stream")
        try:
            data = self._stream.read(len(buffer))
        except OSError:
            if self._file.failed:
                raise
            data, self._broken = self._before_damage(len(buffer)), True
            if not data:
                raise EOFError("truncated or corrupt zstd stream") from None
        self._done += len(data)
        buffer[: len(data)] = data
        return len(data)

    def _before_damage(self, limit: int) -> bytes:
        self._restart()
        left, data = self._done, bytearray()
        try:
            while left:
                left -= len(self._stream.read(min(left, 1 << 18)))
            while len(data) < limit:
                data += self._stream.read(1)
        except OSError:
            if self._file.failed:
                raise
        return bytes(data)


class Watched(io.RawIOBase):
    """Tells a failing disk or network from what Arrow thinks of the bytes: both are OSError."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self.failed = raw, False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        return self._raw.tell()

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._raw.read(len(buffer))
        except BaseException:
            self.failed = True
            raise
        buffer[: len(data)] = data
        return len(data)
