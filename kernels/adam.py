"""Adam in one pass over memory, moments in fp32, bf16 or 8 bit: reference.adam and reference.adam_direction.

adam_kernel updates all parameters of one kind in one launch. Per parameter, eager or compiled, an update
costs the host some 50 microseconds, 11 ms a step for the 219 tensors of a 1B model. Here the host writes a
table of addresses, and each program finds its tensor and tile in it. Bytes moved per number (weight read and
written, gradient read, two moments read and written), bf16 weights: 22 with fp32 moments, 14 with bf16, 10
with 8 bit.

direction_kernel turns one projected gradient into a direction, or both parts of it: 8 bytes a number in bf16
with 8-bit moments.

A program's tile is TILE numbers as (BLOCKS, WIDTH): in 8 bit a row of it is one quant block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .constant import constant
from .reference import FLOOR, QUANT

TILE = 2048  # numbers of a program: 16 a thread, so that 8-bit moments too are read 16 bytes at a time
WARPS = 4
# Of adam_kernel, 32 a thread: on an H200 4096 x 11008 take 0.25, 0.17 and 0.15 ms (fp32, bf16, 8 bit) instead
# of 0.29, 0.20 and 0.22.
DENSE_TILE, DENSE_WARPS = 4096, 2
LEAST = tl.constexpr(FLOOR)
ZERO = tl.constexpr(0x4B400000)  # rounded(0)
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.int8: tl.int8}
# What the launchers can choose; each is compiled ahead of time in the tests.
VARIANTS = [  # weight, moments, weight rounded stochastically
    (weight, moment, noise)
    for weight, noise in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False))
    for moment in DTYPES
]
DIRECTION_VARIANTS = [  # gradient, result, moments, with a column scale
    (grad, out, moment, scaled)
    for grad in (torch.bfloat16, torch.float32)
    for out in (torch.bfloat16, torch.float32)
    for moment in DTYPES
    for scaled in ((False, True) if moment == torch.int8 else (False,))
]
PARTS_VARIANTS = [(grad, moment) for grad in (torch.bfloat16, torch.float32) for moment in DTYPES]


@triton.jit
def bits(element, row):
    """32 random bits: the low 16 are for a second moment, the high 16 for a weight. uint32 arithmetic wraps
    as reference.random_bits does by masking."""
    t, index = tl.load(row + 4).to(tl.uint32), tl.load(row + 5).to(tl.uint32)
    h = element.to(tl.uint32) + t * 0x9E3779B1 + index * 0x632BE5AB
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def stochastic(x, sixteen):
    """x as reference.stochastic_bf16 rounds it, still fp32. NaN is left alone: with noise the hardware's own,
    0x7FFFFFFF, would become -0."""
    noisy = (x.to(tl.int32, bitcast=True) + sixteen.to(tl.int32)) & -65536
    return tl.where(x == x, noisy.to(tl.float32, bitcast=True), x)


@triton.jit
def _load(pointers, mask, MASKED: tl.constexpr):
    if MASKED:
        x = tl.load(pointers, mask=mask, other=0)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def _read(pointers, mask, MASKED: tl.constexpr):
    return _load(pointers, mask, MASKED).to(tl.float32)


@triton.jit
def number(code, SIGNED: tl.constexpr):
    """fp32 of a code, by the bits of 2^23 + byte: conversions run at a quarter of the rate of sums."""
    byte = code.to(tl.uint8, bitcast=True).to(tl.int32)
    if SIGNED:
        x = ((byte ^ 128) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0
    else:
        x = (byte | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    return x


@triton.jit
def rounded(x):
    """int32 whose last byte is x, |x| < 2^22, rounded to nearest, halves to even: of 1.5 * 2^23 + x."""
    return (x + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def _write(pointers, x, mask, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointers, x, mask=mask)
    else:
        tl.store(pointers, x)


@triton.jit
def tile(program, rows, cols, EVEN: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr):
    """A program's (BLOCKS, WIDTH) of a matrix: rows, columns, rows that exist, numbers that do, where they
    lie in a contiguous one, and the quant block of each row."""
    across = tl.cdiv(cols, WIDTH)
    line = (program // across) * BLOCKS + tl.arange(0, BLOCKS)
    col = (program % across) * WIDTH + tl.arange(0, WIDTH)
    inside = line < rows
    mask = inside[:, None]
    if not EVEN:
        mask = mask & (col < cols)[None, :]
    at = line.to(tl.int64)[:, None] * cols + col[None, :]
    return line, col, inside, mask, at, line * across + program % across


@triton.jit
def _step(
    g,  # (BLOCKS, WIDTH) fp32
    m_ptr,
    v_ptr,
    m_scale,
    v_scale,
    d,  # (1, WIDTH) fp32 column scale; used where SCALED
    at,  # (BLOCKS, WIDTH) where in the tensor
    mask,
    unit,  # (BLOCKS,) number of the quant block
    inside,
    row,  # Column
    random,  # bits of the numbers; used where MOMENT is bf16
    beta1,
    rest1,
    beta2,
    rest2,
    MOMENT: tl.constexpr,
    SCALED: tl.constexpr,
    MASKED: tl.constexpr,
    CLIPPED: tl.constexpr = False,  # g is already
    SHARED: tl.constexpr = False,  # warps hold the same numbers: none may write what another has yet to read
):
    """Both parts of a tile's direction, top / (below + eps); its moments are read, updated and written."""
    if MOMENT == tl.int8:
        m = number(_load(m_ptr + at, mask, MASKED), True)
        v = number(_load(v_ptr + at, mask, MASKED), False)
        m = m * (1 / 127) * _read(m_scale + unit, inside, MASKED)[:, None]
        v = v * (1 / 255)
        v = v * v * _read(v_scale + unit, inside, MASKED)[:, None]
        if SCALED:
            m = m * d
            v = v * (d * d)
    else:
        m = _read(m_ptr + at, mask, MASKED)
        v = _read(v_ptr + at, mask, MASKED)
    if not CLIPPED:  # here: beside the load of g adam_kernel took 2.3 ms with bf16 moments, not 0.17
        g = g * tl.load(row + 2)
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    root = tl.sqrt(v)  # the one square root a number: the direction's and the code's
    top = m * (1 / tl.load(row + 6))
    below = root * (1 / tl.sqrt(tl.load(row + 7)))
    if SHARED:
        tl.debug_barrier()
    if MOMENT == tl.int8:
        if SCALED:
            inverse = 1 / d
            m = m * inverse
            v = v * (inverse * inverse)
            root = root * inverse
        a = tl.maximum(tl.max(tl.abs(m), 1), LEAST)
        b = tl.maximum(tl.max(v, 1), LEAST)
        code = rounded(root * (255 / tl.sqrt(b))[:, None])
        code = tl.where((v > 0) & (code == ZERO), code + 1, code)
        _write(m_scale + unit, a, inside, MASKED)
        _write(v_scale + unit, b, inside, MASKED)
        _write(m_ptr + at, rounded(m * (127 / a)[:, None]).to(tl.int8), mask, MASKED)
        _write(v_ptr + at, code.to(tl.uint8), mask, MASKED)
    else:
        if MOMENT == tl.bfloat16:
            v = stochastic(v, random & 0xFFFF)
        _write(m_ptr + at, m.to(MOMENT), mask, MASKED)
        _write(v_ptr + at, v.to(MOMENT), mask, MASKED)
    return top, below


