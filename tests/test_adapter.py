"""GradNormLoRP's adapter form against autograd through the materialised weight."""

import copy

import pytest
import torch
from torch import nn

from optim import attach, subspace
from optim.adapter import AdaptedLinear
from tests.mutants import kills
from tests.tiny import Tiny, batches, flat, moved, ranks, train

START = flat(Tiny())
SETTINGS = {"lr": 1e-2, "rank": 6, "core_rank": 4, "refresh_every": 3, "eps": 1e-5}


class Materialised(nn.Module):
    """y = x W^T + bias with W = mag (W0 + I J) / ||(W0 + I J)_row|| formed, I, J and mag trained."""

    def __init__(self, linear, a):
        super().__init__()
        self.how, self.bias = a.how, linear.bias
        self.w0 = linear.weight.detach().clone()
        self.i = nn.Parameter(torch.zeros_like(a.i))
        self.j = nn.Parameter(a.j.detach().clone())
        self.mag = nn.Parameter(self.w0.norm(dim=1))

    def weight(self):
        w = self.w0 + self.i @ self.j
        if not self.how.normalize:
            return w
        n = w.norm(dim=1, keepdim=True)
        return self.mag[:, None] * w / (n.detach() if self.how.detach_norm else n)

    def forward(self, x):
        return nn.functional.linear(x, self.weight(), self.bias)


class AdapterOracle:
    """Adam on everything by torch alone; factors' gradients in cores P^T Z Q, found when the paper says."""

    def __init__(self, model, engine):
        self.model, self.engine, self.n = model, engine, 0
        self.cfg = engine.cfg
        self.modules = {}
        for a in engine.adapters:
            path, _, name = a.name.removesuffix(".weight").rpartition(".")
            parent = model.get_submodule(path)
            self.modules[a.name] = Materialised(getattr(parent, name), a)
            setattr(parent, name, self.modules[a.name])
        self.q = {b.name: b.q.clone() for b in engine.bases}
        self.found = {b.name: 0 for b in engine.bases}
        self.unset = {b.name for b in engine.bases}
        self.state = {}
        self.merges = {a.name: 0 for a in engine.adapters}

    def zero_grad(self):
        self.model.zero_grad()

    def adam(self, key, g):
        m, v, t = self.state.get(key, (0.0, 0.0, 0))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        self.state[key] = m, v, t + 1
        return m / (1 - 0.9 ** (t + 1)) / ((v / (1 - 0.999 ** (t + 1))).sqrt() + self.cfg.eps)

    def turn(self, a, every):
        first = 0 if self.cfg.refresh == "together" else a.turn * every // a.turns
        return self.n >= every and self.n % every == first

    def factor(self, a, u, p):
        g, lr = p.grad, self.cfg.lr * self.cfg.scale
        if not g.any():  # rests
            return
        names = []
        for b in u.bases:
            names.append(b.name)
            if b.name in self.unset or self.turn(a, self.engine.every):
                seed = subspace.mix(self.engine.seed, b.index, self.found[b.name], 2)
                side = [g if b.side == "input" else g.T]
                first = b.name in self.unset
                self.q[b.name] = subspace.find(side, self.q[b.name], self.cfg.finder, seed, first=first).q
                self.found[b.name] += 1
                self.unset.discard(b.name)
                if first:
                    self.state.pop(u.name, None)
        if not names:
            p.sub_(lr * self.adam(u.name, g))
            return
        q, left = (self.q[name] for name in names)
        p.sub_(lr * left @ self.adam(u.name, left.T @ g @ q) @ q.T)

    @torch.no_grad()
    def step(self):
        for name, p in self.model.named_parameters():
            if name.rpartition(".")[2] not in ("i", "j", "mag"):
                decay = self.cfg.lr * self.cfg.decay if name == "head.weight" else 0.0
                p.sub_(self.cfg.lr * self.adam(name, p.grad) + decay * p)
        for a in self.engine.adapters:
            m = self.modules[a.name]
            self.factor(a, a.units[0], m.i)
            self.factor(a, a.units[1], m.j)
            if self.cfg.normalize:
                step = self.cfg.lr * self.cfg.mag_scale * self.adam(a.name + " mag", m.mag.grad)
                m.mag.copy_((1 - self.cfg.lr * self.cfg.decay) * m.mag - step)
        self.n += 1
        every = self.engine.every if self.cfg.merge_every is None else self.cfg.merge_every
        for a in self.engine.adapters:
            if every and self.turn(a, every):
                m = self.modules[a.name]
                self.merges[a.name] += 1
                m.w0 += m.i @ m.j
                m.i.zero_()
                g = torch.Generator().manual_seed(
                    subspace.mix(self.engine.seed, a.turn, self.merges[a.name], 3)
                )
                m.j.uniform_(-(m.j.shape[1] ** -0.5), m.j.shape[1] ** -0.5, generator=g)
                self.unset |= {b.name for b in a.bases}
                for u in a.units[:2]:
                    self.state.pop(u.name, None)


