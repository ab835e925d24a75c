"""What may differ between a save and the command that goes on from it."""

from __future__ import annotations

from typing import Any

# Keys, or beginnings of keys; any other change is refused.
MAY_CHANGE = (
    "steps",
    "eval_every",
    "save_every",
    "save_minutes",
    "keep_last",
    "spike",
    "profile",
    "deterministic",
    "log",
    "compile",
    "graph",
    "micro_batch",
    "model.pad",
    "run.",
    "data.workers",
    "data.cache",  # and cache_gib
    "data.path",  # a position knows the names and sizes of its files
    "data.validation",
    "optim.lr",
    "optim.scale",
    "optim.mag_scale",
    "optim.warmup",
    "optim.schedule",
    "optim.min_lr_ratio",
    "optim.beta",
    "optim.eps",
    "optim.decay",
    "optim.clip",  # and clip_mode
    "optim.growth_limit",
    "optim.damping",
    "optim.energy",
    "optim.rank_step",
    "optim.rank_min",
    "optim.monotone",
    "optim.adapt_rank",
    "optim.adapt_refresh",
    "optim.update",
    "optim.moments",
    "optim.embed_moments",
    "optim.rounding",
    "optim.lift",
    "optim.refresh",  # and refresh_every
    "optim.finder",
    "optim.transport",
    "optim.merge_every",
    "activations.checkpoint",
    "activations.recompute",
)


def may_change(change: str) -> bool:
    """Of a line of `differences`. A method and its 8-bit twin differ in how moments are stored."""
    if change.startswith("optim.name="):
        now, _, before = change.removeprefix("optim.name=").partition(": was ")
        return now.removesuffix("_8bit") == before.removesuffix("_8bit")
    return change.startswith(MAY_CHANGE)


def way_out(
    change: str,
    save: object,  # where the run would have gone on from
) -> str:
    """What to do about a change that is refused."""
    back = f"{save} was trained with the former: set it back, or run.name=NEW"
    if change.startswith("model."):
        return f"{back} for a model of its own"
    return f"{back} model.init_from={save} to start from its weights"


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
