"""Which parameter is trained by what: from module types and names, without knowing what a transformer is."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from .config import OptimConfig, default_lr
from .engine import Engine, Owned
from .rules.adam import Adam


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

    method      "adamw"
    accum_steps backwards that make one step; gradients are summed over them, so divide the loss accordingly
    group       process group whose ranks hold replicas: gradients are reduced over it; None reduces nothing
    reduce      "sum" or "mean" over the group; must be given with one
    overrides   keys of OptimConfig (lr, scale, decay, ...); unknown keys and bad values raise ValueError
    """
    try:
        cfg = OptimConfig(name=method, **overrides)  # type: ignore[arg-type]
    except TypeError:
        unknown = sorted(set(overrides) - set(OptimConfig.__dataclass_fields__))
        raise ValueError(
            f"{', '.join(unknown)}: unknown; attach takes {', '.join(OptimConfig.__dataclass_fields__)}"
        ) from None
    problems = cfg.problems()
    if method != "adamw":
        problems.append(f"method={method}: not built yet; use adamw")
    if accum_steps < 1:
        problems.append(f"accum_steps={accum_steps}: must be at least 1")
    if (group is None) != (reduce is None) or reduce not in (None, "sum", "mean"):
        problems.append(f'reduce={reduce!r}: give reduce="sum" or "mean" with a process group, and only then')
    if problems:
        raise ValueError("\n".join(problems))
    owned = own(model, cfg)
    lr = cfg.lr if cfg.lr is not None else default_lr(sum(o.param.numel() for o in owned))
    return Engine(
        owned,
        Adam(cfg.beta1, cfg.beta2, cfg.eps),
        lr=lr,
        clip=cfg.clip,
        store=cfg.moments,
        accum_steps=accum_steps,
        group=group,
        reduce=reduce,
    )


def own(model: nn.Module, cfg: OptimConfig) -> list[Owned]:
    """Every trainable parameter once, in the model's order. First match wins:

    embedding   weight of an nn.Embedding (a tied head is the same tensor: owned here)   lr, no decay
    matrix      weight of an nn.Linear inside a numbered block (a number in its path)    lr * scale, decay
    head        weight of any other nn.Linear                                            lr, decay
    gain        anything with fewer than two dimensions: norms, biases                   lr, no decay
    other       the rest                                                                 lr, no decay
    """
    owned: dict[int, Owned] = {}
    modules = dict(model.named_modules())
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        path, _, leaf = name.rpartition(".")
        module = modules[path]
        if isinstance(module, nn.Embedding):
            role, scale, decay = "embedding", 1.0, 0.0
        elif isinstance(module, nn.Linear) and leaf == "weight":
            inside = any(part.isdigit() for part in path.split("."))
            role, scale, decay = ("matrix", cfg.scale, cfg.decay) if inside else ("head", 1.0, cfg.decay)
        else:
            role, scale, decay = ("gain" if p.ndim < 2 else "other"), 1.0, 0.0
        owned[id(p)] = Owned(name, p, role, scale, decay)
    if not owned:
        raise ValueError("model: no parameter requires a gradient")
    return list(owned.values())
