"""Adam: exponential moments with bias correction (Kingma and Ba, Algorithm 1).

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    direction = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

eps is added to the corrected root, as in the paper and in torch.optim.Adam; the GaLore family adds it to the raw root,
which inflates it by 1 / sqrt(1 - b2^t), 31.6 times at the first step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Adam:
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    # state tensors, each of the gradient's shape; True: never negative
    moments = {"m": False, "v": True}

    def direction(
        self,
        state: dict[str, Tensor],  # m, v: the gradient's shape, fp32 (float64 weights: float64)
        g: Tensor,  # likewise
        t: Tensor,  # 0-dim, updates of this matrix including this one
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(direction, new state), all of g's shape and dtype; nothing is changed in place."""
        m = self.beta1 * state["m"] + (1 - self.beta1) * g
        v = self.beta2 * state["v"] + (1 - self.beta2) * g * g
        # 1 - b^t by expm1: 1 - 0.999 ** 1 in fp32 would lose four of its seven digits
        fix1 = -torch.expm1(t * math.log(self.beta1)) if self.beta1 else torch.ones_like(t)
        fix2 = -torch.expm1(t * math.log(self.beta2)) if self.beta2 else torch.ones_like(t)
        return (m / fix1) / (torch.sqrt(v / fix2) + self.eps), {"m": m, "v": v}