def weights(model, oracle):
    """The oracle's weights in the order of a plain model."""
    plain, own = Tiny(), dict(model.named_parameters())
    for name, p in plain.named_parameters():
        p.data.copy_(oracle.modules[name].weight() if name in oracle.modules else own[name])
    return flat(plain)


@pytest.mark.parametrize("micro", [1, 4])
@kills("optim/adapter.py", "        self.weigh()\n        self.settle()\n        for b", "        for b")
@kills("optim/adapter.py", "inner = left @ i\n", "inner = left @ i * 1.01\n")
@kills("optim/adapter.py", "dx = left @ w + inner @ j", "dx = dy @ w + inner @ j")
@kills("optim/adapter.py", "return a + i @ (j @ j.t()), a", "return a, a")
@kills("optim/adapter.py", "(left.t() @ self.i.to(wide)) @ self.j.to(wide)", "0 * self.j.to(wide)")
@kills("optim/adapter.py", "(h.to(wide) - back - ", "(h.to(wide) - ")
@kills("optim/adapter.py", 's = sums["mag"] / mag + zero', 's = sums["mag"] / self.n + zero')
@kills("optim/adapter.py", "left = dy if factor is None else (dy * factor).to(dy.dtype)", "left = dy")
@kills("optim/adapter.py", "            b.fresh = True\n", "            b.fresh = False\n")
@kills("optim/adapter.py", "            scalars.t[u.index] = 0\n", "            pass\n")
@kills("optim/adapter.py", "torch.div(self.mag, self.n, out=self.factor)", "pass")
@kills("optim/scalars.py", "~(self.rests[rows] & (squares[:, 1] == 0))", "(squares[:, 1] >= 0)")
@kills("optim/adapter.py", "if not self.how.detach_norm:", "if True:")
@kills("optim/landing.py", "            a.settle()\n", "            pass\n")
@kills("optim/assign.py", "decay = 0.0 if cfg.normalize else u.decay", "decay = u.decay")
@kills("optim/assign.py", "cfg.mag_scale, u.decay", "cfg.scale, u.decay")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"merge_every": 0},
        {"merge_every": 4, "refresh_every": 2, "refresh": "together"},
        {"core_rank": None, "decay": 0.3, "mag_scale": 1.0},
        {"detach_norm": True},
        {"normalize": False, "core_rank": None},
        {"project": False, "core_rank": None},
        {"finder": "svd"},
    ],
    ids=str,
)
def test_equals_autograd_through_the_materialised_weight_invariant_27(settings, micro):
    """9 updates with refreshes and merges: weights and losses."""
    settings = {**SETTINGS, **settings}
    model, plain = Tiny(), Tiny()
    opt = attach(model, "gradnormlorp_adapter", accum_steps=micro, **settings)
    oracle = AdapterOracle(plain, opt)
    losses = train(model, opt, batches(9), micro)
    expected = train(plain, oracle, batches(9))
    assert losses == pytest.approx(expected, rel=1e-10)
    assert (flat(model) - weights(plain, oracle)).norm() <= 1e-10 * moved(model, START)
    merges = settings.get("merge_every") != 0
    assert all((a.merges >= 1) == merges for a in opt.adapters)
    assert all(b.count >= 2 for b in opt.bases)


def test_two_ranks_equal_autograd_through_the_materialised_weight_invariant_27():
    plain = Tiny()
    oracle = AdapterOracle(plain, attach(Tiny(), "gradnormlorp_adapter", **SETTINGS))
    train(plain, oracle, batches(9))
    for got in ranks(2, "gradnormlorp_adapter", 9, 2, SETTINGS):
        assert (got - weights(plain, oracle)).norm() <= 1e-10 * (got - START).norm()


