"""AdaRankGrad: ranks by energy, lives by convergence, moments and memory through changes of rank. What all
methods share is tested in test_engine.py."""

import copy
import io
import itertools
import math
import random

import pytest
import torch
from torch import nn

from optim import adarank, attach, subspace
from optim.adarank import BETA, LAG, MARGIN, SHORTEST, AdaRank
from optim.config import AdaRankConfig, default_rank_step
from optim.memory import entries
from optim.reduce import Reduce
from optim.subspace import Ranks, find
from tests.mutants import kills
from tests.test_attach import reachable, stored
from tests.test_engine import START, close
from tests.tiny import Oracle, Tiny, batches, compile_blocks, flat, moved, parallel, train

# Half of the energy: within two refreshes bases of rank 6 have ranks from 1 to 5.
KEYS = {"lr": 1e-2, "rank": 6, "rank_min": 1, "refresh_every": 4, "energy": 0.5, "eps": 1e-6}


def planted(spectrum, rows=20, n=16, seed=0):
    """(rows, n) with these singular values, float64."""
    g = torch.Generator().manual_seed(seed)
    s = torch.tensor(spectrum, dtype=torch.float64)
    u, v = (torch.linalg.qr(torch.randn(k, len(s), generator=g, dtype=s.dtype)).Q for k in (rows, n))
    return u * s @ v.t()


def old_basis(r, n=16):
    return subspace.random_basis(n, r, 3, "cpu", torch.float64)


# ---- ranks


@pytest.mark.parametrize("seed", range(40))
@kills("optim/subspace.py", "if held[r - 1] >= self.energy", "if held[r] >= self.energy")
@kills("optim/subspace.py", "range(first, self.most, self.step)", "range(first, self.most)")
@kills("optim/subspace.py", "first = -(-self.least // self.step) * self.step", "first = self.step")
@kills("optim/subspace.py", "energies.cumsum(0)", "energies.flip(0).cumsum(0)")
@kills("optim/subspace.py", "_widened(q_old, ranks.most, seed)", "q_old")
def test_the_rank_is_the_least_that_holds_the_energy_invariant_30(seed):
    """Exact SVD: the rank follows from singular values. Any finder: what its columns hold counts."""
    rng = random.Random(seed)
    spectrum = [10 ** rng.uniform(-0.5, 0.5) for _ in range(12)]
    energy, step, least = rng.uniform(0.1, 1), rng.randint(1, 4), rng.randint(1, 5)
    most, before = rng.randint(6, 12), rng.randint(1, 12)
    g, ranks = planted(spectrum), Ranks(energy, step, least, most)
    shares = torch.tensor(sorted(spectrum, reverse=True)).double().square().cumsum(0)
    shares = (shares / shares[-1]).tolist()
    choices = [r for r in range(1, most) if r % step == 0 and r >= least]
    old = old_basis(min(before, most))
    for finder in ("svd", "warm", "randomized"):
        found = find([g], old, finder, 1, ranks=ranks)
        q, r = found.q, found.q.shape[1]
        assert found.outcome == subspace.FOUND and r in (*choices, most)
        held = ((g @ q).square().sum(0).cumsum(0) / g.square().sum()).tolist()
        below = [s for s in choices if s < r]
        assert r == most or held[r - 1] >= energy - 1e-9
        assert not below or held[below[-1] - 1] < energy + 1e-9
        if finder == "svd":
            assert r in {
                next((s for s in choices if shares[s - 1] >= energy + e), most) for e in (-1e-6, 1e-6)
            }


@pytest.mark.parametrize("before", [4, 8, 12])
@kills("optim/subspace.py", "(q.t() @ more)), [])], 1)", "(q.t() @ more)), [])], 1).flip(1)")
@kills("optim/subspace.py", "None if first else start)", "None)")
def test_the_first_columns_are_what_fewer_would_find(before):
    """Those of a basis whose rank is chosen: the span of GaLore's with that rank from the first of the old
    ones, whatever else is iterated beside them, and each column continues its old one."""
    g = planted([10 ** (-n / 8) for n in range(14)])
    old = old_basis(before)
    for least in (2, 4):
        ranks = Ranks(1e-9, 1, least, 12)  # the least rank holds enough
        for finder in ("warm", "svd"):
            found = find([g], old, finder, 1, ranks=ranks)
            alone = find([g], old[:, :least], finder, 1)
            assert found.q.shape[1] == found.asked == least
            assert torch.linalg.svdvals(alone.q.T @ found.q).min() > 1 - 1e-6
            assert (old[:, :least] * found.q).sum(0).min() >= 0
    wide = find([g], old, "warm", 1, ranks=Ranks(1, 1, 1, 12))
    assert wide.q.shape[1] == 12 and (old * wide.q[:, :before]).sum(0).min() >= 0


