"""What an optimizer remembers, by name: for checkpoints, and counted for the table at the start of a run."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import lift, moments
from .comm import local
from .refresh import floored
from .unit import Unit

if TYPE_CHECKING:
    from .engine import Engine

# In the weights' dtype or a basis', which a card and a CPU choose unlike.
FLOATS = {"qs", "w0", "c", "i", "j"}
LIVES = "bases"  # numbers of all bases, in their order
ENGINE = "engine"  # beside parameters' names and "input NAME", "output NAME", "velora NAME" of bases


def collect(e: Engine) -> dict[str, dict[str, Tensor]]:
    """{name: {key: tensor}}: moments and t of each parameter, each basis with its probe, adapters, the
    engine's clock; without padding, as views."""
    found: dict[str, dict[str, Tensor]] = {
        u.name: {"t": e.scalars.t[u.index].clone(), **u.trim(u.state)} for u in e.units
    }
    for u in e.units:
        if u.deferred:
            found[u.name].pop("wq", None)  # W [Q, S], formed again
            found[u.name]["w0"] = u.w[:, : u.size[1]].detach()
    for b in (*e.bases, *e.grouped):
        found[b.name] = {"qs": b.own, "count": torch.tensor(b.count), "fresh": torch.tensor(int(b.fresh))}
    for a in e.adapters:
        found[a.name] = a.saved()
    if e.adarank:
        found[LIVES] = e.adarank.saved()
    r = e.refresher
    found[ENGINE] = {"norm": e.scalars.norm.clone(), "in_a_row": e.scalars.in_a_row.clone()}
    found[ENGINE] |= {
        k: torch.tensor(v)
        for k, v in (("updates", e.updates), ("seed", e.seed), ("kept", r.kept), ("fallbacks", r.fallbacks))
    }
    return found


def groups(e: Engine) -> list[dict[str, Any]]:
    names = {id(u.param): u.name for u in e.units}
    return [{**g, "params": [names[id(p)] for p in g["params"]]} for g in e.param_groups]


def restore(e: Engine, saved: dict[str, Any]) -> None:
    """Copies into place, after everything was checked: a refused state changes nothing.

    Moments in another store are converted, a history with them; a growth limit or what a deferred lift
    keeps may come or go."""
    state = saved["state"]
    if e.adarank:
        _resize(e, state)
    else:
        _check(e, state)
    for u in e.units:
        same = _moments(u, state[u.name])
        for key, tensor in u.trim(u.state).items():
            if key in state[u.name].keys() - _stored(u) - lift.SAVED:
                tensor.copy_(state[u.name][key])
            elif key == "grown":  # no limit before
                tensor.zero_()
        if not same:
            u.rule.moved_(u.state, True, partial(e.reduce.sum_parts, u.param))
        e.scalars.t[u.index] = state[u.name]["t"]
    for b in (*e.bases, *e.grouped):
        b.load_(*(state[b.name][k] for k in ("qs", "count", "fresh")))
    for u in e.units:
        if u.deferred:
            lift.load_(u, state[u.name])
    for a in e.adapters:
        a.load_(state[a.name])
    if e.adarank:
        e.adarank.load_(state[LIVES])
        e.rearrange(e.bases)
    own, r = state[ENGINE], e.refresher
    e.scalars.norm.copy_(own["norm"])
    e.scalars.in_a_row.copy_(own["in_a_row"])
    e.updates, e.seed = int(own["updates"]), int(own["seed"])
    for a in e.adapters:
        a.seed = e.seed
    r.seed, r.kept, r.fallbacks = e.seed, int(own["kept"]), int(own["fallbacks"])
    for g, there in zip(e.param_groups, saved.get("param_groups", []), strict=False):
        g |= {k: v for k, v in there.items() if k != "params"}


def _resize(e: Engine, state: dict[str, dict[str, Tensor]]) -> None:
    """Checks, and makes room for a save whose bases have other ranks, which they may."""
    bases = [(b, b.r, b.rank, b.qs, b.cross) for b in e.bases]
    units = [(u, dict(u.state)) for u in e.units if u.projected]
    try:
        for b in e.bases:
            r = state[b.name]["qs"].shape[-1] - b.k if "qs" in state.get(b.name, {}) else b.r
            if 1 <= r <= b.most:
                b.resize(r)
        for u, _ in units:
            u.resize()
        _check(e, state)
    except ValueError:
        for b, r, rank, qs, cross in bases:
            b.r, b.rank, b.qs, b.cross = r, rank, qs, cross
        for u, kept in units:
            u.state |= kept
        raise


