"""What every rule shares: moments loaded wide, stored again, and nothing changed where a gradient is not
finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import kernels, moments


class Rule:
    """Subclasses give `moments` and `direction`; `update_` and `step_` are the same for all of them.

    moments   names of tensors of the gradient's shape; "v" is non-negative, all others are signed
    """

    moments: tuple[str, ...] = ()

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

    def update_(
        self,
        ws: list[Tensor],  # weights, in place
        gs: list[Tensor],
        states: list[dict[str, Tensor]],
        table: Tensor,  # (n, 8) kernels.Column
        plan: Any,  # kernels.plan(ws, states)
    ) -> None:
        """Dense parameters: W <- keep W - lr * direction."""
        for w, g, state, h in zip(ws, gs, states, table, strict=True):
            new = w.to(h.dtype) * h[kernels.Column.KEEP] + self.step_(g, state, h, h.dtype)
            w.copy_(torch.where(h[kernels.Column.OK] > 0, new, w.to(h.dtype)))
