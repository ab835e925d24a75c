"""Adam (Kingma and Ba, Algorithm 1) with bias correction, decay decoupled. See kernels.reference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels


@dataclass(frozen=True)
class Adam:
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    state = ("m", "v")  # tensors of the gradient's shape

    def scalars(self, t: Tensor) -> Tensor:
        """(n, 2): the bias corrections 1 - beta^t of each parameter; t (n,) counts its updates and this one.

        By expm1 in float64: 1 - 0.999 ** 1 in fp32 would lose four of its seven digits.
        """
        fixes = [
            -torch.expm1(t.double() * math.log(b)) if b else torch.ones_like(t)
            for b in (self.beta1, self.beta2)
        ]
        return torch.stack(fixes, 1).to(t.dtype)

    def update_(
        self,
        ws: list[Tensor],
        gs: list[Tensor],
        states: list[dict[str, Tensor]],
        table: Tensor,  # (n, 8): kernels.Column
        plan: dict[tuple[int, ...], Tensor] | None,  # kernels.plan(ws, states)
    ) -> None:
        """Weights and states in place."""
        kernels.adam_(ws, gs, states, table, plan, self.beta1, self.beta2, self.eps)
