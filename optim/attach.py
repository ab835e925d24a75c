"""Which parameter is trained by what: from module types and names, without knowing what a transformer is.

Every trainable parameter is owned once, in the model's order; the first line that fits:

    embedding   weight of an nn.Embedding (a tied head is the same tensor: owned here)   lr, no decay
    matrix      weight of an nn.Linear inside a numbered block (a number in its path);   lr * scale, decay
                in a model without such: of every nn.Linear that is not called a head
    head        weight of any other nn.Linear                                            lr, decay
    gain        anything with fewer than two dimensions: norms, biases                   lr, no decay
    other       the rest                                                                 lr, no decay
"""

from __future__ import annotations

import math
import re
import warnings
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .assign import defer, give_adapters, give_bases
from .comm import local, sharded
from .config import (
    AdapterConfig,
    BasisConfig,
    OptimConfig,
    ProjectedConfig,
    Velora,
    default_lr,
    default_refresh_every,
)
from .engine import Engine, basis_dtype
from .layer import ProjectedLinear
from .methods import METHODS, Method, adam
from .reduce import Reduce, sum_shards
from .unit import Basis, Unit
from .velora import give_groups, project_layers

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

HEAD = re.compile(r"(^|\.)(\w*head\w*|embed_out|output|classifier|score)$")


def attach(
    model: nn.Module,
    method: str,
    *,
    accum_steps: int = 1,
    group: dist.ProcessGroup | None = None,
    reduce: str | None = None,
    tokens: int | None = None,
    velora: Velora | None = None,
    **overrides: object,
) -> Engine:
    """A torch.optim.Optimizer for `model`.

    method      a key of METHODS: adamw, adamw_8bit, galore, galore_8bit, gradnormlorp, gradnormlorp_8bit, ...
    accum_steps backwards that make one step; gradients are summed, so divide the loss accordingly
    group       process group whose ranks hold replicas, or row shards (fully_shard before attach):
                gradients are reduced over it; None reduces nothing
    reduce      "sum" or "mean" over the group; must be given with one
    tokens      of this rank in one update, for lift=auto, which without it is lift=now
    velora      layers that keep their input compressed; forwards of the first step's micro-batches inside
                opt.observing() then come before training
    overrides   the optim.* keys (lr, scale, rank, ...); unknown keys and bad values raise ValueError

    A weight larger than its layer's out_features and in_features is padded: zero beyond them, and kept so.
    Projected weights lose requires_grad and their .grad until opt.detach(); state_dict(), parameters() and
    saved files stay those of the plain model; with lift=deferred parameters() are whole weights only after
    opt.fold(), state_dict() always. The bases' random numbers come from torch.initial_seed().
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
    cut = [(name, p) for name, p in model.named_parameters() if sharded(p) and p.requires_grad]
    if cut:
        problems += sharding(*cut[0], cfg, group)
    if velora:
        problems += velora.clashes(cfg)
    if problems:
        raise ValueError("\n".join(problems))
    if group is None and dist.is_initialized() and dist.get_world_size() > 1:
        warnings.warn("group: none given among several ranks, so nothing is reduced", stacklevel=2)
    if cut:
        sum_shards(model, mean=reduce == "mean")
    units = own(model, cfg, METHODS[method])
    numbers, first = sum(math.prod(u.size) for u in units), local(units[0].param)
    comm = Reduce(group, reduce == "mean")
    seed = torch.tensor([torch.initial_seed() % 2**63], device=first.device if group else "cpu")
    comm.from_owner_(seed, 0)
    every = getattr(cfg, "refresh_every", None) or default_refresh_every(numbers)
    groups = give_groups(units, cfg, velora) if velora else []
    bases: list[Basis] = []
    if isinstance(cfg, ProjectedConfig):
        bases = give_bases(model, units, cfg)
        defer(bases, cfg, None if cut else tokens)
    elif isinstance(cfg, AdapterConfig):
        units, bases = give_adapters(model, units, cfg, every, comm, int(seed))
    bases += groups
    project_layers(model, units)
    for b in bases:
        w = local(b.units[0].param)
        b.begin(int(seed), w.device, basis_dtype(cfg, w))
        comm.from_owner_(b.qs, b.index)
    for u in units:
        u.noise = cfg.rounding == "stochastic"
        u.begin()
    return Engine(
        model,
        units,
        bases,
        cfg,
        lr=cfg.lr if cfg.lr is not None else default_lr(numbers, isinstance(cfg, BasisConfig)),
        every=every,
        accum_steps=accum_steps,
        reduce=comm,
        seed=int(seed),
    )


def sharding(name: str, p: DTensor, cfg: OptimConfig, group: dist.ProcessGroup | None) -> list[str]:
    """What stands against training a model whose weights are cut like this one."""
    from torch.distributed.tensor import Shard

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
    if getattr(cfg, "lift", "now") == "deferred":
        problems.append(
            f"lift=deferred: every forward needs all rows of what it keeps, and those of {name} are sharded; "
            "choose lift=now"
        )
    return problems


def config(method: str, overrides: dict[str, object]) -> OptimConfig:
    if method not in METHODS:
        raise ValueError(f"method={method!r}: no such method; choose {', '.join(METHODS)}")
    kind = METHODS[method].config
    unknown = sorted(set(overrides) - (set(kind.__dataclass_fields__) - {"name", "lr_range"}))
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
        size = without_padding(name, module, p) if leaf == "weight" else tuple(p.shape)
        store = cfg.moments
        if role in ("embedding", "head") and cfg.embed_moments:
            store = cfg.embed_moments
        units.append(
            Unit(name.replace("_orig_mod.", ""), module, leaf, size, role,
                 rule if role == "matrix" else others, scale, decay,
                 "fp32" if p.ndim < 2 and store == "int8" else store, limit=getattr(cfg, "growth_limit", 0.0))
        )  # fmt: skip
    if not units:
        raise ValueError("model: no parameter requires a gradient")
    return units


def without_padding(name: str, module: nn.Module, p: nn.Parameter) -> tuple[int, ...]:
    """The size that a linear layer says its weight has: what is stored beyond it has to be zero."""
    if not isinstance(module, nn.Linear) or p.ndim != 2:
        return tuple(p.shape)
    size = (module.out_features, module.in_features)
    if p.shape == size or p.shape[0] < size[0] or p.shape[1] < size[1]:
        return tuple(p.shape)
    if sharded(p):
        raise ValueError(f"{name}: sharded and padded; build the model without padding (model.pad=false)")
    if not p.is_meta and (p[size[0] :].any() or p[:, size[1] :].any()):
        raise ValueError(
            f"{name}: stored as {tuple(p.shape)} in a layer of {size}, and not zero beyond that; "
            "set its out_features and in_features, or clear the padding"
        )
    return size


def inside_block(path: str) -> bool:
    return any(part.isdigit() for part in path.split("."))
