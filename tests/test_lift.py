"""lift=deferred: C beside a weight that rests, against updates at once; and every way to the whole weight."""

import copy
import pickle
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import optim.engine
import train as training
from configs.cli import parse
from configs.schema import Config, ConfigError
from llama import checkpoint, generate, pretrained
from llama import eval as evaluating
from llama import export as exporting
from llama.model import Llama
from optim import attach, lift, magnitude
from optim.config import ProjectedConfig
from optim.layer import ProjectedLinear, _Project, coordinate
from optim.methods import METHODS
from tests.mutants import kills
from tests.tiny import SETTINGS, Tiny, batches, flat, moved, parallel, run, train

D = torch.float64
START = flat(Tiny())
LATE = {"lift": "deferred"}
METHODS_TESTED = [name for name, m in METHODS.items() if issubclass(m.config, ProjectedConfig)]


def close(a, b, tol=1e-12):
    assert moved(a, START) > 1e-2
    assert (flat(a) - flat(b)).norm() <= tol * moved(a, START)


@pytest.fixture
def fixed(monkeypatch):
    """Bases stay as they began."""
    monkeypatch.setattr(optim.engine, "due", lambda *a: False)


# ---- the same training


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("method", METHODS_TESTED)
@kills("optim/lift.py", "c.add_(n)", "c.sub_(n)")
@kills("optim/lift.py", "kernels.rows_(c, n, keep, None, h)", "kernels.rows_(c, n, None, None, h)")
@kills("optim/lift.py", 'u.state["rho"].mul_(keep)', "pass")
@kills("optim/lift.py", "kernels.rows_(c, n, keep, None, h)", "pass")
@kills("optim/lift.py", "].t(), rho, None, h)", "].t(), None, None, h)")
@kills("optim/lift.py", "c.zero_()", "pass")
@kills("optim/lift.py", "rho.fill_(1)\n\n\ndef reproject", "pass\n\n\ndef reproject")
@kills("optim/magnitude.py", "c @ u.q.cross.to(c.dtype)", "0 * c @ u.q.cross.to(c.dtype)")
@kills("kernels/reference.py", "a = a * beside[2][:, None] + ", "a = a + ")
@kills("kernels/reference.py", "beside[1][:, None] + beside[0]", "beside[1][:, None] + 0 * beside[0]")
@kills("kernels/reference.py", "beside[1].mul_(keep)", "pass")
@kills("optim/engine.py", "if u.deferred and u.refresh:", "if False:")
@kills("optim/unit.py", "return self.deferred and not self.refresh", "return self.deferred")
@kills("optim/magnitude.py", "    lift.reproject(u)\n    _ref", "    _ref")
@kills("optim/layer.py", "        y = (y * rho).to(y.dtype)\n", "        pass\n")
@kills("optim/layer.py", "dy if rho is None else (dy * rho).to(dy.dtype)", "dy")
@kills("optim/layer.py", "dx = dx + (dy @ c)", "dx = dx - (dy @ c)")
def test_deferred_is_now_but_for_rounding(method, decay, micro):
    """Weights and losses over three bases of every matrix."""
    now, direct, losses = run(method, 9, micro, decay=decay)
    late, opt, others = run(method, 9, micro, decay=decay, **LATE)
    assert all(b.count >= 3 for b in opt.bases) and all(u.deferred for u in opt.units if u.projected)
    close(now, late)
    assert losses == pytest.approx(others, rel=1e-12)
    for key in ("grad_norm", "energy"):
        torch.testing.assert_close(direct.stats[key], opt.stats[key], rtol=1e-10, atol=0)
    assert any(u.state["c"].any() for u in opt.units if u.projected)
    opt.detach()
    close(now, late)


