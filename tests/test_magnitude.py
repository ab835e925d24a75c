"""GradNormLoRP's direct form against an explicit magnitude and direction under autograd."""

import pytest
import torch
from torch import nn

from optim import attach
from tests.mutants import kills
from tests.tiny import SETTINGS, Oracle, Tiny, batches, flat, moved, train

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
@kills("optim/magnitude.py", "(s / mag)[:, None] * a.to(mag.dtype)", "0 * a.to(mag.dtype)")
@kills("optim/magnitude.py", "n.square() + 2 * along + square", "n.square() + 2 * along")
@kills("optim/magnitude.py", "n.square() + 2 * along + square", "n.square() + square")
@kills("optim/magnitude.py", "new * n / (length * mag)", "new / mag")
@kills("optim/magnitude.py", "keep, new / length, h", "keep, new / n, h")
@kills("optim/magnitude.py", "(u.mag.rate / u.scale)", "1.0")
@kills("optim/magnitude.py", "s = sums[:, 0] / mag", "s = sums[:, 0]")
@kills("optim/layer.py", "left = (dy * factor).to(dy.dtype)", "pass")
@kills(
    "optim/magnitude.py", 'state["factor"].copy_(u.state["mag"] / u.state["n"])', 'state["factor"].fill_(1)'
)
@kills("optim/magnitude.py", "square = (p * (p @ (dv @ dv.t()))).sum(1)", "square = 0 * p.sum(1)")
@kills("optim/magnitude.py", "(part - (s[at] / mag[at])[:, None] * own)", "part")
@kills("optim/magnitude.py", "(part * own).sum(1) / mag[at]", "(part * own).sum(1)")
@kills("optim/magnitude.py", "h[Column.KEEP], 1.0) * state", "1.0, 1.0) * state")
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
