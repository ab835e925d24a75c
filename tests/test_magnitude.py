"""GradNormLoRP's direct form against an explicit magnitude and direction under autograd."""

import pytest
import torch
from torch import nn

from optim import attach, magnitude
from tests.mutants import kills
from tests.tiny import SETTINGS, Oracle, Tiny, batches, flat, moved, ranks, run, train

START = flat(Tiny())


class Explicit(nn.Module):
    """y = x (mag V / ||V_row||)^T + bias with V and mag trained."""

    def __init__(self, linear):
        super().__init__()
        self.v = nn.Parameter(linear.weight.detach().clone())
        self.mag = nn.Parameter(linear.weight.detach().norm(dim=1))
        self.bias = linear.bias

    def weight(self):
        return self.mag[:, None] * self.v / self.v.norm(dim=1, keepdim=True)

    def forward(self, x):
        return nn.functional.linear(x, self.weight(), self.bias)


class ExplicitOracle(Oracle):
    """Adam on V's gradient in a basis found from it, and on mag; decay on mag, so on W."""

    def __init__(self, model, engine, mag_scale=0.25):
        for u in engine.units:
            if u.projected:
                path, _, name = u.name.removesuffix(".weight").rpartition(".")
                parent = model.get_submodule(path)
                setattr(parent, name, Explicit(getattr(parent, name)))
        super().__init__(model, engine)
        self.mag_scale = mag_scale
        for u in engine.units:
            if u.projected:
                self.named[u.name] = self.named[u.name.removesuffix("weight") + "v"]
                self.state[u.name + " mag"] = [0.0, 0.0, 0]

    def refresh(self, b):
        first = self.found[b.name] == 0
        super().refresh(b)
        if first:  # the count of updates, and so both moments, begin anew
            for u in b.units:
                self.state[u.name + " mag"] = [0.0, 0.0, 0]

    @torch.no_grad()
    def step(self):
        decays = {u.name: u.decay for u in self.engine.units if u.projected}
        for u in self.engine.units:
            if u.projected:
                u.decay = 0.0  # V does not decay
        super().step()
        for u in self.engine.units:
            if not u.projected:
                continue
            u.decay = decays[u.name]
            mag, lr = self.model.get_submodule(u.name.removesuffix(".weight")).mag, self.engine.cfg.lr
            m, v, t = self.state[u.name + " mag"]
            m, v = 0.9 * m + 0.1 * mag.grad, 0.999 * v + 0.001 * mag.grad**2
            self.state[u.name + " mag"] = [m, v, t + 1]
            u_ = m / (1 - 0.9 ** (t + 1)) / ((v / (1 - 0.999 ** (t + 1))).sqrt() + self.eps)
            mag.copy_((1 - lr * u.decay) * mag - lr * self.mag_scale * u_)


def weights(model, engine):
    """All weights of an explicit model in the order of a plain one."""
    plain, own = Tiny(), dict(model.named_parameters())
    for name, p in plain.named_parameters():
        path = name.removesuffix(".weight")
        module = model.get_submodule(path) if name.endswith(".weight") else None
        p.data.copy_(module.weight() if isinstance(module, Explicit) else own[name])
    return flat(plain)


@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("side", ["input", "output", "paper"])
@pytest.mark.parametrize("settings", [{}, {"decay": 0.3}, {"mag_scale": 1.0, "share": False}], ids=str)
@kills("kernels/reference.py", "- (s / mag)[:, None] * a)", ")")
@kills("kernels/reference.py", "(n / mag) * along + square", "(n / mag) * along")
@kills("kernels/reference.py", "n.square() + 2 * (n / mag) * along", "n.square() + 0 * along")
@kills("kernels/reference.py", "new * n / (length * mag)", "new / mag")
@kills("kernels/reference.py", "return keep, new / length", "return keep, state['mag'] / length * 1.01")
@kills("optim/magnitude.py", "u.mag.rate / u.scale", "1.0")
@kills("optim/magnitude.py", "s = sums[:, 0] / kernels.divisor(mag, least(w))", "s = sums[:, 0]")
@kills("optim/layer.py", "left = (dy * factor).to(dy.dtype)", "pass")
@kills("optim/magnitude.py", '].copy_(u.state["mag"] / u.state["n"])', "].fill_(1)")
@kills("optim/magnitude.py", "x @ (dv @ dv.t())", "0 * x")
@kills("optim/magnitude.py", "(part - (s[at] / mag[at])[:, None] * own)", "part")
@kills("optim/magnitude.py", "(part * own).sum(1) / mag[at]", "(part * own).sum(1)")
@kills("kernels/reference.py", "h[Column.KEEP], 1.0) * state", "1.0, 1.0) * state")
def test_equals_explicit_magnitude_and_direction_invariant_29(side, settings, micro):
    """(W, mag, n) in coordinates = (V, mag) under autograd: 9 updates, refreshes, micro-batches."""
    settings = {**SETTINGS, "side": side, **settings}
    model, plain = Tiny(), Tiny()
    opt = attach(model, "gradnormlorp", accum_steps=micro, **settings)
    oracle = ExplicitOracle(plain, opt, settings.get("mag_scale", 0.25))
    losses = train(model, opt, batches(9), micro)
    expected = train(plain, oracle, batches(9))
    assert all(b.count >= 3 for b in opt.bases)
    assert (flat(model) - weights(plain, opt)).norm() <= 1e-10 * moved(model, START)
    assert losses == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("side", ["input", "output"])
