"""What every rule shares: moments loaded wide, stored again, and nothing changed where a gradient is not
finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import kernels, moments

Total = Callable[[Tensor], Tensor]  # a sum over this rank's rows of a gradient -> over all its rows


def alone(t: Tensor) -> Tensor:
    """Total where one rank holds all rows."""
    return t


class Rule:
    """Subclasses give `moments` and `direction`; `update_` and `step_` are the same for all of them.

    moments   names of tensors of the gradient's shape; "v" is non-negative, all others are signed
    history   past gradients kept in the same store: "history", (history, *shape), signed
    label     in the start table, up to four letters; by default the class's name
    """

    moments: tuple[str, ...] = ()
    history: int = 0
    label: str = ""

    @property
    def stored(self) -> tuple[str, ...]:
        """Names of what is kept in coordinates, in the store that was asked for."""
        return (*self.moments, "history") if self.history else self.moments

    @property
    def dense(self) -> Rule:
        """The rule of a matrix that is too narrow for a basis."""
        return self

    def begin(
        self,
        store: str,  # fp32 | bf16 | int8
        shape: Sequence[int],
        device: torch.device,
        wide: torch.dtype,
    ) -> dict[str, Tensor]:
        """State of an untrained weight; on the meta device shapes only."""
        return moments.init(store, shape, device, wide, self.moments)

    def moved_(self, state: dict[str, Tensor], rotated: bool, total: Total = alone) -> None:
        """After a new basis, when `stored` was `rotated` into it or not, or after another store: what
        depends on coordinates and is none."""

    def direction(
        self,
        g: Tensor,  # fp32 (float64 weights: float64), clipped: (out, r) coordinates or a whole gradient
        m: dict[str, Tensor],  # the moments, like g; replace the entries by the new moments
        t: Tensor,  # 0-dim: updates of this matrix, this one included
    ) -> Tensor:
        """The step is W <- W - lr * scale * direction (for coordinates: of its lift)."""
        raise NotImplementedError

    def scalars(self, t: Tensor) -> Tensor:
        """(n, 2) of each parameter's own columns kernels.Column.FIX1 and FIX2; t (n,)."""
        return torch.zeros(len(t), 2, dtype=t.dtype, device=t.device)

    def step_(
        self,
        g: Tensor,  # coordinates or gradient, any float dtype
        state: dict[str, Tensor],  # moments.init, in place
        h: Tensor,  # (8,) kernels.Column
        dtype: torch.dtype,
    ) -> Tensor:
        """-lr * direction in `dtype`; zero where the gradient is not finite, and the moments stay too."""
        column = kernels.Column
        ok = h[column.OK] > 0
        m = {k: moments.load(state, k, h.dtype) for k in self.moments}
        u = self.direction(g.to(h.dtype) * h[column.CLIP], m, h[column.T])
        for k, value in m.items():
            moments.save_(state, k, value, ok, h[column.T], h[column.INDEX])
        return torch.where(ok, -h[column.LR] * u, 0.0).to(dtype)

    def steps_(
        self,
        gs: list[Tensor],
        states: list[dict[str, Tensor]],
        hs: list[Tensor],
        dtype: torch.dtype,
        totals: list[Total],  # of each
    ) -> Iterator[Tensor]:
        """step_ of each, when it is asked for."""
        return (self.step_(g, state, h, dtype) for g, state, h in zip(gs, states, hs, strict=True))

    def update_(
        self,
        ws: list[Tensor],  # weights, in place
        gs: list[Tensor],
        states: list[dict[str, Tensor]],
        table: Tensor,  # (n, 8) kernels.Column
        plan: Any,  # kernels.plan(ws, states)
        noise: bool,  # bf16 weights are rounded stochastically: kernels.write_
    ) -> None:
        """Dense parameters: W <- keep W - lr * direction."""
        for w, g, state, h in zip(ws, gs, states, table, strict=True):
            new = w.to(h.dtype) * h[kernels.Column.KEEP] + self.step_(g, state, h, h.dtype)
            new = torch.where(h[kernels.Column.OK] > 0, new, w.to(h.dtype))
            kernels.write_(w, new, h if noise else None)