def drift(method, rounding, dtype, updates=64, **settings):
    """Where so many updates of about 2^-11 took weights near 1.5, whose bf16 neighbours are 2^-7 apart."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96, bias=False)).to(dtype)
    w = model[0].weight
    w.data.copy_(1.5 + torch.rand(w.shape) / 16)
    start, s = w.detach().clone(), torch.randn(64, 96)
    opt = attach(model, method, lr=2e-3, scale=1.0, rank=16, beta1=0.0, rounding=rounding, **settings)
    for _ in range(updates):
        (model(torch.eye(64, dtype=dtype)) * s.to(dtype)).sum().backward()
        opt.step()
        opt.zero_grad()
    opt.detach()
    return (w.detach().float() - start.float()).flatten()


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        *(("galore_8bit", {"side": side}) for side in ("input", "output", "both")),
        ("galore", {"decay": 1e-3}),
        ("galore", LATE),
        ("galore", LATE | {"decay": 1e-3}),
        ("gradnormlorp_8bit", {}),
        ("gradnormlorp_8bit", LATE),
        ("natural_galore_8bit", {}),
    ],
)
@kills("optim/unit.py", "w, noise = self.w, h if self.noise else None", "w, noise = self.w, None")
@kills("optim/unit.py", "w, noise = self.w, h if self.noise else None", "w, noise = self.w, h")
@kills("optim/unit.py", "self.q.q.t(), keep, None, noise)", "self.q.q.t(), keep, None, None)")
@kills("optim/unit.py", "self.p.q, back, keep, None, noise)", "self.p.q, back, keep, None, None)")
@kills("optim/magnitude.py", "h if u.noise else None", "None")
@kills("kernels/lift.py", "rows_(w, a @ b, keep, factor, h)", "rows_(w, a @ b, keep, factor, None)")
def test_small_updates_arrive_in_bf16(fixed, method, settings):
    """By the length along where fp32 weights go; to nearest, unless they gather beside W, most are lost.

    Of 64 updates of an eighth of the distance and 6,144 numbers 1.0 has a standard deviation below 1%.
    """
    there = drift(method, "stochastic", torch.float32, **settings)
    for rounding in ("stochastic", "nearest"):
        went = drift(method, rounding, torch.bfloat16, **settings)
        share = float(went @ there / there.square().sum())
        if rounding == "stochastic":
            assert abs(share - 1) < 0.05
        elif "lift" not in settings:
            assert share < 0.6


def test_two_ranks_and_decay():
    now, _, _ = run("gradnormlorp_8bit", 9, 2, decay=0.3)
    for got in parallel(2, on_rank):
        assert (got - flat(now)).norm() <= 1e-12 * moved(now, START)


def on_rank(rank, world):
    import torch.distributed as dist

    model, group = Tiny(), dist.group.WORLD
    settings = {**SETTINGS, **LATE, "decay": 0.3, "accum_steps": 2, "group": group, "reduce": "sum"}
    train(model, attach(model, "gradnormlorp_8bit", **settings), batches(9), 2, rank=rank, world=world)
    return flat(model)


class Lora(nn.Module):
    """y = x W^T + (x A^T) B^T with A frozen: LoRA without its scale."""

    def __init__(self, linear, a):
        super().__init__()
        self.w, self.a, self.bias = linear.weight.detach(), a, linear.bias
        self.b = nn.Parameter(self.w.new_zeros(len(self.w), len(a)))

    def forward(self, x):
        return F.linear(x, self.w, self.bias) + F.linear(F.linear(x, self.a), self.b)


@kills("optim/lift.py", "c, qs[:, : c.shape[1]].t()", "c, qs[:, -c.shape[1] :].t()")
@kills("optim/layer.py", "xq = xq[..., : c.shape[1]]", "xq = xq[..., -c.shape[1] :]")
@kills("optim/layer.py", "q[:, : c.shape[1]].to(dy.dtype).t()", "q[:, -c.shape[1] :].to(dy.dtype).t()")
@kills("optim/unit.py", "lift.clear_(c, rho)", "pass")
def test_between_refreshes_it_is_lora_and_the_fold_its_merge(fixed):
    """A = Q^T, B = C: torch's Adam on B in a model of Lora layers. fold() adds B A to W."""
    model, plain = Tiny(), Tiny()
    opt = attach(model, "galore", **SETTINGS, **LATE, scale=0.5)
    units = [u for u in opt.units if u.projected]
    for u in units:
        path, _, name = u.name.removesuffix(".weight").rpartition(".")
        parent = plain.get_submodule(path)
        setattr(parent, name, Lora(getattr(parent, name), u.q.q.T.clone()))
    inner = [p for n, p in plain.named_parameters() if n.endswith(".b")]
    others = [p for n, p in plain.named_parameters() if not n.endswith(".b")]
    adam = torch.optim.Adam([{"params": inner, "lr": 5e-3}, {"params": others, "lr": 1e-2}])
    assert train(model, opt, batches(6)) == pytest.approx(train(plain, adam, batches(6)), rel=1e-11)
    loras = [plain.get_submodule(u.name.removesuffix(".weight")) for u in units]
    for u, m in zip(units, loras, strict=True):
        torch.testing.assert_close(u.state["c"], m.b.data, rtol=1e-10, atol=1e-13)
        assert torch.equal(u.param, m.w)
    opt.fold()
    for u, m in zip(units, loras, strict=True):
        torch.testing.assert_close(u.param.data, m.w + m.b.data @ m.a, rtol=1e-11, atol=1e-13)
        assert not u.state["c"].any()
    assert train(model, opt, batches(7)[6:]) == pytest.approx(train(plain, adam, batches(7)[6:]), rel=1e-11)


