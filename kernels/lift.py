"""Lift and apply: the weight takes a low-rank update. One product, W read and written once."""

from __future__ import annotations

import torch
from torch import Tensor


def lift_(
    w: Tensor,  # (out, in) any float dtype, in place
    a: Tensor,  # (out, r): the direction times -lr (input side), or P
    b: Tensor,  # (r, in): Q^T, or the direction times -lr (output side)
    keep: Tensor | None = None,  # 0-dim: 1 - lr * decay; None without decay
) -> None:
    """W <- keep W + a b, summed wide, rounded to W's dtype once.

    A bf16 weight times keep = 1 - 1e-4 alone would round back to itself: decay has to meet the update first.
    """
    a, b = a.to(w.dtype), b.to(w.dtype)
    if keep is None:
        w.addmm_(a, b)
    else:
        wide = torch.promote_types(w.dtype, torch.float32)
        w.copy_(torch.addcmul(torch.mm(a, b).to(wide), w.to(wide), keep.to(wide)))
