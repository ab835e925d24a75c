"""How a rule's state is stored; arithmetic is in fp32 (float64 weights: float64) whatever the store.

fp32  as is (float64 weights: float64).
bf16  half the bytes. What is never negative, "v", rounds stochastically; kernels.save_ says why.
int8  a quarter: a byte a number and an fp32 scale for 256 of them, kernels.quantise. Tensors with fewer
      than two dimensions stay fp32.

A rule written in plain torch reads with `load(state, name, wide)`, computes, and writes with
`save_(state, name, value, ok, t, index)`, or `push_` for one of several; it never sees the store.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import kernels

STORES = ("fp32", "bf16", "int8")
load, save_, push_ = kernels.load, kernels.save_, kernels.push_


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic on weights of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def init(
    store: str,  # fp32 | bf16 | int8
    shape: Sequence[int],
    device: torch.device | str,  # meta included
    wide: torch.dtype,  # fp32, float64 for float64 weights
    names: Sequence[str] = ("m", "v"),
) -> dict[str, Tensor]:
    """Zeros: a state tensor a name, and in 8 bit its scales beside it, (rows, ceil(cols / 256)) fp32."""
    state = {}
    for name in names:
        if store == "int8" and len(shape) > 1:
            codes = torch.uint8 if name in kernels.SECOND else torch.int8
            state[name] = torch.zeros(tuple(shape), dtype=codes, device=device)
            *rows, cols = shape
            blocks = (torch.Size(rows).numel(), -(-cols // kernels.QUANT))
            state[f"{name}_scale"] = torch.zeros(blocks, device=device)
        else:
            dtype = torch.bfloat16 if store == "bf16" else wide
            state[name] = torch.zeros(tuple(shape), dtype=dtype, device=device)
    return state
