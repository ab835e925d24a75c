"""optim.growth_limit, and moments that change their store on the way from a save."""

import copy

import pytest
import torch

from optim import attach, moments
from optim.comm import local
from tests.mutants import kills
from tests.tiny import Tiny, batches, flat, keys, ranks, run, summed_loss, train

LIMIT = 1.005


def directions(method, limit, steps=12, **settings):
    """||W_t - W_(t-1)|| / (lr scale) of each projected matrix: lr so small that nothing else moves."""
    model = Tiny()
    opt = attach(model, method, rank=4, refresh_every=100, growth_limit=limit, **settings)
    matrices = [u for u in opt.units if u.projected]
    assert matrices and all(("grown" in u.state) == bool(limit) for u in matrices)
    out = {u.name: [] for u in matrices}
    for n, tokens in enumerate(batches(steps)):
        lr = 1e-9 * (1 + n % 3)
        for g in opt.param_groups:
            g["lr"] = lr
        before = {u.name: local(u.param).clone() for u in matrices}
        (summed_loss(model, tokens) * (20.0 if n == 5 else 1.0)).backward()
        opt.step()
        opt.zero_grad()
        for u in matrices:
            out[u.name].append(float((local(u.param) - before[u.name]).norm()) / (lr * u.scale))
    return out


@kills("optim/growth.py", "most = u.limit * grown", "most = u.limit * size")
@kills("optim/growth.py", ".sqrt() / lr", ".sqrt()")
@kills("optim/growth.py", "torch.where(moved, size * factor, grown)", "torch.where(moved, size, grown)")
@kills("optim/growth.py", "return n.mul_(torch.where(moved, factor, 1.0))", "return n")
@pytest.mark.parametrize("method", ["galore", "galore_sgd"])
@pytest.mark.parametrize("side", ["input", "output", "both"])
def test_an_update_is_at_most_limit_times_the_last(method, side):
    """p_t = min(||D_t||, limit p_(t-1)), with D of the run without a limit."""
    free, held = (directions(method, limit, side=side) for limit in (0.0, LIMIT))
    limited = 0
    for name, sizes in free.items():
        p = sizes[0]
        assert held[name][0] == pytest.approx(p, rel=1e-5)
        for size, is_ in zip(sizes[1:], held[name][1:], strict=True):
            limited += size > LIMIT * p
            p = min(size, LIMIT * p)
            assert is_ == pytest.approx(p, rel=1e-4)
    assert limited > 10


@kills("optim/growth.py", "moved = (lr > 0) & (size > 0)", "moved = lr > 0")
@pytest.mark.parametrize("method", ["galore", "galore_8bit", "galore_sgd"])
def test_a_skipped_update_is_not_remembered(method):
    _, opt, _ = run(method, steps=3, growth_limit=LIMIT)
    kept = {u.name: u.state["grown"].clone() for u in opt.units if u.projected}
    (summed_loss(opt.root, batches(1)[0]) * float("nan")).backward()
    opt.step()
    assert all(torch.equal(u.state["grown"], kept[u.name]) for u in opt.units if u.projected)


@pytest.mark.parametrize("method", ["galore_8bit", "gradnormlorp", "gradnormlorp_adapter"])
def test_it_is_saved_and_works_for_every_low_rank_method(method):
    settings = {"growth_limit": LIMIT, **keys(method)}
    model, opt, _ = run(method, steps=4, **settings)
    later = Tiny()
    again = attach(later, method, **settings)
    later.load_state_dict({k: v for k, v in model.state_dict().items() if k in later.state_dict()})
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    grown = [u.state["grown"] for u in again.units if "grown" in u.state]
    assert grown and any(g > 0 for g in grown)  # a factor may have begun anew
    for m, o in ((model, opt), (later, again)):
        train(m, o, batches(3, seed=5))
    assert torch.equal(flat(model), flat(later))
    free, _, _ = run(method, steps=4, **keys(method))
    assert not torch.equal(flat(free), flat(run(method, steps=4, **settings)[0]))


def test_two_ranks_limit_alike():
    settings = {**keys("galore"), "growth_limit": LIMIT}
    alone = flat(run("galore", steps=4, **{"growth_limit": LIMIT})[0])
    for w in ranks(2, "galore", 4, 1, settings):
        torch.testing.assert_close(w, alone, rtol=0, atol=1e-12)


# ---- moments from another store


def conversions(method, before, after, **settings):
    """(values before, values after) of every moment, by unit."""
    model, opt, _ = run(method, steps=4, moments=before, **settings)
    start = {u.name: {k: moments.load(u.state, k, torch.float64) for k in u.rule.moments} for u in opt.units}
    other = attach(Tiny(), method, **{**keys(method), **settings}, moments=after)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert torch.equal(other.scalars.t, opt.scalars.t) and other.updates == 4
    for u in other.units:
        for k, x in start[u.name].items():
            yield k, x, moments.load(u.state, k, torch.float64), u
    train(other.root, other, batches(2))


@kills("optim/state.py", "moments.save_(u.state, k, x, yes, yes, yes * u.index)", "pass")
@pytest.mark.parametrize("method", ["adamw", "galore", "gradnormlorp", "gradnormlorp_adapter"])
@pytest.mark.parametrize("after", ["int8", "bf16"])
def test_moments_are_converted_by_value(method, after):
    """There: within the store's rounding. And back: exactly what was stored."""
    for kind, old, new, _ in conversions(method, "fp32", after):
        scale = old.abs().max()
        close = {"int8": 0.03, "bf16": 0.01}[after]
        assert (new - old).abs().max() <= close * scale, kind
        assert torch.isfinite(new).all()
    for _, old, new, _ in conversions(method, after, "fp32"):
        assert torch.equal(old, new)


@kills("optim/state.py", 'd = values["v"].mean(0).sqrt() if', 'd = values["v"].mean(0) if')
@kills("optim/refresh.py", "d.clamp(min=FLOOR * d.max()), 1.0", "d, 1.0")
def test_the_column_scale_comes_from_the_second_moment():
    """The root mean square of a column, a thousandth of the largest at least: one column is zero here."""
    _, opt, _ = run("galore", steps=4)
    saved = copy.deepcopy(opt.state_dict())
    other = attach(Tiny(), "galore", **keys("galore"), moments="int8")
    scaled = [u for u in other.units if "d" in u.state]
    for u in scaled:
        saved["state"][u.name]["v"][:, 0] = 0
    other.load_state_dict(saved)
    for u in scaled:
        rms = saved["state"][u.name]["v"].mean(0).sqrt()
        want = rms.clamp(min=1e-3 * rms.max())
        torch.testing.assert_close(u.state["d"].double(), want, rtol=1e-5, atol=0)


def test_a_limit_may_come_and_go():
    for before, after in ((0.0, LIMIT), (LIMIT, 0.0)):
        _, opt, _ = run("galore", steps=3, growth_limit=before)
        other = attach(Tiny(), "galore", **keys("galore"), growth_limit=after)
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
        train(other.root, other, batches(2))
        assert all(float(u.state["grown"]) > 0 for u in other.units if "grown" in u.state)
