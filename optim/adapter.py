"""Adapters: W = mag (W0 + I J) / n, n the row norms of W0 + I J. W0 rests; I, J and mag are trained.

GradNormLoRP (arXiv 2412.19616), Definition 1. I (out, r) starts at zero, J (r, in) uniform in +-1/sqrt(in),
mag as the row norms of W0. The gradients of I and J are small and formed whole; a unit each, with a basis on
both sides, projects them to (p, p). Neither W nor its gradient exists. With c = mag / n, per output row:

    forward    y = c (x W0^T + (x J^T) I^T)
    n^2        = ||W0||^2 + 2 rowsum(A * I) + rowsum((I J J^T) * I),  A = W0 J^T
    dL/dmag    s = rowsum over tokens of dY * y, over mag
    dL/dI      Z = (c dY)^T (x J^T) - k (A + I J J^T),                k = mag s / n^2
    dL/dJ      H = ((c dY) I)^T x - (k I)^T (W0 + I J)

The first terms and s are sums over tokens: micro-batches and ranks add up, the rest follows once an update
(not at all with detach_norm: n is a constant then). A is formed twice an update, 4 out in r operations,
instead of being kept, 2 out r bytes. normalize=False: y = x W0^T + (x J^T) I^T, no mag.

While I is zero, H is too: J rests for that update, its moments, count and bases with it. Every merge_every
updates W0 takes I J (equation 13 holds only then), I and J begin anew, mag goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import kernels, magnitude, moments, subspace
from .comm import local, sharded
from .layer import ProjectedLinear, unproject
from .reduce import Reduce
from .scalars import Scalars
from .unit import Basis, Unit

ROWS = 1024  # of W0 are cast at a time


class _Adapt(torch.autograd.Function):
    """-> factor (x W0^T + (x J^T) I^T), (..., out). factor, mag None: not normalised."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, i: Tensor, j: Tensor, mag: Tensor | None, factor: Tensor | None
    ) -> Tensor:
        y, h = _product(x, w, i, j, factor)
        ctx.save_for_backward(x, h, w, i, j, None if mag is None else y, factor)
        ctx.wide = None if mag is None else mag.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, w, i, j, y, factor = ctx.saved_tensors
        left = dy if factor is None else (dy * factor).to(dy.dtype)
        inner = left @ i
        dx = left @ w + inner @ j if ctx.needs_input_grad[0] else None
        s = None
        if ctx.wide is not None:
            s = (dy.to(ctx.wide) * y.to(ctx.wide)).flatten(0, -2).sum(0)
        left, inner, x, h = (t.flatten(0, -2) for t in (left, inner, x, h))
        return dx, None, left.t() @ h, inner.t() @ x, s, None


