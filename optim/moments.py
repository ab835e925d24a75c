"""How a rule's state is stored between updates. Arithmetic never happens here: a store loads to the working dtype
(fp32, or float64 for float64 weights), the rule computes, the store rounds.

fp32  as is (float64 weights: float64).
bf16  half the bytes. The first moment rounds to nearest. A second moment must not: with beta2 = 0.999 every one of the
      128 bf16 mantissas times 0.999 rounds back to itself, so v would never fall. It rounds stochastically, by random
      bits that are a function of (seed, element) alone, so that a resumed run draws the same ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

STORES = ("fp32", "bf16")


def init(store: str, like: Tensor) -> Tensor:
    """Zeros for one state tensor of `like`'s shape and device (meta included)."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.zeros_like(like, dtype=torch.bfloat16 if store == "bf16" else wide)


def round_to(
    x: Tensor,  # working dtype
    kept: Tensor,  # the stored tensor: gives the dtype
    nonnegative: bool,  # a second moment
    seed: Tensor,  # 0-dim integer
) -> Tensor:
    """x in the dtype of its store."""
    if kept.dtype == torch.bfloat16 and nonnegative:
        return stochastic_bf16(x, seed)
    return x.to(kept.dtype)


def stochastic_bf16(x: Tensor, seed: Tensor) -> Tensor:
    """bf16 whose expectation is x: adds 16 random bits below the bf16 mantissa of fp32 x, then truncates."""
    bits = x.float().contiguous().view(torch.int32)
    noisy = (bits + random_bits(x, seed)) & -65536
    return torch.where(torch.isfinite(x), noisy.view(torch.float32), x.float()).to(torch.bfloat16)


def random_bits(x: Tensor, seed: Tensor) -> Tensor:
    """int32 in [0, 65536) of x's shape from a counter: an integer mixer (multiply, xor-shift) over (seed, index)."""
    h = torch.arange(x.numel(), device=x.device, dtype=torch.int64).view(x.shape)
    h = (h + seed.to(torch.int64) * 0x632BE5AB) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h = ((h ^ (h >> shift)) * factor) & 0xFFFFFFFF
    return ((h ^ (h >> 16)) & 0xFFFF).to(torch.int32)
