"""The projected linear layer: y = x W^T, and in backward the gradient of W in coordinates, never W's own.

    input    R = G Q  = dY^T (x Q)        (out, r)   saves x Q instead of x
    VeLoRA   the same, Q = I (x) v        (out, n/m) saves x Q: of m numbers in a row their product with v
    output   R = P^T G = (dY P)^T x       (r, in)    saves x
    both     R = P^T G Q = (dY P)^T (x Q) (r, r)     saves x Q
    refresh  R = G = dY^T x               (out, in)  saves x: for the step in which a new basis is found

G = dY^T x is the gradient that autograd would form. R is the gradient of a *coordinate*: a zero scalar
expanded to R's shape, a leaf of four bytes that the optimizer owns and hooks. W takes no gradient.
Coordinates and bases are plain attributes, not Parameters or buffers: state_dict, parameters(), copies and
saved files are those of the plain model.

Beside the basis stand k Gaussian columns S, the norm probe: [Q, S] is one tensor, so that one product gives
x Q and x S, and [R, Z] with Z = G S comes out of one product too (both: Z has a coordinate of its own).

A weight with a magnitude (magnitude.py) has one more coordinate, (out, 1) in the dtype of sums: its gradient
is the sum over tokens of dY * y, for which y = x W^T is saved. On the output side P^T takes dY by row factor.

With the lift deferred (lift.py) the weight is rho W + C Q^T: y = rho (x W^T) + (x Q) C^T, and dX takes
(dY C) Q^T. state_dict, copies and pickles then hold the whole weight.

A second backward through one graph raises autograd's version error once W was updated inside the first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .lift import clear_, fold_


def coordinate(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A leaf of this shape that stores one number; its dtype is the one in which micro-batches are summed."""
    return torch.zeros((), dtype=dtype, device=device).expand(*shape).requires_grad_()


def _product(x: Tensor, w: Tensor, xq: Tensor | None, c: Tensor | None, rho: Tensor | None) -> Tensor:
    """rho (x W^T) + (x Q) C^T, (..., out); c None: x W^T. xq may have columns beyond Q's."""
    y = F.linear(x, w)
    if c is None or xq is None:
        return y
    if rho is not None:
        y = (y * rho).to(y.dtype)
    xq = xq[..., : c.shape[1]].reshape(-1, c.shape[1])
    return torch.addmm(y.reshape(-1, len(c)), xq.to(y.dtype), c.to(y.dtype).t()).view(y.shape)


