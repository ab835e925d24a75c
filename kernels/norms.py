"""Sums of squares of many tensors in one launch, also of the columns of a wider tensor: reference.squares.

torch's multi-tensor norm takes contiguous tensors only; of R in [R, Z], (out, r) of (out, r + k), it falls
back to one slow reduction each, 3% of a 7B step. Here program (i, p) adds up tiles p, p + PARTS, ... of
tensor i. The order of additions depends on the shapes alone: the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PARTS = 64  # programs of a tensor; a batch holds some ten, an H200 132 processors
BLOCKS, WIDTH, WARPS = 8, 256, 4
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


@triton.jit
def squares_kernel(
    entries,  # (tensors, 4) int64: address, rows, columns, row stride
    out,  # (tensors, PARTS) fp32
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,  # every row begins and ends on 16 bytes
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    tensor, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    entry = entries + 4 * tensor
    x_ptr = tl.load(entry).to(tl.pointer_type(DTYPE))
    rows, cols, stride = tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    if ALIGNED:
        x_ptr = tl.multiple_of(x_ptr, 16)
        cols, stride = tl.multiple_of(cols, 8), tl.multiple_of(stride, 8)
    across = tl.cdiv(cols, WIDTH)
    total = tl.zeros((BLOCKS, WIDTH), tl.float32)
    for tile in range(part, tl.cdiv(rows, BLOCKS) * across, parts):
        line = (tile // across) * BLOCKS + tl.arange(0, BLOCKS)
        col = (tile % across) * WIDTH + tl.arange(0, WIDTH)
        mask = (line < rows)[:, None] & (col < cols)[None, :]
        x = tl.load(x_ptr + line[:, None] * stride + col[None, :], mask=mask, other=0).to(tl.float32)
        total += x * x
    tl.store(out + tensor * parts + part, tl.sum(total))


def entry(x: Tensor) -> tuple[int, int, int, int]:
    """How the kernel sees a tensor: flat in rows of WIDTH where that is possible."""
    if x.is_contiguous():
        cols = WIDTH if x.numel() % WIDTH == 0 else x.shape[-1] if x.ndim else 1
        return x.data_ptr(), x.numel() // cols if cols else 0, cols, cols
    return x.data_ptr(), x.shape[0], x.shape[1], x.stride(0)


def launch(tensors: list[Tensor]) -> Tensor:
    entries = [entry(x) for x in tensors]
    aligned = all(at % 16 == 0 and cols % 8 == 0 and stride % 8 == 0 for at, _, cols, stride in entries)
    device = tensors[0].device
    out = torch.empty(len(tensors), PARTS, device=device)
    squares_kernel[(len(tensors), PARTS)](
        torch.tensor(entries, dtype=torch.int64).to(device, non_blocking=True), out,
        DTYPE=DTYPES[tensors[0].dtype], ALIGNED=aligned, BLOCKS=BLOCKS, WIDTH=WIDTH, num_warps=WARPS,
    )  # fmt: skip
    return out.sum(1)
