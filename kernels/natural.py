"""Natural GaLore's step from a gradient to Adam's direction: history.natural_dots_, natural_weights_ and
natural_direction_.

In torch the s past gradients are widened, copied and read some five times, 280 ms a step at 7B with s = 4 in
8 bit; here all but the one that is replaced are read twice. Bytes a number in bf16 with them and the moments
in 8 bit: 2 + s, and 7 + s. The system of s equations is solved in one program: cuSOLVER's small
factors wait for the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adam import DTYPES, LEAST, QUANT, _step, bits, number, rounded, tile

DOTS, DIRECTION = (1024, 1), (1024, 4)  # numbers of a program, warps: sums over one warp need no barrier
VARIANTS = [  # gradient, store of history and moments, with a column scale
    (torch.bfloat16, torch.int8, True),
    (torch.bfloat16, torch.int8, False),
    (torch.bfloat16, torch.bfloat16, False),
    (torch.bfloat16, torch.float32, False),
    (torch.float32, torch.float32, False),
    (torch.float32, torch.int8, False),
]


@triton.jit
def _gradient(
    g_ptr, d_ptr, row, rows, cols, stride, SCALED: tl.constexpr, EVEN: tl.constexpr, BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """This program's tile of the clipped gradient, fp32, and of its column scale; where it is."""
    line, col, inside, mask, at, unit = tile(rows, cols, EVEN, BLOCKS, WIDTH)
    mask = mask & (col < cols)[None, :]  # of the tile's shape, where EVEN too
    d = 1.0
    if SCALED:
        d = tl.load(d_ptr + col, mask=col < cols, other=1.0)[None, :]
    g = tl.load(g_ptr + line.to(tl.int64)[:, None] * stride + col[None, :], mask=mask, other=0)
    return g.to(tl.float32) * tl.load(row + 2), d, inside, mask, at, unit