@pytest.mark.parametrize("finder", ["warm", "svd", "randomized"])
def test_a_rank_is_found_for_every_matrix_invariant_31(finder):
    ranks = Ranks(0.9, 2, 1, 10)
    zero = find([torch.zeros(20, 16, dtype=torch.float64)], old_basis(4), finder, 1, ranks=ranks)
    assert zero.outcome == subspace.KEPT and torch.equal(zero.q, old_basis(4))
    for spectrum, r in (([5.0], 2), ([1.0] * 16, 10), ([3.0] * 6, 6), ([1.0] * 4 + [1e-9] * 8, 4)):
        for dtype in (torch.float64, torch.float32):
            found = find([planted(spectrum).to(dtype)], old_basis(4), finder, 1, ranks=ranks)
            assert found.q.shape[1] == r, spectrum
            assert (found.q.T @ found.q - torch.eye(r)).abs().max() <= 1e-5
    noise = planted([1.0 + n / 99 for n in range(16)])
    for energy, r in ((1.0, 10), (1e-9, 2)):
        assert find([noise], old_basis(4), finder, 1, ranks=Ranks(energy, 2, 1, 10)).q.shape[1] == r
    assert find([noise * math.nan], old_basis(4), finder, 1, ranks=ranks).outcome == subspace.KEPT


class Linear(nn.Module):
    """The gradient of its only weight is what it is told, whatever the weight."""

    def __init__(self, rows=20, n=16):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(n, rows, bias=False, dtype=torch.float64)])

    def backward(self, g):
        (self.layers[0](torch.eye(g.shape[1], dtype=g.dtype)) * g.t()).sum().backward()


def trained_on(gradients, **settings):
    """A step on each gradient; its basis' rank and number of refreshes after each."""
    model = Linear()
    fixed = {"lr": 1e-3, "rank": 12, "rank_min": 1, "refresh_every": 8, "energy": 0.9}
    opt = attach(model, "adarankgrad", **{**fixed, **settings})
    told = []
    for g in gradients:
        model.backward(g)
        opt.step()
        opt.zero_grad()
        told.append((opt.bases[0].rank, opt.bases[0].count))
    return model, opt, told


def falling(ranks=(11, 8, 5, 2, 7, 7), steps=8):
    """Gradients whose energy lies in fewer and fewer directions, at the end again in more."""
    return [planted([1.0] * r, seed=n) for n, r in enumerate(ranks) for _ in range(steps)]


@kills("optim/adarank.py", "if b.fresh or not", "if not")
@kills("optim/refresh.py", "ranks=self.ranks(b) if self.ranks else None", "ranks=None")
@kills("optim/adarank.py", "b.rank if self.cfg.monotone else b.most", "b.most")
@kills("optim/adarank.py", "b.rank if self.cfg.monotone else b.most", "b.rank")
@kills("optim/adarank.py", "min(spare) >= 0 and ", "")
@kills("optim/subspace.py", "min(asked, ranks.room or asked)", "asked")
@pytest.mark.parametrize("monotone", [False, True])
def test_ranks_follow_a_falling_rank(monotone):
    """The random basis is replaced at full rank; from then on the rank is 90% of the planted one: at once if
    it falls, when there is room again if it rises."""
    _, opt, told = trained_on(falling(), adapt_refresh=False, rank_step=1, monotone=monotone)
    assert [r for r, _ in told[::8]] == [12, 8, 5, 2, 2, 2 if monotone else 7]
    assert told[0] == (12, 0) and told[1] == (12, 1) and told[-1][1] == 6
    assert opt.bases[0].most == 12


