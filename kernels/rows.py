"""Weights as magnitude times direction, by rows: reference.tangent_, magnitude_, rows_.

In torch an update of one matrix takes some fifty launches around its three products; here it is three, and
two where the lift waits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adam import TILE, WARPS, _step, bits, stochastic, tile

LANES = 256
TANGENT = 4  # rows a program of tangent_kernel; with 8, 11008 x 1040 take 28.3 us instead of 25.6 (deferred)
# Of magnitude_kernel: rows, columns at a time, warps where it reads two matrices, and more. On an H200, us
# (torch.compile): 11008 x 1024 18 (26), output side 34 (39), deferred 32 (81); 4096 x 1024 11 (11), 16 (18),
# 16 (28); 5504 x 512 9.3 (9.6), 14.0 (12.5), 13.5 (22); 2048 x 512 7.8 (7.1), 8.8 (8.9), 8.7 (15).
LINES, LONG, FEW, MANY = 8, 256, 2, 8


@triton.jit
def rows_kernel(
    w_ptr,  # (rows, cols), in place
    p_ptr,  # (rows, cols)
    keep_ptr,  # KEEP numbers, fp32
    factor_ptr,  # (rows,) fp32; read where FACTOR
    row,  # (8,) fp32: reference.Column; read where STOCHASTIC
    rows,
    cols,
    KEEP: tl.constexpr,  # none | one | rows
    FACTOR: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    EVEN: tl.constexpr,  # WIDTH divides cols
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    line, _, inside, mask, at, _ = tile(tl.program_id(0), rows, cols, EVEN, BLOCKS, WIDTH)
    w = tl.load(w_ptr + at, mask=mask, other=0).to(tl.float32)
    x = tl.load(p_ptr + at, mask=mask, other=0).to(tl.float32)
    if FACTOR:
        x = x * tl.load(factor_ptr + line, mask=inside, other=0.0)[:, None]
    if KEEP == "rows":
        w = w * tl.load(keep_ptr + line, mask=inside, other=0.0)[:, None]
    elif KEEP == "one":
        w = w * tl.load(keep_ptr)
    x = w + x
    if STOCHASTIC:
        x = stochastic(x, bits(at, row) >> 16)
    tl.store(w_ptr + at, x.to(w_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _divisor(mag, least):
    return tl.where(mag < 0, tl.minimum(mag, -least), tl.maximum(mag, least))


@triton.jit
def tangent_kernel(
    x_ptr,  # (rows, cols), in place
    a_ptr,  # (rows, cols)
    c_ptr,  # (rows, r); read where BESIDE, like the next two
    z_ptr,  # (rows, cols - r)
    rho_ptr,  # (rows,) fp32, like the next four
    sums_ptr,
    mag_ptr,
    n_ptr,
    s_ptr,  # written
    rows,
    cols,
    r,
    least,
    BESIDE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    line, col, inside, mask, at, _ = tile(tl.program_id(0), rows, cols, EVEN, BLOCKS, WIDTH)
    mag = _divisor(tl.load(mag_ptr + line, mask=inside, other=1.0), least)
    s = tl.load(sums_ptr + line, mask=inside, other=0.0) / mag
    if tl.program_id(0) % tl.cdiv(cols, WIDTH) == 0:
        tl.store(s_ptr + line, s, mask=inside)
    x = tl.load(x_ptr + at, mask=mask, other=0).to(tl.float32)
    a = tl.load(a_ptr + at, mask=mask, other=0).to(tl.float32)
    if BESIDE:
        own, rest = mask & (col < r)[None, :], mask & (col >= r)[None, :]
        place = line.to(tl.int64)[:, None]
        y = tl.load(c_ptr + place * r + col[None, :], mask=own, other=0).to(tl.float32)
        z = tl.load(z_ptr + place * (cols - r) + (col - r)[None, :], mask=rest, other=0).to(tl.float32)
        a = a * tl.load(rho_ptr + line, mask=inside, other=0.0)[:, None] + y + z
    c = mag / tl.load(n_ptr + line, mask=inside, other=1.0)
    x = c[:, None] * (x - (s / mag)[:, None] * a)
    tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def magnitude_kernel(
    x_ptr,  # (rows, cols) contiguous
    a_ptr,  # (rows, cols), of row stride `stride`
    b_ptr,  # (rows, cols) contiguous; read unless SAME
    c_ptr,  # (rows, cols) contiguous, in place; where BESIDE, like rho
    rho_ptr,  # (rows,) fp32, as all vectors; in place
    mag_ptr,  # in place
    n_ptr,  # in place
    m_ptr,  # in place
    v_ptr,  # in place
    s_ptr,
    keep_ptr,  # written
    factor_ptr,  # written
    row,  # (8,) fp32: reference.Column
    rows,
    cols,
    stride,
    rate,
    least,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    SAME: tl.constexpr,  # b is x
    BESIDE: tl.constexpr,
    STOCHASTIC: tl.constexpr,  # c is rounded so
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside, lane = line < rows, tl.arange(0, WIDTH)
    ok = tl.load(row + 3) > 0
    old = tl.load(mag_ptr + line, mask=inside, other=1.0)
    n = tl.load(n_ptr + line, mask=inside, other=1.0)
    s = tl.load(s_ptr + line, mask=inside, other=0.0)
    if BESIDE:
        rho = tl.load(rho_ptr + line, mask=inside, other=0.0)
    along = tl.zeros((BLOCKS, WIDTH), tl.float32)
    square = tl.zeros((BLOCKS, WIDTH), tl.float32)
    for start in range(0, cols, WIDTH):
        col = start + lane
        mask = inside[:, None] & (col < cols)[None, :]
        at = line[:, None] * cols + col[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0).to(tl.float32)
        a = tl.load(a_ptr + line[:, None] * stride + col[None, :], mask=mask, other=0).to(tl.float32)
        b = x if SAME else tl.load(b_ptr + at, mask=mask, other=0).to(tl.float32)
        if BESIDE:
            a = a * rho[:, None] + tl.load(c_ptr + at, mask=mask, other=0).to(tl.float32)
        along += x * a
        square += x * b
    mag = _divisor(old, least)
    moves = tl.where(ok, inside, False)
    top, below = _step(
        s, m_ptr, v_ptr, m_ptr, v_ptr, s, line, moves, line, moves, row, 0,
        beta1, rest1, beta2, rest2, tl.float32, False, True, False, True,
    )  # fmt: skip
    new = tl.load(row + 1) * old - tl.load(row) * (top / (below + eps)) * rate
    length = n * n + 2 * (n / mag) * tl.sum(along, 1) + tl.sum(square, 1)
    length = tl.maximum(tl.sqrt(tl.maximum(length, 0.0)), 1.1754943508222875e-38)
    new, length = tl.where(ok, new, old), tl.where(ok, length, n)
    keep, factor = tl.where(ok, new * n / (length * mag), 1.0), new / length
    tl.store(mag_ptr + line, new, mask=inside)
    tl.store(n_ptr + line, length, mask=inside)
    tl.store(keep_ptr + line, keep, mask=inside)
    tl.store(factor_ptr + line, factor, mask=inside)
    if BESIDE:
        for start in range(0, cols, WIDTH):
            col = start + lane
            mask = (col < cols)[None, :] & inside[:, None]
            at = line[:, None] * cols + col[None, :]
            x = tl.load(x_ptr + at, mask=mask, other=0).to(tl.float32)
            c = tl.load(c_ptr + at, mask=mask, other=0).to(tl.float32)
            c = c * keep[:, None] + x * factor[:, None]
            if STOCHASTIC:
                c = stochastic(c, bits(at, row) >> 16)
            tl.store(c_ptr + at, c.to(c_ptr.dtype.element_ty), mask=mask)
        tl.store(rho_ptr + line, rho * keep, mask=inside)


def launch_tangent(
    x: Tensor, a: Tensor, sums: Tensor, mag: Tensor, n: Tensor, least: float,
    beside: tuple[Tensor, Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    (rows, cols), s = x.shape, torch.empty_like(sums)
    c, z, rho = beside or (None, None, None)
    if x.numel():
        tangent_kernel[(triton.cdiv(rows, TANGENT) * triton.cdiv(cols, LANES),)](
            x, a, c, z, rho, sums, mag, n, s, rows, cols, 0 if c is None else c.shape[1], least,
            BESIDE=c is not None, EVEN=cols % LANES == 0, BLOCKS=TANGENT, WIDTH=LANES, num_warps=WARPS,
        )  # fmt: skip
    return s


def launch_magnitude(
    state: dict[str, Tensor], s: Tensor, x: Tensor, a: Tensor, b: Tensor, h: Tensor, rate: float,
    beta1: float, beta2: float, eps: float, least: float, beside: tuple[Tensor, Tensor] | None, noise: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (rows, cols), keep, factor = x.shape, torch.empty_like(s), torch.empty_like(s)
    c, rho = beside or (None, None)
    if rows:
        magnitude_kernel[(triton.cdiv(rows, LINES),)](
            x, a, b, c, rho, state["mag"], state["n"], state["mag_m"], state["mag_v"], s, keep, factor, h,
            rows, cols, a.stride(0), rate, least, beta1, 1 - beta1, beta2, 1 - beta2, eps,
            SAME=b is x, BESIDE=c is not None,
            STOCHASTIC=noise and c is not None and c.dtype == torch.bfloat16,
            BLOCKS=LINES, WIDTH=LONG, num_warps=FEW if b is x and c is None else MANY,
        )  # fmt: skip
    return keep, factor


def launch(w: Tensor, product: Tensor, keep: Tensor | None, factor: Tensor | None, h: Tensor | None) -> None:
    (rows, cols), blocks = w.shape, TILE // LANES
    if w.numel():
        rows_kernel[(triton.cdiv(rows, blocks) * triton.cdiv(cols, LANES),)](
            w, product, keep, factor, h, rows, cols,
            KEEP="none" if keep is None else "rows" if keep.ndim else "one", FACTOR=factor is not None,
            STOCHASTIC=h is not None and w.dtype == torch.bfloat16, EVEN=cols % LANES == 0,
            BLOCKS=blocks, WIDTH=LANES, num_warps=WARPS,
        )  # fmt: skip
