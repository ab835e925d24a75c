"""Adam of a matrix whose gradient is A (x) v (VeLoRA: Miles et al. 2024, arXiv 2405.17991), in factored form.

A is (out, groups), v a unit vector that never changes, (A (x) v)[o, j m + q] = A[o, j] v[q]. All moments of
such gradients are of that form: first M (x) v, second V (x) v^2. With M and V of A alone, 1/m of the memory,

    direction[o, j m + q] = M^ v_q / (sqrt(V^) |v_q| + eps)

is that of Adam on the whole matrix, for every eps. It is no A' (x) v: that of Adam on A, times v, has a
cosine of 0.87 with it; (M^ / sqrt(V^)) (x) sign(v) is its limit for eps -> 0, 12% off at eps = 1e-2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from .adam import Adam


@dataclass(frozen=True)
class Velora(Adam):
    """Its step is not a direction yet: both parts of it, for kernels.grouped_."""

    label = "adam"

    def step_(self, g: Tensor, state: dict[str, Tensor], h: Tensor, dtype: torch.dtype) -> Tensor:
        """(2, out, groups) wide: -lr M^ and sqrt(V^)."""
        return kernels.adam_parts(g, state, h, self.beta1, self.beta2)