@kills("optim/unit.py", "if new.shape != old.shape:", "if k == 'd':")
@kills("optim/unit.py", "if r != self.r:", "if r > self.r:")
@kills("optim/engine.py", "for u in dict.fromkeys(u for b in bases for u in b.units)", "for u in ()")
@kills("optim/engine.py", "self.version += bool(bases)", "pass")
@kills("optim/adarank.py", "updates % self.every or not", "not")
@kills("optim/adarank.py", "for u in dict.fromkeys(u for b in changed for u in b.units)", "for u in ()")
@kills("optim/memory.py", "(len(b.qs) + b.k)", "len(b.qs)")
@kills("optim/memory.py", 'Entry("column scale", cols', 'Entry("column scale", u.q.most')
@pytest.mark.parametrize("side", ["input", "output", "both"])
def test_memory_falls_as_the_formula_says(side):
    """After every refresh_every steps: each tensor that can be reached is in the table, nothing else is held,
    and a graph captured before is known to be stale."""
    model = Linear()
    opt = attach(model, "adarankgrad_8bit", lr=1e-3, rank=12, refresh_every=8, energy=0.9, rank_step=1,
                 rank_min=1, adapt_refresh=False, side=side)  # fmt: skip
    held, versions, full = [], [], sum(x.bytes for x in entries(opt))
    for g in falling():
        model.backward(g)
        opt.step()
        opt.zero_grad()
        saved, opt.stats = opt.stats["saved_mib"] * 2**20, {}
        table: dict[torch.dtype, int] = {}
        counted: dict[torch.dtype, int] = {}
        for x in entries(opt):
            table[x.dtype] = table.get(x.dtype, 0) + x.numel
        for t in reachable(model, opt):
            counted[t.dtype] = counted.get(t.dtype, 0) + stored(t)
        assert counted == table
        now = sum(x.bytes for x in entries(opt))
        assert saved == full - now
        held.append(now)
        versions.append(opt.version)
        (u,) = opt.units
        assert u.state["m"].shape == u.shape and (not u.q or u.state["d"].shape == (u.q.r,))
        for b in u.bases:
            layer = model.layers[0]
            assert (layer.q if b.side == "input" else layer.p) is b.qs
        if len(held) % 8 == 0:
            assert all(b.r == b.asked for b in opt.bases)
    changed = [n for n in range(1, 48) if held[n] != held[n - 1]]
    assert changed == [15, 23, 31, 39], "all at once"
    assert held[7] > held[15] > held[23] > held[31] < held[39]
    assert [n for n in range(1, 48) if versions[n] != versions[n - 1]] == changed


@kills("optim/adarank.py", "sum(spare) < room * SPARE", "False")
@kills(
    "optim/adarank.py", "b for b in self.bases if b.asked != b.r", "b for b in self.bases if b.asked > b.r"
)
@kills("optim/adarank.py", "(b.r - b.asked) * size", "(b.r - b.asked)")
def test_room_is_given_back_when_an_eighth_is_spare_or_one_basis_needs_more():
    """Sizes 16 + 8: of five bases with room for 4 a column each is a quarter of the room."""
    for asked, resized in (
        ((4, 4, 4, 4, 4), []), ((4, 3, 4, 4, 4), []), ((4, 3, 4, 2, 4), [1, 3]), ((4, 3, 4, 6, 4), [1, 3]),
    ):  # fmt: skip
        a = alone(most=8)
        for b, r in zip(a.bases, asked, strict=True):
            b.rank = min(b.rank, r)
            b.asked = r
        assert a.resize(7) == []
        assert [b.index for b in a.resize(8)] == resized
        assert [b.r for b in a.bases] == [r if n in resized else 4 for n, r in enumerate(asked)]


def test_defaults():
    """Steps of an eighth of the rank, 64 at most; half of the rank at least."""
    assert [default_rank_step(r) for r in (1, 4, 32, 128, 256, 512, 1024)] == [1, 1, 4, 16, 32, 64, 64]
    a = alone()
    b = a.bases[0]
    assert a.ranks(b) is None
    b.fresh, b.most, b.r = False, 45, 30
    assert a.ranks(b) == Ranks(0.9, 5, 23, 45, 30)


# ---- moments


