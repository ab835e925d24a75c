"""Bases and adapters: which matrix gets which, and what it shares.

Projected methods give each matrix a basis by cfg.side; weights with one input share theirs (SHARED).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict

from torch import nn

from . import lift
from .adapter import Adapter, How, adapt
from .config import AdapterConfig, BasisConfig, MagnitudeConfig, ProjectedConfig, default_rank
from .layer import project
from .methods import adam
from .reduce import Reduce
from .unit import PROBE, Basis, Magnitude, Unit

# Names, within one module, of linears that read the same input.
SHARED = (
    r"(q|k|v)_proj", r"(query|key|value)", r"w(q|k|v)", r"to_(q|k|v)",
    r"(gate|up)_proj", r"w(1|3)", r"fc_?(gate|up)", r"wi_(0|1)",
)  # fmt: skip


def survey(
    model: nn.Module, units: list[Unit], cfg: BasisConfig
) -> tuple[dict[int, list[nn.Linear]], list[Unit], int]:
    """The layers that use each weight, by its id; the matrices that are not VeLoRA's; the rank."""
    users: dict[int, list[nn.Linear]] = defaultdict(list)
    for module in model.modules():
        if type(module) is nn.Linear:
            users[id(module.weight)].append(module)
    every = [u for u in units if u.role == "matrix"]
    if not every:
        raise ValueError(f"model: {cfg.name} projects weights of nn.Linear in blocks, and there are none")
    rank = cfg.rank or default_rank(sum(math.prod(u.size) for u in every), every[0].size[1])
    return users, [u for u in every if not u.grouped], rank


def give_adapters(
    model: nn.Module, units: list[Unit], cfg: AdapterConfig, every: int, comm: Reduce, seed: int
) -> tuple[list[Unit], list[Basis]]:
    """All units, those of the factors and the magnitude in place of each matrix; and the factors' bases."""
    users, matrices, rank = survey(model, units, cfg)
    core = cfg.core_rank or rank
    if core > rank:
        raise ValueError(
            f"core_rank={core}: above rank={rank}, the factors' narrow side; choose at most that"
        )
    for u in matrices:
        if not users[id(u.param)]:
            u.why = f"a subclass of nn.Linear, {type(u.owner).__name__}"
        elif rank >= min(u.size):
            u.why = f"width {min(u.size)}"
    chosen = [u for u in matrices if not u.why]
    if not chosen:
        raise ValueError(f"rank={rank}: no matrix is wider, nothing would be trained in factors; choose less")
    merge = every if cfg.merge_every is None else cfg.merge_every
    together = cfg.refresh == "together"
    how = How(merge, together, cfg.detach_norm, cfg.normalize, comm)
    every_unit: list[Unit] = []
    bases: list[Basis] = []
    for u in units:
        if u not in chosen:
            every_unit.append(u)
            continue
        layers = [adapt(layer) for layer in users[id(u.param)]]
        a = Adapter(u.name, u.size, rank, chosen.index(u), len(chosen), seed, how, layers)
        a.make()
        for layer in layers:
            layer.adapter = a
        decay = 0.0 if cfg.normalize else u.decay  # of W: on the magnitude, which is its scale
        for name, size in (("i", (u.size[0], rank)), ("j", (rank, u.size[1]))):
            a.units.append(
                Unit(
                    f"{u.name} {name.upper()}",
                    a,
                    name,
                    size,
                    "factor",
                    u.rule,
                    u.scale,
                    decay,
                    u.store,
                    limit=u.limit,
                    adapter=a,
                )
            )
            for side, dim in (("input", 1), ("output", 0)) if cfg.project else ():
                x = a.units[-1]
                b = Basis(f"{side} {x.name}", len(bases), side, size[dim], core, 0, [x])
                bases.append(b)
                x.q, x.p = (b, x.p) if side == "input" else (x.q, b)
        if cfg.normalize:
            mag = Unit(
                f"{u.name} mag", a, "mag", u.size[:1], "magnitude", adam(cfg), cfg.mag_scale, u.decay, "fp32",
                adapter=a,
            )  # fmt: skip
            a.units.append(mag)
        every_unit += a.units
    return every_unit, bases


def give_bases(model: nn.Module, units: list[Unit], cfg: ProjectedConfig) -> list[Basis]:
    """Bases of all matrices, in the model's order; each unit learns its own and its layers, now projected."""
    users, matrices, rank = survey(model, units, cfg)
    families: dict[tuple[str, ...], list[Unit]] = {}
    for u in matrices:
        side = side_of(u, cfg.side)
        width = min(u.size) if side == "both" else u.size[side == "input"]
        if not users[id(u.param)]:
            u.why = f"a subclass of nn.Linear, {type(u.owner).__name__}"
        elif rank >= width:
            u.why = f"width {width}"
        else:
            family = family_of(u) if cfg.share and side != "output" else u.name
            families.setdefault((side, family), []).append(u)
    for u in (u for u in matrices if u.why):
        u.rule = u.rule.dense
    bases: list[Basis] = []
    turns: dict[str, int] = {}

    def basis(side: str, members: list[Unit], k: int) -> Basis:
        dim = 1 if side == "input" else 0
        n, across = members[0].size[dim], sum(u.size[1 - dim] for u in members)
        b = Basis(f"{side} {members[0].name}", len(bases), side, n, min(rank, n, across), k, members)
        b.turn = turns.setdefault(block_of(members[0].name), len(turns))
        bases.append(b)
        return b

    for (side, _), members in families.items():
        if side != "output":
            q = basis("input", members, PROBE)
            for u in members:
                u.q = q
        if side != "input":
            for u in members:
                u.p = basis("output", [u], 0 if side == "both" else PROBE)
    if cfg.transport != "auto" and not any(u.rule.moments for u in matrices):
        raise ValueError(f"transport={cfg.transport}: {cfg.name} keeps no moments in a basis; leave it out")
    if isinstance(cfg, MagnitudeConfig):
        how = Magnitude(cfg.mag_scale, adam(cfg))
        for u in (u for u in matrices if u.projected):
            u.mag = how
    for u in matrices:
        if u.projected:
            u.layers = [project(layer) for layer in users[id(u.param)]]
    if not bases:
        raise ValueError(f"rank={rank}: no matrix is wider, nothing would be projected; choose a smaller one")
    return bases


def defer(bases: list[Basis], cfg: ProjectedConfig, tokens: int | None) -> None:
    """Which weights keep their updates beside them until a refresh. tokens: of an update; None: unknown."""
    for b in bases:
        auto = cfg.lift == "auto" and cfg.side == "input" and tokens is not None and lift.pays(b, tokens)
        for u in b.units:
            u.deferred = cfg.lift == "deferred" or auto


def side_of(u: Unit, side: str) -> str:
    """paper projects the shorter side of a matrix, long the longer; square ones as published code does."""
    out, width = u.size
    return {
        "paper": "input" if out >= width else "output",
        "long": "output" if out >= width else "input",
    }.get(side, side)


def block_of(name: str) -> str:
    """The path up to its first number: "model.layers.3"; all of a path without one."""
    found = re.match(r"(.*?\.\d+)\.", name)
    return found[1] if found else name


def family_of(u: Unit) -> str:
    """Equal for weights of one module that read the same input."""
    path = u.name.removesuffix(".weight")
    parent, _, name = path.rpartition(".")
    for n, pattern in enumerate(SHARED):
        if re.fullmatch(pattern, name):
            return f"{parent}.{n} {u.size[1]}"
    return u.name