def test_two_ranks_equal_explicit_magnitude_and_direction_invariant_29(side):
    settings = {**SETTINGS, "side": side}
    plain = Tiny()
    oracle = ExplicitOracle(plain, attach(Tiny(), "gradnormlorp", **settings))
    train(plain, oracle, batches(9))
    for got in ranks(2, "gradnormlorp", 9, 2, settings):
        assert (got - weights(plain, oracle.engine)).norm() <= 1e-10 * (got - START).norm()


def single(dtype=torch.float64, out=12, n=20, side="input", **settings):
    """One projected layer and its unit; mag and n are set."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(n, out, bias=False)])}).to(dtype)
    opt = attach(model, "gradnormlorp", **{"lr": 1e-2, "rank": 4, "side": side, **settings})
    (u,) = opt.units
    magnitude.begin(u, u.param)
    return opt, u, u.param.detach()


@pytest.mark.parametrize("side", ["input", "output"])
@kills("kernels/reference.py", "s = sums / mag\n", "s = sums / n\n")
@kills("kernels/reference.py", "(mag / n)[:, None] * (x.to", "(n / mag)[:, None] * (x.to")
@kills("optim/magnitude.py", "(s / n)[:, None]", "(s / mag)[:, None]")
@kills("optim/magnitude.py", "(mag[at] / n[at])[:, None] * (part", "(part")
def test_coordinates_are_those_of_the_whole_gradient_invariant_29b(side):
    """Two micro-batches, mag far from n: s, D Q (or P^T D), D S from the leaves = from G."""
    _, u, w = single(side=side)
    u.state["n"].mul_(torch.rand(12, dtype=torch.float64) + 0.5)
    c = u.state["mag"] / u.state["n"]
    g = [torch.randn(12, 20, dtype=torch.float64) for _ in range(2)]
    if u.p is None:
        sums = [x @ u.q.qs for x in g]
    else:
        sums = [u.p.qs.T @ (c[:, None] * x) for x in g]
    rows = [(x * w).sum(1, keepdim=True) for x in g]
    (both,), s, a = magnitude.direction(u, w, [sum(sums), sum(rows)])
    whole = sum(g)
    want = magnitude.direction_of_(u, w, whole)
    torch.testing.assert_close(s, want, rtol=1e-12, atol=1e-12)
    projected = whole @ u.q.qs if u.p is None else u.p.qs.T @ whole
    torch.testing.assert_close(both, projected, rtol=1e-11, atol=1e-12)
    assert a is None if u.p else torch.allclose(a, w @ u.q.qs)


@kills("optim/magnitude.py", "(part - (s[at] / mag[at])[:, None] * own)", "(part - own)")
@kills("kernels/reference.py", "n.copy_(length)", "pass")
@kills("kernels/reference.py", 'state["mag"].copy_(new)', "pass")
def test_rows_keep_their_magnitude_and_the_direction_is_tangential_invariant_26():
    """||W_row|| = |mag| and n = ||V_row|| after 20 updates between refreshes; each row of D is orthogonal to
    V's; the gradient does not depend on the length of V."""
    _, u, w = single()
    g = torch.randn(12, 20, dtype=torch.float64)
    d = g.clone()
    magnitude.direction_of_(u, w, d)
    assert ((d * w).sum(1).abs() <= 1e-12 * d.norm(dim=1) * w.norm(dim=1)).all()
    u.state["n"].mul_(2.0)  # V twice as long: half the gradient
    half = g.clone()
    magnitude.direction_of_(u, w, half)
    torch.testing.assert_close(2 * half, d, rtol=1e-12, atol=0)
    for side in ("input", "output"):
        model, opt, _ = run("gradnormlorp", steps=20, side=side, refresh_every=100, decay=0.1)
        for u in opt.units:
            if u.projected:
                mag, n = u.state["mag"], u.state["n"]
                torch.testing.assert_close(u.param.detach().norm(dim=1), mag.abs(), rtol=1e-11, atol=0)
                assert (mag / Tiny().get_parameter(u.name).detach().norm(dim=1) - 1).abs().max() > 1e-3
                assert (n / Tiny().get_parameter(u.name).detach().norm(dim=1) - 1).abs().max() > 1e-4