@kills("kernels/reference.py", "rows_(beside[0], x, keep", "rows_(beside[0], x, None")
@kills("optim/magnitude.py", "if u.mag and not u.deferred)", "if u.mag)")
def test_w_q_of_a_magnitude_does_not_drift(fixed):
    """A = rho (W Q) + C after 200 updates without a product with W, while A has moved by a tenth."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(96, 24, bias=False)])}).double()
    opt = attach(model, "gradnormlorp", lr=1e-3, rank=16, decay=0.1, **LATE)
    (u,), target = opt.units, torch.randn(24, 96, dtype=D) * 0.04
    magnitude.begin(u, u.param)
    for _ in range(200):
        x = torch.randn(8, 96, dtype=D)
        (u.layers[0](x) - x @ target.T).square().mean().backward()
        opt.step()
    whole, w, qs = u.layers[0].folded(), u.param.detach(), u.q.qs
    assert (u.q.q.T @ u.q.q - torch.eye(16, dtype=D)).abs().max() < 1e-15
    a, (c, rho) = whole @ qs, lift.beside(u)
    ours = rho[:, None] * u.state["wq"] + torch.cat([c, c @ u.q.cross], 1)
    assert (ours - a).norm() <= 3e-15 * a.norm()
    assert (w @ qs - a).norm() > 0.05 * a.norm()
    torch.testing.assert_close(whole.norm(dim=1), u.state["mag"].abs(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("method", ["galore", "gradnormlorp"])
@kills("optim/unit.py", "lift.step_(self, n, keep, noise)", "lift.step_(self, n, keep, None)")
@kills("optim/magnitude.py", "beside, u.noise)", "beside, False)")
def test_c_is_rounded_as_w_would_be(fixed, method):
    """In bf16 stochastically or to nearest: one number in ten is another after two updates, by little."""
    found = []
    for rounding in ("stochastic", "nearest"):
        torch.manual_seed(0)
        model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(96, 64, bias=False)])}).bfloat16()
        opt = attach(model, method, lr=1e-3, rank=16, rounding=rounding, **LATE)
        for x in torch.randn(2, 8, 96).bfloat16():
            model["layers"][0](x).float().square().mean().backward()
            opt.step()
        found.append(opt.units[0].state["c"].float())
    torch.testing.assert_close(*found, rtol=2**-6, atol=1e-6)
    assert (found[0] != found[1]).float().mean() > 0.1


# ---- the layer


@pytest.mark.parametrize("rows", [None, 0, 1])
def test_the_layer_is_a_linear_with_the_whole_weight(rows):
    """rho: none, one number, one a row. Output, dX, R, Z and the sum of dY * y; any shape of input."""
    g = torch.Generator().manual_seed(0)
    w, c, qs = (torch.randn(*s, generator=g, dtype=D) for s in ((7, 9), (7, 3), (9, 5)))
    rho = None if rows is None else torch.rand((7,) * rows, generator=g, dtype=D) + 0.5
    whole = (w if rho is None else rho.reshape(-1, 1) * w) + c @ qs[:, :3].T
    for shape in ((4, 9), (2, 3, 9), (9,), (0, 9)):
        x = torch.randn(shape, generator=g, dtype=D, requires_grad=True)
        dy = torch.randn(*shape[:-1], 7, generator=g, dtype=D)
        kind = {"dtype": D, "device": w.device}
        coord, mag = coordinate(7, 5, **kind), coordinate(7, 1, **kind)
        y = _Project.apply(x, w, coord, None, None, qs, mag, None, c, rho)
        y.backward(dy)
        torch.testing.assert_close(y, x @ whole.T, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(x.grad, dy @ whole, rtol=1e-12, atol=1e-13)
        full = dy.reshape(-1, 7).T @ x.detach().reshape(-1, 9)
        torch.testing.assert_close(coord.grad, full @ qs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mag.grad[:, 0], (full * whole).sum(1), rtol=1e-12, atol=1e-12)


def one(dtype=torch.float32, **settings):
    """A layer with something beside its weight."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(32, 24)])}).to(dtype)
    opt = attach(model, "galore", lr=1e-2, rank=4, refresh_every=50, **LATE, **settings)
    lin = model["layers"][0]
    for _ in range(3):
        lin(torch.randn(8, 32, dtype=dtype)).square().sum().backward()
        opt.step()
        opt.zero_grad()
    return model, opt, lin


