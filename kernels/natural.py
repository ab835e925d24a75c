"""Natural GaLore's step from a gradient to Adam's direction: history.natural_dots_, natural_weights_ and
natural_direction_.

In torch the s past gradients are widened, copied and read some five times, 280 ms a step at 7B with s = 4 in
8 bit; here all but the one that is replaced are read twice. Bytes a number in bf16 with them and the moments
in 8 bit: 2 + s, and 7 + s. A system of s equations is solved in one program: cuSOLVER's small factors wait
for the host. Products, and systems, of all gradients that have landed are one launch each: at 1B a gradient
of 2048 x 512 is read in 2 microseconds, which a launch takes too.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adam import DTYPES, LEAST, QUANT, _step, bits, number, rounded, tile
from .constant import constant

DOTS, DIRECTION = (1024, 1), (1024, 4)  # numbers of a tile, warps: sums over one warp need no barrier
PARTS = 512  # programs of dots_kernel for each gradient
SOLVE = 1024  # numbers of a sum over them that weights_kernel reads at once
FIELDS = tl.constexpr(10)
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
    program, g_ptr, d_ptr, row, rows, cols, stride, SCALED: tl.constexpr, EVEN: tl.constexpr,
    BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A program's tile of the clipped gradient, fp32, and of its column scale; where it is."""
    line, col, inside, mask, at, unit = tile(program, rows, cols, EVEN, BLOCKS, WIDTH)
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
    entries,  # (tensors, FIELDS) int64: launch_dots
    out_ptr,  # (tensors, PARTS, 2, S) fp32, written
    GRAD: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,  # S or more, a power of 2
    STORE: tl.constexpr,
    SCALED: tl.constexpr,
    EVEN: tl.constexpr,  # WIDTH divides cols
    ALIGNED: tl.constexpr,  # the gradient's rows begin on 16 bytes
    PARTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    part, entry = tl.program_id(0), entries + FIELDS * tl.program_id(1).to(tl.int64)
    g_ptr = tl.multiple_of(tl.load(entry).to(tl.pointer_type(GRAD)), 16)
    history = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(STORE)), 16)
    scales = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
    d_ptr = tl.multiple_of(tl.load(entry + 3).to(tl.pointer_type(tl.float32)), 16)
    slot_ptr = tl.load(entry + 4).to(tl.pointer_type(tl.int64))
    row = tl.load(entry + 5).to(tl.pointer_type(tl.float32))
    rows, cols, stride = tl.load(entry + 6), tl.load(entry + 7), tl.load(entry + 8)
    if EVEN:
        cols = tl.multiple_of(cols, WIDTH)
    if ALIGNED:
        stride = tl.multiple_of(stride, 8)
    slot, moves = tl.load(slot_ptr), tl.load(row + 3) > 0
    lane = tl.arange(0, P)
    fresh, held = tl.zeros((P,), tl.float32), tl.zeros((P,), tl.float32)
    for program in range(part, tl.cdiv(rows, BLOCKS) * tl.cdiv(cols, WIDTH), PARTS):
        g, d, inside, mask, at, unit = _gradient(
            program, g_ptr, d_ptr, row, rows, cols, stride, SCALED, EVEN, BLOCKS, WIDTH
        )
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
        fresh += tl.where(lane == slot, tl.sum(tl.sum(g * g, 1), 0), 0.0)
        held += tl.where(lane == slot, tl.sum(tl.sum(kept * kept, 1), 0), 0.0)
        for k in tl.static_range(1, S):
            i = (slot + k) % S
            x, factor = _past(history, scales, i, d, rows, cols, inside, mask, at, unit, STORE, SCALED, WIDTH)
            fresh += tl.where(lane == i, tl.sum(tl.sum(x * g, 1) * factor, 0), 0.0)
            held += tl.where(lane == i, tl.sum(tl.sum(x * kept, 1) * factor, 0), 0.0)
        if moves:
            tl.store(history + slot * rows * cols + at, code, mask=mask)
            if STORE == tl.int8:
                tl.store(scales + slot * rows * tl.cdiv(cols, WIDTH) + unit, a, mask=inside)
    out = out_ptr + (tl.load(entry + 9) * PARTS + part) * 2 * S + lane
    tl.store(out, fresh, mask=lane < S)
    tl.store(out + S, held, mask=lane < S)


