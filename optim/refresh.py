"""When a basis is replaced, and what happens to it and to the moments then.

    staggered   bases start random, and those of a block are replaced in one step. The first round replaces
                those of block b of B at update 1 + floor(b w / B), with w = min(T, max(warm-up, B)); then at
                j T + floor(b T / B), j = 1, 2, ...
    together    all at updates 0, T, 2T, ...: GaLore's way, holds every full gradient at once

On its refresh step a basis' weights form G, over all micro-batches and ranks; the new basis is found from it,
R = G Q_new is exact, and the ordinary update follows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from . import kernels, magnitude, moments, subspace
from .reduce import Reduce
from .scalars import Scalars
from .unit import Basis, Unit

Held = dict[int, tuple[Unit, Tensor, Tensor | None]]  # by unit: G, and s, wait for a basis
FLOOR = 1e-3  # of the largest column scale


def due(turn: int, turns: int, update: int, every: int, warmup: int, together: bool) -> bool:
    """Whether the bases of turn `turn` of `turns` are replaced in update `update` (0-based)."""
    if together:
        return update % every == 0
    window = min(every, max(warmup, turns))
    if update == 1 + turn * window // turns:
        return True
    return update >= every and update % every == turn * every // turns


class Refresher:
    """Finds new bases. `overlaps` and `replaced` are of the step in progress, `seconds` since last read."""

    def __init__(
        self, finder: str, transport: str, seed: int, reduce: Reduce,
        ranks: Callable[[Basis], subspace.Ranks | None] | None = None,  # of the basis after this one
    ) -> None:  # fmt: skip
        self.finder, self.transport, self.seed, self.reduce = finder, transport, seed, reduce
        self.ranks = ranks
        self.replaced: list[Basis] = []
        self.held: Held = {}
        self.found: dict[int, subspace.Found] = {}  # by Basis.index: what need not be looked for any more
        self.overlaps: list[Tensor] = []
        self.kept = 0  # bases not replaced for a gradient that is zero or not finite, ever
        self.fallbacks = 0  # found by Householder QR after a failed factorisation, ever
        self._events: list[tuple[Any, Any]] = []
        self._seconds = 0.0

    def arrive(self, u: Unit, g: Tensor, s: Tensor | None) -> None:
        """Keeps G of a unit, and the gradient of its magnitude, until `ready` hands them out."""
        self.held[u.index] = u, g, s
        for b in u.bases:
            b.arrived += b.due

    def ready(self, scalars: Scalars) -> list[tuple[Unit, Tensor, Tensor | None]]:
        """Replaces every basis whose units have all arrived; those that wait for no other, with G and s."""
        for b, gs in self.waiting():
            for u, anew in self.replace_(b, gs):
                if anew:
                    scalars.start_anew(u)
            b.due = False
        done = [n for n, (u, _, _) in self.held.items() if not any(b.due for b in u.bases)]
        return [self.held.pop(n) for n in done]

    def waiting(self) -> list[tuple[Basis, list[Tensor]]]:
        """Bases to be replaced whose units have all arrived, with G (rows, in) of each."""
        bases = dict.fromkeys(b for u, _, _ in self.held.values() for b in u.bases)
        there = [b for b in bases if b.due and b.arrived == len(b.units)]
        return [(b, [self.held[u.index][1] for u in b.units]) for b in there]

    def plain(self, bases: list[Basis]) -> bool:
        """Whether nothing in their replacement is the host's, but for what `attempt`, `noted` and draws of S
        leave it. The first time differs, in signs and moments."""
        if self.finder != "warm" or self.ranks or self.reduce.world > 1:
            return False
        return not any(b.fresh for b in bases) and self._policy(bases[0], False) == "keep"

    def attempt(self, b: Basis, gs: list[Tensor], old: Tensor) -> subspace.Attempt:
        """A look for the basis after `old` (n, rank); `ready` takes what is in `found`."""
        wide = torch.promote_types(old.dtype, torch.float32)
        return subspace.attempt(self._whole(b, gs), old.to(wide), self.finder, 0)

    def noted(self, b: Basis, asked: int) -> None:
        """The host's part of a replacement."""
        b.fresh, b.asked, b.count = False, asked, b.count + 1
        self.replaced.append(b)

    def _policy(self, b: Basis, first: bool) -> str:
        """What becomes of moments, see subspace.transport."""
        rotated = "rotate_fill" if b.varies else "rotate"
        policy = self.transport
        if policy == "auto":
            policy = "reset" if first else "keep" if self.finder == "warm" else rotated
        return policy

    def _whole(self, b: Basis, gs: list[Tensor]) -> list[Tensor]:
        """G of a basis' units, of all ranks and without padding, turned to the basis' side."""
        whole = [
            self.reduce.gather_rows(u.param, g)[:, : u.size[1]] for u, g in zip(b.units, gs, strict=True)
        ]
        return whole if b.side == "input" else [g.t() for g in whole]

    def replace_(self, b: Basis, gs: list[Tensor]) -> list[tuple[Unit, bool]]:
        """A new basis from G (rows, in) of each of its units; its units, with whether moments start anew.

        Old basis kept: an empty list. One rank finds it, all take it from there: factorisations differ in the
        last bits between cards.
        """
        wide = torch.promote_types(b.qs.dtype, torch.float32)
        old = b.used.to(wide, copy=True)  # replaced in place below
        with self.timed(b.qs.device):
            whole = self._whole(b, gs)
            owner = b.index % self.reduce.world
            q, outcome, asked = b.used.contiguous(), 0, b.asked
            if self.reduce.rank == owner:
                found = self.found.get(b.index) or subspace.find(
                    whole,
                    old,
                    self.finder,
                    subspace.mix(self.seed, b.index, b.count, 2),
                    first=b.fresh,
                    ranks=self.ranks(b) if self.ranks else None,
                )
                q, outcome, asked = found.q.to(b.qs.dtype).contiguous(), found.outcome, found.asked
            if self.reduce.world > 1:
                told = torch.tensor([outcome, q.shape[1], asked], device=q.device)
                self.reduce.from_owner_(told, owner)
                outcome, r, asked = told.tolist()
                if q.shape[1] != r:
                    q = q.new_empty(b.n, r)
                self.reduce.from_owner_(q, owner)
            if outcome == subspace.KEPT:
                self.kept += 1
                return []
            self.fallbacks += outcome == subspace.FALLBACK
            policy = self._policy(b, b.fresh)
            self.noted(b, asked)
            if not kernels.capturing(q.device):
                b.draw_(self.seed, b.count)
            b.replace_(q)
            c = old.t() @ q.to(wide)
            self.overlaps.append(subspace.overlap(c))
            if policy == "keep" and b.varies:
                policy, c = "rotate_fill", torch.eye(*c.shape, dtype=c.dtype, device=c.device)
            for u, g in zip(b.units, gs, strict=True):
                self._carry(u, b, g, c, policy)
            return [(u, policy == "reset") for u in b.units]

    def _carry(self, u: Unit, b: Basis, g: Tensor, c: Tensor, policy: str) -> None:
        """Moments into the new basis; for 8-bit ones the column scale of R = G Q_new. c: Q_old^T Q_new."""
        if policy == "reset" and u.mag:
            magnitude.restart(u)
        d = self._column_scale(u, u.coordinates(g)) if "d" in u.state and b.side == "input" else None
        if policy == "keep":
            if d is not None:
                kernels.rescale_(u.state, u.rule.moments, d)
            u.rule.moved_(u.state, False)
            return
        yes, dim = torch.ones((), device=c.device), -1 if b.side == "input" else -2
        used = {k: moments.load(u.state, k, c.dtype).narrow(dim, 0, len(c)) for k in u.rule.stored}
        if d is not None:
            u.state["d"].copy_(d)
        for k, x in used.items():
            m, v = (None, x) if k in kernels.SECOND else (x, None)
            m, v = subspace.transport(m, v, c, policy, dim)
            moved = m if v is None else v
            assert moved is not None
            moved = nn.functional.pad(moved, (0, 0) * (-1 - dim) + (0, b.r - b.rank))  # columns not in use
            moments.save_(u.state, k, moved, yes, yes * b.count, yes * u.index)
        u.rule.moved_(u.state, policy != "reset", partial(self.reduce.sum_parts, u.param))

    def _column_scale(self, u: Unit, r: Tensor) -> Tensor:
        """(r,) root mean square of the columns of R over all rows, at least FLOOR of the largest."""
        sums = torch.linalg.vector_norm(r, dim=0, dtype=torch.promote_types(r.dtype, torch.float32)).square()
        d = (self.reduce.sum_rows([u], sums[None])[0] / u.size[0]).sqrt()
        return floored(d)

    def timed(self, device: torch.device) -> AbstractContextManager[None]:
        """Adds to `seconds` what happens inside; what a graph does inside is timed where it is replayed."""
        return nullcontext() if kernels.capturing(device) else _timer(self, device)

    def seconds(self) -> float:
        """Spent on finding bases since the last call; on a GPU as far as it is known without waiting."""
        while self._events and self._events[0][1].query():
            begin, end = self._events.pop(0)
            self._seconds += begin.elapsed_time(end) / 1e3
        done, self._seconds = self._seconds, 0.0
        return done


