"""The optimizer: one object between loss.backward() and new weights, whatever the method.

One step of dense training, K micro-batches:

    K x backward      autograd sums G into p.grad; a hook per parameter counts
    step()            reduce G over ranks, in one fixed order -> norms -> clip coefficient, finite flags
                      -> for each matrix: rule(G) -> W <- (1 - lr decay) W - lr scale direction

Every per-step scalar (lr, decay factor, clip coefficient, finite flag, t) is a column of one small device
tensor with a row a parameter: nothing is read back by the host in a step. A matrix whose gradient holds a NaN
or an infinity is skipped whole: its weight, state and t stay as they were, and the skip is counted. After the
reduction all ranks hold the same gradient, so they skip alike without a message.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import kernels, moments
from .rules.adam import Adam

Column = kernels.Column


@dataclass
class Owned:
    """One parameter and how it is trained."""

    name: str
    param: nn.Parameter
    role: str  # matrix | embedding | head | gain | other
    scale: float  # its lr is group lr * scale
    decay: float  # decoupled


class Engine(torch.optim.Optimizer):
    """Made by `attach`. A torch optimizer: param_groups, step, zero_grad, state_dict, LR schedulers.

    state_dict() is keyed by parameter name and holds tensors and numbers only. `accum_steps` backwards make
    one step; it may be set between steps. `stats` holds this step's device scalars: grad_norm (before
    clipping, over the finite matrices), skipped (matrices skipped by this step), skipped_in_a_row (steps).
    """

    def __init__(
        self,
        owned: list[Owned],
        rule: Adam,
        *,
        lr: float,
        clip: float,
        store: str,
        accum_steps: int,
        group: dist.ProcessGroup | None,
        reduce: str | None,
    ) -> None:
        groups: dict[tuple[str, float, float], dict[str, Any]] = {}
        for o in owned:
            g = groups.setdefault(
                (o.role, o.scale, o.decay), {"params": [], "role": o.role, "scale": o.scale, "decay": o.decay}
            )
            g["params"].append(o.param)
        super().__init__(list(groups.values()), {"lr": lr})
        self.owned, self.rule, self.clip = owned, rule, clip
        self.accum_steps, self.group, self.reduce = accum_steps, group, reduce
        group_of = {id(p): n for n, g in enumerate(self.param_groups) for p in g["params"]}
        first = owned[0].param
        wide = torch.float64 if any(o.param.dtype == torch.float64 for o in owned) else torch.float32
        self._group_of = torch.tensor([group_of[id(o.param)] for o in owned], device=first.device)
        self._table = torch.zeros(len(owned), 8, dtype=wide, device=first.device)
        self._table[:, Column.INDEX] = torch.arange(len(owned))
        self._t = torch.zeros(len(owned), dtype=wide, device=first.device)
        self._in_a_row = torch.zeros((), device=first.device)
        for o in owned:
            p = o.param
            self.state[p] = moments.init(store, p.shape, p.device, moments.wide(p.dtype), rule.state)
        self.stats: dict[str, Tensor] = {}
        self._plan = kernels.plan([o.param for o in owned], [self.state[o.param] for o in owned])
        self._fired = [0] * len(owned)
        self._hooks = [
            o.param.register_post_accumulate_grad_hook(lambda p, n=n: self._count(n))
            for n, o in enumerate(owned)
        ]

    def _count(self, n: int) -> None:
        self._fired[n] += 1

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update from the gradients of `accum_steps` backwards; RuntimeError after more or fewer."""
        if closure is not None:
            raise ValueError("closure: not supported; call backward accum_steps times, then step()")
        self._close()
        grads = self._reduced()
        self._scalars(grads)
        params: list[Tensor] = [o.param for o in self.owned]
        self.rule.update_(params, grads, [self.state[p] for p in params], self._table, self._plan)

    def _close(self) -> None:
        """Checks that every parameter got a gradient from each of the step's backwards."""
        fired, self._fired = self._fired, [0] * len(self.owned)
        if max(fired) != self.accum_steps:
            raise RuntimeError(f"step() after {max(fired)} backward(s): accum_steps={self.accum_steps}")
        missing = [o.name for o, n in zip(self.owned, fired, strict=True) if n != self.accum_steps]
        if missing:
            raise RuntimeError(
                f"no gradient in every backward for {', '.join(missing[:5])}"
                + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
                + ": a parameter that the loss does not use must be frozen "
                "(requires_grad_(False)) before attach"
            )

    def _reduced(self) -> list[Tensor]:
        """Gradients summed (reduce="mean": averaged) over ranks, in the order of `owned` on every rank."""
        grads = [o.param.grad for o in self.owned if o.param.grad is not None]
        assert len(grads) == len(self.owned)
        if self.group is not None:
            work = [dist.all_reduce(g, group=self.group, async_op=True) for g in grads]
            for w in work:
                w.wait()
            if self.reduce == "mean":
                torch._foreach_div_(grads, dist.get_world_size(self.group))
        return grads

    def _scalars(self, grads: list[Tensor]) -> None:
        """Fills the table for this step, all on the device."""
        table, wide = self._table, self._table.dtype
        norms = torch.stack(torch._foreach_norm(grads, 2, dtype=wide))
        ok = torch.isfinite(norms)
        total = torch.where(ok, norms, 0).square().sum().sqrt()
        lr, scale, decay = torch.tensor(
            [[g["lr"], g["scale"], g["decay"]] for g in self.param_groups], dtype=wide
        ).T
        host = torch.stack([lr * scale, 1 - lr * decay], 1)
        table[:, Column.LR : Column.KEEP + 1] = host.to(table.device, non_blocking=True)[self._group_of]
        table[:, Column.CLIP] = (self.clip / (total + 1e-6)).clamp(max=1) if self.clip else 1
        table[:, Column.OK] = ok
        table[:, Column.T] = self._t + 1
        table[:, Column.FIX1 :] = self.rule.scalars(table[:, Column.T])
        self._t += ok
        skipped = (~ok).sum()
        self._in_a_row = torch.where(skipped > 0, self._in_a_row + 1, 0)
        self.stats = {"grad_norm": total, "skipped": skipped, "skipped_in_a_row": self._in_a_row}

    def state_dict(self) -> dict[str, Any]:
        """{"state": {name: {"t", "m", "v"}}, "param_groups": [...]}: tensors and numbers only."""
        state = {o.name: {"t": self._t[n].clone(), **self.state[o.param]} for n, o in enumerate(self.owned)}
        names = {id(o.param): o.name for o in self.owned}
        groups = [{**g, "params": [names[id(p)] for p in g["params"]]} for g in self.param_groups]
        return {"state": state, "param_groups": groups}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copies into place; ValueError names a parameter of missing, unknown or differently shaped state."""
        state, mine = state_dict["state"], {o.name: o for o in self.owned}
        for name in [*(mine.keys() - state.keys()), *(state.keys() - mine.keys())]:
            raise ValueError(f"optimizer state of {name}: in only one of the save and this model")
        for n, o in enumerate(self.owned):
            saved, kept = state[o.name], self.state[o.param]
            if saved.keys() - {"t"} != kept.keys():
                raise ValueError(
                    f"optimizer state of {o.name}: saved {sorted(saved)}, this method keeps {sorted(kept)}"
                )
            for k, tensor in kept.items():
                if saved[k].shape != tensor.shape:
                    raise ValueError(
                        f"optimizer state {k} of {o.name}: "
                        f"saved {tuple(saved[k].shape)}, here {tuple(tensor.shape)}"
                    )
                tensor.copy_(saved[k])
            self._t[n] = saved["t"]
        for mine_g, saved_g in zip(self.param_groups, state_dict.get("param_groups", []), strict=False):
            mine_g["lr"] = saved_g["lr"]

    def detach(self) -> None:
        """Takes the hooks off; the model is as it was before attach, with the trained weights."""
        for hook in self._hooks:
            hook.remove()

    def table(self) -> str:
        """What is trained how: one line a group of parameters, for the start of a run."""
        rows = [
            f"{'parameters':<12}{'tensors':>8}{'numbers':>15}  {'rule':<6}{'state':>11}{'lr':>10}{'decay':>8}"
        ]
        for g in self.param_groups:
            numbers = sum(p.numel() for p in g["params"])
            state = sum(s.numel() * s.element_size() for p in g["params"] for s in self.state[p].values())
            rows.append(
                f"{g['role']:<12}{len(g['params']):>8}{numbers:>15,}  {type(self.rule).__name__.lower():<6}"
                f"{state / 2**20:>7.1f} MiB{g['lr'] * g['scale']:>10.2e}{g['decay']:>8g}"
            )
        return "\n".join(rows)
