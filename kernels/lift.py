"""Lift and apply: the weight takes a low-rank update.

W is read and written once. Where it decays, is rounded stochastically or has row factors, a b goes through
memory besides. A kernel that does all in one gains nothing: on an H200 4096 x 4096 of rank 1024 take 0.085 ms
in it, 0.081 by a product and rows_, 11008 x 4096 0.206 and 0.205 (the best of sixteen tilings,
by pointers and by TMA); to nearest addmm takes 0.064 and 0.161.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import rows_


def lift_(
    w: Tensor,  # (out, in) any float dtype, in place
    a: Tensor,  # (out, r): the direction times -lr (input side), or P
    b: Tensor,  # (r, in): Q^T, or the direction times -lr (output side)
    keep: Tensor | None = None,  # 0-dim or (out,) wide: 1 - lr * decay; None without decay
    factor: Tensor | None = None,  # (out,) wide, of a b; None: 1
    h: Tensor | None = None,  # as reference.write_ takes it: stochastic rounding of a bf16 w
) -> None:
    """W <- keep W + factor (a b), summed wide, rounded to W's dtype once.

    A bf16 weight times keep = 1 - 1e-4 alone would round back to itself: decay has to meet the update first.
    rows_ is given a b in W's dtype: a rounding of 2^-9 of the update, some 2^-9 of W, saves a third of the
    bytes.
    """
    a, b = a.to(w.dtype), b.to(w.dtype)
    if keep is None and factor is None and (h is None or w.dtype != torch.bfloat16):
        w.addmm_(a, b)
    else:
        rows_(w, a @ b, keep, factor, h)
