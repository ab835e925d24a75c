"""The update of a VeLoRA weight, W read and written once: reference.grouped_.

What the step takes of memory besides is 2 / size of W in fp32; in torch it is W five times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adam import TILE, WARPS, bits, stochastic, tile

LANES = 256
VARIANTS = [  # weight, direction, weight rounded stochastically
    (torch.bfloat16, torch.bfloat16, False),
    (torch.bfloat16, torch.bfloat16, True),
    (torch.float32, torch.float32, False),
    (torch.bfloat16, torch.float32, False),
    (torch.bfloat16, torch.float32, True),
]


@triton.jit
def grouped_kernel(
    w_ptr,  # (rows, cols) of row stride `stride`, in place
    parts_ptr,  # (2, rows, cols / SIZE) fp32
    d_ptr,  # (SIZE,)
    keep_ptr,  # () fp32; read where DECAY
    row,  # (8,) fp32: reference.Column; read where NOISE
    rows,
    cols,
    stride,
    eps,
    DECAY: tl.constexpr,
    NOISE: tl.constexpr,
    SIZE: tl.constexpr,
    EVEN: tl.constexpr,  # WIDTH divides cols
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    line, col, inside, mask, element, _ = tile(tl.program_id(0), rows, cols, EVEN, BLOCKS, WIDTH)
    at = line.to(tl.int64)[:, None] * stride + col[None, :]
    groups = cols // SIZE
    d = tl.load(d_ptr + col % SIZE).to(tl.float32)[None, :]
    group = (col // SIZE)[None, :]
    top = tl.load(parts_ptr + line.to(tl.int64)[:, None] * groups + group, mask=mask, other=0.0)
    root = tl.load(parts_ptr + (line + rows).to(tl.int64)[:, None] * groups + group, mask=mask, other=1.0)
    w = tl.load(w_ptr + at, mask=mask, other=0).to(tl.float32)
    if DECAY:
        w = w * tl.load(keep_ptr)
    w = w + top * d / (root * tl.abs(d) + eps)
    if NOISE:
        w = stochastic(w, bits(element, row) >> 16)
    tl.store(w_ptr + at, w.to(w_ptr.dtype.element_ty), mask=mask)


def launch(
    w: Tensor, parts: Tensor, direction: Tensor, eps: float, keep: Tensor | None, h: Tensor | None
) -> None:
    rows, cols = w.shape
    h = h if w.dtype == torch.bfloat16 else None
    if w.numel():
        grouped_kernel[(triton.cdiv(rows, TILE // LANES) * triton.cdiv(cols, LANES),)](
            w, parts, direction, keep, h, rows, cols, w.stride(0), eps,
            DECAY=keep is not None, NOISE=h is not None, SIZE=len(direction), EVEN=cols % LANES == 0,
            BLOCKS=TILE // LANES, WIDTH=LANES, num_warps=WARPS,
        )  # fmt: skip
