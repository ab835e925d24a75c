"""Sums of squares of many tensors in one launch: reference.squares, reference.probe_squares.

torch's multi-tensor norm takes contiguous tensors only; of R in [R, Z], (out, r) of (out, r + k), it falls
back to one slow reduction each, 3% of a 7B step. Here program (i, p) adds up tiles p, p + PARTS, ... of
tensor i. The order of additions depends on the shapes alone: the same bits in every run.

probe_kernel reads [R, Z] once for both its sums; a product for each matrix and squares_kernel took 4 + 3 ms.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from .constant import constant
from .reference import PROBE

PARTS = 64  # programs of a tensor; a batch holds some ten, an H200 132 processors
# and of one that has so many numbers, embeddings and head, of which there are two
MANY, LARGE = 512, 2**24
BLOCKS, WIDTH, WARPS = 8, 256, 4
LINES, ACROSS = 64, 128  # a tile of R in probe_kernel
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


@triton.jit
def squares_kernel(
    entries,  # (tensors, 5) int64: address, rows, columns, row stride, programs
    out,  # (tensors, width) fp32, zeros
    width,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,  # every row begins and ends on 16 bytes
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    tensor, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    entry = entries + 5 * tensor
    x_ptr = tl.load(entry).to(tl.pointer_type(DTYPE))
    rows, cols, stride, parts = (
        tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4),
    )  # fmt: skip
    if ALIGNED:
        x_ptr = tl.multiple_of(x_ptr, 16)
        cols, stride = tl.multiple_of(cols, 8), tl.multiple_of(stride, 8)
    across = tl.cdiv(cols, WIDTH)
    total = tl.zeros((BLOCKS, WIDTH), tl.float32)
    tiles = tl.cdiv(rows, BLOCKS) * across
    for tile in range(tl.where(part < parts, part, tiles), tiles, parts):
        line = (tile // across) * BLOCKS + tl.arange(0, BLOCKS)
        col = (tile % across) * WIDTH + tl.arange(0, WIDTH)
        mask = (line < rows)[:, None] & (col < cols)[None, :]
        x = tl.load(x_ptr + line[:, None] * stride + col[None, :], mask=mask, other=0).to(tl.float32)
        total += x * x
    tl.store(out + tensor * width + part, tl.sum(total))


@triton.jit
def probe_kernel(
    entries,  # (tensors, 7) int64: addresses of R, Z and Q^T S, rows, rank, row strides of R and Z
    out,  # (2, tensors, PARTS) fp32
    DTYPE: tl.constexpr,
    FACTOR: tl.constexpr,  # of the product; the interpreter has no bf16 one
    ALIGNED: tl.constexpr,  # every row of R begins and ends on 16 bytes
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
):
    tensor, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    entry = entries + 7 * tensor
    r_ptr = tl.load(entry).to(tl.pointer_type(DTYPE))
    z_ptr = tl.load(entry + 1).to(tl.pointer_type(DTYPE))
    cross_ptr = tl.load(entry + 2).to(tl.pointer_type(DTYPE))
    rows, rank = tl.load(entry + 3), tl.load(entry + 4)
    r_stride, z_stride = tl.load(entry + 5), tl.load(entry + 6)
    if ALIGNED:
        r_ptr = tl.multiple_of(r_ptr, 16)
        rank, r_stride = tl.multiple_of(rank, 8), tl.multiple_of(r_stride, 8)
    probe = tl.arange(0, K)
    captured = tl.zeros((LINES, WIDTH), tl.float32)
    rest = tl.zeros((LINES, K), tl.float32)
    for tile in range(part, tl.cdiv(rows, LINES), parts):
        line = tile * LINES + tl.arange(0, LINES)
        inside = (line < rows)[:, None]
        held = tl.zeros((LINES, K), tl.float32)
        for start in range(0, rank, WIDTH):
            col = start + tl.arange(0, WIDTH)
            mask = inside & (col < rank)[None, :]
            r = tl.load(r_ptr + line[:, None] * r_stride + col[None, :], mask=mask, other=0)
            cross_at = cross_ptr + col[:, None] * K + probe[None, :]
            cross = tl.load(cross_at, mask=(col < rank)[:, None], other=0)
            held = tl.dot(r.to(FACTOR), cross.to(FACTOR), acc=held, input_precision="ieee")
            wide = r.to(tl.float32)
            captured += wide * wide
        z = tl.load(z_ptr + line[:, None] * z_stride + probe[None, :], mask=inside, other=0)
        outside = z.to(tl.float32) - held
        rest += outside * outside
    tl.store(out + tensor * parts + part, tl.sum(captured))
    tl.store(out + (tl.num_programs(0) + tensor) * parts + part, tl.sum(rest))


def entry(x: Tensor) -> tuple[int, int, int, int]:
    """How the kernel sees a tensor: flat in rows of WIDTH where that is possible."""
    if x.is_contiguous():
        cols = WIDTH if x.numel() % WIDTH == 0 else x.shape[-1] if x.ndim else 1
        return x.data_ptr(), x.numel() // cols if cols else 0, cols, cols
    return x.data_ptr(), x.shape[0], x.shape[1], x.stride(0)


def launch(tensors: list[Tensor]) -> Tensor:
    entries = [(*entry(x), MANY if x.numel() >= LARGE else PARTS) for x in tensors]
    aligned = all(at % 16 == 0 and cols % 8 == 0 and stride % 8 == 0 for at, _, cols, stride, _ in entries)
    device = tensors[0].device
    out = torch.zeros(len(tensors), MANY, device=device)  # one width, so that all are added in one order
    squares_kernel[(len(tensors), max(parts for *_, parts in entries))](
        constant(entries, torch.int64, device), out, MANY,
        DTYPE=DTYPES[tensors[0].dtype], ALIGNED=aligned, BLOCKS=BLOCKS, WIDTH=WIDTH, num_warps=WARPS,
    )  # fmt: skip
    return out.sum(1)


def launch_probe(rs: list[Tensor], zs: list[Tensor], crosses: list[Tensor]) -> Tensor:
    entries = [
        (r.data_ptr(), z.data_ptr(), c.data_ptr(), *r.shape, r.stride(0), z.stride(0))
        for r, z, c in zip(rs, zs, crosses, strict=True)
    ]
    aligned = all(
        at % 16 == 0 and rank % 8 == 0 and stride % 8 == 0 for at, _, _, _, rank, stride, _ in entries
    )
    device, dtype = rs[0].device, DTYPES[rs[0].dtype]
    factor = tl.float32 if "TRITON_INTERPRET" in os.environ else dtype
    out = torch.empty(2, len(rs), PARTS, device=device)
    probe_kernel[(len(rs), PARTS)](
        constant(entries, torch.int64, device), out,
        DTYPE=dtype, FACTOR=factor, ALIGNED=aligned, LINES=LINES, WIDTH=ACROSS, K=PROBE, num_warps=WARPS,
    )  # fmt: skip
    return out.sum(2)
