"""From a gradient that backward hands out to the weight that took it: the engine's half inside backward.

    hook -> ready -> launch: take, reduce over ranks -> land -> hold, up to HELD bytes
         -> flush: squares, finite flag, clip, rule, lift

On a refresh step G waits for its basis instead of being held: refresh.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import growth, kernels, magnitude, measure
from .config import OptimConfig
from .measure import Landed
from .reduce import Flight, Reduce
from .refresh import Refresher
from .rules import Rule
from .rules.rule import Total, alone
from .scalars import Scalars
from .unit import Unit
from .watch import Watch

Column = kernels.Column
LAGGED = ("global_estimated", "projected")  # clip modes that in backward know the last step's norm only
# Bytes of gradients that wait in backward for one another: their norms take one launch then. 0.06 GiB at 7b,
# where a block's Rs are 0.09; at 1b the host needs 1.1 ms a matrix without.
HELD = 2**26
NORM_OF = {"projected": 0}  # clip mode -> column of Scalars.squares; all others 1


class Landing:
    """What Engine does in backward, and to the end of it; every attribute is an Engine's."""

    units: list[Unit]
    cfg: OptimConfig
    reduce: Reduce
    refresher: Refresher
    scalars: Scalars
    accum_steps: int
    passes: int
    in_backward: bool
    aside: Callable[[], AbstractContextManager[Any]]  # around all work in backward
    load_rates: Callable[[], None]
    _begin: Watch
    _forwards: int  # of this step
    _alone: bool  # the bases of one block are all that are replaced in this step
    _plans: dict[tuple[int, ...], Any]

    def _line_up(self) -> None:
        """The order of units, the same on all ranks."""
        # Gains and biases wait for step() and one launch, unless their norm is needed before any update.
        early = not self.in_backward or self.passes == 2
        self._late = [u for u in self.units if u.role == "gain" and not early]
        self._order = [u for u in reversed(self.units) if u not in self._late]

    def _empty(self) -> None:
        """Nothing has arrived."""
        self._ready: set[int] = set()
        self._next, self._pass, self._forwards, self._opened = 0, 1, 0, False
        self._flight: list[tuple[Unit, Flight]] = []
        self._landed: list[Landed] = []
        self._waiting = 0  # bytes of it

    def _hook(self, u: Unit) -> Callable[[Tensor, int], None]:
        def fire(leaf: Tensor, n: int) -> None:
            if leaf.grad is None:  # the layer's other coordinate was in use
                return
            u.fired[n] += 1
            if 0 < self._forwards < u.fired[n]:
                raise RuntimeError(
                    f"{u.name}: more gradients than forward passes. A layer used in two reentrant checkpoint "
                    "segments would be updated twice: checkpoint with use_reentrant=False"
                )
            if all(u.fired[i] == self.accum_steps * self._pass for i in u.active()):
                self._begin.seen(u, leaf.grad)
                self._ready.add(u.index)
                if (self.in_backward or self._pass < self.passes) and u not in self._late:
                    with self.aside():
                        self._drain(depth=0 if self.reduce.group is None else 1)

        return fire

    @torch.no_grad()
    def _drain(self, depth: int) -> None:
        """Launches ready units in order, at most `depth` reductions in flight; the others land."""
        while self._next < len(self._order) and self._order[self._next].index in self._ready:
            self._launch(self._order[self._next])
            self._next += 1
            while len(self._flight) > depth:
                self._land()
        if self._pass < self.passes and self._next == len(self._order):
            while self._flight:
                self._land()
            self._flush()
            self.scalars.clip_all(self.cfg.clip, self.scalars.total(1))
            self._pass, self._next, self._ready = 2, 0, set()

    def _launch(self, u: Unit) -> None:
        grads = u.take()
        self._begin.taken(u, grads[0])
        self._flight.append((u, self.reduce.start(u, grads)))

    def _land(self) -> None:
        """One unit's reduced gradient; on a refresh step the units of a basis wait for each other."""
        u, flight = self._flight.pop(0)
        grads = flight.land()
        if not self._opened:
            lagged = self.in_backward and self.cfg.clip_mode in LAGGED
            if not kernels.capturing(self.scalars.table.device):
                self.load_rates()
            self.scalars.open(self.cfg.clip if lagged else 0.0)
            self._opened = True
        if u.adapter:
            for m, g in u.adapter.land(u, grads[0]):
                self._refresh(m, g) if m.projected else self._hold("dense", m, g, g, None, None)
        elif u.refresh:
            self._refresh(u, grads[0])
        else:
            s = a = None
            if u.mag:
                grads, s, a = magnitude.direction(u, u.w, grads)
            r, z = u.split(grads)
            self._hold("dense" if z is None else "probed", u, r, r if z is None else z, s, a)
        if (self.in_backward or self._pass < self.passes) and self._waiting >= HELD:
            self._flush()

    def _refresh(self, u: Unit, g: Tensor) -> None:
        """G, or of a factor any gradient, waits for its basis: not longer than needed, unless those of one
        block are all that wait. Then the bases are found in step(), when no activations lie beside them."""
        s = None
        if u.mag:
            magnitude.resume(u, u.w)
            s = magnitude.direction_of_(u, u.w, g)
        self.refresher.arrive(u, g, s)
        if u.adapter or not self._alone:
            self._found()

    def _found(self) -> None:
        """New bases where all gradients are there, and R from them."""
        for u, g, s in self.refresher.ready(self.scalars):
            a = u.w @ u.q.q.to(g.dtype) if s is not None and u.q else None
            self._hold("whole", u, u.coordinates(g), g, s, a)

    def _hold(self, kind: str, u: Unit, r: Tensor, rest: Tensor, s: Tensor | None, a: Tensor | None) -> None:
        self._landed.append(Landed(kind, u, r, rest, s, a))
        # The same on every rank, however its rows are cut: a flush exchanges sums.
        rows = self.reduce.rows(u.param) if u.sharded else r.shape[0] if r.ndim else 1
        size = rows * math.prod(r.shape[1:]) * r.element_size() * (1 if a is None else 2)
        # Nobody waits with a whole gradient, but for those of factors.
        self._waiting += HELD if kind == "whole" and not u.adapter else size

    def _flush(self) -> None:
        """Clip, rule and weight update of everything that has landed; dense units of one rule go together."""
        batch, self._landed, self._waiting = self._landed, [], 0
        if not batch:
            return
        for units, squares in measure.squares(batch, self.scalars.dtype):
            self.scalars.measured(units, self.reduce.sum_rows(units, squares))
        if self._pass < self.passes:
            for x in batch:
                x.unit.param.grad = None
            return
        clip, mode = self.cfg.clip, self.cfg.clip_mode
        if clip and mode == "per_layer":
            self.scalars.clip_each(clip, [x.unit for x in batch])
        elif clip and not self.in_backward:
            self.scalars.clip_all(clip, self.scalars.total(NORM_OF.get(mode, 1)))
        dense: dict[Rule, list[tuple[Unit, Tensor]]] = {}
        projected: dict[tuple[Rule, torch.dtype], list[Landed]] = {}
        for x in batch:
            if x.unit.projected:
                projected.setdefault((x.unit.rule, x.unit.w.dtype), []).append(x)
            else:
                dense.setdefault(x.unit.rule, []).append((x.unit, x.r))
        for (rule, dtype), found in projected.items():
            units = [x.unit for x in found]
            hs = [self.scalars.table[u.index] for u in units]
            totals: list[Total] = [
                partial(self.reduce.sum_parts, u.param) if u.sharded else alone for u in units
            ]
            ns = rule.steps_([x.r for x in found], [u.state for u in units], hs, dtype, totals)
            for x, n, h in zip(found, ns, hs, strict=True):
                self._lift(x, n, h)
        for rule, some in dense.items():
            units = [u for u, _ in some]
            ws, states = [u.w for u in units], [u.state for u in units]
            key = tuple(u.index for u in units)
            if key not in self._plans:
                self._plans[key] = kernels.plan(ws, states)
            table = self.scalars.table[self.scalars.rows(units)]
            rule.update_(ws, [g for _, g in some], states, table, self._plans[key], units[0].noise)
            for u in units:
                if self.in_backward and u not in self._late:
                    u.param.grad = None
        for a in dict.fromkeys(x.unit.adapter for x in batch if x.unit.adapter):
            a.settle()

    def _lift(self, x: Landed, n: Tensor, h: Tensor) -> None:
        """W <- keep W + the lift of n, of a weight in whatever form."""
        u = x.unit
        n = growth.limit_(u, n, h, self.reduce) if u.limit else n
        if x.s is not None:
            magnitude.step_(u, u.w, n, x.s, x.a, h)
            return
        keep = torch.where(h[Column.OK] > 0, h[Column.KEEP], 1.0) if u.decay else None
        u.lift_(n, keep, h)
