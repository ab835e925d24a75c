"""What an optimizer remembers, by name: for checkpoints, and counted for the table at the start of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .engine import Engine

ENGINE = "engine"  # beside parameters' names and "input NAME", "output NAME" of bases


def collect(e: Engine) -> dict[str, dict[str, Tensor]]:
    """{name: {key: tensor}}: moments and t of each parameter, each basis with its probe, adapters, the
    engine's clock."""
    found: dict[str, dict[str, Tensor]] = {
        u.name: {"t": e.scalars.t[u.index].clone(), **u.state} for u in e.units
    }
    for b in e.bases:
        found[b.name] = {"qs": b.qs, "count": torch.tensor(b.count), "fresh": torch.tensor(int(b.fresh))}
    for a in e.adapters:
        found[a.name] = a.saved()
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
    """Copies into place, after everything was checked: a refused state changes nothing."""
    state, mine = saved["state"], collect(e)
    for name in sorted(state.keys() ^ mine.keys()):
        raise ValueError(f"optimizer state of {name}: in only one of the save and this model")
    for name, kept in mine.items():
        if state[name].keys() != kept.keys():
            raise ValueError(
                f"optimizer state of {name}: saved {sorted(state[name])}, this method keeps {sorted(kept)}"
            )
        for key, tensor in kept.items():
            there, here = state[name][key], tensor
            if there.shape != here.shape:
                raise ValueError(
                    f"optimizer state {key} of {name}: saved {tuple(there.shape)}, here {tuple(here.shape)}"
                )
    for u in e.units:
        for key, tensor in u.state.items():
            tensor.copy_(state[u.name][key])
        e.scalars.t[u.index] = state[u.name]["t"]
    for b in e.bases:
        b.load_(*(state[b.name][k] for k in ("qs", "count", "fresh")))
    for a in e.adapters:
        a.load_(state[a.name])
    own, r = state[ENGINE], e.refresher
    e.scalars.norm.copy_(own["norm"])
    e.scalars.in_a_row.copy_(own["in_a_row"])
    e.updates, e.seed = int(own["updates"]), int(own["seed"])
    for a in e.adapters:
        a.seed = e.seed
    r.seed, r.kept, r.fallbacks = e.seed, int(own["kept"]), int(own["fallbacks"])
    for g, there in zip(e.param_groups, saved.get("param_groups", []), strict=False):
        g |= {k: v for k, v in there.items() if k != "params"}