@pytest.mark.parametrize("basis", [None, "fp32"])
@kills("optim/layer.py", "            c = None if c is None else c.to(dtype)\n", "")
def test_autocast_and_a_wider_basis(basis):
    """Products in bf16 whatever the weights' dtype, eager and compiled."""
    torch._dynamo.reset()
    for dtype in (torch.float32, torch.bfloat16):
        _, opt, lin = one(dtype, basis_dtype=basis, decay=0.1)
        x = torch.randn(6, 32, requires_grad=True)
        want = F.linear(x, lin.folded().float(), lin.bias.float())
        (dx,) = torch.autograd.grad(want.square().sum(), x)
        for call in (lin, torch.compile(lin, backend="aot_eager", fullgraph=True)):
            x.grad = None
            with torch.autocast("cpu", torch.bfloat16):
                y = call(x)
                with torch.no_grad():
                    still = call(x)
            y.float().square().sum().backward()
            opt.zero_grad()
            assert y.dtype == still.dtype == torch.bfloat16
            assert x.grad.dtype == torch.float32 and lin.c.dtype == dtype
            for got, good in ((y, want), (still, want), (x.grad, dx)):
                assert (got.float() - good).norm() <= 1e-2 * good.norm()


def test_one_weight_in_two_layers():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(3))
            self.layers[2].weight = self.layers[1].weight
            self.double()

        def forward(self, x):
            for n in (0, 1, 0, 2):
                x = torch.tanh(self.layers[n](x))
            return x

    ends = []
    for settings in ({}, LATE):
        model = Twice()
        opt = attach(model, "galore", **SETTINGS, **settings)
        for x in torch.randn(7, 5, 16, dtype=D, generator=torch.Generator().manual_seed(1)):
            (model(x) - x.roll(1)).square().sum().backward()
            opt.step()
            opt.zero_grad()
        opt.detach()
        assert model.layers[1].weight is model.layers[2].weight
        ends.append(flat(model))
    torch.testing.assert_close(*ends, rtol=1e-11, atol=1e-13)


