"""The end of a lift with row factors: W read and written once, rounded once. reference.rows_."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adam import TILE, WARPS, _noise, tile
from .reference import APART

LANES = 256


@triton.jit
def rows_kernel(
    w_ptr,  # (rows, cols), in place
    p_ptr,  # (rows, cols) fp32
    keep_ptr,  # (rows,) fp32
    factor_ptr,  # (rows,) fp32
    row,  # (8,) fp32: reference.Column; read where STOCHASTIC
    rows,
    cols,
    STOCHASTIC: tl.constexpr,
    APART: tl.constexpr,
    EVEN: tl.constexpr,  # WIDTH divides cols
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    line, _, inside, mask, at, _ = tile(rows, cols, EVEN, BLOCKS, WIDTH)
    keep = tl.load(keep_ptr + line, mask=inside, other=0.0)[:, None]
    factor = tl.load(factor_ptr + line, mask=inside, other=0.0)[:, None]
    w = tl.load(w_ptr + at, mask=mask, other=0).to(tl.float32)
    x = w * keep + tl.load(p_ptr + at, mask=mask, other=0.0) * factor
    if STOCHASTIC:
        noise = _noise(at, tl.load(row + 4), tl.load(row + 5) + APART)
        x = ((x.to(tl.int32, bitcast=True) + noise) & -65536).to(tl.float32, bitcast=True)
    tl.store(w_ptr + at, x.to(w_ptr.dtype.element_ty), mask=mask)


def launch(w: Tensor, product: Tensor, keep: Tensor, factor: Tensor, h: Tensor | None) -> None:
    (rows, cols), blocks = w.shape, TILE // LANES
    if w.numel():
        rows_kernel[(triton.cdiv(rows, blocks) * triton.cdiv(cols, LANES),)](
            w, product, keep, factor, keep if h is None else h, rows, cols,
            STOCHASTIC=h is not None and w.dtype == torch.bfloat16, APART=APART, EVEN=cols % LANES == 0,
            BLOCKS=blocks, WIDTH=LANES, num_warps=WARPS,
        )  # fmt: skip