def _check(e: Engine, state: dict[str, dict[str, Tensor]]) -> None:
    """ValueError names what of a saved state is missing, unknown or of another shape or kind."""
    mine = collect(e)
    for name in sorted(state.keys() ^ mine.keys()):
        raise ValueError(f"optimizer state of {name}: in only one of the save and this model")
    stored = {u.name: {*_stored(u), "grown", *(lift.SAVED if u.layers else ())} for u in e.units}
    for name, kept in mine.items():
        free = stored.get(name, set())
        if state[name].keys() - free != kept.keys() - free:
            raise ValueError(
                f"optimizer state of {name}: saved {sorted(state[name])}, this method keeps {sorted(kept)}"
            )
        for key in kept.keys() & state[name].keys():
            there, here = state[name][key], kept[key]
            if there.shape != here.shape:
                raise ValueError(
                    f"optimizer state {key} of {name}: saved {tuple(there.shape)}, here {tuple(here.shape)}"
                )
            if there.dtype != here.dtype and key not in free - {"d", "grown"} | FLOATS:
                raise ValueError(f"optimizer state {key} of {name}: saved {there.dtype}, here {here.dtype}")
    for u in e.units:
        if not any(_kinds(state[u.name], u) == _kinds(_blank(u, store), u) for store in moments.STORES):
            raise ValueError(f"optimizer state of {u.name}: its moments are of no kind, or not all of one")
        if ("c" in state[u.name]) != ("w0" in state[u.name]):
            raise ValueError(f"optimizer state of {u.name}: one of c and w0 without the other")
    for key in FLOATS:
        kinds = {str(kept[key].dtype) for kept in state.values() if key in kept}
        if not kinds <= {"torch.float64", "torch.float32", "torch.bfloat16"} or len(kinds) > 1:
            raise ValueError(f"optimizer state {key}: saved as {' and '.join(sorted(kinds))}")


def _blank(u: Unit, store: str) -> dict[str, Tensor]:
    """State of a unit in another store: shapes and dtypes."""
    return u.trim(u.rule.begin(store, u.shape, torch.device("meta"), moments.wide(local(u.param).dtype)))


def _kinds(state: dict[str, Tensor], u: Unit) -> dict[str, tuple[Any, ...]]:
    """Key -> (shape, dtype) of its moments and their scales."""
    return {k: (t.shape, t.dtype) for k, t in state.items() if k in _stored(u) - {"d"}}


def _stored(u: Unit) -> set[str]:
    """Keys of the moments and what their store has beside them."""
    return {"d", *u.rule.stored, *(f"{k}_scale" for k in u.rule.stored)}


def _moments(u: Unit, saved: dict[str, Tensor]) -> bool:
    """Bit for bit from the same store (true), else by value."""
    keys = _stored(u)
    mine = {k: t for k, t in u.trim(u.state).items() if k in keys}
    there = {k: t for k, t in saved.items() if k in keys}
    if {k: t.dtype for k, t in mine.items()} == {k: t.dtype for k, t in there.items()}:
        for k, t in mine.items():
            t.copy_(there[k])
        return True
    wide = moments.wide(local(u.param).dtype)
    there = {k: t.to(local(u.param).device) for k, t in there.items()}
    values = {k: moments.load(there, k, wide) for k in u.rule.stored}
    if "d" in u.state:  # R's root mean square over rows, as the second moment remembers it
        d = values["v"].mean(0).sqrt() if "v" in values else torch.zeros_like(u.state["d"])
        u.state["d"].copy_(floored(d))
    yes = torch.ones((), device=local(u.param).device)
    for k, x in values.items():
        x = F.pad(x, (0, u.state[k].shape[-1] - x.shape[-1])) if x.ndim else x
        moments.save_(u.state, k, x, yes, yes, yes * u.index)
    return False
