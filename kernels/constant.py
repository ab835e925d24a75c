"""Numbers from the host on the device: address tables, indices, sizes. Never read back.

A CUDA graph would copy them anew in each replay, from host memory that is long gone. So while one is captured
they are copied at once, on a stream beside it, and live as long as it: `kept` is the graph's.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

kept: list[Tensor] = []


def capturing(device: torch.device) -> bool:
    """Whether what is launched now is recorded in a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def constant(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of `values` (nested lists, or a tensor on the host) on the device; nothing waits."""
    host = torch.as_tensor(values, dtype=dtype)
    if not capturing(device):
        return host.to(device, non_blocking=True)
    with torch.cuda.stream(_beside(device)):
        kept.append(host.to(device))
    return kept[-1]


@cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    # torch hands out 32 streams of a priority in turn; one of high priority is never the captured one.
    return torch.cuda.Stream(device, priority=-1)