class AdaOracle(Oracle):
    """Whole gradients; replaces the bases that the engine replaced, and chooses their ranks itself."""

    def ranks(self, b):
        cfg = self.engine.cfg
        return (
            Ranks(cfg.energy, 1, 1, 6, self.rooms[self.step_number][b.index]) if self.found[b.name] else None
        )

    def due(self, b):
        return (self.step_number, b.index) in self.replaced


def recorded(opt):
    """after_step for `train`, and the (update, basis) that were replaced, with all ranks after each and the
    room before each."""
    events, ranks, counts = set(), [], [0] * len(opt.bases)
    rooms = [[b.r for b in opt.bases]]

    def note(n):
        for b in opt.bases:
            if b.count != counts[b.index]:
                events.add((n, b.index))
                counts[b.index] = b.count
        ranks.append([b.rank for b in opt.bases])
        rooms.append([b.r for b in opt.bases])

    return note, events, ranks, rooms


@pytest.mark.parametrize("side", ["input", "output", "both"])
@pytest.mark.parametrize("transport", ["auto", "keep", "rotate_fill", "rotate", "reset"])
@kills("optim/refresh.py", ".narrow(dim, 0, len(c))", "")
@kills("optim/unit.py", "self.own[:, self.rank : self.r].zero_()", "pass")
@kills("optim/refresh.py", '"reset" if first else "keep" if', '"keep" if')
@kills("optim/refresh.py", 'if policy == "keep" and b.varies:', "if False:")
@kills("optim/refresh.py", "torch.eye(*c.shape", "0 * torch.eye(*c.shape")
@kills("optim/refresh.py", "b.replace_(q)", "pass")
@kills("optim/refresh.py", "m, v = subspace.transport(m, v, c, policy, dim)", "m, v = m and c * 0, v")
def test_equals_the_dense_oracle_through_changes_of_rank(side, transport):
    model, plain = Tiny(), Tiny()
    opt = attach(model, "adarankgrad", **KEYS, side=side, transport=transport)
    oracle = AdaOracle(plain, opt, eps=1e-6)
    note, oracle.replaced, ranks, oracle.rooms = recorded(opt)
    losses = train(model, opt, batches(14), after_step=note)
    assert len({tuple(r) for r in ranks}) >= 4 and all(b.count >= 2 for b in opt.bases)
    assert any(x > y for x, y in itertools.pairwise(oracle.rooms)), "some rise"
    expected = train(plain, oracle, batches(14))
    assert {b.name: b.rank for b in opt.bases} == {name: q.shape[1] for name, q in oracle.q.items()}
    close(plain, model, 1e-8)
    assert losses == pytest.approx(expected, rel=1e-8)


@kills("optim/unit.py", 'blank["c"] = self.param', 'blank["e"] = self.param')
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_deferred_lift_goes_through_changes_of_rank(decay):
    """C has the columns of its basis, and is folded into W before that is replaced."""
    ends = []
    for lift in ("now", "deferred"):
        model = Tiny()
        opt = attach(model, "adarankgrad", **KEYS, lift=lift, decay=decay)
        note, _, ranks, rooms = recorded(opt)
        train(model, opt, batches(14), after_step=note)
        assert len({tuple(r) for r in rooms}) >= 3
        ends.append((model, ranks))
    assert ends[0][1] == ends[1][1] and len({tuple(r) for r in ends[0][1]}) >= 4
    assert all(u.state["c"].shape == u.shape for u in opt.units if u.deferred)
    close(ends[0][0], ends[1][0], 1e-8)


@pytest.mark.parametrize("twin", ["", "_8bit"])
@pytest.mark.parametrize("transport", ["auto", "rotate_fill", "keep", "reset"])
@kills("optim/adarank.py", "b.fresh or not self.cfg.adapt_rank", "b.fresh")
@kills("optim/engine.py", "if self.adarank and self.adarank.cfg.adapt_refresh", "if self.adarank")
def test_without_either_it_is_galore_bitwise(twin, transport):
    ends = []
    for method, off in (("galore", {}), ("adarankgrad", {"adapt_rank": False, "adapt_refresh": False})):
        model = Tiny()
        opt = attach(model, f"{method}{twin}", lr=1e-2, rank=6, refresh_every=8, transport=transport, **off)
        ends.append((train(model, opt, batches(19)), flat(model)))
    assert ends[0][0] == ends[1][0] and torch.equal(ends[0][1], ends[1][1])


