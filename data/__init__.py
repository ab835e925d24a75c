"""Text to batches of tokens, in an order that is a pure function of (seed, position).

The names below load on first use: `data.config` alone costs no torch import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import DamageLimit, DataConfig, DataError

if TYPE_CHECKING:
    from .cache import listing
    from .evalset import EvalSet
    from .loader import Batch, Dataset, Loader, build
    from .pack import IGNORE
    from .tokenizer import Tokenizer

_HOME = {
    "Batch": "loader",
    "Dataset": "loader",
    "EvalSet": "evalset",
    "IGNORE": "pack",
    "Loader": "loader",
    "Tokenizer": "tokenizer",
    "build": "loader",
    "listing": "cache",
}
__all__ = [
    "Batch", "DamageLimit", "DataConfig", "DataError", "Dataset",
    "EvalSet", "IGNORE", "Loader", "Tokenizer", "build", "listing",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