@triton.jit
def _dense(
    w_ptr, g_ptr, m_ptr, v_ptr, m_scale, v_scale, at, mask, unit, inside, row,
    beta1, rest1, beta2, rest2, eps, WEIGHT: tl.constexpr, MOMENT: tl.constexpr, NOISE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    w = _read(w_ptr + at, mask, MASKED)
    g = _read(g_ptr + at, mask, MASKED)
    # Early, while loads are waited for; with fp32 moments, which leave it no registers, late. On an H200
    # 4096 x 11008 take 0.26 ms instead of 0.34, with bf16 and 8 bit 0.20 and 0.18 instead of 0.24 and 0.19.
    EARLY: tl.constexpr = MOMENT == tl.bfloat16 or NOISE and MOMENT == tl.int8
    random = bits(at, row) if EARLY else 0
    top, below = _step(
        g, m_ptr, v_ptr, m_scale, v_scale, g, at, mask, unit, inside, row, random,
        beta1, rest1, beta2, rest2, MOMENT, False, MASKED,
    )  # fmt: skip
    w = w * tl.load(row + 1) - tl.load(row) * (top / (below + eps))
    if NOISE:
        w = stochastic(w, (random if EARLY else bits(at, row)) >> 16)
    _write(w_ptr + at, w.to(WEIGHT), mask, MASKED)


@triton.jit
def adam_kernel(
    addresses,  # (tensors, 9) int64: w, g, m, v, scales of m and v (or 0), numbers, columns, row of the table
    tiles,  # (programs, 2) int32: tensor, tile in it
    table,  # (parameters, 8) fp32: reference.Column
    beta1,
    rest1,  # 1 - beta1, from the host's float64: in fp32 1 - 0.999 is off by 1.3e-5 of itself
    beta2,
    rest2,
    eps,
    WEIGHT: tl.constexpr,
    MOMENT: tl.constexpr,
    NOISE: tl.constexpr,  # bf16 weights are rounded stochastically
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    entry = addresses + 9 * tl.load(tiles + 2 * program).to(tl.int64)
    tile = tl.load(tiles + 2 * program + 1).to(tl.int64)
    SECOND: tl.constexpr = tl.uint8 if MOMENT == tl.int8 else MOMENT
    # 16-byte alignment is checked by the launcher; it is what makes the accesses 16 bytes wide
    w_ptr = tl.multiple_of(tl.load(entry).to(tl.pointer_type(WEIGHT)), 16)
    g_ptr = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(WEIGHT)), 16)
    m_ptr = tl.multiple_of(tl.load(entry + 2).to(tl.pointer_type(MOMENT)), 16)
    v_ptr = tl.multiple_of(tl.load(entry + 3).to(tl.pointer_type(SECOND)), 16)
    m_scale = tl.load(entry + 4).to(tl.pointer_type(tl.float32))
    v_scale = tl.load(entry + 5).to(tl.pointer_type(tl.float32))
    numbers = tl.load(entry + 6)
    cols = tl.load(entry + 7)
    row = table + 8 * tl.load(entry + 8)
    line = tl.arange(0, BLOCKS)
    lane = tl.arange(0, WIDTH)
    if tl.load(row + 3) > 0:  # a non-finite gradient leaves everything as it was
        if (cols == WIDTH) & ((tile + 1) * (BLOCKS * WIDTH) <= numbers):  # seen as flat, and no end of it
            at = tile * (BLOCKS * WIDTH) + (line * WIDTH)[:, None] + lane[None, :]
            unit = tile * BLOCKS + line
            _dense(
                w_ptr, g_ptr, m_ptr, v_ptr, m_scale, v_scale, at, at < numbers, unit, unit < numbers, row,
                beta1, rest1, beta2, rest2, eps, WEIGHT, MOMENT, NOISE, False,
            )  # fmt: skip
        else:
            across = tl.cdiv(cols, WIDTH)
            rows = (tile // across) * BLOCKS + line
            col = (tile % across) * WIDTH + lane
            at = rows[:, None] * cols + col[None, :]
            mask = (col < cols)[None, :] & (at < numbers)
            unit = rows * across + tile % across
            _dense(
                w_ptr, g_ptr, m_ptr, v_ptr, m_scale, v_scale, at, mask, unit, rows * cols < numbers, row,
                beta1, rest1, beta2, rest2, eps, WEIGHT, MOMENT, NOISE, True,
            )  # fmt: skip


@triton.jit
def direction_kernel(
    g_ptr,  # (rows, cols), of row stride `stride`
    n_ptr,  # (rows, cols) contiguous as the moments, written; PARTS: (2, rows, cols) fp32
    m_ptr,
    v_ptr,
    m_scale,
    v_scale,
    d_ptr,  # (cols,) fp32 column scale
    row,  # (8,) fp32: reference.Column
    rows,
    cols,
    stride,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    MOMENT: tl.constexpr,
    SCALED: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN: tl.constexpr,  # WIDTH divides cols
    WHOLE: tl.constexpr,  # and BLOCKS rows: no number of a tile is missing
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    line, col, inside, mask, at, unit = tile(tl.program_id(0), rows, cols, EVEN, BLOCKS, WIDTH)
    second = (line + rows).to(tl.int64)[:, None] * cols + col[None, :]  # where PARTS
    if tl.load(row + 3) > 0:
        if SCALED:
            d = tl.load(d_ptr + col, mask=col < cols, other=1.0)[None, :]
        else:
            d = 0.0
        g = _read(g_ptr + line.to(tl.int64)[:, None] * stride + col[None, :], mask, not WHOLE)
        random = bits(at, row) if MOMENT == tl.bfloat16 else 0
        top, below = _step(
            g, m_ptr, v_ptr, m_scale, v_scale, d, at, mask, unit, inside, row, random,
            beta1, rest1, beta2, rest2, MOMENT, SCALED, not WHOLE,
        )  # fmt: skip
        if PARTS:
            _write(n_ptr + second, below, mask, not WHOLE)
            direction = top
        else:
            direction = top / (below + eps)
        _write(n_ptr + at, (-tl.load(row) * direction).to(n_ptr.dtype.element_ty), mask, not WHOLE)
    else:  # nothing is read, so no NaN can leak
        tl.store(n_ptr + at, tl.zeros((BLOCKS, WIDTH), n_ptr.dtype.element_ty), mask=mask)
        if PARTS:
            tl.store(n_ptr + second, tl.zeros((BLOCKS, WIDTH), n_ptr.dtype.element_ty), mask=mask)


def columns(shape: torch.Size, moment: torch.dtype) -> int:
    """How wide adam_kernel sees a tensor: flat, in rows of 256, unless its quant blocks forbid it."""
    return shape[-1] if moment == torch.int8 and shape[-1] % QUANT else QUANT


def tile_table(ws: list[Tensor], moment: torch.dtype) -> Tensor:
    """(programs, 2) int32: every tile of every tensor, a tensor's in a row; 8 bytes for 4096 numbers."""
    sizes = [(w.numel(), columns(w.shape, moment)) for w in ws]
    down = DENSE_TILE // QUANT
    counts = torch.tensor([-(-n // (down * cols)) * -(-cols // QUANT) for n, cols in sizes])
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    starts = torch.cumsum(counts, 0) - counts
    tiles = torch.stack([tensor, torch.arange(len(tensor)) - starts[tensor]], 1)
    return constant(tiles, torch.int32, ws[0].device)


def launch(
    ws: list[Tensor],  # all of one dtype
    gs: list[Tensor],  # likewise, the same
    states: list[dict[str, Tensor]],  # all of one store
    indices: list[int],  # the table's rows that they are
    table: Tensor,
    tiles: Tensor,  # tile_table(ws)
    beta1: float,
    beta2: float,
    eps: float,
    noise: bool,
) -> None:
    moment = states[0]["m"].dtype
    names = ("m", "v", "m_scale", "v_scale") if moment == torch.int8 else ("m", "v")
    rows = [
        [w.data_ptr(), g.data_ptr(), *(s[name].data_ptr() for name in names), *[0] * (4 - len(names))]
        + [w.numel(), columns(w.shape, moment), n]
        for w, g, s, n in zip(ws, gs, states, indices, strict=True)
    ]
    addresses = constant(rows, torch.int64, table.device)
    adam_kernel[(len(tiles),)](
        addresses, tiles, table, beta1, 1 - beta1, beta2, 1 - beta2, eps, WEIGHT=DTYPES[ws[0].dtype],
        MOMENT=DTYPES[moment], NOISE=noise and ws[0].dtype == torch.bfloat16, BLOCKS=DENSE_TILE // QUANT,
        WIDTH=QUANT, num_warps=DENSE_WARPS,
    )  # fmt: skip


def launch_direction(
    g: Tensor,
    state: dict[str, Tensor],
    h: Tensor,
    beta1: float,
    beta2: float,
    eps: float | None,  # None: both parts (2, rows, cols), which it would join
    dtype: torch.dtype,
) -> Tensor:
    n = torch.empty(g.shape if eps is not None else (2, *g.shape), dtype=dtype, device=g.device)
    moment, d = state["m"].dtype, state.get("d")
    (rows, cols), stride = g.shape, g.stride(0)
    if (
        g.is_contiguous()
        and d is None
        and (moment != torch.int8 or cols % QUANT == 0)
        and g.numel() % QUANT == 0
    ):
        rows, cols, stride = g.numel() // QUANT, QUANT, QUANT  # flat
    width = min(QUANT, max(16, triton.next_power_of_2(cols)))
    blocks = TILE // width
    grid = (triton.cdiv(rows, blocks) * triton.cdiv(cols, width),)
    even = cols % width == 0
    if g.numel():
        direction_kernel[grid](
            g, n, state["m"], state["v"], state.get("m_scale"), state.get("v_scale"), d, h,
            rows, cols, stride, beta1, 1 - beta1, beta2, 1 - beta2, eps or 0.0,
            MOMENT=DTYPES[moment], SCALED=d is not None, PARTS=eps is None, EVEN=even,
            WHOLE=even and rows % blocks == 0, BLOCKS=blocks, WIDTH=width, num_warps=WARPS,
        )  # fmt: skip
    return n