# ---- lives


@kills("optim/adarank.py", "if life.begun < 0 else update", "if False else update")
@kills("optim/adarank.py", "update, self.every + after, 0", "update, self.every, 0")
def test_a_gradient_that_never_converges_keeps_galores_schedule(monkeypatch):
    monkeypatch.setattr(adarank, "MARGIN", 0.0)
    ends = []
    for method, off in (("galore", {}), ("adarankgrad", {"adapt_rank": False})):
        model = Tiny()
        opt = attach(model, method, lr=1e-2, rank=4, refresh_every=11, transport="rotate_fill", **off)
        opt.warmup_steps = 5
        ends.append((train(model, opt, batches(35)), flat(model)))
    assert ends[0][0] == ends[1][0] and torch.equal(ends[0][1], ends[1][1])


def lives(sizes, every, energy):
    """Updates that replace a basis that holds all of G; sizes: ||G|| in each."""
    least = max(1, every // SHORTEST)
    lag, begun, latest, x, reference, threshold = min(LAG, least), None, 1, 0.0, math.inf, 0.0
    wanted = below = False
    found = []
    for n, size in enumerate(sizes):
        replaced = n >= latest or wanted
        if replaced:
            found.append(n)
            latest, wanted, reference = n + every if begun is not None else every, False, size
        x = 1.0 if replaced and begun is None else BETA * x + (1 - BETA) * size / reference
        if replaced:
            begun, threshold = n, MARGIN * min(energy**0.5, x)
        if (n + 1) % lag == 0:
            wanted |= below and n - begun >= least
            below = x < threshold
    return found


@kills("optim/adarank.py", "BETA * self.average + (1 - BETA)", "0.5 * self.average + 0.5")
@kills(
    "optim/adarank.py",
    "MARGIN * self.average[at].clamp(max=self.cfg.energy**0.5)",
    "MARGIN * self.average[at]",
)
@kills("optim/adarank.py", "MARGIN * self.average[at]", "self.average[at]")
@kills("optim/adarank.py", "clamp(max=self.cfg.energy**0.5)", "clamp(max=self.cfg.energy)")
@kills("optim/adarank.py", "self.reference[at] = whole[at]", "self.reference[at] = captured[at] / 2")
@kills("optim/adarank.py", "torch.where(first, ratio[at], x[at])", "x[at]")
@kills("optim/adarank.py", "torch.where(first, ratio[at], x[at])", "ratio[at]")
@kills("optim/adarank.py", "self.lag = min(LAG, self.least)", "self.lag = min(9, self.least)")
@kills("optim/adarank.py", "bool(life.wanted) or update >= life.latest", "update >= life.latest")
@kills("optim/adarank.py", "bool(life.wanted) or update >= life.latest", "bool(life.wanted)")
@kills("optim/adarank.py", "(captured / self.reference).sqrt()", "captured / self.reference")
@pytest.mark.parametrize("energy", [0.3, 0.9])
@pytest.mark.parametrize("rate", [1.0, 0.995, 0.97, 0.9, 1.01])
def test_a_basis_lives_until_its_gradient_has_converged(energy, rate):
    """Norms that fall, and one of full size now and then."""
    every = 78
    sizes = [2 * rate**n if n % 23 else 2.0 for n in range(150)]
    g = planted([1.0, 0.0])
    _, opt, told = trained_on([g * s for s in sizes], refresh_every=every, energy=energy)
    counts = [0, *(count for _, count in told)]
    assert [n for n in range(150) if counts[n + 1] > counts[n]] == lives(sizes, every, energy)


class Replicas(Reduce):
    """Another rank: the first one's answer is what counts."""

    def __init__(self, answer):
        super().__init__(None, False)
        self.answer = answer

    def from_owner_(self, t, owner):
        assert owner == 0
        t.copy_(self.answer)


def alone(n=5, every=8, reduce=None, most=4, **settings):
    """Bases with room for 4 columns, each of a layer 16 wide."""
    bases = []
    for b in range(n):
        model = nn.Module()
        model.layers = nn.ModuleList([nn.Linear(16, 8, bias=False)])
        bases += attach(model, "galore", rank=4).bases
        bases[-1].index = bases[-1].turn = b
        bases[-1].most = most
        bases[-1].units[0].index = b
    a = AdaRank(bases, n, AdaRankConfig(**settings), every, reduce or Reduce(None, False))
    a.place(torch.device("cpu"), torch.float64)
    return a


@kills("optim/adarank.py", "self.reduce.from_owner_(self.below, 0)", "pass")
def test_all_ranks_go_by_the_first_ones_answer():
    a = alone(every=40, reduce=Replicas(torch.tensor([True, False, True, False, False])))
    for update in range(40):
        a.look(update)
    assert [life.wanted for life in a.lives] == [1, 0, 1, 0, 0]


@kills("optim/adarank.py", "key=lambda b: self.lives[b.index].begun", "key=lambda b: -b.index")
@kills("optim/adarank.py", "for b in waiting))[: self.most]", "for b in waiting))")
@kills("optim/adarank.py", "b.due = b in waiting and b.turn in chosen", "b.due = b.turn in chosen")
@kills("optim/adarank.py", "-(-self.turns // self.least)", "self.turns // self.least")
def test_few_blocks_at_once_the_oldest_first():
    a = alone()
    assert (a.least, a.most) == (2, 3)
    for life, begun in zip(a.lives, (9, 4, 7, 5, 8), strict=True):
        life.begun, life.latest, life.wanted = begun, 99, 1
    a.choose(20, 0)
    assert [b.index for b in a.bases if b.due] == [1, 2, 3]
    a.lives[3].wanted = a.lives[4].wanted = 0
    a.lives[4].latest = 20
    a.choose(20, 0)
    assert [b.index for b in a.bases if b.due] == [1, 2, 4]
    for b, turn in zip(a.bases, (0, 1, 0, 1, 2), strict=True):
        b.turn = turn
    a.most = 1
    a.choose(20, 0)
    assert [b.index for b in a.bases if b.due] == [1], "its block's other one does not wait"
    a.lives[3].wanted = 1
    a.choose(20, 0)
    assert [b.index for b in a.bases if b.due] == [1, 3]


@kills("optim/engine.py", "if part or not self.updates", "if not self.updates")
def test_a_step_that_replaces_a_part_of_a_block_is_of_no_kind():
    """Nor captured therefore: the next part of it may be another."""
    model = Tiny()
    opt = attach(model, "adarankgrad", **{**KEYS, "refresh_every": 50})
    train(model, opt, batches(4))
    assert opt.kind == -1
    for life in opt.adarank.lives[:2]:
        life.wanted = 1
    opt._prepare()
    assert [b.index for b in opt.bases if b.due] == [0, 1] and opt.kind is None
    for life in opt.adarank.lives[:4]:
        life.wanted = 1
    opt._prepare()
    assert opt.kind == 0


@kills("optim/adarank.py", "for b in tried:", "for b in (b for b in tried if b.count == 2):")
def test_a_zero_gradient_is_not_tried_again_at_once(monkeypatch):
    monkeypatch.setattr(adarank, "MARGIN", 0.0)
    zero, g = torch.zeros(20, 16, dtype=torch.float64), planted([1.0, 0.5])
    _, opt, told = trained_on([*[g] * 6, zero, *[g] * 7], refresh_every=6)
    assert opt.stats["bases_kept"] == 1
    assert [count for _, count in told] == [0] + [1] * 11 + [2] * 2, "kept at 6, found at 12"
    _, opt, told = trained_on([g, zero, *[g] * 12], refresh_every=6)
    assert [r for r, _ in told] == [12] * 12 + [2] * 2, "the first basis that is found has full rank"


@kills("optim/adarank.py", "update - life.begun >= self.least", "update - life.begun > self.least")
@kills("optim/adarank.py", "life.wanted |= int(below and", "life.wanted = int(below and")
def test_a_basis_is_old_enough_at_its_least_age():
    a = alone(every=78)
    assert (a.least, a.lag) == (19, 10)
    a.below.fill_(True)
    for life, begun in zip(a.lives, (10, 11, 9, 25, 29), strict=True):
        life.begun = begun
    a.lives[4].wanted = 1
    a.look(28)
    assert [life.wanted for life in a.lives] == [0, 0, 0, 0, 1], "between two looks"
    a.look(29)
    assert [life.wanted for life in a.lives] == [1, 0, 1, 0, 1]


@kills("optim/adarank.py", "(mine == self.members).all(1)", "mine.any(1)")
def test_a_gradient_that_is_not_finite_leaves_the_average():
    model = Tiny()
    opt = attach(model, "adarankgrad", **{**KEYS, "refresh_every": 50})
    train(model, opt, batches(14))
    assert not any(b.due for b in opt.bases)
    before, u = opt.adarank.average.clone(), opt.units[1]
    handle = u.leaves[0].register_hook(lambda g: g * math.nan)
    train(model, opt, batches(15)[14:])
    handle.remove()
    same = [x == y for x, y in zip(before.tolist(), opt.adarank.average.tolist(), strict=True)]
    assert same == [b is u.q for b in opt.bases]


# ---- ranks, saves, graphs


def adapted(rank, world):
    import torch.distributed as dist

    model = Tiny()
    opt = attach(model, "adarankgrad_8bit", **KEYS, group=dist.group.WORLD, reduce="sum")
    note, *told = recorded(opt)
    train(model, opt, batches(16), rank=rank, world=world, after_step=note)
    return flat(model), *told, [vars(life) for life in opt.adarank.lives]


@kills("optim/refresh.py", "if q.shape[1] != r:", "if False:")
@kills("optim/refresh.py", "torch.tensor([outcome, q.shape[1], asked", "torch.tensor([outcome, b.rank, asked")
def test_two_ranks_choose_as_one():
    model = Tiny()
    opt = attach(model, "adarankgrad_8bit", **KEYS)
    note, *told = recorded(opt)
    train(model, opt, batches(16), after_step=note)
    assert len({tuple(r) for r in told[1]}) >= 5
    both = parallel(2, adapted)
    assert torch.equal(both[0][0], both[1][0])
    for end, *decided in both:
        assert decided == [*told, [vars(life) for life in opt.adarank.lives]]
        assert (end - flat(model)).norm() <= 1e-10 * moved(model, START)


@pytest.mark.parametrize(("method", "lift"), [("adarankgrad", "deferred"), ("adarankgrad_8bit", "now")])
@kills("optim/state.py", "        e.adarank.load_(state[LIVES])\n", "")
@kills("optim/state.py", "        e.rearrange(e.bases)\n", "")
@kills("optim/adarank.py", 'b.asked = int(state["asked"][n])', "pass")
@kills("optim/unit.py", "int(self.own[:, : self.r].any(0).sum())", "self.r")
def test_resumes_bitwise_around_every_change_of_rank(method, lift):
    steps, model = 14, Tiny()
    opt = attach(model, method, **KEYS, lift=lift)
    saves = []

    def save(n):
        buffer = io.BytesIO()
        torch.save([model.state_dict(), opt.state_dict(), [(b.r, b.rank) for b in opt.bases]], buffer)
        saves.append(buffer)

    train(model, opt, batches(steps), after_step=save)
    ranks = [torch.load(io.BytesIO(b.getvalue()))[2] for b in saves]
    changes = [n for n in range(1, steps - 1) if ranks[n] != ranks[n - 1]]
    assert len(changes) >= 4
    for n in sorted({n + d for n in changes for d in (-1, 0)}):
        weights, state, before = torch.load(io.BytesIO(saves[n].getvalue()))
        again = Tiny(seed=5)
        other = attach(again, method, **KEYS, lift=lift)
        again.load_state_dict(weights)
        other.load_state_dict(state)
        assert [(b.r, b.rank) for b in other.bases] == before
        train(again, other, batches(steps)[n + 1 :])
        assert torch.equal(flat(again), flat(model)), f"after step {n + 1}"
        a, b = (torch.utils._pytree.tree_leaves(o.state_dict()["state"]) for o in (opt, other))
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        stats = [
            {k: v for k, v in o.stats.items() if k not in ("refresh_s", "overlap")} for o in (opt, other)
        ]
        assert stats[0] == stats[1]


@kills(
    "optim/state.py", "            b.r, b.rank, b.qs, b.cross = r, rank, qs, cross\n", "            pass\n"
)
@kills("optim/state.py", "            u.state |= kept\n", "            pass\n")
def test_a_refused_save_of_other_ranks_changes_nothing():
    model = Tiny()
    opt = attach(model, "adarankgrad", **KEYS)
    train(model, opt, batches(12))
    saved = copy.deepcopy(opt.state_dict())
    assert any(b.r < 6 for b in opt.bases)
    fresh = Tiny()
    other = attach(fresh, "adarankgrad", **KEYS)
    before = copy.deepcopy(other.state_dict()["state"])
    bad = copy.deepcopy(saved)
    bad["state"]["layers.1.down_proj.weight"]["m"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"layers\.1\.down_proj\.weight.*\(3,\)"):
        other.load_state_dict(bad)
    after = other.state_dict()["state"]
    assert all(torch.equal(before[n][k], after[n][k]) for n in before for k in before[n])
    assert [b.r for b in other.bases] == [6] * 8
    train(fresh, other, batches(2))
    narrow = attach(Tiny(), "adarankgrad", **{**KEYS, "rank": 2})
    with pytest.raises(ValueError, match="optimizer state"):
        narrow.load_state_dict(saved)


@kills("optim/unit.py", "torch._dynamo.mark_dynamic(b.qs, 1)", "pass")
@kills(
    "optim/unit.py",
    "torch._dynamo.mark_dynamic(self.leaves[0], 1 if",
    "torch._dynamo.mark_dynamic(self.leaves[0], 0 if",
)
@kills("optim/unit.py", 'torch._dynamo.mark_dynamic(self.state["c"], 1)', "pass")
@pytest.mark.parametrize("how", [{"side": "output"}, {"side": "both"}, {"lift": "now"}, {"lift": "deferred"}])
def test_other_ranks_are_no_other_graphs(how):
    """Different ranks in a block, and one graph from the first step on; only rank 1 would have its own."""
    keys = {**KEYS, "rank_min": 2, "energy": 0.65, **how}
    torch._dynamo.reset()
    graphs = []

    def counting(gm, inputs):
        graphs.append(gm)
        return gm

    eager, model = Tiny(), Tiny()
    plain = attach(eager, "adarankgrad", **keys)
    opt = attach(model, "adarankgrad", **keys)
    train(eager, plain, batches(12))
    compile_blocks(model, backend=counting)
    note, _, _, ranks = recorded(opt)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        train(model, opt, batches(12), after_step=note)
    assert len({r for some in ranks for r in some}) >= 3
    close(eager, model, 1e-10)
    assert len(graphs) == 1


# ---- measures and settings


@kills("optim/adarank.py", "self.lives[b.index].ranks += b.rank", "self.lives[b.index].ranks += b.most")
@kills("optim/adarank.py", "(most - mean) * size for most", "(most - mean) for most")
@kills("optim/engine.py", "self.bases if done == 1 else self.refresher.replaced", "self.refresher.replaced")
def test_the_papers_measures():
    model = Tiny()
    opt = attach(model, "adarankgrad", **KEYS)
    note, events, ranks, _ = recorded(opt)
    rows = []

    def after(n):
        note(n)
        rows.append(dict(opt.stats))

    train(model, opt, batches(12), after_step=after)
    names = [u.name.removesuffix(".weight") for b in opt.bases for u in [b.units[0]]]
    for n, row in enumerate(rows):
        means = torch.tensor(ranks[: n + 1]).double().mean(0).tolist()
        parts = [(means[b.index], sum(u.param.shape)) for b in opt.bases for u in b.units]
        total = sum(size for _, size in parts)
        assert row["effective_rank"] == pytest.approx(sum(m * size for m, size in parts) / total)
        assert row["memory_reduction"] == pytest.approx(sum((6 - m) * size for m, size in parts))
        shown = [b.index for b in opt.bases if n == 0 or (n, b.index) in events]
        assert {k for k in row if k.startswith("rank/")} == {f"rank/{names[b]}" for b in shown}
        for b in shown:
            assert row[f"rank/{names[b]}"] == ranks[n][b]
            assert row[f"effective_rank/{names[b]}"] == pytest.approx(means[b])
            saved = sum((6 - means[b]) * sum(u.param.shape) for u in opt.bases[b].units)
            assert row[f"memory_reduction/{names[b]}"] == pytest.approx(saved)
