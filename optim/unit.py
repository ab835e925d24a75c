"""One trained weight and its basis: the geometry that the engine needs, and nothing about time.

    side     R              back(N)    basis
    input    G Q            N Q^T      Q (in, r), shared by weights with one input
    output   P^T G          P N        P (out, r)
    both     P^T G Q        P N Q^T    both
    VeLoRA   G Q            N (x) v    Q = I (x) v, fixed

The norm probe: S holds k Gaussian columns, Z = G S. With captured = ||R||^2,

    estimate = ||R||^2 + ||Z - back(R) S||^2 / k       unbiased for ||G||^2, never below ||R||^2

(Hutchinson's estimator of the part of G outside the basis; the standard deviation is sqrt(2/k) times the
Frobenius norm of that part's Gram matrix.) On the output side G is G^T and S has `out` rows.

A weight may be stored padded: larger than its layer's out_features and in_features, with zeros that get no
gradient. Its rows of padding are left out of everything here; columns of padding go through the products, and
stay zero because what meets them is: rows of Q, columns of a gradient and of moments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from . import kernels, lift, subspace
from .comm import local, sharded
from .layer import ProjectedLinear, coordinate
from .rules import Rule
from .rules.adam import Adam
from .rules.velora import Velora

if TYPE_CHECKING:
    from .adapter import Adapter

PROBE = kernels.PROBE  # columns of the norm probe: 1.6% of the products of R at r = 1024


@dataclass(eq=False)
class Basis:
    """Orthonormal columns for the row space (side input) or column space (output) of its units' gradients."""

    grouped: ClassVar[bool] = False  # velora.Grouped's
    name: str
    index: int
    side: str  # input | output
    n: int  # in_features or out_features: rows, but for those of padding
    r: int  # columns that there is room for; those beyond `rank` are zero, as is all that comes of them
    k: int  # columns of the probe beside it
    units: list[Unit] = field(default_factory=list)
    turn: int = 0  # bases of one turn are replaced in one step
    qs: Tensor = field(init=False)  # (n, r + k), basis dtype: [Q, S]; then rows of zeros for padding
    cross: Tensor = field(init=False)  # (r, k) Q^T S, basis dtype
    count: int = 0  # refreshes done
    fresh: bool = True  # random, or of a factor that began anew: the next one owes it nothing
    due: bool = False  # this step replaces it
    arrived: int = 0  # of its units, on its refresh step
    most: int = field(init=False)  # its rank at the start, and the largest
    rank: int = field(init=False)
    asked: int = field(init=False)  # the rank that its gradient called for: `rank`, or more than r
    varies: bool = False  # its rank may change

    def __post_init__(self) -> None:
        self.most = self.rank = self.asked = self.r

    @property
    def own(self) -> Tensor:
        """[Q, S] without padding."""
        return self.qs[: self.n]

    @property
    def q(self) -> Tensor:
        """Q as it meets weights: with rows for columns of padding, without any for rows of padding."""
        return (self.qs if self.side == "input" else self.own)[:, : self.r]

    @property
    def used(self) -> Tensor:
        """(n, rank) the columns in use, without padding."""
        return self.own[:, : self.rank]

    @property
    def s(self) -> Tensor:
        return self.own[:, self.r :]

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        self.qs = self.qs.to(device, dtype).contiguous()
        self.cross = self._cross()

    def _cross(self) -> Tensor:
        wide = torch.promote_types(self.qs.dtype, torch.float32)
        return (self.own[:, : self.r].to(wide).t() @ self.s.to(wide)).to(self.qs.dtype)

    def load_(self, qs: Tensor, count: Tensor, fresh: Tensor) -> None:
        self.own.copy_(qs)
        self.cross.copy_(self._cross())
        if self.varies:
            self.rank = self.asked = int(self.own[:, : self.r].any(0).sum())
        self.count, self.fresh = int(count), bool(fresh)

    def begin(self, seed: int, device: torch.device, dtype: torch.dtype) -> None:
        """A random basis and probe; on the meta device shapes only."""
        self._allocate(device, dtype)
        if device.type != "meta":
            wide = torch.promote_types(dtype, torch.float32)
            self.draw_(seed, 0)
            self.replace_(subspace.random_basis(self.n, self.r, subspace.mix(seed, self.index), device, wide))

    def _allocate(self, device: torch.device, dtype: torch.dtype) -> None:
        rows = self.units[0].param.shape[self.side == "input"]
        self.qs = torch.zeros(rows, self.r + self.k, dtype=dtype, device=device)
        self.cross = torch.empty(self.r, self.k, dtype=dtype, device=device)

    def resize(self, r: int) -> None:
        """Room for r columns. Leaves and layers have the old tensors until their unit is placed again."""
        if r != self.r:
            old, s, both = self.qs, self.s, min(r, self.r)
            self.r, self.rank = r, min(r, self.rank)
            self._allocate(old.device, old.dtype)
            self.qs[:, :both].copy_(old[:, :both])
            self.s.copy_(s)
            self.cross.copy_(self._cross())

    def draw_(self, seed: int, count: int) -> None:
        """The S that comes with refresh number `count`, in place."""
        if self.k:
            wide = torch.promote_types(self.qs.dtype, torch.float32)
            draw = subspace.mix(seed, self.index, count, 1)
            self.s.copy_(subspace.gaussian(self.n, self.k, draw, self.qs.device, wide))

    def replace_(self, q: Tensor) -> None:
        """Q (n, r or fewer) wide beside S, in place: a compiled forward may hold the tensor."""
        self.rank = q.shape[1]
        self.used.copy_(q)
        self.own[:, self.rank : self.r].zero_()
        self.cross.copy_(self._cross())