def single(dtype=torch.float64, out=12, n=20, **settings):
    """A model of one adapted layer, with a bias, trained for some updates; its optimizer and adapter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n, out)).to(dtype)
    opt = attach(model, "gradnormlorp_adapter", **{"lr": 1e-2, "rank": 4, "refresh_every": 50, **settings})
    return model, opt, opt.adapters[0]


def updates(model, opt, n, seed=1):
    g = torch.Generator().manual_seed(seed)
    for _ in range(n):
        x = torch.randn(5, 20, generator=g, dtype=torch.float64).to(model[0].weight.dtype)
        (model(x) - 1).square().mean().backward()
        opt.step()
        opt.zero_grad()


@kills("optim/adapter.py", "return b in self.units[0].bases or update != self.since", "return True")
def test_begins_at_the_plain_model_invariant_25():
    """I J = 0 and mag = ||W0_row||: the outputs, bit by bit; dL/dJ is zero, dL/dI and dL/dmag are not; J and
    its bases rest, I's bases are found from the first gradient."""
    model, opt, a = single()
    plain = copy.deepcopy(model)
    x = torch.randn(7, 20, dtype=torch.float64)
    j = a.j.detach().clone()
    out = model(x)
    # the bias on its own: BLAS may round a product that begins with it differently
    assert torch.equal(out, torch.nn.functional.linear(x, plain[0].weight) + plain[0].bias)
    out.square().sum().backward()
    opt.step()
    grads = dict(zip("ijm", opt.scalars.squares[: len(a.units), 1].tolist(), strict=True))
    assert grads["j"] == 0 and grads["i"] > 0 and grads["m"] > 0
    assert torch.equal(a.j, j) and a.i.any() and int(opt.stats["skipped"]) == 0
    assert [b.count for b in a.bases] == [1, 1, 0, 0] and opt.stats["bases_kept"] == 0
    assert opt.scalars.t[: len(a.units)].tolist() == [1, 0, 1]
    opt.zero_grad()
    updates(model, opt, 1)
    assert [b.count for b in a.bases] == [1, 1, 1, 1] and not torch.equal(a.j, j)
    assert opt.scalars.t[: len(a.units)].tolist() == [2, 1, 2]


@pytest.mark.parametrize("settings", [{}, {"normalize": False}], ids=str)
@kills("optim/adapter.py", "x if self.factor is None else x * self.factor[rows, None]", "x")
@kills("optim/adapter.py", "kernels.lift_(w, self.i[at], self.j, h=h)", "pass")
def test_merge_save_copy_and_detach_leave_the_outputs_invariant_28(settings):
    """W0 <- W0 + I J, state_dict, a copy, and the plain layer after detach: outputs within one rounding."""
    for dtype, unit in ((torch.float64, 2.0**-52), (torch.bfloat16, 2.0**-8)):
        model, opt, a = single(dtype, rounding="nearest", **settings)
        updates(model, opt, 9)
        x = torch.randn(64, 20, dtype=torch.float64).to(dtype)
        before, w0 = model(x).double(), a.weight.detach().clone()
        # every product and every sum rounded once or twice: a bound, element by element
        bound = 4 * unit * (x.abs().double() @ a.folded().abs().double().T + before.abs()).detach()

        def near(out, before=before, bound=bound):
            return ((out.double() - before).abs() <= bound).all()

        plain = nn.Linear(20, 12).to(dtype)
        plain.load_state_dict({k.removeprefix("0."): v for k, v in model.state_dict().items()})
        assert near(plain(x))
        copied = copy.deepcopy(model)
        assert not isinstance(copied[0], AdaptedLinear) and torch.equal(copied[0].weight, plain.weight)
        mag = None if a.mag is None else a.mag.clone()
        a.merge(50, opt.scalars)
        assert not torch.equal(a.weight, w0) and not a.i.any() and a.merges == 1
        assert mag is None or torch.equal(a.mag, mag)
        assert near(model(x))
        opt.detach()
        assert type(model[0]) is nn.Linear and near(model(x))