# ---- the whole weight


@pytest.mark.parametrize("method", ["galore", "gradnormlorp"])
@kills("optim/layer.py", '            destination[prefix + "weight"] = whole\n', "            pass\n")
@kills("optim/layer.py", '        state["_parameters"] = {**state', "        _ = {**state")
@kills("optim/engine.py", "        self.fold()\n", "")
@kills("optim/layer.py", "            clear_(self.c, self.rho)\n", "            pass\n")
def test_every_way_out_of_training_gives_the_whole_weight(method):
    """Evaluation, state_dict, a copy, a pickle, another model that loads it, fold, detach: one function."""
    model, opt, _ = run(method, 8, decay=0.1, **LATE)
    tokens, saved = batches(1, seed=9)[0], model.state_dict()
    part, *_ = [u for u in opt.units if u.projected and u.state["c"].any()]
    assert (saved[part.name] - part.param).norm() > 1e-3 * part.param.norm()
    with torch.no_grad():
        want = model(tokens)
    torch.testing.assert_close(model(tokens).detach(), want, rtol=1e-12, atol=1e-13)
    opt.zero_grad()
    plain, again = Tiny(seed=5), Tiny(seed=5)
    plain.load_state_dict(saved)
    attach(again, method, **SETTINGS, **LATE)
    again.load_state_dict(saved)
    other, beside, _ = run(method, 5, seed=3, **LATE)
    assert any(u.state["c"].any() for u in beside.units if u.projected)
    other.load_state_dict(saved)
    copies = [plain, again, other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for m in copies:
        with torch.no_grad():
            torch.testing.assert_close(m(tokens), want, rtol=1e-12, atol=1e-13)
    assert not any(isinstance(m, ProjectedLinear) for m in copies[3].modules())
    frugal = checkpoint.weights(model)
    assert frugal.keys() == saved.keys() and all(torch.equal(frugal[k], saved[k]) for k in saved)
    opt.detach()
    twin, opt, _ = run(method, 8, decay=0.1, **LATE)
    opt.fold()
    for m in (model, twin):
        with torch.no_grad():
            torch.testing.assert_close(m(tokens), want, rtol=1e-12, atol=1e-13)
        read = torch.cat([p.detach().flatten() for p in m.parameters()])
        torch.testing.assert_close(read, torch.cat([p.flatten() for p in saved.values()]))
    assert not [m for m in model.modules() if isinstance(m, ProjectedLinear)]


@pytest.mark.parametrize("method", ["galore", "gradnormlorp"])
@kills("optim/unit.py", "        lift.reproject(self)\n", "")
@kills("optim/layer.py", "            self.moved()\n\n    def __reduce", "\n    def __reduce")
def test_folding_or_loading_the_whole_weight_at_any_time_changes_nothing(method):
    now, _, _ = run(method, 7, decay=0.1)
    for what in ("fold", "load"):
        model = Tiny()
        opt = attach(model, method, **SETTINGS, **LATE, decay=0.1)

        def touch(n, model=model, opt=opt, what=what):
            opt.fold() if what == "fold" else model.load_state_dict(model.state_dict())

        train(model, opt, batches(7), after_step=touch)
        close(now, model, 1e-11)


@kills("optim/engine.py", "w.dtype if k in lift.OURS else s.dtype", "s.dtype")
def test_a_moved_model_goes_on():
    model = Tiny(dtype=torch.float32)
    opt = attach(model, "gradnormlorp", **SETTINGS, **LATE)
    train(model, opt, batches(2))
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype)
        train(model, opt, batches(2))
        for u in opt.units:
            if u.projected:
                assert u.state["c"].dtype == u.state["wq"].dtype == dtype and u.layers[0].c is u.state["c"]
                torch.testing.assert_close(u.state["wq"], u.param @ u.q.qs)
    assert torch.isfinite(flat(model)).all() and opt.updates == 6


