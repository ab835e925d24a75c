"""What the engine sends between ranks. Alone (group None) every call returns at once.

Every rank holds all rows of R, of its own data; with the same basis everywhere the sum of the Rs is the R of
the whole batch. Replicas sum R whole. A weight sharded by rows (FSDP2, a DTensor) reduce-scatters R by rows,
and moments, rule and weight update stay on the rows. Gradients of sharded dense parameters come reduced
already.

Collectives are matched by their order alone, so callers launch them in one fixed order on all ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .comm import local, sharded
from .unit import Unit


class Flight:
    """Gradients of one unit on their way; `land` waits and returns them."""

    def __init__(self, out: list[Tensor], works: list[Any], kept: list[Tensor], divide: int) -> None:
        self.out, self.works, self.kept, self.divide = out, works, kept, divide

    def land(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        if self.divide > 1:
            torch._foreach_div_(self.out, self.divide)
        return self.out


class Reduce:
    def __init__(self, group: dist.ProcessGroup | None, mean: bool) -> None:
        self.group = group
        self.world = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.divide = self.world if mean else 1

    def start(self, u: Unit, grads: list[Tensor]) -> Flight:
        if u.sharded:
            if not u.projected:
                return Flight([local(g) for g in grads], [], [], 1)
            return self._rows(u, grads)
        if self.group is None:
            return Flight(grads, [], [], 1)
        works = [dist.all_reduce(g, group=self.group, async_op=True) for g in grads]
        return Flight(grads, works, [], self.divide)

    def _rows(self, u: Unit, grads: list[Tensor]) -> Flight:
        """This rank's rows; the last ranks may hold fewer than `rows` or none."""
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        rows, out, works, kept = local(u.param).shape[0], [], [], []
        for g in grads:
            each = -(-len(g) // self.world)
            padded = F.pad(g, (0, 0, 0, each * self.world - len(g))).contiguous()
            mine = g.new_empty(each, g.shape[1])
            works.append(scatter(mine, padded, group=self.group, async_op=True))
            out.append(mine[:rows])
            kept.append(padded)
        return Flight(out, works, kept, self.divide)

    def rows(self, w: Tensor) -> int:
        """Most rows that a rank holds of a row-sharded weight, as FSDP2 cuts."""
        return -(-w.shape[0] // self.world)

    def gather_rows(self, w: Tensor, g: Tensor) -> Tensor:
        """Of a row-sharded w: this rank's rows g to all rows, on every rank."""
        if not sharded(w):
            return g
        out, each = w.shape[0], self.rows(w)
        mine = F.pad(g, (0, 0, 0, each - len(g))).contiguous()
        whole = g.new_empty(each * self.world, g.shape[1])
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(whole, mine, group=self.group)
        return whole[:out]

    def sum_rows(self, units: list[Unit], t: Tensor) -> Tensor:
        """t (n, ...), a row a unit: summed over ranks where the unit's weight is sharded by rows."""
        cut = [u.sharded for u in units]
        if not any(cut):
            return t
        mask = torch.tensor(cut, device=t.device).view(-1, *[1] * (t.ndim - 1))
        total = torch.where(mask, t, 0)
        dist.all_reduce(total, group=self.group)
        return torch.where(mask, total, t)

    def sum_parts(self, w: Tensor, t: Tensor) -> Tensor:
        """Of a row-sharded w: the sum over ranks of what each has of its rows."""
        if sharded(w):
            dist.all_reduce(t, group=self.group)
        return t

    def sum_(self, t: Tensor) -> None:
        """Over ranks, in place."""
        if self.group is not None:
            dist.all_reduce(t, group=self.group)

    def from_owner_(self, t: Tensor, owner: int) -> None:
        """Overwrites t by that of one rank, bit by bit."""
        if self.group is not None:
            source = dist.get_global_rank(self.group, owner % self.world)
            dist.broadcast(t, src=source, group=self.group)


def sum_shards(model: torch.nn.Module, mean: bool) -> None:
    """FSDP2 averages gradients unless told otherwise."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule) and not mean:
            module.set_gradient_divide_factor(1.0)