def _product(x: Tensor, w: Tensor, i: Tensor, j: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    h = F.linear(x, j)
    y = F.linear(x, w) + F.linear(h, i)
    return (y if factor is None else (y * factor).to(y.dtype)), h


class AdaptedLinear(ProjectedLinear):
    """An nn.Linear whose class was changed by `adapt`; its state_dict, copies and pickles hold W."""

    adapter: Adapter
    i: Tensor  # (out, r)
    j: Tensor  # (r, in)

    def forward(self, x: Tensor) -> Tensor:
        w: Tensor = self.weight
        i, j = self.i, self.j
        bias: Tensor | None = self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, w, i, j = (t.to(dtype) for t in (x, w, i, j))
            bias = None if bias is None else bias.to(dtype)
        if torch.is_grad_enabled():
            y = _Adapt.apply(x, w, i, j, self.mag, self.factor)
        else:
            y, _ = _product(x, w, i, j, self.factor)
        return y if bias is None else y + bias

    def folded(self) -> Tensor:
        w, folded = self.adapter.weight, self.adapter.folded()
        if sharded(w):
            from torch.distributed.tensor import DTensor

            mesh, like = w.device_mesh, {"run_check": False, "shape": w.shape, "stride": w.stride()}
            folded = DTensor.from_local(folded, mesh, w.placements, **like)  # type: ignore[arg-type]
        return folded

    def _load_from_state_dict(self, *args: Any) -> None:
        """The loaded weight is W: the adapter begins anew at it, until optimizer state is loaded too."""
        super()._load_from_state_dict(*args)  # type: ignore[no-untyped-call]
        if self.adapter.begun:
            self.adapter.begin()


@dataclass(frozen=True)
class How:
    """What is the same for all adapters of a model."""

    merge_every: int  # updates; 0: never
    together: bool  # merges and refreshes of all layers in one update, not spread over the period
    detach_norm: bool
    normalize: bool
    reduce: Reduce


@dataclass(eq=False)
class Adapter:
    """Of one weight: its factors, its units, and when they begin anew."""

    name: str  # of the weight
    size: tuple[int, ...]  # (out, in) of the weight without padding
    r: int
    turn: int  # of
    turns: int
    seed: int
    how: How
    layers: list[AdaptedLinear]
    units: list[Unit] = field(default_factory=list)  # of I, J and mag
    i: Tensor = field(init=False)  # (out, r), a leaf
    j: Tensor = field(init=False)  # (r, in), a leaf
    mag: Tensor | None = None  # (out,) wide, a leaf
    squares: Tensor | None = None  # (out,) wide: of W0's rows
    n: Tensor | None = None  # (out,) wide
    factor: Tensor | None = None  # (out,) wide: mag / n
    begun: bool = False  # mag and n are those of W0
    since: int = 0  # updates done when I was last zero
    merges: int = 0
    _landed: dict[str, Tensor] = field(default_factory=dict)

    # ---- tensors

    @property
    def weight(self) -> Tensor:
        """W0, (out, in); a DTensor if its rows are sharded."""
        return self.layers[0].weight

    @property
    def bases(self) -> list[Basis]:
        return [b for u in self.units for b in u.bases]

    def make(self) -> None:
        """I, J, mag and what goes with it; shapes only on the meta device. W0 may not hold its values yet."""
        w = self.weight
        like = {"device": w.device, "dtype": w.dtype}
        self.i = torch.zeros(w.shape[0], self.r, **like).requires_grad_()  # type: ignore[call-overload]
        self.j = torch.zeros(self.r, w.shape[1], **like).requires_grad_()  # type: ignore[call-overload]
        self.draw_()
        if self.how.normalize:
            rows = torch.ones(w.shape[0], device=w.device, dtype=moments.wide(w.dtype))
            self.mag = rows.clone()
            self.mag[self.size[0] :] = 0
            self.mag.requires_grad_()
            self.squares, self.n, self.factor = rows.clone(), rows.clone(), rows

    @torch.no_grad()
    def draw_(self) -> None:
        if not self.j.is_meta:
            width = self.size[1]
            bound = width**-0.5
            g = torch.Generator(self.j.device)
            g.manual_seed(subspace.mix(self.seed, self.turn, self.merges, 3))
            drawn = self.j.new_empty(self.r, width).uniform_(-bound, bound, generator=g)
            self.j[:, :width].copy_(drawn)
            self.how.reduce.from_owner_(self.j.data, self.turn)  # cards draw differently

    @torch.no_grad()
    def place(self, moved: Callable[[], None]) -> None:
        """Everything to W0's device and dtype, after it was moved; `moved` is called when it is again."""
        w = self.weight
        wide = moments.wide(w.dtype)
        if self.i.is_meta and not w.is_meta:
            self.make()
        elif (self.i.device, self.i.dtype) != (w.device, w.dtype):
            self.i = self.i.detach().to(w.device, w.dtype).requires_grad_()
            self.j = self.j.detach().to(w.device, w.dtype).requires_grad_()
            for name in ("mag", "squares", "n", "factor") if self.how.normalize else ():
                setattr(self, name, getattr(self, name).detach().to(w.device, wide))
            if self.mag is not None:
                self.mag.requires_grad_()
            if self.begun:
                self.weigh()
                self.settle()
        for layer in self.layers:
            layer.i, layer.j, layer.mag, layer.factor = self.i, self.j, self.mag, self.factor
            layer.moved = moved

    # ---- the norm

    def _rows(self) -> tuple[Tensor, slice]:
        """W0's rows on this rank, and which they are."""
        w = local(self.weight)
        first = self.how.reduce.rank * self.how.reduce.rows(self.weight) if w is not self.weight else 0
        return w, slice(first, first + len(w))

    def _wide(self, w: Tensor, x: Tensor) -> Tensor:
        """w x with wide sums."""
        if w.is_cuda and w.dtype == torch.bfloat16:
            return torch.mm(w, x.to(w.dtype), out_dtype=torch.float32)
        wide = moments.wide(w.dtype)
        return torch.cat([part.to(wide) @ x.to(wide) for part in w.split(ROWS)])

    def _inside(self) -> tuple[Tensor, Tensor]:
        """A + I J J^T and A, both (out, r) wide, all rows."""
        w, _ = self._rows()
        a = self.how.reduce.gather_rows(self.weight, self._wide(w, self.j.t()))
        i, j = self.i.to(a.dtype), self.j.to(a.dtype)
        return a + i @ (j @ j.t()), a

    @torch.no_grad()
    def begin(self) -> None:
        """W is W0 as it stands: I is zero, mag and n are its row norms. ValueError for a row of zeros."""
        self.begun = True
        self.i.zero_()
        if self.mag is None or self.n is None or self.factor is None:
            return
        self.weigh()
        assert self.squares is not None
        magnitude.refuse_zeros(self.squares, self.name)
        self.n.copy_(self.squares.sqrt())
        self.mag[: self.size[0]].copy_(self.n[: self.size[0]])
        self.factor.fill_(1)

    @torch.no_grad()
    def weigh(self) -> None:
        """Row norms of W0."""
        if self.squares is not None:
            w, _ = self._rows()
            norms = torch.linalg.vector_norm(w, dim=1, dtype=self.squares.dtype)
            self.squares.copy_(self.how.reduce.gather_rows(self.weight, norms.square()[:, None])[:, 0])
            self.squares[self.size[0] :] = 1  # a divisor, of magnitudes that are zero

    @torch.no_grad()
    def settle(self) -> None:
        """n and mag / n of the factors as they are."""
        if self.mag is None or self.n is None or self.factor is None or self.squares is None:
            return
        inside, a = self._inside()
        square = self.squares + ((inside + a) * self.i.to(a.dtype)).sum(1)
        self.n.copy_(square.clamp(min=torch.finfo(square.dtype).tiny).sqrt())
        torch.div(self.mag, self.n, out=self.factor)

    @torch.no_grad()
    def folded(self) -> Tensor:
        """W, (out, in) in W0's dtype, a new tensor; of a row-sharded W0 this rank's rows."""
        w, at = self._rows()
        w = w.detach().clone()
        if self.begun:
            for start in range(0, len(w), ROWS):
                some = slice(start, start + ROWS)
                rows = slice(at.start + start, min(at.start + start + ROWS, at.stop))
                x = w[some].to(moments.wide(w.dtype)) + self._wide(self.i[rows], self.j)
                w[some] = x if self.factor is None else x * self.factor[rows, None]
        return w

    # ---- a step

    def due(self, b: Basis, update: int, every: int) -> bool:
        """Whether basis b is found anew in this update (0-based): J's not while I is zero."""
        if b.fresh:
            return b in self.units[0].bases or update != self.since
        return self._turn(update, every)

    def _turn(self, update: int, every: int) -> bool:
        first = 0 if self.how.together else self.turn * every // self.turns
        return update >= every and update % every == first

    def land(self, u: Unit, g: Tensor) -> list[tuple[Unit, Tensor]]:
        """Keeps a reduced sum over tokens; with the last, every unit and its gradient, without rows of
        padding."""
        self._landed[u.leaf_name] = g
        if len(self._landed) < len(self.units):
            return []
        sums, self._landed = self._landed, {}
        zero = torch.stack([g.sum() for g in sums.values()]).sum() * 0  # nan if anything is not finite
        z, h = sums["i"] + zero, sums["j"] + zero
        if self.mag is None or self.n is None:
            return self._handed_out(z, h)
        wide, mag = self.n.dtype, kernels.divisor(self.mag.detach(), magnitude.least(self.j))
        s = sums["mag"] / mag + zero
        if not self.how.detach_norm:
            inside, _ = self._inside()
            w, at = self._rows()
            left = (mag * s / self.n.square())[:, None] * self.i.to(wide)
            z = (z.to(wide) - (mag * s / self.n.square())[:, None] * inside).to(z.dtype)
            back = self._wide(left[at].t().to(w.dtype), w)
            back = self.how.reduce.sum_parts(self.weight, back)
            h = (h.to(wide) - back - (left.t() @ self.i.to(wide)) @ self.j.to(wide)).to(h.dtype)
        return self._handed_out(z, h, s)

    def _handed_out(self, *grads: Tensor) -> list[tuple[Unit, Tensor]]:
        return [(u, g[: u.size[0]]) for u, g in zip(self.units, grads, strict=True)]

    @torch.no_grad()
    def merge(self, update: int, scalars: Scalars) -> None:
        """At the end of an update whose turn it is: W0 <- W0 + I J; I and J begin anew."""
        if not self.how.merge_every or not self._turn(update, self.how.merge_every):
            return
        w, at = self._rows()
        h = scalars.table[self.units[0].index] if self.units[0].noise else None
        kernels.lift_(w, self.i[at], self.j, h=h)
        self.merges += 1
        self.since = update
        self.i.zero_()
        self.draw_()
        self.weigh()
        self.settle()
        for b in self.bases:
            b.fresh = True
        for u in self.units[:2]:
            scalars.t[u.index] = 0
            for k, t in u.state.items():
                t.fill_(1 if k == "d" else 0)

    @torch.no_grad()
    def detach(self) -> None:
        """Plain layers again, with W."""
        local(self.weight).copy_(self.folded())
        for layer in self.layers:
            unproject(layer)

    # ---- saving

    def saved(self) -> dict[str, Tensor]:
        """What is not in its units: the raw tensors, where state_dict() of the model has W. No padding."""
        out, width = self.size
        held = {"w0": local(self.weight)[:out, :width], "i": self.i[:out], "j": self.j[:, :width]}
        held |= {} if self.mag is None else {"mag": self.mag[:out]}
        numbers = {"since": self.since, "merges": self.merges, "begun": int(self.begun)}
        return {
            **{k: t.detach() for k, t in held.items()},
            **{k: torch.tensor(v) for k, v in numbers.items()},
        }

    @torch.no_grad()
    def load_(self, state: dict[str, Tensor]) -> None:
        for key, tensor in self.saved().items():
            if tensor.ndim:
                tensor.copy_(state[key])
        self.since, self.merges, self.begun = int(state["since"]), int(state["merges"]), bool(state["begun"])
        if self.begun:
            self.weigh()
            self.settle()


def adapt(layer: nn.Linear) -> AdaptedLinear:
    """Changes the layer's class; Adapter.place sets its tensors."""
    assert type(layer) is nn.Linear, type(layer)
    layer.__class__ = AdaptedLinear
    assert isinstance(layer, AdaptedLinear)
    layer.weight.requires_grad_(False)
    layer.probe = layer.p = layer.q = layer.c = layer.rho = None
    layer.refresh = False
    return layer
