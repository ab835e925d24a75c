"""Per-step scalars of all units, in one device tensor: what a kernel needs to know beside tensors.

A row a unit, kernels.Column: lr, decay factor, clip coefficient, finite flag, t, the rule's own corrections.
Rules and kernels read their row; nothing comes back to the host within a step. lr and decay are written once
a step, the flag and the clip coefficient when a unit's gradient has landed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import kernels
from .comm import local
from .rules import Rule
from .unit import Unit

Column = kernels.Column


class Scalars:
    def __init__(self, units: list[Unit], groups: list[int], before: Scalars | None = None) -> None:
        """groups: each unit's index in the optimizer's param_groups. before: of the weights' former device,
        dtype."""
        self.units = units
        device = local(units[0].param).device
        wide = torch.float64 if any(u.param.dtype == torch.float64 for u in units) else torch.float32
        self.dtype = wide
        self.group_of = torch.tensor(groups, device=device)
        self.rates = torch.zeros(max(groups) + 1, 2, dtype=wide, device=device)  # lr * scale, 1 - lr * decay
        self.table = torch.zeros(len(units), 8, dtype=wide, device=device)
        self.table[:, Column.INDEX] = torch.arange(len(units))
        self.t = torch.zeros(len(units), dtype=wide, device=device)  # updates done
        self.squares = torch.zeros(len(units), 2, dtype=wide, device=device)  # captured, estimate
        self.norm = torch.full((), -1.0, dtype=wide, device=device)  # of the last step; -1: none yet
        self.in_a_row = torch.zeros((), dtype=wide, device=device)  # steps with a skipped unit
        self.projected = torch.tensor([u.projected and not u.grouped for u in units], device=device)
        # The units of an adapter are skipped together, and count once. A factor rests while its gradient is
        # zero.
        one = [u.role != "magnitude" and u.leaf_name != "j" for u in units]
        self.counted = torch.tensor(one, device=device)
        self.rests = torch.tensor([u.role == "factor" for u in units], device=device)
        self._index: dict[tuple[int, ...], Tensor] = {}
        if before is not None and not before.t.is_meta:
            for name in ("t", "norm", "in_a_row"):
                getattr(self, name).copy_(getattr(before, name))

    def rows(self, units: list[Unit]) -> Tensor | slice:
        """Index of the units' rows; made once for each list, a slice where one will do."""
        first, n = units[0].index, len(units)
        if n == 1 or n == len(self.units) and first == 0:
            return slice(first, first + n)
        key = tuple(u.index for u in units)
        if key not in self._index:
            self._index[key] = kernels.constant(key, torch.int64, self.table.device)
        return self._index[key]

    def load(self, param_groups: list[dict[str, Any]]) -> None:
        """What the host decides of a step: lr and decay of each group. Not part of a captured step."""
        rows = [[g["lr"], g["scale"], g["decay"]] for g in param_groups]
        lr, scale, decay = torch.tensor(rows, dtype=self.dtype).T
        self.rates.copy_(torch.stack([lr * scale, 1 - lr * decay], 1), non_blocking=True)

    def open(self, clip: float) -> None:
        """Fills the table for a step. clip > 0: every unit by the last step's norm (none yet: not at all)."""
        self.table[:, Column.LR : Column.KEEP + 1] = self.rates[self.group_of]
        self.table[:, Column.CLIP] = (
            torch.where(self.norm >= 0, coefficient(clip, self.norm), 1.0) if clip else 1.0
        )
        self.table[:, Column.T] = self.t + 1
        by_rule: dict[Rule, list[Unit]] = {}
        for u in self.units:
            by_rule.setdefault(u.rule, []).append(u)
        for rule, units in by_rule.items():
            rows_of = self.rows(units)
            self.table[rows_of, Column.FIX1 :] = rule.scalars(self.table[rows_of, Column.T])

    def start_anew(self, u: Unit) -> None:
        """This update of u is its first."""
        self.t[u.index] = 0
        self.table[u.index, Column.T] = 1
        self.table[u.index, Column.FIX1 :] = u.rule.scalars(self.t.new_ones(1))[0]

    def measured(self, units: list[Unit], squares: Tensor) -> None:
        """squares (n, 2): captured and estimate of each unit's squared norm. Not finite: the unit is
        skipped."""
        rows = self.rows(units)
        self.squares[rows] = squares
        moves = torch.isfinite(squares[:, 1]) & ~(self.rests[rows] & (squares[:, 1] == 0))
        self.table[rows, Column.OK] = moves.to(self.dtype)

    def total(self, column: int) -> Tensor:
        """Norm over the finite units: of the captured parts (0) or of the estimates (1)."""
        return torch.where(self.table[:, Column.OK] > 0, self.squares[:, column], 0).sum().sqrt()

    def clip_all(self, clip: float, norm: Tensor) -> None:
        self.table[:, Column.CLIP] = coefficient(clip, norm)

    def clip_each(self, clip: float, units: list[Unit]) -> None:
        """Each unit by the norm of what its rule sees: R, or a dense gradient."""
        rows = self.rows(units)
        self.table[rows, Column.CLIP] = coefficient(clip, self.squares[rows, 0].sqrt())

    def close(self, column: int) -> dict[str, Tensor]:
        """Ends a step: t of the updated units, the norm to clip by next, statistics as tensors of their
        own."""
        ok = self.table[:, Column.OK] > 0
        self.t.copy_(self.table[:, Column.T] - 1 + ok)
        skipped = (~torch.isfinite(self.squares[:, 1]) & self.counted).sum()
        self.norm.copy_(self.total(column))
        self.in_a_row.copy_(torch.where(skipped > 0, self.in_a_row + 1, 0))
        captured, estimate = torch.where((ok & self.projected)[:, None], self.squares, 0).sum(0)
        return {
            "grad_norm": self.total(1),
            "skipped": skipped,
            "skipped_in_a_row": self.in_a_row.clone(),
            "energy": captured / estimate,
        }


def coefficient(clip: float, norm: Tensor) -> Tensor:
    return (clip / (norm + 1e-6)).clamp(max=1)
