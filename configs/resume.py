"""What may differ between a save and the command that goes on from it."""

from __future__ import annotations

from typing import Any

# Keys, or beginnings of keys; any other change is refused.
MAY_CHANGE = (
    "steps",
    "eval_every",
    "save_every",
    "keep_last",
    "log",
    "compile",
    "micro_batch",
    "run.",
    "data.workers",
    "data.cache",  # and cache_gib
    "data.path",  # a position knows the names and sizes of its files
    "data.validation",
    "optim.lr",
    "optim.warmup",
    "optim.schedule",
    "optim.min_lr_ratio",
    "optim.clip",  # and clip_mode
    "optim.update",
    "optim.refresh_every",
    "optim.finder",
    "optim.merge_every",
    "activations.checkpoint",
)


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Changed settings as `key=now: was before`."""
    found = []
    for key in sorted({*before, *now}):
        a, b = before.get(key), now.get(key)
        if a != b and isinstance(a, dict | None) and isinstance(b, dict | None):  # None: not there at all
            found += differences(a or {}, b or {}, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}={b}: was {a}")
    return found
