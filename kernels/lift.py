"""Lift and apply: the weight takes a low-rank update. One product, W read and written once."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import rows_


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


def lift_rows_(
    w: Tensor,  # (out, in) any float dtype, in place
    a: Tensor,  # (out, r)
    b: Tensor,  # (r, in)
    keep: Tensor,  # (out,) wide
    factor: Tensor,  # (out,) wide, of a b
    h: Tensor | None,  # (8,) Column: a bf16 w is rounded stochastically by its t and index; None: to nearest
) -> None:
    """W <- keep W + factor (a b), row by row, a b in W's dtype, the sum wide and rounded once.

    A factor on the row nearer to 1 than 2^-9 would be lost in bf16 if rounded to nearest. In the product a
    rounding is 2^-9 of the update, which is some 2^-9 of W: what it saves is a third of the bytes.
    """
    rows_(w, a.to(w.dtype) @ b.to(w.dtype), keep, factor, h)
