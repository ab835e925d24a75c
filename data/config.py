"""What text a run reads. No torch here: `--help` and the checks of a command line read this file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class DataError(ValueError):
    """The data cannot be used as asked; found before the first step. Names key, value, reason, way out."""


@dataclass
class DataConfig:
    name: str = "c4"  # c4 | local | tokens | sample
    train: Any = None  # a glob, a name or a list of them
    validation: Any = None  # likewise
    packing: str = "dense"  # dense | paper
    tokenizer: str | None = None  # a SentencePiece model file, t5, llama or train; None: the source's default
    workers: int | None = None  # tokenizing processes; None: 0 on a CPU, a few on a GPU
    cache: str | None = None  # None: $XDG_CACHE_HOME/subspan or ~/.cache/subspan
    path: str | None = None  # c4 only: a folder or mirror with C4's layout
