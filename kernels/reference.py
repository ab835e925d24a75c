"""What the kernels compute, in plain torch, in any float dtype. These functions are the specification."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor


class Column(IntEnum):
    """Columns of a parameter's row of per-step scalars: on the device, never read by the host."""

    LR = 0  # the parameter's own, scale included
    KEEP = 1  # 1 - lr * decay
    CLIP = 2  # coefficient on the gradient
    OK = 3  # 0: the gradient is not finite, skip
    T = 4  # updates of this parameter, this one included
    INDEX = 5  # of the parameter: tells random numbers apart
    FIX1 = 6  # the rule's own: for Adam 1 - beta1^t
    FIX2 = 7  # and 1 - beta2^t


def adam(
    w: Tensor,  # (n,) weights, any float dtype, updated in place
    g: Tensor,  # (n,) gradient, any float dtype
    m: Tensor,  # (n,) first moment, fp32, bf16 or (float64 weights) float64, in place
    v: Tensor,  # (n,) second moment, likewise, in place
    h: Tensor,  # (8,) fp32 or float64: Column
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One AdamW update (Loshchilov and Hutter, Algorithm 2), all in fp32 (float64 weights: float64).

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  w <- keep w - lr (m / fix1) / (sqrt(v / fix2) + eps)

    eps is added to the corrected root, as in the paper and in torch.optim.AdamW. The fresh moments are used
    before they are rounded to their store. A bf16 v rounds stochastically, seeded by (t, index, element):
    with beta2 = 0.999 every one of the 128 bf16 mantissas times 0.999 rounds back to itself, so nearest
    rounding would never let v fall. Where ok is 0 nothing changes.
    """
    wide = torch.float64 if w.dtype == torch.float64 else torch.float32
    ok = h[Column.OK] > 0
    g = g.to(wide) * h[Column.CLIP]
    new_m = beta1 * m.to(wide) + (1 - beta1) * g
    new_v = beta2 * v.to(wide) + (1 - beta2) * g * g
    direction = (new_m / h[Column.FIX1]) / (torch.sqrt(new_v / h[Column.FIX2]) + eps)
    w.copy_(torch.where(ok, w.to(wide) * h[Column.KEEP] - h[Column.LR] * direction, w.to(wide)))
    m.copy_(torch.where(ok, new_m, m.to(wide)))
    stored = stochastic_bf16(new_v, h[Column.T], h[Column.INDEX]) if v.dtype == torch.bfloat16 else new_v
    v.copy_(torch.where(ok, stored, v))


def stochastic_bf16(x: Tensor, t: Tensor, index: Tensor) -> Tensor:
    """bf16 whose expectation is fp32 x (n,): adds 16 random bits below the mantissa, then truncates."""
    x = x.float()
    noisy = (x.view(torch.int32) + random_bits(x.numel(), t, index)) & -65536
    return torch.where(torch.isfinite(x), noisy.view(torch.float32), x).to(torch.bfloat16)


def random_bits(n: int, t: Tensor, index: Tensor) -> Tensor:
    """int32 (n,) in [0, 65536), a function of (t, index, element): multiplies and xor-shifts of integers."""
    seed = t.to(torch.int64) * 0x9E3779B1 + index.to(torch.int64) * 0x632BE5AB
    h = (torch.arange(n, device=t.device, dtype=torch.int64) + seed) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h = ((h ^ (h >> shift)) * factor) & 0xFFFFFFFF
    return ((h ^ (h >> 16)) & 0xFFFF).to(torch.int32)


def cross_entropy_(
    logits: Tensor,  # (n, V) any float dtype; with grad overwritten by their gradient
    labels: Tensor,  # (n,) int64, `ignore` where nothing is to be predicted
    grad: bool,
    ignore: int = -100,
) -> Tensor:
    """Token losses (n,), fp32 (float64 logits: float64): logsumexp(logits) - logits[label], 0 where ignored.

    With grad the logits become the gradient of the plain sum, softmax - onehot, zero rows where ignored.
    """
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    valid = labels != ignore
    lse = torch.logsumexp(x, dim=1)
    target = x.gather(1, torch.where(valid, labels, 0)[:, None])[:, 0]
    if grad:
        hit = torch.arange(x.shape[1], device=x.device) == labels[:, None]
        p = torch.exp(x - lse[:, None])
        logits.copy_(torch.where(valid[:, None], torch.where(hit, p - 1.0, p), 0.0))
    return torch.where(valid, lse - target, 0.0)
