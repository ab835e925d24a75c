"""AdamW over all parameters in one launch: see reference.adam for what it computes.

Per parameter, eager or compiled, an update costs the host some 50 microseconds, 11 ms a step for the 219
tensors of a 1B model. Here the host writes a table of addresses, and each program finds its tensor and block
in it. Bytes moved per number: weight read and written, gradient read, two moments read and written: 22 with
bf16 weights and fp32 moments, 14 with bf16 moments.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # numbers of a program
WARPS = 4
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
TRITON_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# (weights, gradient, moments) that the launcher can choose; each is compiled ahead of time in the tests
VARIANTS = [
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32, torch.float32),
    (torch.float32, torch.float32, torch.bfloat16),
]


@triton.jit
def _noise(element, t, index):
    """16 random bits, int32; uint32 arithmetic wraps as reference.random_bits does by masking."""
    h = element.to(tl.uint32) + t.to(tl.uint32) * 0x9E3779B1 + index.to(tl.uint32) * 0x632BE5AB
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return ((h ^ (h >> 16)) & 0xFFFF).to(tl.int32)


@triton.jit
def _update(
    w_ptr, g_ptr, m_ptr, v_ptr, at, mask, row, beta1, rest1, beta2, rest2, eps,
    MOMENT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    if MASKED:
        w = tl.load(w_ptr + at, mask=mask, other=0.0)
        g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(m_ptr + at, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + at, mask=mask, other=0.0).to(tl.float32)
    else:
        w = tl.load(w_ptr + at)
        g = tl.load(g_ptr + at).to(tl.float32)
        m = tl.load(m_ptr + at).to(tl.float32)
        v = tl.load(v_ptr + at).to(tl.float32)
    g = g * tl.load(row + 2)
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    direction = (m / tl.load(row + 6)) / (tl.sqrt(v / tl.load(row + 7)) + eps)
    new = (w.to(tl.float32) * tl.load(row + 1) - tl.load(row) * direction).to(w.dtype)
    if MOMENT == tl.bfloat16:
        noise = _noise(at, tl.load(row + 4), tl.load(row + 5))
        v = ((v.to(tl.int32, bitcast=True) + noise) & -65536).to(tl.float32, bitcast=True)
    if MASKED:
        tl.store(w_ptr + at, new, mask=mask)
        tl.store(m_ptr + at, m.to(MOMENT), mask=mask)
        tl.store(v_ptr + at, v.to(MOMENT), mask=mask)
    else:
        tl.store(w_ptr + at, new)
        tl.store(m_ptr + at, m.to(MOMENT))
        tl.store(v_ptr + at, v.to(MOMENT))


@triton.jit
def adam_kernel(
    addresses,  # (tensors, 5) int64: addresses of w, g, m, v, and how many numbers
    blocks,  # (programs, 2) int32: tensor, block in it
    table,  # (tensors, 8) fp32: reference.Column
    beta1,
    rest1,  # 1 - beta1, from the host's float64: in fp32 1 - 0.999 is off by 1.3e-5 of itself
    beta2,
    rest2,
    eps,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(blocks + 2 * program).to(tl.int64)
    first = tl.load(blocks + 2 * program + 1).to(tl.int64) * BLOCK
    entry = addresses + 5 * tensor
    # 16-byte alignment is checked by the launcher; it is what makes the accesses 16 bytes wide
    w_ptr = tl.multiple_of(tl.load(entry).to(tl.pointer_type(WEIGHT)), 16)
    g_ptr = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(GRAD)), 16)
    m_ptr = tl.multiple_of(tl.load(entry + 2).to(tl.pointer_type(MOMENT)), 16)
    v_ptr = tl.multiple_of(tl.load(entry + 3).to(tl.pointer_type(MOMENT)), 16)
    n = tl.load(entry + 4)
    row = table + 8 * tensor
    at = tl.multiple_of(first, BLOCK) + tl.arange(0, BLOCK)
    if tl.load(row + 3) > 0:  # a non-finite gradient leaves everything as it was
        if first + BLOCK <= n:
            _update(
                w_ptr, g_ptr, m_ptr, v_ptr, at, at < n, row, beta1, rest1, beta2, rest2, eps, MOMENT, False
            )
        else:
            _update(
                w_ptr, g_ptr, m_ptr, v_ptr, at, at < n, row, beta1, rest1, beta2, rest2, eps, MOMENT, True
            )


def block_table(sizes: list[int], device: torch.device, block: int = BLOCK) -> Tensor:
    """(programs, 2) int32: every block of every tensor, a tensor's blocks in a row."""
    counts = torch.tensor([-(-n // block) for n in sizes])
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    starts = torch.cumsum(counts, 0) - counts
    return torch.stack([tensor, torch.arange(len(tensor)) - starts[tensor]], 1).to(torch.int32).to(device)


def launch(
    ws: list[Tensor], gs: list[Tensor], ms: list[Tensor], vs: list[Tensor], table: Tensor, blocks: Tensor,
    beta1: float, beta2: float, eps: float,
) -> None:  # fmt: skip
    rows = [
        [w.data_ptr(), g.data_ptr(), m.data_ptr(), v.data_ptr(), w.numel()]
        for w, g, m, v in zip(ws, gs, ms, vs, strict=True)
    ]
    addresses = torch.tensor(rows, dtype=torch.int64).to(table.device, non_blocking=True)
    adam_kernel[(len(blocks),)](
        addresses, blocks, table, beta1, 1 - beta1, beta2, 1 - beta2, eps,
        WEIGHT=DTYPES[ws[0].dtype], GRAD=DTYPES[gs[0].dtype], MOMENT=DTYPES[ms[0].dtype],
        BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