def test_meta_becomes_real_after_attach():
    with torch.device("meta"):
        model = Tiny()
    opt = attach(model, "gradnormlorp", **SETTINGS, **LATE)
    model.to_empty(device="cpu")
    model.load_state_dict(Tiny().state_dict())
    torch.manual_seed(0)
    twin = Tiny()
    torch.manual_seed(0)
    other = attach(twin, "gradnormlorp", **SETTINGS)
    for m, o in ((model, opt), (twin, other)):
        train(m, o, batches(5))
    close(twin, model)


# ---- going on with another lift


@pytest.mark.parametrize("before", ["now", "deferred"])
@pytest.mark.parametrize("method", ["galore_8bit", "gradnormlorp"])
@kills("optim/lift.py", "if SAVED & saved.keys() == mine.keys():", "if True:")
@kills("optim/lift.py", '        clear_(u.state["c"]', '        lambda: clear_(u.state["c"]')
def test_lift_and_decay_may_change(method, before):
    """A save of one lift goes on with the other, with decay switched on or off: as if nothing had been."""
    tokens, after = batches(8), {"now": "deferred", "deferred": "now"}[before]
    for first, second in ((0.0, 0.0), (0.1, 0.0), (0.0, 0.1)):
        ends = []
        for lifts in (("now", "now"), (before, after), (before, before)):
            model = Tiny()
            opt = attach(model, method, **SETTINGS, lift=lifts[0], decay=first)
            train(model, opt, tokens[:5])
            again = Tiny(seed=5)
            other = attach(again, method, **SETTINGS, lift=lifts[1], decay=second)
            train(again, other, batches(5, seed=3))  # a C of its own, to be forgotten
            assert lifts[1] == "now" or any(u.state["c"].any() for u in other.units if u.deferred)
            for name, w in model.state_dict().items():  # as train.py loads a save
                again.get_parameter(name).data.copy_(w)
            other.load_state_dict({"state": copy.deepcopy(opt.state_dict()["state"])})
            train(again, other, tokens[5:])
            ends.append(again)
        close(ends[0], ends[1], 1e-11)
        close(ends[0], ends[2], 1e-11)


@kills("optim/state.py", 'if ("c" in state[u.name]) != ("w0" in state[u.name]):', "if False:")
def test_half_of_a_deferred_lift_is_refused():
    _, opt, _ = run("galore", 4, **LATE)
    name = "layers.1.down_proj.weight"
    for key in ("c", "w0"):
        saved = copy.deepcopy(opt.state_dict())
        del saved["state"][name][key]
        with pytest.raises(ValueError, match=rf"{name}: one of c and w0 without the other"):
            opt.load_state_dict(saved)


# ---- who defers


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            ["optim=galore", "optim.lift=deferred", "optim.side=output"],
            "x Q.*choose now, or .*=input",
        ),
        (["optim=gradnormlorp", "optim.lift=deferred", "optim.side=paper"], "optim.side=paper does not form"),
        (
            ["optim=gradnormlorp_adapter", "optim.lift=deferred"],
            "gradnormlorp_adapter keeps its.*out",
        ),
        (["optim=gradnormlorp_adapter_8bit", "optim.lift=auto"], "gradnormlorp_adapter_8bit keeps"),
        (["optim=galore", "optim.lift=later"], "choose now, deferred or auto"),
        (["optim=adamw", "optim.lift=deferred"], "belongs to low-rank methods"),
    ],
)
@kills("optim/config.py", 'if self.lift == "deferred" and self.side != "input":', "if False:")
@kills("optim/config.py", 'if self.lift != "now":', "if False:")
def test_what_cannot_be_deferred_is_refused(line, says):
    with pytest.raises(ConfigError) as error:
        parse(line)
    (said,) = str(error.value).splitlines()
    key = next(item for item in line if "lift" in item)
    assert said.startswith(f"{key}: ") and re.search(says, said), said


