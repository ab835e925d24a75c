"""The optimizer: one object between loss.backward() and new weights, whatever the method.

One step, K micro-batches:

    K x backward    autograd sums R (of a projected weight) or G (of a dense one) into a leaf's .grad; at
                    the K-th a hook calls its unit ready
    drain           ready units in one fixed order: take -> reduce over ranks, one in flight -> land:
                    refresh step? basis from G, R = G Q -> squares -> finite flag, clip -> rule -> lift
    step()          drains what is left, gains and biases in one launch, statistics, clock, next refreshes

update=in_backward drains from the hooks, update=after in step(): the same code, the same bits. Per-step
scalars (lr, decay factor, clip coefficient, finite flag, t) are columns of one device tensor, see
scalars.py: the host reads nothing back but, on a refresh step, whether the factorisation succeeded. A unit
whose gradient holds a NaN or an infinity is skipped whole: weight, state and t stay, the skip is counted.
After the reduction all ranks hold the same gradient, so they skip alike.

Clipping multiplies R (or G) by c = min(1, clip / norm) before the moments. The norm: exact (dense methods),
from the probe's estimates (global_estimated), of the Rs, which are smaller (projected), or each unit's own
(per_layer). The two global modes know this step's norm if updates come after backward, else the last step's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from . import lift, magnitude, memory, state, velora
from .adarank import AdaRank
from .comm import local
from .config import AdaRankConfig, OptimConfig
from .landing import NORM_OF, Landing
from .layer import unproject
from .reduce import Reduce
from .refresh import Eager, Held, Refresher, due
from .scalars import Scalars
from .unit import Basis, Unit
from .watch import Watch, missing


def basis_dtype(cfg: OptimConfig, w: Tensor) -> torch.dtype:
    """Of the bases of weight w."""
    name = getattr(cfg, "basis_dtype", None)
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name] if name else w.dtype


class Engine(Landing, torch.optim.Optimizer):
    """Made by `attach`. A torch optimizer: param_groups, step, zero_grad, state_dict, LR schedulers.

    accum_steps    backwards that make one step; may be set between steps
    warmup_steps   of the lr schedule: the first round of bases is spread over them; set before training
    version        rises when tensors were replaced by others: a captured step must be captured anew
    passes         times that a step's batches go forward and backward: 2 with clip_mode=two_pass, else 1
    first_round    (bases found, bases): while they differ, some are still random
    stats          of this step, device scalars or numbers: grad_norm (before clipping, finite units;
                   estimated by the probe where projected), skipped (units), skipped_in_a_row (steps); for
                   projected methods energy (captured share of the squared norm), overlap (of the bases
                   replaced with their predecessors; nan: none was), bases_kept (so far, for a zero or
                   non-finite gradient) and refresh_s (spent on finding bases); for adarankgrad
                   effective_rank, memory_reduction (AdaRank.measures), saved_mib (held less than with every
                   basis at its largest) and, of bases replaced, in the first step of all, AdaRank.layers
    """

    def __init__(
        self, root: nn.Module, units: list[Unit], bases: list[Basis], cfg: OptimConfig, *,
        lr: float, every: int, accum_steps: int, reduce: Reduce, seed: int,
    ) -> None:  # fmt: skip
        groups: dict[tuple[Any, ...], dict[str, Any]] = {}
        for n, u in enumerate(units):
            u.index = n
            like = {"role": u.role, "scale": u.scale, "decay": u.decay}
            groups.setdefault(tuple(like.values()), {"params": [], **like})["params"].append(u.param)
        self._groups = [list(groups).index((u.role, u.scale, u.decay)) for u in units]
        super().__init__(list(groups.values()), {"lr": lr})
        self.root, self.units, self.cfg, self.reduce = root, units, cfg, reduce
        self.bases = [b for b in bases if not isinstance(b, velora.Grouped)]
        self.grouped = [b for b in bases if isinstance(b, velora.Grouped)]
        self.adapters = list(dict.fromkeys(u.adapter for u in units if u.adapter))
        self.accum_steps, self.every, self.seed, self._warmup = accum_steps, every, seed, 0
        self.in_backward = cfg.update_resolved == "in_backward"
        self.passes = 2 if cfg.clip_mode == "two_pass" else 1
        self.updates = self.version = 0  # updates: steps done
        self.stats: dict[str, Tensor | float] = {}
        self._saved: dict[str, float] = {}
        self.adarank: AdaRank | None = None
        if isinstance(cfg, AdaRankConfig):
            self.adarank = AdaRank(self.bases, len(units), cfg, every, reduce)
        ranks = self.adarank.ranks if self.adarank else None
        self.refresher = Refresher(
            getattr(cfg, "finder", ""), getattr(cfg, "transport", ""), seed, reduce, ranks
        )
        self._eager = Eager(root)
        self.turns = max((b.turn for b in self.bases), default=0) + 1
        self.aside: Callable[[], AbstractContextManager[Any]] = nullcontext  # around all work in backward
        self._paths = {id(m): name for name, m in root.named_modules()}
        self._line_up()
        self._place()
        self._begin = Watch(self, self._late or units)
        self._root_hook = root.register_forward_pre_hook(self._begin)
        self._prepare()

    def _place(self) -> None:
        """Leaves, hooks, bases and state where the weights are: at attach, and after they were moved."""
        self._moved = False
        for a in self.adapters:
            a.place(self._note_move)
        for n, g in enumerate(self.param_groups):  # to_empty() makes new Parameters
            g["params"] = [u.param for u, of in zip(self.units, self._groups, strict=True) if of == n]
        self.state.clear()
        for u in self.units:
            w = local(u.param)
            for b in u.bases:
                if b.qs.is_meta and not w.is_meta:
                    b.begin(self.seed, w.device, basis_dtype(self.cfg, w))
                elif (b.qs.device, b.qs.dtype) != (w.device, basis_dtype(self.cfg, w)):
                    b.place(w.device, basis_dtype(self.cfg, w))
            if any(s.is_meta for s in u.state.values()):
                u.begin()
            for k, s in u.state.items():
                u.state[k] = s.to(w.device, w.dtype if k in lift.OURS else s.dtype)
            lift.reproject(u)
            self.state[u.param] = u.state
            u.place(self._hook(u))
            for layer in u.layers:
                layer.moved = self._note_move
        self.version += 1
        self.scalars = Scalars(self.units, self._groups, getattr(self, "scalars", None))
        if self.adarank:
            self.adarank.place(self.scalars.table.device, self.scalars.dtype)
        self._plans: dict[tuple[int, ...], Any] = {}

    def rearrange(self, bases: list[Basis]) -> None:
        """These and their units have other tensors now: leaves, layers and captured steps must follow."""
        for u in dict.fromkeys(u for b in bases for u in b.units):
            u.place(self._hook(u))
        self.version += bool(bases)

    def _note_move(self) -> None:
        self._moved = True

    # ---- before backward

    def forward_begins(self) -> None:
        if self._moved:
            self._place()
            self._prepare()
        if self.unseen:
            raise RuntimeError(velora.UNSEEN)
        if not self._forwards and not self.updates:
            for u in self.units:
                if u.mag:
                    magnitude.begin(u, u.w)
            for a in self.adapters:
                a.begin()
        self._forwards += 1
        self._form_g()  # blocks may have been compiled since the step was prepared

    @property
    def unseen(self) -> bool:
        """Whether VeLoRA's directions are still to be found, by `observing`."""
        return any(b.fresh for b in self.grouped)

    def observing(self) -> AbstractContextManager[None]:
        """Forwards inside, of all micro-batches of the first step, give VeLoRA its directions."""
        return velora.observing(self)

    def _prepare(self) -> None:
        """An empty queue, and the bases that the next step replaces."""
        self._empty()
        self.refresher.replaced = []
        for b in self.bases:
            together = getattr(self.cfg, "refresh", "") == "together"
            if a := b.units[0].adapter:
                b.due = a.due(b, self.updates, self.every)
            else:
                b.due = due(b.turn, self.turns, self.updates, self.every, self._warmup, together)
            b.arrived = 0
        if self.adarank and self.adarank.cfg.adapt_refresh:
            self.adarank.choose(self.updates, self._warmup)
        self._tried = [b for b in self.bases if b.due]
        self._alone = self.in_backward and len({b.turn for b in self._tried}) == 1
        self.refresher.held.clear()
        self.refresher.found.clear()
        for u in self.units:
            u.fired = [0] * len(u.fired)
            u.refresh = u.adapter is None and any(b.due for b in u.bases)
            if u.deferred and u.refresh:  # before the forward that forms G, and any save from now on
                u.fold_(self.scalars.table[u.index])
            for layer in u.layers:
                layer.refresh = u.refresh
        self._form_g()

    def _form_g(self) -> None:
        self._eager.enter([self._paths[id(m)] for u in self.units if u.refresh for m in u.layers])

    @property
    def warmup_steps(self) -> int:
        return self._warmup

    @warmup_steps.setter
    def warmup_steps(self, steps: int) -> None:
        self._warmup = steps
        self._prepare()

    @property
    def first_round(self) -> tuple[int, int]:
        return sum(b.count > 0 for b in self.bases), len(self.bases)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Ends one update made of `accum_steps` backwards; RuntimeError after more or fewer."""
        if closure is not None:
            raise ValueError("closure: not supported; call backward accum_steps times, then step()")
        self.collect()
        self.conclude()
        self.advance()

    @torch.no_grad()
    def collect(self) -> None:
        """The part of step() that a CUDA graph can hold: all updates, but for those that wait for a basis."""
        if wrong := missing(self):
            self.zero_grad()
            raise RuntimeError(wrong)
        self._drain(depth=len(self._order))
        for u in self._late:
            self._launch(u)
        while self._flight:
            self._land()
        if self.in_backward:
            self._flush()
        assert self._next == len(self._order)

    @torch.no_grad()
    def conclude(self) -> None:
        """New bases, which the host waits for once, and what waited for them; statistics."""
        self._found()
        self._flush()
        assert not self.refresher.held
        self.stats = {**self.scalars.close(NORM_OF.get(self.cfg.clip_mode, 1))}
        if not self.bases:
            del self.stats["energy"]
        if self.adarank:
            self.adarank.note(self.scalars, self.refresher.replaced)
        self._begin.warn()

    def concluded(self, stats: dict[str, Tensor | float], overlaps: list[Tensor]) -> None:
        """As conclude() leaves it, after its device work was done otherwise."""
        for b, _ in self.refresher.waiting():
            self.refresher.noted(b, b.asked)
        self.refresher.overlaps, self.stats = list(overlaps), dict(stats)

    @torch.no_grad()
    def advance(self) -> None:
        """The part of step() that the host decides: what is due between this update and the next."""
        if self.bases:
            overlaps, self.refresher.overlaps = self.refresher.overlaps, []
            self.stats |= {
                "overlap": torch.stack(overlaps).mean() if overlaps else math.nan,
                "bases_kept": float(self.refresher.kept),
                "refresh_s": self.refresher.seconds(),
            }
        if self.adarank:
            self.stats |= self._adapt(self.adarank)
        self._eager.leave()
        self.updates += 1
        for a in self.adapters:
            a.merge(self.updates, self.scalars)
        magnitude.read_back(self.units, self.updates)
        self._prepare()

    def _adapt(self, a: AdaRank) -> dict[str, float]:
        """What this step meant for the lives of bases; statistics."""
        a.begin(self._tried, self.updates)
        a.look(self.updates)
        done = self.updates + 1
        if resized := a.resize(done):
            self.rearrange(resized)
        if resized or not self._saved:
            self._saved = {"saved_mib": memory.saved(self) / 2**20}
        shown = self.bases if done == 1 else self.refresher.replaced
        return a.measures(done) | self._saved | a.layers(shown, done)

    @property
    def kind(self) -> int | None:
        """Steps of one kind launch the same: -1, no basis is replaced in it; n, those of block n are, all at
        its end; None, any other."""
        due = {b.turn for b in self.bases if b.due}
        part = any(not b.due for b in self.bases if b.turn in due)
        if part or not self.updates or self._moved or due and (not self._alone or self.adapters):
            return None
        return due.pop() if due else -1

    @property
    def held(self) -> Held:
        """Between collect() and conclude(): gradients that wait for a basis."""
        return self.refresher.held

    @held.setter
    def held(self, held: Held) -> None:
        self.refresher.held = dict(held)
        for b in self.bases:
            b.arrived = len(b.units) if b.due else 0

    def load_rates(self) -> None:
        """lr and decay of the groups to the device: done in step(), but for one that is captured."""
        self.scalars.load(self.param_groups)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients of an unfinished step as well; what was updated inside backward stays."""
        super().zero_grad(set_to_none)
        if any(any(u.fired) for u in self.units):
            for u in self.units:
                u.drop()
            self._prepare()

    # ---- state

    @torch.no_grad()
    def fold(self) -> None:
        """lift=deferred: parameters become the whole weights, for whoever reads them directly.

        As at a refresh: the model computes the same up to one rounding of each weight. state_dict(), copies
        and detach() need no call: they fold by themselves."""
        for u in self.units:
            if u.deferred:
                u.fold_(self.scalars.table[u.index])

    def state_dict(self) -> dict[str, Any]:
        """{"state": {name: {key: tensor}}, "param_groups": [...]}: tensors and numbers only, by name."""
        return {"state": state.collect(self), "param_groups": state.groups(self)}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copies into place; ValueError names a parameter of missing, unknown or differently shaped state."""
        state.restore(self, state_dict)
        self._saved = {}
        self._eager.leave()
        self._prepare()

    def detach(self) -> None:
        """The plain model again, with the trained weights: classes, requires_grad and hooks as before
        attach."""
        self.fold()
        self._eager.leave()
        self._root_hook.remove()
        for u in self.units:
            for hook in u.hooks:
                hook.remove()
            for layer in u.layers:
                unproject(layer)
        for a in self.adapters:
            a.detach()

    def table(self) -> str:
        """What is trained how, with its memory: for the start of a run."""
        return memory.table(self)