@kills("optim/adapter.py", "square = self.squares + ((inside + a)", "square = self.squares + ((inside)")
def test_norm_of_rows_without_forming_the_weight_invariant_27b():
    """n^2 = ||W0||^2 + 2 <W0 J^T, I> + <I J J^T, I>; ||W_row|| = |mag|."""
    model, opt, a = single()
    updates(model, opt, 30)
    w = a.weight + a.i @ a.j
    torch.testing.assert_close(a.n, w.norm(dim=1), rtol=1e-13, atol=0)
    torch.testing.assert_close(a.folded().norm(dim=1), a.mag.abs(), rtol=1e-13, atol=0)
    assert (a.mag / a.weight.norm(dim=1) - 1).abs().max() > 1e-2


@kills("optim/adapter.py", "        if self.adapter.begun:\n            self.adapter.begin()", "        pass")
def test_weights_loaded_later_are_the_weights():
    model, opt, _ = single()
    updates(model, opt, 5)
    other = nn.Sequential(nn.Linear(20, 12)).double()
    model.load_state_dict(other.state_dict())
    x = torch.randn(7, 20, dtype=torch.float64)
    torch.testing.assert_close(model(x), other(x))
    updates(model, opt, 3)
    assert not torch.allclose(model(x), other(x))


def test_moved_and_converted_adapters_go_on():
    model, opt, a = single(torch.float32)
    updates(model, opt, 3)
    before = model.state_dict()["0.weight"].double()
    model.to(torch.bfloat16)
    assert (model.state_dict()["0.weight"].double() - before).norm() <= 2**-8 * before.norm()
    updates(model, opt, 3)
    assert a.i.dtype == torch.bfloat16 and a.mag.dtype == torch.float32
    model.to(torch.float64)
    updates(model, opt, 3)
    assert a.mag.dtype == torch.float64 and opt.updates == 9 and torch.isfinite(a.folded()).all()


def test_what_cannot_be_is_refused():
    for settings, text in (
        ({"core_rank": 5}, r"core_rank=5: above"),
        ({"rank": 12, "core_rank": 4}, r"rank=12: no matrix is wider"),
        ({"normalize": False, "mag_scale": 1.0}, r"optim\.mag_scale=1\.0: would be ignored"),
        ({"project": False, "finder": "svd"}, r"optim\.finder=svd: would be ignored"),
        (
            {"project": False, "basis_dtype": "fp32"},
            r"optim\.basis_dtype=fp32: would be .* optim\.project=false",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            single(**settings)
    model = nn.Sequential(nn.Linear(20, 12)).double()
    model[0].weight.data[3] = 0
    attach(model, "gradnormlorp_adapter", lr=1e-2, rank=4)
    with pytest.raises(ValueError, match=r"0\.weight: 1 of 12 rows are zero"):
        model(torch.randn(2, 20, dtype=torch.float64))


@kills("optim/adapter.py", "if self.units[0].noise else None", "if not self.units[0].noise else None")
def test_a_merge_is_rounded_as_weights_are():
    """By a sixteenth of the distance of bf16 numbers there: as many of 4096 take a whole one, or none."""
    for rounding, share in (("stochastic", 1 / 16), ("nearest", 0)):
        model, opt, a = single(torch.bfloat16, 64, 64, rounding=rounding)
        with torch.no_grad():
            model[0].weight.fill_(1.5)
            a.i.fill_(2.0**-6)
            a.j.fill_(2.0**-7)
        a.merge(50, opt.scalars)
        rose = (model[0].weight.float() - 1.5) * 2**7
        assert a.merges == 1 and abs(rose.mean() - share) <= 5 * (share * (1 - share) / 4096) ** 0.5


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_bf16_rows_keep_their_magnitude_over_2000_updates(rounding):
    """||W_row|| / |mag| - 1 of the folded weight, eight merges among the updates."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64, bias=False)).bfloat16()
    opt = attach(model, "gradnormlorp_adapter", lr=3e-3, rank=16, refresh_every=250, rounding=rounding)
    g = torch.Generator().manual_seed(1)
    target = torch.randn(64, 256, generator=g) * 0.06
    for _ in range(2000):
        x = torch.randn(4, 256, generator=g)
        (model(x.bfloat16()).float() - x @ target.T).square().mean().backward()
        opt.step()
        opt.zero_grad()
    (a,) = opt.adapters
    assert a.merges == 8
    off = a.folded().float().norm(dim=1) / a.mag.abs() - 1
    assert off.square().mean().sqrt() <= 1e-3