def shards(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = Tiny(), init_device_mesh("cpu", (world,))
    fully_shard(model, mesh=mesh)
    given = {**SETTINGS, "group": mesh.get_group(), "reduce": "sum"}
    with pytest.raises(ValueError) as error:
        attach(model, "galore", **given, **LATE)
    opt = attach(model, "galore", **given, lift="auto", tokens=1)
    return str(error.value), any(u.deferred for u in opt.units)


@kills("optim/attach.py", 'if getattr(cfg, "lift", "now") == "deferred":', "if False:")
@kills("optim/attach.py", "None if cut else tokens", "tokens")
def test_row_shards_are_refused_and_never_chosen():
    said, any_deferred = parallel(2, shards)[0]
    assert said.startswith("lift=deferred: ") and "embed.weight are sharded; choose lift=now" in said
    assert not any_deferred


def seven_b(method="galore_8bit", **settings):
    cfg = parse(["model=llama_7b"]).model
    with torch.device("meta"):
        model = Llama(cfg).to(torch.bfloat16)
    return attach(model, method, **settings)


@kills("optim/lift.py", "tokens * (2 * out + b.n)", "tokens * (2 * out + b.r)")
@kills("optim/lift.py", "products = 2 if b.units[0].mag else 1", "products = 1")
@kills("optim/assign.py", 'cfg.side == "input" and tokens', "tokens")
@kills("optim/assign.py", "tokens is not None and lift.pays(b, tokens)", "tokens is not None")
def test_auto_defers_below_the_tokens_at_which_it_pays():
    """in out / (2 out + in) with the stacked outs of a basis: o 1365, q,k,v 1755, gate,up 1874, down 2348;
    twice as many where the product of A = W Q goes too."""
    kinds = ["o_proj", "q_proj", "up_proj", "down_proj"]

    def chosen(method="galore_8bit", **settings):
        opt = seven_b(method, lift="auto", **settings)
        return [k for k in kinds if any(u.deferred for u in opt.units if k in u.name)]

    assert chosen() == []
    assert chosen(tokens=1365) == kinds and chosen(tokens=1366) == kinds[1:]
    assert chosen(tokens=1755) == kinds[1:] and chosen(tokens=1756) == kinds[2:]
    assert chosen(tokens=1875) == kinds[3:] and chosen(tokens=2349) == []
    assert chosen("gradnormlorp", tokens=2730) == kinds and chosen("gradnormlorp", tokens=2732) == kinds[1:]
    assert chosen(tokens=1, side="paper") == []


def test_the_table_says_so():
    text = seven_b(lift="auto", tokens=1800).table()
    assert "lift      deferred to the next basis for 64 of 128 bases" in text and "deferred 1." in text
    assert "deferred" not in seven_b(lift="auto", tokens=4096).table()
    assert max(map(len, text.splitlines())) <= 80


def test_memory_that_runs_out_names_it():
    cfg = Config(micro_batch=1, optim=ProjectedConfig(lift="auto"))
    assert "optim.lift=now" in cfg.smaller(1)


# ---- train.py


RUN = "optim=gradnormlorp_8bit optim.rank=8 optim.refresh_every=6 optim.lr=0.003 optim.decay=0.1".split()


@pytest.fixture(scope="module")
def trained(command, tmp_path_factory):
    """A run of 6 steps, saved in the middle of periods."""
    folder = tmp_path_factory.mktemp("late")
    line = command(folder, *RUN, "optim.lift=deferred", "save_every=2", "keep_last=9")
    assert training.main(line) == 0
    return folder / "r"


def parts(save):
    """name -> (W as it rests, the whole weight from the raw tensors) of what is deferred in a save."""
    state, found = checkpoint.load_optim(save), {}
    bases = {}
    for name, tensors in state.items():
        if "qs" in tensors:
            layer = name.removeprefix("input ").rpartition(".")[0].rpartition(".")[0]
            bases[layer, tensors["qs"].shape[0], name] = tensors["qs"]
    for name, tensors in state.items():
        if "c" in tensors:
            (qs,) = [q for key, q in bases.items() if owner(name) == key[2]]
            c, rho = tensors["c"], tensors["rho"]
            found[name] = tensors["w0"], rho[:, None] * tensors["w0"] + c @ qs[:, : c.shape[1]].T
    return found


def owner(name):
    """Of the basis of a weight: the first that shares it."""
    for others, first in (("kv", "q"), (("up",), "gate")):
        for other in others:
            name = name.replace(f".{other}_proj", f".{first}_proj")
    return f"input {name}"


@kills(
    "llama/checkpoint.py",
    "t if t.data_ptr() in own else t.cpu()",
    "dict(module.named_parameters(prefix.removesuffix('.')))[name].detach()",
)
def test_a_save_holds_whole_weights_and_the_parts(trained, tmp_path, capsys):
    """model.safetensors is what every reader may take: eval, generate, export, init_from, transformers."""
    for save in checkpoint.complete(trained):
        whole = load_file(save / "model.safetensors")
        found = parts(save)
        assert len(found) == 14
        for name, (_, want) in found.items():
            torch.testing.assert_close(whole[name], want, rtol=1e-5, atol=1e-7)
        apart = sum(float((whole[n] - w0).norm() / w0.norm()) > 1e-3 for n, (w0, _) in found.items())
        assert checkpoint.step_of(save) < 4 or apart >= 7, "not in the middle of periods"
    save = checkpoint.latest(trained)
    whole = load_file(save / "model.safetensors")
    assert exporting.main([str(trained), str(tmp_path / "out")]) == 0
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(exported[n], w) for n, w in whole.items())
    model = pretrained.load_model(save, "cpu")
    assert all(torch.equal(w, whole[n]) for n, w in model.state_dict().items())
    capsys.readouterr()
    assert evaluating.main([str(trained)]) == 0
    said = float(capsys.readouterr().out.partition("val loss")[2].split()[0])
    rows = [r for r in training.metrics.read(trained / "metrics.jsonl") if "val_loss" in r]
    assert said == pytest.approx(rows[-1]["val_loss"], abs=2e-6) and rows[-1]["step"] == 6
    assert generate.main([str(trained), "The ", "tokens=5"]) == 0


