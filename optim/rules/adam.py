"""Adam (Kingma and Ba, Algorithm 1) with bias correction, decay decoupled. See kernels.reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from .rule import Rule


@dataclass(frozen=True)
class Adam(Rule):
    """Written as kernels, one pass over the moments in whatever store, instead of as `direction`."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    moments = ("m", "v")

    def scalars(self, t: Tensor) -> Tensor:
        """(n, 2): the bias corrections 1 - beta^t of each parameter; t (n,) counts its updates and this one.

        By expm1 in float64: 1 - 0.999 ** 1 in fp32 would lose four of its seven digits.
        """
        fixes = [
            -torch.expm1(t.double() * math.log(b)) if b else torch.ones_like(t)
            for b in (self.beta1, self.beta2)
        ]
        return torch.stack(fixes, 1).to(t.dtype)

    def step_(self, g: Tensor, state: dict[str, Tensor], h: Tensor, dtype: torch.dtype) -> Tensor:
        return kernels.adam_direction(g, state, h, self.beta1, self.beta2, self.eps, dtype)

    def update_(
        self,
        ws: list[Tensor],
        gs: list[Tensor],
        states: list[dict[str, Tensor]],
        table: Tensor,
        plan: Any,
        noise: bool,
    ) -> None:
        kernels.adam_(ws, gs, states, table, plan, self.beta1, self.beta2, self.eps, noise)