@triton.jit
def weights_kernel(
    entries,  # (tensors, 4) int64: launch_weights
    dots,  # (tensors, parts, 2, S) fp32
    parts,
    w_ptr,  # (tensors, S) fp32, written
    place_ptr,  # (tensors, 1) int64, written: the slot as it was
    damping,
    SMALL: tl.constexpr,  # a trace below is zero
    S: tl.constexpr,
    P: tl.constexpr,
    MANY: tl.constexpr,  # parts that are read at once
):
    n = tl.program_id(0).to(tl.int64)
    gram_ptr = tl.load(entries + 4 * n).to(tl.pointer_type(tl.float32))
    slot_ptr = tl.load(entries + 4 * n + 1).to(tl.pointer_type(tl.int64))
    filled_ptr = tl.load(entries + 4 * n + 2).to(tl.pointer_type(tl.int64))
    row = tl.load(entries + 4 * n + 3).to(tl.pointer_type(tl.float32))
    one = tl.arange(0, P)
    i, j = one[:, None], one[None, :]
    slot, filled = tl.load(slot_ptr), tl.load(filled_ptr)
    inside = (i < S) & (j < S)
    gram = tl.load(gram_ptr + i * S + j, mask=inside, other=0.0)
    fresh, held = tl.zeros((MANY, P), tl.float32), tl.zeros((MANY, P), tl.float32)
    for first in range(0, parts, MANY):
        part = first + tl.arange(0, MANY)
        mask = (part < parts)[:, None] & (one < S)[None, :]
        at = dots + (n * parts + part)[:, None] * (2 * S) + one[None, :]
        fresh += tl.load(at, mask=mask, other=0.0)
        held += tl.load(at + S, mask=mask, other=0.0)
    fresh, held = tl.sum(fresh, 0), tl.sum(held, 0)
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
    tl.store(w_ptr + n * S + one, x * damp, mask=one < S)
    tl.store(place_ptr + n, slot)
    if tl.load(row + 3) > 0:
        gram = tl.where(i == slot, held[None, :], tl.where(j == slot, held[:, None], gram))
        tl.store(gram_ptr + i * S + j, gram, mask=inside)
        tl.store(filled_ptr, count)
        tl.store(slot_ptr, (slot + 1) % S)


@triton.jit(do_not_specialize_on_alignment=["w_ptr", "place_ptr"])  # a row each of what weights_kernel wrote
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
        tl.program_id(0), g_ptr, d_ptr, row, rows, cols, stride, SCALED, EVEN, BLOCKS, WIDTH
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
            beta1, rest1, beta2, rest2, STORE, SCALED, True, True,
        )  # fmt: skip
        n = -tl.load(row) * (top / (below + eps))
        tl.store(n_ptr + at, n.to(n_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(n_ptr + at, tl.zeros((BLOCKS, WIDTH), n_ptr.dtype.element_ty), mask=mask)


def _plan(g: Tensor, state: dict[str, Tensor], size: int) -> tuple[int, dict[str, Any]]:
    """Tiles, and what a kernel is compiled for: in 8 bit a row of a tile is one quant block."""
    rows, cols = g.shape
    width = min(QUANT, max(16, triton.next_power_of_2(cols)))
    blocks, history = size // width, state["history"]
    return triton.cdiv(rows, blocks) * triton.cdiv(cols, width), {
        "S": len(history), "STORE": DTYPES[history.dtype], "SCALED": "d" in state,
        "EVEN": cols % width == 0, "BLOCKS": blocks, "WIDTH": width,
    }  # fmt: skip


def launch_dots(gs: list[Tensor], states: list[dict[str, Tensor]], hs: list[Tensor]) -> Tensor:
    """One launch for all that are alike but for their sizes."""
    history, (size, warps) = len(states[0]["history"]), DOTS
    out = torch.empty(len(gs), PARTS, 2, history, dtype=torch.float32, device=gs[0].device)
    alike: dict[tuple[Any, ...], tuple[dict[str, Any], list[list[int]]]] = {}
    for n, (g, state, h) in enumerate(zip(gs, states, hs, strict=True)):
        _, kinds = _plan(g, state, size)
        kinds |= {"GRAD": DTYPES[g.dtype], "ALIGNED": g.stride(0) % 8 == 0}
        pointers = [g, *(state.get(k) for k in ("history", "history_scale", "d", "slot")), h]
        entry = [0 if t is None else t.data_ptr() for t in pointers]
        entry += [*g.shape, g.stride(0), n]
        alike.setdefault(tuple(kinds.values()), (kinds, []))[1].append(entry)
    for kinds, entries in alike.values():
        dots_kernel[(PARTS, len(entries))](
            constant(entries, torch.int64, out.device), out, P=triton.next_power_of_2(history), PARTS=PARTS,
            num_warps=warps, **kinds,
        )  # fmt: skip
    return out


def launch_weights(
    dots: Tensor, states: list[dict[str, Tensor]], hs: list[Tensor], damping: float
) -> tuple[Tensor, Tensor]:
    pointers = [[s["gram"], s["slot"], s["filled"], h] for s, h in zip(states, hs, strict=True)]
    entries = constant([[t.data_ptr() for t in ts] for ts in pointers], torch.int64, dots.device)
    (n, parts, _, history), info = dots.shape, torch.finfo(torch.float32)
    w = torch.empty(n, history, dtype=torch.float32, device=dots.device)
    place = torch.empty(n, 1, dtype=torch.int64, device=dots.device)
    size = triton.next_power_of_2(history)
    weights_kernel[(n,)](
        entries, dots, parts, w, place, damping, SMALL=info.tiny / info.eps, S=history, P=size,
        MANY=max(1, SOLVE // size), num_warps=4,
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
    size, warps = DIRECTION
    programs, kinds = _plan(g, state, size)
    n = torch.empty(g.shape, dtype=dtype, device=g.device)
    direction_kernel[(programs,)](
        g, state["history"], state.get("history_scale"), state.get("d"), w, place, n, state["m"], state["v"],
        state.get("m_scale"), state.get("v_scale"), h, *g.shape, g.stride(0),
        beta1, 1 - beta1, beta2, 1 - beta2, eps, num_warps=warps, **kinds,
    )  # fmt: skip
    return n
