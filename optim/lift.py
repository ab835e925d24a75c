"""The deferred lift: between refreshes the coordinate is a real matrix C, and W rests.

    forward    y = rho (x W^T) + (x Q) C^T          the weight is rho W + C Q^T
    update     C <- keep C + N,  rho <- keep rho     N = -lr * direction; keep: decay, one number or one a row
    fold       W <- rho W + C Q^T,  C <- 0,  rho <- 1

Equal to lifting N into W at once but for rounding: W in bf16 is rounded once a period. The fold comes when a
refresh of the basis is prepared, before its first forward; the refresh step, which forms G, lifts into W. In
place throughout: compiled forwards and CUDA graphs hold the tensors.

A weight with a magnitude (magnitude.py) has a rho for each row, and A = W Q in its formulas costs no product:

    A = rho (W Q) + C,    W [Q, S] being formed when W or Q changes, once a period

which takes Q^T Q for I: with Q in bf16 A is off by 2e-4 of itself after 200 updates, its rounding by 2e-3.

Only for side=input, where the forward has x Q already, and for whole weights: that of a row shard would need
all rows of C.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import kernels

if TYPE_CHECKING:
    from .unit import Basis, Unit

OURS = ("c", "wq")  # state in the weight's dtype: C meets x Q in the forward as W meets x
SAVED = {"c", "rho", "w0"}  # of a deferred weight, beside what every method saves: w0 is W as it rests


def pays(b: Basis, tokens: int) -> bool:
    """Whether a forward and a backward with C over so many tokens cost less than the lift it replaces.

    2 T r (2 out + in) operations more against 2 r in out less, of which a magnitude's A = W Q is as many
    again. C's bytes, out r numbers, are not weighed: the choice would differ between cards, and ranks. The
    start table shows them, and running out of memory names optim.lift=now.
    """
    out = sum(u.size[0] for u in b.units)
    products = 2 if b.units[0].mag else 1
    return tokens * (2 * out + b.n) < products * b.n * out


def begin(u: Unit, wide: torch.dtype) -> None:
    """State of a weight that nothing is kept beside yet: C and rho with rows of padding, as the forward meets
    them."""
    assert u.q is not None
    w = u.param.detach()
    u.state["c"] = w.new_zeros(len(w), u.q.r)
    if u.mag or u.decay:
        u.state["rho"] = w.new_ones(len(w) if u.mag else (), dtype=wide)
    if u.mag:
        u.state["wq"] = w.new_zeros(len(u.w), u.q.r + u.q.k)


def step_(u: Unit, n: Tensor, keep: Tensor | None, h: Tensor | None) -> None:
    """C <- keep C + N, rho <- keep rho; keep 0-dim, None without decay. Rounded as W would be: kernels.lift_.
    Of a weight with a magnitude it is kernels.magnitude_ that does this."""
    c = u.state["c"][: len(n)]
    if keep is None and (h is None or c.dtype != torch.bfloat16):
        c.add_(n)
    else:
        kernels.rows_(c, n, keep, None, h)
    if keep is not None:
        u.state["rho"].mul_(keep)


def fold_(w: Tensor, c: Tensor, qs: Tensor, rho: Tensor | None, h: Tensor | None = None) -> None:
    """W <- rho W + C Q^T, Q being the first columns of qs; h: see kernels.lift_."""
    kernels.lift_(w, c, qs[:, : c.shape[1]].t(), rho, None, h)


def clear_(c: Tensor, rho: Tensor | None) -> None:
    """Nothing is kept beside W."""
    c.zero_()
    if rho is not None:
        rho.fill_(1)


def reproject(u: Unit) -> None:
    """W [Q, S] anew, where it is kept: after W or Q has changed."""
    if "wq" in u.state:
        assert u.q is not None
        w = u.w.detach()
        torch.mm(w, u.q.qs.to(w.dtype), out=u.state["wq"])


def beside(u: Unit) -> tuple[Tensor, Tensor]:
    """C (out, r) and rho (out,) of a weight with a magnitude, without padding."""
    c, rho = (u.state[k][: len(u.state["wq"])] for k in ("c", "rho"))
    return c, rho


def load_(u: Unit, saved: dict[str, Tensor]) -> None:
    """W as it rested and what was beside it; a save of another kind (lift=now, decay switched on or off):
    W is the whole weight, as it was loaded with the model, and nothing is beside it."""
    mine = {k: t for k, t in u.trim(u.state).items() if k in SAVED} | {"w0": u.w[:, : u.size[1]].detach()}
    if SAVED & saved.keys() == mine.keys():
        for k, t in mine.items():
            t.copy_(saved[k])
    else:
        clear_(u.state["c"], u.state.get("rho"))
    reproject(u)
