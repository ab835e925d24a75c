"""Squares of reduced gradients: what the basis holds, and the estimate of the whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import kernels
from .unit import PROBE, Unit


class Landed(NamedTuple):
    """A reduced gradient."""

    kind: str  # dense | probed | whole: formed on a refresh step
    unit: Unit
    r: Tensor  # R, or a dense parameter's gradient
    rest: Tensor  # probed: Z; whole: G; dense: r
    s: Tensor | None = None  # gradient of the magnitude; R, Z and G are then the direction's
    a: Tensor | None = None  # W Q beside it, on the input side


def squares(batch: list[Landed], dtype: torch.dtype) -> Iterator[tuple[list[Unit], Tensor]]:
    """Units of one kind, and (n, 2) of `dtype`: captured ||R||^2, and ||G||^2, exact where G is known.

    Of a weight with a magnitude both are of the direction's gradient, and hold the magnitude's besides."""
    for kind in ("dense", "probed", "whole"):
        for own in (True, False):  # with a basis of rows alone, or none: one kernel reads R once
            some = [x for x in batch if x.kind == kind and (x.unit.p is None) == own]
            some.sort(key=lambda x: x.unit.index)
            units, rs, rests = [x.unit for x in some], [x.r for x in some], [x.rest for x in some]
            if not some:
                continue
            if kind == "dense":
                captured = estimate = kernels.squares(rs, dtype)
            elif kind == "whole":
                captured, estimate = kernels.squares([*rs, *rests], dtype).view(2, -1)
            else:
                if own:
                    crosses = [u.q.cross.to(r.dtype) for u, r in zip(units, rs, strict=True) if u.q]
                    captured, rest = kernels.probe_squares(rs, rests, crosses, dtype)
                else:
                    rests = [x.unit.outside(x.r, x.rest) for x in some]
                    captured, rest = kernels.squares([*rs, *rests], dtype).view(2, -1)
                estimate = captured + rest / PROBE
            sums = [x.s for x in some if x.s is not None]  # of all these units or of none
            if sums:
                more = kernels.squares(sums, dtype)
                captured, estimate = captured + more, estimate + more
            yield units, torch.stack([captured, estimate], 1)