def floored(d: Tensor) -> Tensor:
    """Column scales (r,), each at least FLOOR of the largest; ones where all are zero."""
    return torch.where(d.max() > 0, d.clamp(min=FLOOR * d.max()), 1.0)


@contextmanager
def _timer(to: Refresher, device: torch.device) -> Iterator[None]:
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        yield
        events[1].record()
        to._events.append((events[0], events[1]))
    else:
        begin = time.perf_counter()
        yield
        to._seconds += time.perf_counter() - begin


class Eager:
    """Compiled modules around the layers that form G run eager for that step; nothing is compiled anew."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.undo: list[Callable[[], None]] = []

    def enter(self, paths: list[str]) -> None:
        """paths: names of the layers in `root`. Modules that are eager already are passed over."""
        from torch._dynamo.eval_frame import OptimizedModule  # takes a second: not for a refused command line

        for path in paths:
            parent = self.root
            for part in path.split("."):
                if part == "_orig_mod":  # named while its parent was an OptimizedModule
                    continue
                child = parent._modules[part]
                if isinstance(child, OptimizedModule):
                    self._swap(parent._modules, part, child._orig_mod)
                    child = child._orig_mod
                assert child is not None
                self._uncompile(child)
                parent = child

    def _uncompile(self, module: nn.Module) -> None:
        forward = vars(module).get("forward")
        plain = getattr(getattr(forward, "__func__", forward), "_torchdynamo_orig_callable", None)
        if plain is not None:
            bound = MethodType(plain, module) if isinstance(forward, MethodType) else plain
            self._swap(vars(module), "forward", bound)
        if module._compiled_call_impl is not None:
            self._swap(vars(module), "_compiled_call_impl", None)

    def _swap(self, table: Any, key: str, value: Any) -> None:
        before = table[key]
        table[key] = value

        def restore() -> None:
            if table.get(key) is value:  # else somebody compiled it anew in between
                table[key] = before

        self.undo.append(restore)

    def leave(self) -> None:
        while self.undo:
            self.undo.pop()()