@kills("optim/magnitude.py", 'u.state["mag"] < 0, -norms, norms', 'u.state["mag"] < 0, norms, norms')
@kills("optim/landing.py", "magnitude.resume(u, u.w)\n            s =", "s =")
def test_a_refresh_reads_the_magnitudes_as_stored():
    _, u, w = single()
    u.state["mag"][3] *= -1
    w.mul_(1.5)
    n = u.state["n"].clone()
    magnitude.resume(u, w)
    torch.testing.assert_close(u.state["mag"].abs(), w.norm(dim=1))
    assert (u.state["mag"] < 0).nonzero().tolist() == [[3]] and torch.equal(u.state["n"], n)
    model = Tiny()
    opt = attach(model, "gradnormlorp", **SETTINGS)
    for tokens in batches(3):
        train(model, opt, [tokens])
        with torch.no_grad():
            for u in opt.units:
                if u.projected:
                    u.state["mag"].mul_(1.001)
    for u in opt.units:
        if u.projected and u.q.count == 1:  # refreshed once, then changed at most twice
            assert (u.param.norm(dim=1) / u.state["mag"] - 1).abs().max() < 2.5e-3


@kills("kernels/reference.py", "mag.clamp(min=least)", "mag")
def test_a_magnitude_that_passes_zero_goes_on():
    opt, u, w = single()
    w[2], u.state["mag"][2] = 0, 0  # as after an update that happened to end there
    opt.updates = 1
    for _ in range(3):
        u.layers[0](torch.randn(5, 20, dtype=torch.float64)).square().sum().backward()
        opt.step()
        opt.zero_grad()
        assert int(opt.stats["skipped"]) == 0
    assert torch.isfinite(u.param).all() and torch.isfinite(u.state["mag"]).all()


def test_rows_of_zeros_are_refused():
    _, u, w = single()
    w[2] = 0
    with pytest.raises(ValueError, match=r"layers\.0\.weight: 1 of 12 rows are zero.*Initialise"):
        u.layers[0].weight.data.copy_(w)
        magnitude.begin(u, w)


@kills("kernels/reference.py", "if h is not None and w.dtype == torch.bfloat16", "if False")
@kills("optim/magnitude.py", "if updates % READ == 0:", "if False:")
@kills("optim/magnitude.py", "h if u.noise else None", "None")
def test_bf16_rows_keep_their_magnitude_over_2000_updates():
    """||W_row|| / |mag| - 1, root mean square over rows, at its worst in the last 250 of 2,000 updates.
    Rounded to nearest, factors within 2^-9 of one are lost; stochastically, they come with noise, which falls
    with the root of the width."""
    off = {}
    for rounding in ("stochastic", "nearest"):
        settings = {"rank": 16, "refresh_every": 250, "rounding": rounding, "lr": 1e-3}
        opt, u, w = single(torch.bfloat16, out=64, n=512, **settings)
        target = torch.randn(64, 512, generator=torch.Generator().manual_seed(1)) * 0.04
        g = torch.Generator().manual_seed(2)
        off[rounding] = 0.0
        for n in range(2000):
            x = torch.randn(4, 512, generator=g)
            (u.layers[0](x.bfloat16()).float() - x @ target.T).square().mean().backward()
            opt.step()
            opt.zero_grad()
            if n >= 1750:
                rows = w.float().norm(dim=1) / u.state["mag"].abs() - 1
                off[rounding] = max(off[rounding], float(rows.square().mean().sqrt()))
        assert u.q.count == 8
    assert off["stochastic"] <= 1e-3 < 5e-3 < off["nearest"], off
