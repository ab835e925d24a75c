"""AdaRankGrad (Refael et al. 2024, arXiv 2410.17881): the rank of a basis by energy, its life by
convergence.

Rank (Algorithm 2, Eq. 2; chosen in subspace.find). With lambda_i the energies of G along the new basis'
columns and e(r) = 1 - sum_{i <= r} lambda_i / ||G||^2,

    r = the least multiple of rank_step in [rank_min, r_max] with e(r) <= 1 - energy, else r_max

The columns are in the order of subspace iteration, whose factors are triangular: the first r are those that
it would find from the first r alone, within a few percent of the best r, and no eigenvalues are needed. r_max
is the rank at the start; with `monotone` the last one. rank_min is half of it unless set: early
gradients lie in few directions, and what training loses in them it does not make up. A random first basis is
replaced at full rank. The paper asks for the largest r with an error of at most eta_th (Eq. 4), which is
always the full rank; its search shrinks r_max where the error is too large, and for a matrix of rank one it
does not end. Its eta_th = 0.48 is, of norms as in Algorithm 2, energy = 1 - 0.48^2 = 0.77; of squares as in
Eq. 2, 0.52.

Life (Algorithm 3, Block 3). The paper replaces a basis when ||R|| <= sqrt(1 - eta_th) ||G||, with G of its
first step (Theorem 2). A minibatch's norm is mostly noise, and R of the batch that the basis was found from
is larger than that of any other. So with x the moving average of ||R|| / ||G of its first step||, that goes
on over bases, one is replaced

    when x < MARGIN min(sqrt(energy), x in its first step), refresh_every / SHORTEST steps old or more,
    and when it is refresh_every steps old.

The random ones are replaced by GaLore's first round; if x never falls all others by GaLore's schedule. Those
that wait are replaced a block in a step, the oldest basis' first, or as many blocks as would make each one's
turn come every refresh_every / SHORTEST steps: each basis needs a whole G.

Moments (Block 2): the paper rotates them, M <- R M, V <- R V, and V can become negative. Here the columns
of a new basis continue those of the old one, whose moments stay; those of columns that are new begin at 0 and
the mean of V. In the order of energy and rotated (transport=rotate_fill)
V is a mean of all directions, far below what the leading ones need: at 60M the loss is 5.48 instead of 5.41
after 130 steps, perplexity 70.7 instead of 69.3 after 600. Those of the random basis start anew.

x lives on the device. Every `lag` steps it is compared, by the first rank for all, and what came of it read
`lag` steps later: no step waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import kernels
from .config import AdaRankConfig, default_rank_step
from .reduce import Reduce
from .refresh import due
from .scalars import Scalars
from .subspace import Ranks
from .unit import Basis

BETA = 0.9  # of the moving average
MARGIN = 0.95  # a fall by less is noise
SHORTEST = 4  # a basis lives for refresh_every / SHORTEST steps or more
LAG = 10  # steps between two looks, and from a look to its reading
SPARE = 1 / 8  # of the room of all bases: that much, not in use, is given back


@dataclass
class Life:
    """Of a basis; updates are counted from 0."""

    begun: int = -1  # the update that replaced it, or tried to; -1: none yet
    latest: int = 0  # the one that will at the latest
    wanted: int = 0  # its gradient has converged in it
    ranks: int = 0  # sum of its ranks over all updates


class AdaRank:
    """Which bases the next step replaces, how their ranks are chosen, and the paper's measures of them."""

    def __init__(
        self, bases: list[Basis], units: int, cfg: AdaRankConfig, every: int, reduce: Reduce
    ) -> None:
        """units: number of the engine's, of which `note` is told the squares."""
        self.bases, self.cfg, self.every, self.reduce = bases, cfg, every, reduce
        self.least = max(1, every // SHORTEST)
        self.lag = min(LAG, self.least)
        self.turns = max((b.turn for b in bases), default=0) + 1
        self.most = -(-self.turns // self.least)  # turns a step
        self.lives = [Life() for _ in bases]
        self.sizes = [sum(sum(u.size) for u in b.units) for b in bases]  # sums of d_j + d_{j+1}
        for b in bases:
            b.varies = cfg.adapt_rank
        self.members = torch.zeros(len(bases), units, dtype=torch.bool)
        for b in bases:
            self.members[b.index, [u.index for u in b.units]] = True
        n = len(bases)
        self.average = torch.zeros(n)  # x
        self.reference = torch.full((n,), torch.inf)  # ||G||^2 at the refresh; inf: none yet
        self.threshold = torch.zeros(n)  # of x
        self.below = torch.zeros(n, dtype=torch.bool)  # x < threshold, at the last look
        self._host = self.below
        self._copied: torch.cuda.Event | None = None

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        for name in ("members", "below"):
            setattr(self, name, getattr(self, name).to(device))
        for name in ("average", "reference", "threshold"):
            setattr(self, name, getattr(self, name).to(device, dtype))
        self._host = self.below
        if device.type == "cuda":
            self._host = torch.empty(self.below.shape, dtype=torch.bool, pin_memory=True)
        self._send()

    def ranks(self, b: Basis) -> Ranks | None:
        """How the rank of the basis after b is chosen; None: as b's."""
        if b.fresh or not self.cfg.adapt_rank:
            return None
        return Ranks(
            self.cfg.energy, self.step(b), self.floor(b), b.rank if self.cfg.monotone else b.most, b.r
        )

    def floor(self, b: Basis) -> int:
        return self.cfg.rank_min or -(-b.most // 2)

    def step(self, b: Basis) -> int:
        return self.cfg.rank_step or default_rank_step(b.most)

    # ---- before a step

    def choose(self, update: int, warmup: int) -> None:
        """Sets `due` of every basis for this update."""
        waiting = [b for b in self.bases if self._waits(b, update, warmup)]
        waiting.sort(key=lambda b: self.lives[b.index].begun)
        chosen = list(dict.fromkeys(b.turn for b in waiting))[: self.most]
        for b in self.bases:
            b.due = b in waiting and b.turn in chosen

    def _waits(self, b: Basis, update: int, warmup: int) -> bool:
        life = self.lives[b.index]
        if life.begun < 0:
            return due(b.turn, self.turns, update, self.every, warmup, False)
        return bool(life.wanted) or update >= life.latest

    # ---- after one

    def begin(self, tried: list[Basis], update: int) -> None:
        """New lives. A basis whose G was zero or not finite stays, and is not tried again at once."""
        for b in tried:
            life = self.lives[b.index]
            after = b.turn * self.every // self.turns if life.begun < 0 else update
            life.begun, life.latest, life.wanted = update, self.every + after, 0

    def note(self, scalars: Scalars, replaced: list[Basis]) -> None:
        """Of this update, whose squares ||R||^2 and ||G||^2 are exact for bases that it replaced. Nothing
        comes from the host unless there are such bases."""
        mine = self.members & (scalars.table[:, kernels.Column.OK] > 0)
        captured, whole = torch.where(self.members[:, :, None], scalars.squares, 0).sum(1).unbind(1)
        at = torch.tensor([b.index for b in replaced], device=mine.device) if replaced else None
        if at is not None:
            first = self.reference[at].isinf()
            self.reference[at] = whole[at]
        ratio = (captured / self.reference).sqrt()
        x = BETA * self.average + (1 - BETA) * ratio
        if at is not None:
            x[at] = torch.where(first, ratio[at], x[at])
        self.average.copy_(torch.where((mine == self.members).all(1), x, self.average))
        if at is not None:
            self.threshold[at] = MARGIN * self.average[at].clamp(max=self.cfg.energy**0.5)

    def look(self, update: int) -> None:
        """Ends an update. Now and then: reads what the last look saw, and looks again."""
        for b in self.bases:
            self.lives[b.index].ranks += b.rank
        if (update + 1) % self.lag:
            return
        if self._copied is not None:
            self._copied.synchronize()  # of lag steps ago
        for life, below in zip(self.lives, self._host.tolist(), strict=True):
            life.wanted |= int(below and update - life.begun >= self.least)
        torch.lt(self.average, self.threshold, out=self.below)
        self.reduce.from_owner_(self.below, 0)
        self._send()

    def _send(self) -> None:
        """`below` on its way to the host."""
        if self.below.is_cuda:
            self._host.copy_(self.below, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def resize(self, updates: int) -> list[Basis]:
        """After so many updates: which bases have room for another number of columns now, and their units'
        tensors with them."""
        if updates % self.every or not self.cfg.adapt_rank:
            return []
        room = sum(b.r * size for b, size in zip(self.bases, self.sizes, strict=True))
        spare = [(b.r - b.asked) * size for b, size in zip(self.bases, self.sizes, strict=True)]
        if min(spare) >= 0 and sum(spare) < room * SPARE:
            return []
        changed = [b for b in self.bases if b.asked != b.r]
        for b in changed:
            b.resize(b.asked)
        for u in dict.fromkeys(u for b in changed for u in b.units):
            u.resize()
        return changed

    # ---- saved

    def saved(self) -> dict[str, Tensor]:
        """Of every basis a number each."""
        held = {k: getattr(self, k) for k in ("average", "reference", "threshold", "below")}
        held["asked"] = torch.tensor([b.asked for b in self.bases])
        return held | {k: torch.tensor([vars(life)[k] for life in self.lives]) for k in vars(Life())}

    def load_(self, state: dict[str, Tensor]) -> None:
        for k in ("average", "reference", "threshold", "below"):
            getattr(self, k).copy_(state[k])
        for n, (b, life) in enumerate(zip(self.bases, self.lives, strict=True)):
            vars(life).update({k: int(state[k][n]) for k in vars(life)})
            b.asked = int(state["asked"][n])
        self._send()

    # ---- measures

    def measures(self, updates: int) -> dict[str, float]:
        """The paper's, of all layers after so many updates. With R_t^j the rank of layer j in update t and
        d_j, d_{j+1} its sizes: effective_rank, the mean of R_t^j weighted by d_j + d_{j+1} (the paper's total
        weighted-average effective rank, there divided by the sum of d_j d_{j+1}, which gives no rank);
        memory_reduction, the sum over j of (r_max - mean of R_t^j) (d_j + d_{j+1})."""
        lives = zip(self.bases, self.lives, self.sizes, strict=True)
        parts = [(b.most, life.ranks / updates, size) for b, life, size in lives]
        total = sum(size for *_, size in parts)
        return {
            "effective_rank": sum(mean * size for _, mean, size in parts) / total,
            "memory_reduction": sum((most - mean) * size for most, mean, size in parts),
        }

    def layers(self, some: list[Basis], updates: int) -> dict[str, float]:
        """Of these bases the rank, its mean over updates (effective layer-gradient-rank) and what that saves
        (per-layer memory reduction, of all layers with this basis). Keys end in the first layer's name."""
        found: dict[str, float] = {}
        for b in some:
            u, mean = b.units[0], self.lives[b.index].ranks / updates
            name = u.name.removesuffix(".weight") + (f"/{b.side}" if len(u.bases) > 1 else "")
            found[f"rank/{name}"] = float(b.rank)
            found[f"effective_rank/{name}"] = mean
            found[f"memory_reduction/{name}"] = (b.most - mean) * self.sizes[b.index]
        return found