@kills("optim/lift.py", "            t.copy_(saved[k])", "            t.copy_(saved[k] if k != 'w0' else t)")
@kills("optim/lift.py", "            t.copy_(saved[k])", "            t.copy_(saved[k] if k != 'c' else t)")
def test_a_run_goes_on_in_the_middle_of_a_period_bit_for_bit(trained, command, tmp_path):
    shutil.copytree(trained, tmp_path / "r")
    shutil.rmtree(checkpoint.folder(tmp_path / "r", 6))
    line = command(tmp_path, *RUN, "optim.lift=deferred", "save_every=2", "keep_last=9")
    assert training.main(line) == 0
    for file in ("model.safetensors", "optim.safetensors"):
        a, b = (load_file(checkpoint.folder(r, 6) / file) for r in (trained, tmp_path / "r"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_transformers_saves_the_whole_weight(tmp_path):
    transformers = pytest.importorskip("transformers")
    shapes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shapes, vocab_size=40))
    opt = attach(model, "galore", **SETTINGS, **LATE)
    for batch in batches(5):
        model(input_ids=batch, labels=batch).loss.backward()
        opt.step()
        opt.zero_grad()
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    tokens = batches(1)[0]
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)
    u = next(u for u in opt.units if u.projected and u.state["c"].any())
    assert not torch.allclose(loaded.get_parameter(u.name), u.param, rtol=1e-3)
