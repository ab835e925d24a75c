"""The norm-growth limiter (Chen et al., "Fira", section 4.2; Zhu et al., "APOLLO", Algorithm 1) as an option.

With D the direction of an update in coordinates and p the norm of the last one as it was applied:

    ||D|| > limit p   ->   D limit p / ||D||        the first update has no p and is not limited

It is a ratio, so lr and its schedule do not enter. Bases are orthonormal: ||D|| is the norm of the update.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernels
from .reduce import Reduce
from .unit import Unit


def limit_(u: Unit, n: Tensor, h: Tensor, reduce: Reduce) -> Tensor:
    """N = -lr D, scaled in place; u.state["grown"] becomes the new p."""
    grown = u.state["grown"]
    square = torch.linalg.vector_norm(n, dtype=grown.dtype).square()
    lr = h[kernels.Column.LR]
    size = reduce.sum_rows([u], square.view(1, 1))[0, 0].sqrt() / lr
    most = u.limit * grown
    factor = torch.where((grown > 0) & (size > most), most / size, 1.0)
    moved = (lr > 0) & (size > 0)  # a skipped update is zero
    grown.copy_(torch.where(moved, size * factor, grown))
    return n.mul_(torch.where(moved, factor, 1.0))
