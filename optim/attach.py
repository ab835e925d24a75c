"""Which parameter is trained by what: from module types and names, without knowing what a transformer is.

Every trainable parameter is owned once, in the model's order; the first line that fits:

    embedding   weight of an nn.Embedding (a tied head is the same tensor: owned here)   lr, no decay
    matrix      weight of an nn.Linear inside a numbered block (a number in its path);   lr * scale, decay
                in a model without such: of every nn.Linear that is not called a head
    head        weight of any other nn.Linear                                            lr, decay
    gain        anything with fewer than two dimensions: norms, biases                   lr, no decay
    other       the rest                                                                 lr, no decay

Projected methods give each matrix a basis by cfg.side; weights with one input share theirs (SHARED).
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from .config import (
    MagnitudeConfig,
    OptimConfig,
    ProjectedConfig,
    default_lr,
    default_rank,
    default_refresh_every,
)
from .engine import Engine, basis_dtype
from .layer import ProjectedLinear, project
from .methods import METHODS, Method, adam
from .reduce import Reduce, sum_shards
from .unit import PROBE, Basis, Magnitude, Unit, local

HEAD = re.compile(r"(^|\.)(\w*head\w*|embed_out|output|classifier|score)$")
# Names, within one module, of linears that read the same input.
SHARED = (
    r"(q|k|v)_proj", r"(query|key|value)", r"w(q|k|v)", r"to_(q|k|v)",
    r"(gate|up)_proj", r"w(1|3)", r"fc_?(gate|up)", r"wi_(0|1)",
)  # fmt: skip


def attach(
    model: nn.Module,
    method: str,
    *,
    accum_steps: int = 1,
    group: dist.ProcessGroup | None = None,
    reduce: str | None = None,
    **overrides: object,
) -> Engine:
    """A torch.optim.Optimizer for `model`.

    method      a key of METHODS: adamw, adamw_8bit, galore, galore_8bit, gradnormlorp, gradnormlorp_8bit, ...
    accum_steps backwards that make one step; gradients are summed, so divide the loss accordingly
    group       process group whose ranks hold replicas, or row shards (fully_shard before attach):
                gradients are reduced over it; None reduces nothing
    reduce      "sum" or "mean" over the group; must be given with one
    overrides   the optim.* keys (lr, scale, rank, ...); unknown keys and bad values raise ValueError

    Projected weights lose requires_grad and their .grad until opt.detach(); state_dict(), parameters() and
    saved files stay those of the plain model. The bases' random numbers come from torch.initial_seed().
    """
    cfg = config(method, overrides)
    problems = cfg.problems()
    if accum_steps < 1:
        problems.append(f"accum_steps={accum_steps}: must be at least 1")
    if accum_steps > 1 and cfg.clip_mode == "two_pass":
        problems.append(
            f"accum_steps={accum_steps}: clip_mode=two_pass would hold all gradients; choose clip_mode=exact"
        )
    if (group is None) != (reduce is None) or reduce not in (None, "sum", "mean"):
        problems.append(f'reduce={reduce!r}: give reduce="sum" or "mean" with a process group, and only then')
    if isinstance(model, DistributedDataParallel):
        problems.append(
            "model: a DistributedDataParallel shows its hooks one rank's gradient, and replicas would drift; "
            'attach to model.module with group=... and reduce="mean", and train that without the wrapper'
        )
    cut = [(name, p) for name, p in model.named_parameters() if isinstance(p, DTensor) and p.requires_grad]
    if cut:
        problems += sharding(*cut[0], cfg, group)
    if problems:
        raise ValueError("\n".join(problems))
    if group is None and dist.is_initialized() and dist.get_world_size() > 1:
        warnings.warn("group: none given among several ranks, so nothing is reduced", stacklevel=2)
    sum_shards(model, mean=reduce == "mean")
    units = own(model, cfg, METHODS[method])
    numbers, first = sum(u.param.numel() for u in units), local(units[0].param)
    comm = Reduce(group, reduce == "mean")
    seed = torch.tensor([torch.initial_seed() % 2**63], device=first.device if group else "cpu")
    comm.from_owner_(seed, 0)
    projected = isinstance(cfg, ProjectedConfig)
    bases = give_bases(model, units, cfg) if isinstance(cfg, ProjectedConfig) else []
    for b in bases:
        w = local(b.units[0].param)
        b.begin(int(seed), w.device, basis_dtype(cfg, w))
        comm.from_owner_(b.qs, b.index)
    for u in units:
        u.begin()
    return Engine(
        model,
        units,
        bases,
        cfg,
        lr=cfg.lr if cfg.lr is not None else default_lr(numbers, projected),
        every=(getattr(cfg, "refresh_every", None) or default_refresh_every(numbers)),
        accum_steps=accum_steps,
        reduce=comm,
        seed=int(seed),
    )


def sharding(name: str, p: DTensor, cfg: OptimConfig, group: dist.ProcessGroup | None) -> list[str]:
    """What stands against training a model whose weights are cut like this one."""
    problems = []
    if group is None:
        problems.append(
            f"{name}: a shard of {p.device_mesh.size()} ranks'; give group=mesh.get_group() and reduce"
        )
    if tuple(p.placements) != (Shard(0),):
        problems.append(f"{name}: placed as {p.placements}; use fully_shard on a one-dimensional mesh")
    side = getattr(cfg, "side", "input")
    if side != "input":
        problems.append(
            f"side={side}: needs whole columns, and the rows of {name} are sharded; choose side=input"
        )
    return problems


def config(method: str, overrides: dict[str, object]) -> OptimConfig:
    if method not in METHODS:
        raise ValueError(f"method={method!r}: no such method; choose {', '.join(METHODS)}")
    kind = METHODS[method].config
    unknown = sorted(set(overrides) - (set(kind.__dataclass_fields__) - {"name"}))
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)}: unknown to {method}; it takes {', '.join(kind.__dataclass_fields__)}"
        )
    return kind(name=method, **{**METHODS[method].defaults, **overrides})  # type: ignore[arg-type]


def own(model: nn.Module, cfg: OptimConfig, method: Method) -> list[Unit]:
    """Every trainable parameter once."""
    modules = dict(model.named_modules())
    linears = [n for n, m in modules.items() if isinstance(m, nn.Linear)]
    numbered = any(inside_block(n) for n in linears)
    others, rule = adam(cfg), method.rule(cfg)
    rule = others if rule == others else rule
    units: list[Unit] = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        path, _, leaf = name.rpartition(".")
        module = modules[path]
        if isinstance(module, ProjectedLinear):
            raise ValueError(f"{name}: trained by another optimizer; call its detach() first")
        if isinstance(module, nn.Embedding):
            role, scale, decay = "embedding", 1.0, 0.0
        elif isinstance(module, nn.Linear) and leaf == "weight":
            matrix = inside_block(path) if numbered else not HEAD.search(path)
            role, scale, decay = ("matrix", cfg.scale, cfg.decay) if matrix else ("head", 1.0, cfg.decay)
        else:
            role, scale, decay = ("gain" if p.ndim < 2 else "other"), 1.0, 0.0
        store = cfg.moments
        if role in ("embedding", "head") and cfg.embed_moments:
            store = cfg.embed_moments
        units.append(
            Unit(name.replace("_orig_mod.", ""), module, leaf, role, rule if role == "matrix" else others,
                 scale, decay, "fp32" if p.ndim < 2 and store == "int8" else store)
        )  # fmt: skip
    if not units:
        raise ValueError("model: no parameter requires a gradient")
    return units


def inside_block(path: str) -> bool:
    return any(part.isdigit() for part in path.split("."))


def give_bases(model: nn.Module, units: list[Unit], cfg: ProjectedConfig) -> list[Basis]:
    """Bases of all matrices, in the model's order; each unit learns its own and its layers, now projected."""
    users: dict[int, list[nn.Linear]] = defaultdict(list)
    for module in model.modules():
        if type(module) is nn.Linear:
            users[id(module.weight)].append(module)
    matrices = [u for u in units if u.role == "matrix"]
    if not matrices:
        raise ValueError(f"model: {cfg.name} projects weights of nn.Linear in blocks, and there are none")
    rank = cfg.rank or default_rank(sum(u.param.numel() for u in matrices), matrices[0].param.shape[1])
    families: dict[tuple[str, ...], list[Unit]] = {}
    for u in matrices:
        side = side_of(u, cfg.side)
        width = min(u.param.shape) if side == "both" else u.param.shape[side == "input"]
        if not users[id(u.param)]:
            u.why = f"a subclass of nn.Linear, {type(u.owner).__name__}"
        elif rank >= width:
            u.why = f"width {width}"
        else:
            family = family_of(u) if cfg.share and side != "output" else u.name
            families.setdefault((side, family), []).append(u)
    bases: list[Basis] = []

    def basis(side: str, members: list[Unit], k: int) -> Basis:
        dim = 1 if side == "input" else 0
        n, across = members[0].param.shape[dim], sum(u.param.shape[1 - dim] for u in members)
        bases.append(
            Basis(f"{side} {members[0].name}", len(bases), side, n, min(rank, n, across), k, members)
        )
        return bases[-1]

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
        how = Magnitude(cfg.mag_scale, adam(cfg), cfg.rounding == "stochastic")
        for u in (u for u in units if u.projected):
            u.mag = how
    for u in units:
        if u.projected:
            u.layers = [project(layer) for layer in users[id(u.param)]]
    if not bases:
        raise ValueError(f"rank={rank}: no matrix is wider, nothing would be projected; choose a smaller one")
    return bases


def side_of(u: Unit, side: str) -> str:
    """paper projects the shorter side of a matrix, long the longer; square ones as published code does."""
    out, width = u.param.shape
    return {
        "paper": "input" if out >= width else "output",
        "long": "output" if out >= width else "input",
    }.get(side, side)


def family_of(u: Unit) -> str:
    """Equal for weights of one module that read the same input."""
    path = u.name.removesuffix(".weight")
    parent, _, name = path.rpartition(".")
    for n, pattern in enumerate(SHARED):
        if re.fullmatch(pattern, name):
            return f"{parent}.{n} {u.param.shape[1]}"
    return u.name