class _Project(torch.autograd.Function):
    """-> the weight's product with x. p, q None: the identity; probe, mag, factor, c, rho None: there is
    none."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        coord: Tensor,
        probe: Tensor | None,
        p: Tensor | None,
        q: Tensor | None,
        mag: Tensor | None,
        factor: Tensor | None,
        c: Tensor | None,
        rho: Tensor | None,
    ) -> Tensor:
        if q is None:
            kept = x
        else:
            wide = torch.promote_types(x.dtype, q.dtype)  # the same dtype but for a basis kept wider
            kept = x.to(wide)
            if q.ndim == 1:  # under compile one with what makes x; columns of padding are in no group
                kept = kept[..., : coord.shape[1] * len(q)].unflatten(-1, (-1, len(q)))
            kept = kept @ q.to(wide)
        y = _product(x, w, kept, c, rho)
        ctx.save_for_backward(
            kept, w, p, None if mag is None else y, factor, c, rho, None if c is None else q
        )
        ctx.columns = None if probe is None else coord.shape[1]
        ctx.wide = None if mag is None else mag.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept, w, p, y, factor, c, rho, q = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy if rho is None else (dy * rho).to(dy.dtype)) @ w
            if c is not None:  # the probe's columns have no part in it
                dx = dx + (dy @ c) @ q[:, : c.shape[1]].to(dy.dtype).t()
        kept = kept.reshape(-1, kept.shape[-1])
        left = dy = dy.reshape(-1, dy.shape[-1])
        s = None
        if ctx.wide is not None:
            s = (dy.to(ctx.wide) * y.reshape(dy.shape).to(ctx.wide)).sum(0)[:, None]
        if factor is not None:
            left = (dy * factor).to(dy.dtype)
        if p is not None:
            wide = torch.promote_types(dy.dtype, p.dtype)
            left = left.to(wide) @ p.to(wide)
        if ctx.columns is None:
            z = None
        else:
            kept, probed = kept[:, : ctx.columns], kept[:, ctx.columns :]
            z = dy.to(probed.dtype).t() @ probed
        wide = torch.promote_types(left.dtype, kept.dtype)
        return dx, None, left.to(wide).t() @ kept.to(wide), z, None, None, s, None, None, None


class ProjectedLinear(nn.Linear):
    """An nn.Linear whose class was changed by `project`; `unproject` changes it back."""

    coord: Tensor  # what R is the gradient of
    probe: Tensor | None  # side both: what Z is the gradient of
    full: Tensor  # the identity basis' coordinate (out, in)
    p: Tensor | None  # [P, S] (out, r + k); side both: P (out, r)
    q: Tensor | None  # [Q, S] (in, r + k); VeLoRA: v (m,)
    mag: Tensor | None  # what the sum of dY * y is the gradient of (out, 1)
    factor: Tensor | None  # with a magnitude, output side: of rows (out,)
    c: Tensor | None  # lift deferred: C (out, r)
    rho: Tensor | None  # and with decay or a magnitude: of W, () or of its rows (out,)
    refresh: bool  # this step forms G
    moved: Callable[[], None]  # called after .to(), .cuda(), .bfloat16(), to_empty()

    def forward(self, x: Tensor) -> Tensor:
        grad, c = torch.is_grad_enabled(), self.c
        if not grad and c is None:
            return F.linear(x, self.weight, self.bias)
        w: Tensor = self.weight
        bias: Tensor | None = self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, w = x.to(dtype), w.to(dtype)
            c = None if c is None else c.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        if not grad:
            assert c is not None and self.q is not None
            y = _product(x, w, x @ self.q[:, : c.shape[1]].to(x.dtype), c, self.rho)
        elif self.refresh:  # C was folded
            y = _Project.apply(x, w, self.full, None, None, None, None, None, None, None)
        else:
            y = _Project.apply(
                x, w, self.coord, self.probe, self.p, self.q, self.mag, self.factor, c, self.rho
            )
        return y if bias is None else y + bias

    def _apply(self, fn: Any, recurse: bool = True) -> ProjectedLinear:
        super()._apply(fn, recurse)
        self.moved()
        return self

    def folded(self) -> Tensor | None:
        """The weight, a new tensor rounded to nearest, where it is more than the parameter; else None."""
        if self.c is None or self.q is None:
            return None
        w = self.weight.detach().clone()
        fold_(w, self.c, self.q, self.rho)
        return w

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        whole = self.folded()
        if whole is not None:
            destination[prefix + "weight"] = whole

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """A loaded weight is whole: nothing is beside it, until optimizer state is loaded too."""
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[no-untyped-call]
        if self.c is not None and prefix + "weight" in state_dict:
            clear_(self.c, self.rho)
            self.moved()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """A deepcopy or a pickle is a plain trainable nn.Linear: nobody would hook a copy's coordinate."""
        state, whole = {k: v for k, v in self.__dict__.items() if k not in ATTRIBUTES}, self.folded()
        if whole is not None:
            state["_parameters"] = {**state["_parameters"], "weight": nn.Parameter(whole)}
        return _plain, (state,)


ATTRIBUTES = (
    "coord", "probe", "full", "p", "q", "mag", "factor", "c", "rho", "refresh", "moved", "adapter", "i", "j"
)  # fmt: skip


def _plain(state: dict[str, Any]) -> nn.Linear:
    layer = nn.Linear.__new__(nn.Linear)
    layer.__setstate__(state)
    layer.weight.requires_grad_(True)
    return layer


def project(layer: nn.Linear) -> ProjectedLinear:
    """Changes the layer's class; the engine sets coordinates, bases and `moved` before the first forward."""
    assert type(layer) is nn.Linear, type(layer)
    layer.__class__ = ProjectedLinear
    assert isinstance(layer, ProjectedLinear)
    layer.weight.requires_grad_(False)
    layer.probe = layer.p = layer.q = layer.mag = layer.factor = layer.c = layer.rho = None
    layer.refresh = False
    return layer


def unproject(layer: ProjectedLinear) -> None:
    for name in ATTRIBUTES:
        layer.__dict__.pop(name, None)
    layer.__class__ = nn.Linear  # type: ignore[assignment]
    layer.weight.requires_grad_(True)
