"""8-bit moments under a new column scale, in one pass over codes and block scales: reference.rescale_.

Both moments of 11008 x 1024 take 0.10 ms on an H200; in plain torch, some forty passes in fp32, 1.04 ms.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .adam import TILE, WARPS, ZERO, number, rounded, tile
from .reference import FLOOR, QUANT, SECOND

LEAST = tl.constexpr(FLOOR)


@triton.jit
def rescale_kernel(
    code_ptr,  # (rows, cols) int8, or uint8
    scale_ptr,  # (rows, ceil(cols / WIDTH)) fp32
    ratio_ptr,  # (cols,) fp32: old column scale over the new one; of a second moment squared
    rows,
    cols,
    SIGNED: tl.constexpr,
    EVEN: tl.constexpr,  # WIDTH divides cols
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    _, col, inside, mask, at, unit = tile(tl.program_id(0), rows, cols, EVEN, BLOCKS, WIDTH)
    scale = tl.load(scale_ptr + unit, mask=inside, other=0.0)[:, None]
    ratio = tl.load(ratio_ptr + col, mask=col < cols, other=0.0)[None, :]
    x = number(tl.load(code_ptr + at, mask=mask, other=0), SIGNED)
    if SIGNED:
        x = x * (1 / 127) * scale * ratio
        largest = tl.maximum(tl.max(tl.abs(x), 1), LEAST)
        code = rounded(x * (127 / largest)[:, None]).to(tl.int8)
    else:
        x = x * (1 / 255)
        x = x * x * scale * ratio
        largest = tl.maximum(tl.max(x, 1), LEAST)
        code = rounded(tl.sqrt(x) * (255 / tl.sqrt(largest))[:, None])
        code = tl.where((x > 0) & (code == ZERO), code + 1, code).to(tl.uint8)
    tl.store(code_ptr + at, code, mask=mask)
    tl.store(scale_ptr + unit, largest, mask=inside)


def launch(state: dict[str, Tensor], names: tuple[str, ...], d: Tensor) -> None:
    ratio = state["d"] / d
    state["d"].copy_(d)
    for name in names:
        second, codes = name in SECOND, state[name]
        rows, cols = codes.shape
        width = min(QUANT, max(16, triton.next_power_of_2(cols)))
        blocks = TILE // width
        if codes.numel():
            rescale_kernel[(triton.cdiv(rows, blocks) * triton.cdiv(cols, width),)](
                codes, state[f"{name}_scale"], ratio * ratio if second else ratio, rows, cols,
                SIGNED=not second, EVEN=cols % width == 0, BLOCKS=blocks, WIDTH=width, num_warps=WARPS,
            )  # fmt: skip
