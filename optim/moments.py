"""temporary"""

import torch
from torch import Tensor

SECOND = ("v",)


def init(store, shape, device, wide, names=("m", "v")):
    return {
        k: torch.zeros(shape, device=device, dtype=torch.bfloat16 if store == "bf16" else wide) for k in names
    }


def load(state, name, wide):
    return state[name].to(wide, copy=True)


def save_(state, name, value, ok, t, index):
    state[name].copy_(torch.where(ok > 0, value, state[name].to(value.dtype)))
