"""Adam (Kingma and Ba, Algorithm 1) with bias correction, decay decoupled. See kernels.reference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from .rule import Rule


@dataclass(frozen=True)
class Adam(Rule):
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

    def direction(self, g, m, t):
        m["m"] = self.beta1 * m["m"] + (1 - self.beta1) * g
        m["v"] = self.beta2 * m["v"] + (1 - self.beta2) * g * g
        f = self.scalars(t[None])[0]
        return (m["m"] / f[0]) / (torch.sqrt(m["v"] / f[1]) + self.eps)