@dataclass(frozen=True)
class Magnitude:
    """How a unit's magnitude is trained: magnitude.py."""

    rate: float  # its lr is group lr * rate
    rule: Adam


@dataclass(eq=False)
class Unit:
    """One parameter, how it is trained, and the leaves whose gradients autograd hands out for it."""

    name: str
    owner: Any  # a module, or an Adapter; its parameter is looked up there: to_empty() replaces it
    leaf_name: str
    size: tuple[int, ...]  # of the parameter, without padding; of a sharded one the whole
    role: str  # matrix | embedding | head | gain | other; of an adapter: factor | magnitude
    rule: Rule
    scale: float  # its lr is group lr * scale
    decay: float  # decoupled
    store: str  # fp32 | bf16 | int8
    mag: Magnitude | None = None  # None: W is trained as it is, not as magnitude and direction
    limit: float = 0.0  # of growth: growth.py; 0: none
    noise: bool = False  # a bf16 parameter is rounded stochastically
    deferred: bool = False  # between refreshes updates gather beside W: lift.py
    adapter: Adapter | None = None  # whose factor or magnitude this is: its gradient arrives whole
    index: int = 0
    layers: list[ProjectedLinear] = field(default_factory=list)  # that use it; none: dense
    q: Basis | None = None
    p: Basis | None = None
    why: str = ""  # for the start table: why a matrix is not projected
    state: dict[str, Tensor] = field(default_factory=dict)
    leaves: list[Tensor] = field(default_factory=list)  # coordinates: R, probe's, magnitude's; dense: itself
    refresh: bool = False  # this step forms G
    full: Tensor | None = None  # the identity basis' coordinate
    fired: list[int] = field(default_factory=list)  # backwards counted by leaf since the last step; full last
    hooks: list[Any] = field(default_factory=list)

    @property
    def param(self) -> nn.Parameter:
        return getattr(self.owner, self.leaf_name)

    @property
    def padded(self) -> bool:
        return tuple(self.param.shape) != self.size

    @property
    def w(self) -> Tensor:
        """The parameter, on this rank, without rows of padding."""
        w = local(self.param)
        return w[: self.size[0]] if self.padded else w

    @property
    def projected(self) -> bool:
        return self.q is not None or self.p is not None

    @property
    def grouped(self) -> bool:
        """VeLoRA's."""
        return self.q is not None and self.q.grouped

    @property
    def bases(self) -> list[Basis]:
        return [b for b in (self.q, self.p) if b is not None]

    @property
    def sharded(self) -> bool:
        return sharded(self.param)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of R, with this rank's rows only where the weight is sharded."""
        w = self.w
        if not self.projected:
            return tuple(w.shape)
        return (self.p.r if self.p else w.shape[0], self.q.r if self.q else w.shape[1])

    def begin(self) -> None:
        """State of an untrained weight; shapes only on the meta device."""
        w = self.w
        wide = torch.promote_types(w.dtype, torch.float32)
        self.state.clear()
        self.state |= self._blank()
        if self.limit and self.projected:
            self.state["grown"] = torch.zeros((), dtype=wide, device=w.device)
        if self.mag:  # magnitude.begin sets mag and n
            ones, row = w.new_ones(len(w), dtype=wide), w.new_zeros(1, len(w), dtype=wide)
            self.state |= {"mag": ones, "n": ones.clone(), "mag_m": row, "mag_v": row.clone()}
            if self.p:
                self.state["factor"] = w.new_ones(len(self.param), dtype=wide)  # the layer's, with padding
        if self.deferred:
            lift.begin(self, wide)

    def _blank(self) -> dict[str, Tensor]:
        """What the rule and its store keep, zeros."""
        w = self.w
        wide = torch.promote_types(w.dtype, torch.float32)
        state = self.rule.begin(self.store, self.shape, w.device, wide)
        if self.q and not self.grouped and self.store == "int8" and self.rule.moments:
            state["d"] = torch.ones(self.q.r, device=w.device)
        return state

    def resize(self) -> None:
        """New tensors for what does not fit a basis with room for another rank, with what both hold."""
        blank = self._blank()
        if self.q and "c" in self.state:
            blank["c"] = self.param.detach().new_zeros(len(self.param), self.q.r)
        for k, new in blank.items():
            old = self.state[k]
            if new.shape != old.shape:
                both = tuple(slice(min(sizes)) for sizes in zip(new.shape, old.shape, strict=True))
                new[both].copy_(old[both])
                self.state[k] = new

    def place(self, hook: Callable[[Tensor, int], None]) -> None:
        """Leaves on the weight's device in its dtype, with their hooks; again whenever it has moved."""
        for handle in self.hooks:
            handle.remove()
        if self.projected and not self.adapter:
            w = self.param
            out, width = w.shape
            if self.q and self.p:
                self.leaves = [
                    coordinate(self.p.r, self.q.r, dtype=w.dtype, device=w.device),
                    *([coordinate(out, self.q.k, dtype=w.dtype, device=w.device)] if self.q.k else []),
                ]
            elif self.q:
                self.leaves = [coordinate(out, self.q.r + self.q.k, dtype=w.dtype, device=w.device)]
            else:
                assert self.p is not None
                self.leaves = [coordinate(self.p.r + self.p.k, width, dtype=w.dtype, device=w.device)]
            self.full = coordinate(out, width, dtype=w.dtype, device=w.device)
            if self.mag:
                self.leaves.append(coordinate(out, 1, dtype=self.state["mag"].dtype, device=w.device))
            for layer in self.layers:
                layer.mag = self.leaves[-1] if self.mag else None
                layer.factor = self.state.get("factor")
                layer.c, layer.rho = self.state.get("c"), self.state.get("rho")
                layer.coord, layer.full = self.leaves[0], self.full
                layer.probe = self.leaves[1] if self.q and self.p and self.q.k else None
                layer.q = self.q.qs if self.q else None
                layer.p = self.p.qs if self.p else None
            for b in self.bases:
                if b.varies:
                    self._vary(b)
        else:
            self.leaves = [self.param]
        self.fired = [0] * (len(self.leaves) + 1)
        every = [*self.leaves, *([self.full] if self.full is not None else [])]
        self.hooks = [
            leaf.register_post_accumulate_grad_hook(lambda p, n=n: hook(p, n)) for n, leaf in enumerate(every)
        ]

    def _vary(self, b: Basis) -> None:
        """A compiled block takes any rank of this basis, and is not compiled anew for another."""
        import torch._dynamo

        torch._dynamo.mark_dynamic(b.qs, 1)
        torch._dynamo.mark_dynamic(self.leaves[0], 1 if b.side == "input" else 0)
        if "c" in self.state:
            torch._dynamo.mark_dynamic(self.state["c"], 1)

    def active(self) -> list[int]:
        """Which entries of `fired` count in this step."""
        return [len(self.leaves)] if self.refresh else list(range(len(self.leaves)))

    def take(self) -> list[Tensor]:
        """The accumulated gradients of the active leaves, which let go of them."""
        leaves = [self.full] if self.refresh else self.leaves
        grads = []
        for leaf in leaves:
            assert leaf is not None and leaf.grad is not None
            grads.append(leaf.grad)
            by_rows = leaf is self.full or self.p is None or leaf is not self.leaves[0]
            if self.padded and by_rows and not self.adapter:
                grads[-1] = grads[-1][: self.size[0]]
            if self.projected or self.adapter:
                leaf.grad = None
        return grads

    def drop(self) -> None:
        """Forgets what was accumulated since the last step."""
        self.fired = [0] * (len(self.leaves) + 1)
        if self.projected or self.adapter:
            for leaf in (*self.leaves, self.full):
                if leaf is not None:
                    leaf.grad = None

    def trim(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The unit's state without padding: views."""
        if not self.padded:
            return state
        width = self.q.r if self.q else self.size[-1]
        most = {"factor": self.size[0]} | dict.fromkeys(self.rule.stored, width)
        most |= {f"{k}_scale": -(-width // kernels.QUANT) for k in self.rule.stored}
        rows = {k: state[k][: self.size[0]] for k in ("c", "rho") if k in state and state[k].ndim}
        return {k: t[..., : most[k]] if k in most else t for k, t in state.items()} | rows

    def split(self, grads: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """R and Z (None without a probe) from the leaves' gradients."""
        if self.q and self.p:
            return grads[0], grads[1] if len(grads) > 1 else None
        if self.q:
            return grads[0][:, : self.q.r], grads[0][:, self.q.r :] if self.q.k else None
        if self.p:
            return grads[0][: self.p.r], grads[0][self.p.r :] if self.p.k else None
        return grads[0], None

    def coordinates(self, g: Tensor) -> Tensor:
        """R of a whole gradient G (out, in): on a refresh step."""
        if self.p:
            g = self.p.q.to(g.dtype).t() @ g
        return g @ self.q.q.to(g.dtype) if self.q else g

    def outside(self, r: Tensor, z: Tensor) -> Tensor:
        """Z - back(R) S: the probe's view of what a basis of columns does not hold; its square over k
        estimates that."""
        assert self.p is not None
        if self.q:
            return z - self.p.q.to(r.dtype) @ (r @ self.q.cross.to(r.dtype))
        return torch.addmm(z, self.p.cross.to(r.dtype).t(), r, alpha=-1)

    @property
    def rests(self) -> bool:
        """Whether this step's update stays beside W."""
        return self.deferred and not self.refresh

    def fold_(self, h: Tensor) -> None:
        """W takes what is beside it; h: the unit's row of the table."""
        assert self.q is not None
        c, rho = self.state["c"], self.state.get("rho")
        lift.fold_(self.param.detach(), c, self.q.qs, rho, h if self.noise else None)
        lift.clear_(c, rho)
        lift.reproject(self)

    def lift_(self, n: Tensor, keep: Tensor | None, h: Tensor) -> None:
        """W <- keep W + back(N), N = -lr * direction; or C, which stands for it. h: the unit's row of the
        table."""
        w, noise = self.w, h if self.noise else None
        if self.rests:
            lift.step_(self, n, keep, noise)
        elif self.q and self.grouped:
            eps = self.rule.eps if isinstance(self.rule, Velora) else 0.0
            kernels.grouped_(w[:, : self.q.n], n, self.q.qs, eps, keep, noise)
        elif self.p is None:
            assert self.q is not None
            kernels.lift_(w, n, self.q.q.t(), keep, None, noise)
        else:
            back = n if self.q is None else n @ self.q.q.to(n.dtype).t()
            kernels.lift_(w, self.p.q, back, keep, None, noise)
