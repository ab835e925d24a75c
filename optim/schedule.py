"""Learning rate as a pure function of the step: resuming, in-backward updates and ranks cannot disagree.

Warm-up is linear over S_w = round(warmup * steps) updates; then cosine or linear down to min_lr_ratio, or
constant. Step s counts updates from 1: the first one is never wasted at lr 0, the last (s = steps) runs at
exactly min_lr_ratio (for schedule=constant: 1). Published code starts at s = 0 and takes one update too many.
"""

from __future__ import annotations

import math


def factor(step: int, steps: int, *, schedule: str, warmup: float, min_lr_ratio: float) -> float:
    """Multiplier of the peak learning rate for update `step` (1-based) of `steps`."""
    if not 1 <= step <= steps:
        raise ValueError(f"step={step}: updates are numbered 1..{steps}")
    warm = round(warmup * steps)
    if step <= warm:
        return step / warm
    if schedule == "constant":
        return 1.0
    p = (step - warm) / (steps - warm)  # in (0, 1]
    if schedule == "linear":
        return 1.0 + (min_lr_ratio - 1.0) * p
    if schedule == "cosine":
        return min_lr_ratio + (1.0 - min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * p))
    raise ValueError(f"optim.schedule={schedule}: use cosine, linear or constant")
