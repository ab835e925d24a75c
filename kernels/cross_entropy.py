"""Cross-entropy and its gradient over rows of logits, in place: reference.cross_entropy_ specifies it.

One program a row. The row is read once from memory for the sum of exponentials, kept as a running maximum and
sum in each lane, four numbers at a time, and once more, from the cache, to be overwritten by its gradient: 4
bytes a bf16 logit, and 2.25 exponentials.
8192 rows of 32,000 on an H200: 0.36 ms, compiled torch 0.68 ms; a row in registers, read once, 0.41.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # lanes
WARPS = 16
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
VARIANTS = [(dtype, grad) for dtype in DTYPES for grad in (False, True)]  # logits, with the gradient


@triton.jit
def cross_entropy_kernel(
    logits,  # (rows, V) fp32 or bf16, contiguous; with GRAD overwritten
    labels,  # (rows,) int64
    nll,  # (rows,) fp32, written
    V,
    ignore,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * V
    label = tl.load(labels + row)
    valid = label != ignore
    lane = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), -1.0e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, 4 * BLOCK):
        at = start + lane
        # beyond the end: adds exp(-huge) = 0
        a = tl.load(base + at, mask=at < V, other=-1.0e30).to(tl.float32)
        b = tl.load(base + at + BLOCK, mask=at + BLOCK < V, other=-1.0e30).to(tl.float32)
        c = tl.load(base + at + 2 * BLOCK, mask=at + 2 * BLOCK < V, other=-1.0e30).to(tl.float32)
        d = tl.load(base + at + 3 * BLOCK, mask=at + 3 * BLOCK < V, other=-1.0e30).to(tl.float32)
        new = tl.maximum(top, tl.maximum(tl.maximum(a, b), tl.maximum(c, d)))
        more = tl.exp(a - new) + tl.exp(b - new) + (tl.exp(c - new) + tl.exp(d - new))
        total = total * tl.exp(top - new) + more
        top = new
    highest = tl.max(top, 0)
    lse = highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))
    target = tl.load(base + tl.where(valid, label, 0)).to(tl.float32)
    tl.store(nll + row, tl.where(valid, lse - target, 0.0))
    if GRAD:
        tl.debug_barrier()  # the label's logit is read before anything is overwritten
        for start in range(0, V, BLOCK):
            at = start + lane
            x = tl.load(base + at, mask=at < V, other=-1.0e30)
            p = tl.exp(x.to(tl.float32) - lse)
            p = tl.where(at == label, p - 1.0, p)
            tl.store(base + at, tl.where(valid, p, 0.0).to(x.dtype), mask=at < V)


def launch(logits: Tensor, labels: Tensor, grad: bool, ignore: int) -> Tensor:
    nll = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        cross_entropy_kernel[(len(logits),)](
            logits, labels, nll, logits.shape[1], ignore, GRAD=grad, BLOCK=BLOCK, num_warps=WARPS
        )
    return nll
