"""Magnitude and direction: W = mag V / n with n = ||V_row||, one number of each a row; V is never stored.

GradNormLoRP (arXiv 2412.19616) in its direct form: weight normalisation of the stored weight, the direction's
gradient in a basis. From G = dL/dW, with c = mag / n:

    s = rowsum(G * W) / mag            dL/d mag
    D = c (G - s / mag W)              dL/dV, each row orthogonal to V's

In coordinates, R = G Q and the sum over tokens of dY * y = rowsum(G * W) being linear in the data:

    input side    D Q   = c (R - s / mag A),  A = W Q
    output side   P^T D = P^T c G - P^T diag(s / n) W;  the layer forms the first term, dY scaled before P

An update by N, the step of V in coordinates, and of mag, both from the old W:

    n'^2 = n^2 + 2 rowsum(V * dV) + rowsum(dV * dV),  dV = back(N)      no pass over W on the input side
    W'   = (mag' n) / (n' mag) W + mag' / n' dV

Decay multiplies W and mag alike. In bf16 a row and its mag drift apart: at a refresh, and every READ updates,
mag becomes the norm of the row as it is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernels, lift
from .unit import Unit

LEAST = 1e-8  # of |mag| over the root of in_features: what is divided by
ROWS = 1024  # of G are cast at a time
READ = 64  # 0.2 GB more to read in a step at 7B; read back every 250 only, 60M's rows were 1.0e-3 off
Column = kernels.Column


def begin(u: Unit, w: Tensor) -> None:
    """mag = n = row norms, for weights that have not been trained yet. ValueError for a row of zeros."""
    norms = torch.linalg.vector_norm(w, dim=1, dtype=u.state["mag"].dtype)
    refuse_zeros(norms, u.name)
    for name in ("mag", "n"):
        u.state[name].copy_(norms)
    lift.reproject(u)


def refuse_zeros(norms: Tensor, name: str) -> None:
    zeros = int((norms == 0).sum())
    if zeros:
        raise ValueError(
            f"{name}: {zeros} of {len(norms)} rows are zero; they have no direction and would stay zero "
            "under gradnormlorp. Initialise them, or choose another method"
        )


def resume(u: Unit, w: Tensor) -> None:
    """mag = the row norms of W as stored, its sign kept; V, and so n, as before."""
    norms = torch.linalg.vector_norm(w, dim=1, dtype=u.state["mag"].dtype)
    u.state["mag"].copy_(torch.where(u.state["mag"] < 0, -norms, norms))
    _refactor(u)


def read_back(units: list[Unit], updates: int) -> None:
    """`resume` for all, every READ updates; but where W is a part: there each refresh does."""
    if updates % READ == 0:
        for u in (u for u in units if u.mag and not u.deferred):
            resume(u, u.w)


def restart(u: Unit) -> None:
    """The moments of mag begin anew with those of the direction: they share the count of updates."""
    u.state["mag_m"].zero_()
    u.state["mag_v"].zero_()


def least(w: Tensor) -> float:
    return LEAST * float(w.shape[1] ** 0.5)


def _refactor(u: Unit) -> None:
    if "factor" in u.state:
        u.state["factor"][: len(u.state["n"])].copy_(u.state["mag"] / u.state["n"])


def direction(u: Unit, w: Tensor, grads: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """From the leaves' gradients, [R, Z] and the sums of dY * y: [D Q, D S], s (rows,), and [A, W S] where
    it was formed."""
    both, sums = grads
    mag, n = u.state["mag"], u.state["n"]
    if u.p is not None:
        s = sums[:, 0] / kernels.divisor(mag, least(w))
        left = (u.p.own.to(mag.dtype) * (s / n)[:, None]).to(w.dtype)
        return [both - (left.t() @ w).to(both.dtype)], s, None
    assert u.q is not None
    if u.rests:
        c, rho = lift.beside(u)
        beside = (c, c @ u.q.cross.to(c.dtype), rho)
        return [both], kernels.tangent_(both, u.state["wq"], sums[:, 0], mag, n, least(w), beside), None
    a = w @ u.q.qs.to(w.dtype)
    return [both], kernels.tangent_(both, a.to(both.dtype), sums[:, 0], mag, n, least(w)), a


def direction_of_(u: Unit, w: Tensor, g: Tensor) -> Tensor:
    """A whole gradient G (rows, in) becomes D in place; s (rows,)."""
    mag, n = kernels.divisor(u.state["mag"], least(w)), u.state["n"]
    s = g.new_empty(len(g), dtype=mag.dtype)
    for start in range(0, len(g), ROWS):
        at = slice(start, start + ROWS)
        part, own = g[at].to(mag.dtype), w[at].to(mag.dtype)
        s[at] = (part * own).sum(1) / mag[at]
        g[at] = ((mag[at] / n[at])[:, None] * (part - (s[at] / mag[at])[:, None] * own)).to(g.dtype)
    return s


def step_(
    u: Unit,
    w: Tensor,  # (rows, in), in place
    step: Tensor,  # N, -lr * direction in coordinates
    s: Tensor,  # (rows,)
    a: Tensor | None,  # (rows, r or more) W Q; None where direction gave none
    h: Tensor,  # the unit's row of the table: kernels.Column
) -> None:
    """mag, n and W after one update; nothing changes where the gradient is not finite."""
    assert u.mag is not None
    rule, wide = u.mag.rule, u.state["n"].dtype
    if u.p is None:
        a = u.state["wq"] if u.rests else a
        assert a is not None and u.q is not None
        left, right = step, u.q.q.t()
        x, a, b = step, a[:, : step.shape[1]], step
    else:
        left, right, dv = u.p.q, step, step.to(wide)
        x = left.to(wide).contiguous()  # S stands beside P
        a, b = w @ step.t().to(w.dtype), x @ (dv @ dv.t())
    rate, betas = u.mag.rate / u.scale, (rule.beta1, rule.beta2, rule.eps)
    beside = lift.beside(u) if u.rests else None
    keep, factor = kernels.magnitude_(u.state, s, x, a, b, h, rate, *betas, least(w), beside, u.noise)
    if beside:  # C has taken the step; the rows' lengths are read at the fold's refresh
        return
    kernels.lift_(w, left, right, keep, factor, h if u.noise else None)
    lift.reproject(u)
    _refactor(u)
