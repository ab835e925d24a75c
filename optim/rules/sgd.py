"""Plain gradient descent: the direction is the gradient. No state. The case rho = 1 of GaLore's theorems."""

from __future__ import annotations

from torch import Tensor

from .rule import Rule


class Sgd(Rule):
    def direction(self, g: Tensor, m: dict[str, Tensor], t: Tensor) -> Tensor:
        return g
