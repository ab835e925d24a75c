"""How a rule's state is stored; arithmetic is in fp32 (float64 weights: float64) whatever the store.

fp32  as is (float64 weights: float64).
bf16  half the bytes. The first moment rounds to nearest, the second stochastically; kernels.reference.adam
      says why.
"""

from __future__ import annotations

import torch
from torch import Tensor


def init(store: str, like: Tensor) -> Tensor:
    """Zeros for one state tensor of `like`'s shape and device (meta included)."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.zeros_like(like, dtype=torch.bfloat16 if store == "bf16" else wide)