@triton.jit
def _past(
    history, scales, i, d, rows, cols, inside, mask, at, unit, STORE: tl.constexpr, SCALED: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """The same tile of past gradient i, fp32, and a factor of each row that is still to be applied."""
    x = tl.load(history + i * tl.cast(rows, tl.int64) * cols + at, mask=mask, other=0)
    factor = 1.0
    if STORE == tl.int8:
        units = i * tl.cast(rows, tl.int64) * tl.cdiv(cols, WIDTH) + unit
        factor = tl.load(scales + units, mask=inside, other=0.0) * (1 / 127)
        x = number(x, True)
        if SCALED:
            x = x * d
    return x.to(tl.float32), factor


@triton.jit
def dots_kernel(
    g_ptr,  # (rows, cols) of row stride `stride`
    history,  # (S, rows, cols), that of the slot written
    scales,  # (S, rows, quant blocks of a row) fp32, likewise
    d_ptr,  # (cols,) fp32 column scale
    slot_ptr,  # (1,) int64
    out_ptr,  # (programs, 2, P) fp32, written
    row,  # (8,) fp32: reference.Column
    rows,
    cols,
    stride,
    S: tl.constexpr,
    P: tl.constexpr,  # S or more, a power of 2
    STORE: tl.constexpr,
    SCALED: tl.constexpr,
    EVEN: tl.constexpr,  # WIDTH divides cols
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    g, d, inside, mask, at, unit = _gradient(
        g_ptr, d_ptr, row, rows, cols, stride, SCALED, EVEN, BLOCKS, WIDTH
    )
    slot = tl.load(slot_ptr)
    if STORE == tl.int8:
        y = g
        if SCALED:
            y = g * (1 / d)
        a = tl.maximum(tl.max(tl.abs(y), 1), LEAST)
        code = rounded(y * (127 / a)[:, None]).to(tl.int8)
        kept = number(code, True) * (1 / 127) * a[:, None]
        if SCALED:
            kept = kept * d
        kept = tl.where(mask, kept, 0.0)
    else:
        code = g.to(STORE)
        kept = code.to(tl.float32)
    lane = tl.arange(0, P)
    fresh = tl.where(lane == slot, tl.sum(tl.sum(g * g, 1), 0), 0.0)
    held = tl.where(lane == slot, tl.sum(tl.sum(kept * kept, 1), 0), 0.0)
    for k in tl.static_range(1, S):
        i = (slot + k) % S
        x, factor = _past(history, scales, i, d, rows, cols, inside, mask, at, unit, STORE, SCALED, WIDTH)
        fresh = tl.where(lane == i, tl.sum(tl.sum(x * g, 1) * factor, 0), fresh)
        held = tl.where(lane == i, tl.sum(tl.sum(x * kept, 1) * factor, 0), held)
    out = out_ptr + tl.program_id(0) * 2 * P + lane
    tl.store(out, fresh)
    tl.store(out + P, held)
    if tl.load(row + 3) > 0:
        tl.store(history + slot * rows * cols + at, code, mask=mask)
        if STORE == tl.int8:
            tl.store(scales + slot * rows * tl.cdiv(cols, WIDTH) + unit, a, mask=inside)


@triton.jit
def weights_kernel(
    dots,  # (2, S) fp32
    gram_ptr,  # (S, S) fp32, in place
    slot_ptr,  # (1,) int64, in place
    filled_ptr,  # () int64, in place
    row,  # (8,) fp32: reference.Column
    w_ptr,  # (S,) fp32, written
    place_ptr,  # (1,) int64, written: the slot as it was
    damping,
    SMALL: tl.constexpr,  # a trace below is zero
    S: tl.constexpr,
    P: tl.constexpr,
):
    one = tl.arange(0, P)
    i, j = one[:, None], one[None, :]
    slot, filled = tl.load(slot_ptr), tl.load(filled_ptr)
    inside = (i < S) & (j < S)
    gram = tl.load(gram_ptr + i * S + j, mask=inside, other=0.0)
    fresh = tl.load(dots + one, mask=one < S, other=0.0)
    held = tl.load(dots + S + one, mask=one < S, other=0.0)
    system = tl.where(i == slot, fresh[None, :], tl.where(j == slot, fresh[:, None], gram))
    trace = tl.sum(tl.sum(tl.where(i == j, system, 0.0), 1), 0)
    system = system * tl.where(trace > SMALL, 1 / trace, 0.0)
    count = tl.minimum(filled + 1, S)
    damp = damping / count.to(tl.float32)
    system = system + tl.where(i == j, damp, 0.0)
    x = tl.where(one == slot, 1.0, 0.0)
    for k in range(S):  # Gauss-Jordan; no pivoting: the condition is 1 + count / damping at most
        line = tl.sum(tl.where(i == k, system, 0.0), 0)
        pivot = tl.sum(tl.where(one == k, line, 0.0), 0)
        top = tl.sum(tl.where(one == k, x, 0.0), 0) / pivot
        line = line / pivot
        factor = tl.sum(tl.where(j == k, system, 0.0), 1)
        x = tl.where(one == k, top, x - factor * top)
        system = tl.where(i == k, line[None, :], system - factor[:, None] * line[None, :])
    tl.store(w_ptr + one, x * damp, mask=one < S)
    tl.store(place_ptr, slot)
    if tl.load(row + 3) > 0:
        gram = tl.where(i == slot, held[None, :], tl.where(j == slot, held[:, None], gram))
        tl.store(gram_ptr + i * S + j, gram, mask=inside)
        tl.store(filled_ptr, count)
        tl.store(slot_ptr, (slot + 1) % S)


@triton.jit
def direction_kernel(
    g_ptr,  # (rows, cols) of row stride `stride`
    history,  # (S, rows, cols)
    scales,
    d_ptr,
    w_ptr,  # (S,) fp32
    place_ptr,  # (1,) int64
    n_ptr,  # (rows, cols) contiguous, written
    m_ptr,  # (rows, cols), in place, as v
    v_ptr,
    m_scale,
    v_scale,
    row,
    rows,
    cols,
    stride,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    S: tl.constexpr,
    STORE: tl.constexpr,  # of the history and the moments
    SCALED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    g, d, inside, mask, at, unit = _gradient(
        g_ptr, d_ptr, row, rows, cols, stride, SCALED, EVEN, BLOCKS, WIDTH
    )
    if tl.load(row + 3) > 0:
        place = tl.load(place_ptr)
        y = g * tl.load(w_ptr + place)
        for k in tl.static_range(1, S):
            i = (place + k) % S
            x, factor = _past(history, scales, i, d, rows, cols, inside, mask, at, unit, STORE, SCALED, WIDTH)
            factor = factor * tl.load(w_ptr + i)
            y += x * (factor[:, None] if STORE == tl.int8 else factor)
        random = bits(at, row) if STORE == tl.bfloat16 else 0
        top, below = _step(
            y, m_ptr, v_ptr, m_scale, v_scale, d, at, mask, unit, inside, row, random,
            beta1, rest1, beta2, rest2, STORE, SCALED, True,
        )  # fmt: skip
        n = -tl.load(row) * (top / (below + eps))
        tl.store(n_ptr + at, n.to(n_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(n_ptr + at, tl.zeros((BLOCKS, WIDTH), n_ptr.dtype.element_ty), mask=mask)


def _plan(g: Tensor, state: dict[str, Tensor], size: int, warps: int) -> tuple[int, dict[str, object]]:
    """Programs, and what they are compiled for: in 8 bit a row of a tile is one quant block."""
    rows, cols = g.shape
    width = min(QUANT, max(16, triton.next_power_of_2(cols)))
    blocks, history = size // width, state["history"]
    return triton.cdiv(rows, blocks) * triton.cdiv(cols, width), {
        "S": len(history), "STORE": DTYPES[history.dtype], "SCALED": "d" in state,
        "EVEN": cols % width == 0, "BLOCKS": blocks, "WIDTH": width, "num_warps": warps,
    }  # fmt: skip


def launch_dots(g: Tensor, state: dict[str, Tensor], h: Tensor) -> Tensor:
    history, (programs, kinds) = state["history"], _plan(g, state, *DOTS)
    size = triton.next_power_of_2(len(history))
    out = torch.empty(programs, 2, size, dtype=torch.float32, device=g.device)
    dots_kernel[(programs,)](
        g, history, state.get("history_scale"), state.get("d"), state["slot"], out, h, *g.shape, g.stride(0),
        P=size, **kinds,
    )  # fmt: skip
    return out.sum(0)[:, : len(history)].contiguous()  # ranks may sum it


def solve_warps(history: int) -> int:
    """One needs no barriers; 64 equations have too many numbers for it."""
    return 1 if history <= 8 else 4


def launch_weights(
    dots: Tensor, state: dict[str, Tensor], h: Tensor, damping: float
) -> tuple[Tensor, Tensor]:
    gram, slot, info = state["gram"], state["slot"], torch.finfo(torch.float32)
    w, place = torch.empty_like(gram[0]), torch.empty_like(slot)
    weights_kernel[(1,)](
        dots, gram, slot, state["filled"], h, w, place, damping,
        SMALL=info.tiny / info.eps, S=len(gram), P=triton.next_power_of_2(len(gram)),
        num_warps=solve_warps(len(gram)),
    )  # fmt: skip
    return w, place


def launch_direction(
    g: Tensor,
    state: dict[str, Tensor],
    w: Tensor,
    place: Tensor,
    h: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    programs, kinds = _plan(g, state, *DIRECTION)
    n = torch.empty(g.shape, dtype=dtype, device=g.device)
    direction_kernel[(programs,)](
        g, state["history"], state.get("history_scale"), state.get("d"), w, place, n, state["m"], state["v"],
        state.get("m_scale"), state.get("v_scale"), h, *g.shape, g.stride(0),
        beta1, 1 - beta1, beta2, 1 - beta2, eps, **kinds,
    )  # fmt: skip
    return n
