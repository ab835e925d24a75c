"""The engine against a dense oracle, and every mode of running against every other: for each method of
METHODS."""

import copy
import functools
import io
from dataclasses import replace

import pytest
import torch
import torch._dynamo
from torch import nn

import optim.engine
import optim.landing
from optim import attach
from optim.config import BasisConfig, ProjectedConfig
from optim.methods import METHODS, Method
from optim.refresh import due
from optim.rules import Rule
from tests.mutants import kills
from tests.tiny import (
    SETTINGS,
    Oracle,
    Tiny,
    batches,
    compile_blocks,
    flat,
    keys,
    moved,
    parallel,
    run,
    shard,
    summed_loss,
    train,
)


class Momentum(Rule):
    """A method written in a test file: heavy-ball momentum in coordinates."""

    moments = ("m",)

    def direction(self, g, m, t):
        m["m"] = 0.9 * m["m"] + g
        return m["m"]


# With optim.lift=deferred: names of their own, so that every test of methods runs them.
DEFERRED = {
    f"{name}_deferred": replace(METHODS[name], defaults={**METHODS[name].defaults, "lift": "deferred"})
    for name in ("galore_8bit", "gradnormlorp")
}
METHODS_TESTED = [*METHODS, "momentum", "momentum_8bit", *DEFERRED]
PROJECTED = [m for m in METHODS_TESTED if m not in ("adamw", "adamw_8bit")]
SIDES = ("input", "output", "paper", "long", "both")


@pytest.fixture(autouse=True)
def momentum(monkeypatch):
    monkeypatch.setitem(METHODS, "momentum", Method(lambda cfg: Momentum(), ProjectedConfig, {"scale": 5.0}))
    monkeypatch.setitem(
        METHODS,
        "momentum_8bit",
        Method(lambda cfg: Momentum(), ProjectedConfig, {"scale": 5.0, "moments": "int8"}),
    )
    for name, method in DEFERRED.items():
        monkeypatch.setitem(METHODS, name, method)


@pytest.fixture
def fixed(monkeypatch):
    """Bases stay as they began."""
    monkeypatch.setattr(optim.engine, "due", lambda *a: False)


START = flat(Tiny())


def close(a, b, tol=1e-12):
    """Two trained models, relative to how far the first one moved."""
    assert moved(a, START) > 1e-2
    assert (flat(a) - flat(b)).norm() <= tol * moved(a, START)


def projected(name):
    return issubclass(METHODS[name].config, BasisConfig)


@functools.cache
def reference(method, micro=1):
    """What `run` gives, trained once for all tests: to be read only. Every basis is replaced twice, or about
    to be: J's, whose I was merged away a step ago."""
    trained = run(method, micro=micro)
    assert all(b.count + b.fresh >= 2 for b in trained[1].bases)
    return trained


# ---- the rule, its basis and the schedule


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"decay": 0.1},
        {"share": False},
        {"finder": "svd", "transport": "rotate_fill"},
        {"finder": "randomized", "transport": "rotate"},
        {"refresh": "together", "finder": "svd", "transport": "keep"},
    ],
    ids=str,
)
@kills("optim/unit.py", "w, n, self.q.q.t(), keep", "w, n, self.q.s.t(), keep")
@kills("optim/unit.py", "else n @ self.q.q.to(n.dtype).t()", "else n @ self.q.q.to(n.dtype).flip(1).t()")
@kills("optim/scalars.py", "[lr * scale, 1 - lr * decay]", "[lr, 1 - lr * decay]")
@kills("optim/refresh.py", 'policy = "reset" if first', 'policy = "keep" if first')
@kills("optim/refresh.py", "b.replace_(q)", "pass")
@kills("optim/landing.py", "u, u.coordinates(g), g", "u, u.coordinates(g) * 1.01, g")
@kills("optim/refresh.py", "m, v = subspace.transport(m, v, c, policy, dim)", "pass")
@kills("optim/refresh.py", "c = old.t() @ q.to(wide)", "c = q.to(wide).t() @ old")
@kills("optim/refresh.py", '-1 if b.side == "input" else -2', "-1")
@kills("optim/scalars.py", "self.table[:, Column.T] - 1 + ok", "self.table[:, Column.T] - 1")
@kills("optim/scalars.py", "self.t[u.index] = 0\n        self.table[u.index, Column.T] = 1", "pass")
def test_equals_the_dense_oracle_invariant_47(side, settings):
    """Random first bases, a staggered first round and further rounds: engine = whole gradients, projected."""
    settings = {**SETTINGS, "eps": 1e-6, "side": side, **settings}
    model, plain = Tiny(), Tiny()
    opt = attach(model, "galore", **settings)
    oracle = Oracle(plain, opt, eps=1e-6)
    losses = train(model, opt, batches(6))
    expected = train(plain, oracle, batches(6))
    assert all(b.count >= 2 for b in opt.bases)
    close(plain, model, 1e-11)
    assert losses == pytest.approx(expected, rel=1e-11)


@kills("optim/rules/rule.py", "-h[column.LR] * u", "h[column.LR] * u")
@kills(
    "optim/unit.py",
    "                leaf.grad = None\n        return grads",
    "                pass\n        return grads",
)
def test_sgd_equals_the_dense_oracle():
    model, plain = Tiny(), Tiny()
    opt = attach(model, "galore_sgd", **SETTINGS)
    oracle = Oracle(plain, opt, adam=False)
    train(model, opt, batches(6))
    train(plain, oracle, batches(6))
    assert all(b.count >= 2 for b in opt.bases)
    close(plain, model)


@kills("optim/refresh.py", "min(every, max(warmup, turns))", "max(warmup, turns)")
@kills("optim/refresh.py", "update == 1 + turn * window // turns", "update == turn * window // turns")
@kills("optim/refresh.py", "update % every == turn * every // turns", "update % every == turn")
def test_the_schedule_of_refreshes():
    """Each basis once in the first round, within min(T, max(warm-up, B)) updates; then once every T."""
    for bases, every, warmup in ((128, 200, 15000), (128, 200, 20), (32, 200, 60), (300, 50, 0), (5, 1, 0)):
        window, first = min(every, max(warmup, bases)), []
        for b in range(bases):
            at = [t for t in range(4 * every + 2) if due(b, bases, t, every, warmup, False)]
            assert 1 <= at[0] <= window
            first.append(at[0])
            rest = [t for t in at[1:] if t >= every] if every > 1 else at[1:]
            assert [t // every for t in rest[:3]] == ([1, 2, 3] if every > 1 else [2, 3, 4])
            assert len({t % every for t in rest}) == 1
        assert max(map(first.count, first)) == -(-bases // window) and first == sorted(first)
    assert [t for t in range(9) if due(3, 5, t, 4, 0, True)] == [0, 4, 8]


@kills(
    "optim/unit.py",
    "return g @ self.q.q.to(g.dtype) if self.q else g",
    "return g @ self.q.q.to(g.dtype).flip(1) if self.q else g",
)
@kills("optim/refresh.py", "b.replace_(q)", "pass")
@kills("optim/refresh.py", "return update % every == 0", "return update % every == 0 and update != 2")
def test_sgd_at_full_rank_is_sgd_invariant_4():
    """rho = 1, r = min(out, in), T = 1, every basis from this step's G: exactly gradient descent."""
    for side in ("input", "output"):
        model, plain = Tiny(), Tiny()
        opt = attach(model, "galore_sgd", lr=1e-2, scale=30.0, rank=WIDE, side=side, refresh="together",
                     refresh_every=1, finder="svd", share=False)  # fmt: skip
        assert any(u.projected for u in opt.units)
        matrices = [p for n, p in plain.named_parameters() if "_proj.weight" in n]
        rest = [p for n, p in plain.named_parameters() if "_proj.weight" not in n]
        others = torch.optim.Adam(rest, lr=1e-2)
        sgd = torch.optim.SGD(matrices, lr=0.3)
        for tokens in batches(6):
            for m, steps in ((model, [opt]), (plain, [others, sgd])):
                (summed_loss(m, tokens) / 60).backward()
                for o in steps:
                    o.step()
                    o.zero_grad()
        close(plain, model, 1e-10)


WIDE = 16


class Coordinates(nn.Module):
    """W = W_0 + C Q^T (or P C) with C trained: what a projected layer computes while its basis stays."""

    def __init__(self, linear, unit):
        super().__init__()
        self.weight, self.unit, self.bias = linear.weight.detach(), unit, linear.bias
        self.c = nn.Parameter(torch.zeros(unit.shape, dtype=linear.weight.dtype))

    def forward(self, x):
        c = self.c @ self.unit.q.q.t() if self.unit.q else self.c
        return nn.functional.linear(x, self.weight + (self.unit.p.q @ c if self.unit.p else c), self.bias)


def with_coordinates(opt, scale, lr=1e-2):
    """A Tiny whose matrices are Coordinates, and a torch optimizer that trains it."""
    plain = Tiny()
    for u in opt.units:
        if u.projected:
            path, _, name = u.name.removesuffix(".weight").rpartition(".")
            parent = plain.get_submodule(path)
            setattr(parent, name, Coordinates(getattr(parent, name), u))
    inner = [p for n, p in plain.named_parameters() if n.endswith(".c")]
    rest = [p for n, p in plain.named_parameters() if not n.endswith(".c")]
    groups = [{"params": inner, "lr": lr * scale}, {"params": rest, "lr": lr}]
    return plain, torch.optim.Adam(groups, lr=lr)


@pytest.mark.parametrize("side", ("input", "output", "both"))
@kills("optim/layer.py", "left = left.to(wide) @ p.to(wide)", "left = left.to(wide) @ p.to(wide).flip(1)")
@kills("optim/layer.py", "left = left.to(wide) @ p.to(wide)", "left = -(left.to(wide) @ p.to(wide))")
@kills("optim/scalars.py", "[lr * scale, 1 - lr * decay]", "[lr, 1 - lr * decay]")
def test_fixed_basis_is_adam_on_coordinates_invariant_5(side, fixed):
    """Between refreshes: torch's Adam on C, W = W_0 + scale C Q^T, is the same training."""
    model = Tiny()
    opt = attach(model, "galore", **SETTINGS, side=side, scale=0.5)
    plain, adam = with_coordinates(opt, 0.5)
    losses, other = train(model, opt, batches(6)), train(plain, adam, batches(6))
    assert losses == pytest.approx(other, rel=1e-11)


@kills("optim/unit.py", "w, self.p.q, back, keep", "w, self.p.q.abs(), back, keep")
@kills("optim/unit.py", "w, self.p.q, back, keep", "w, self.p.s[:, :4], back, keep")
def test_adam_in_a_selection_of_rows_is_adam_on_them_invariant_5b(fixed):
    """P a signed choice of coordinates: plain Adam on those rows, nothing on the others."""
    model, plain = Tiny(), Tiny()
    opt = attach(model, "galore", lr=1e-2, scale=1.0, rank=4, side="output")
    for b in opt.bases:
        b.q.zero_()
        b.q[:4] = torch.diag(torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64))
    before = copy.deepcopy(plain)
    adam = torch.optim.Adam(plain.parameters(), lr=1e-2)
    (summed_loss(model, batches(1)[0]) / 60).backward()
    (summed_loss(plain, batches(1)[0]) / 60).backward()
    opt.step()
    adam.step()
    for (name, p), q, old in zip(
        model.named_parameters(), plain.parameters(), before.parameters(), strict=True
    ):
        if "_proj.weight" in name:
            torch.testing.assert_close(p[:4], q[:4], rtol=1e-12, atol=1e-14)
            assert torch.equal(p[4:], old[4:]) and not torch.equal(p[:4], old[:4])


@kills(
    "optim/unit.py",
    "w, n, self.q.q.t(), keep",
    "w, n, self.q.q.abs().t(), keep",
)
@kills(
    "optim/methods.py", '"galore": Method(adam, Projected', '"galore": Method(lambda cfg: Sgd(), Projected'
)
def test_signs_and_order_of_a_basis_do_not_matter_a_rotation_does_invariant_6(fixed):
    g = torch.Generator().manual_seed(3)
    ends = []
    for change in ("none", "flip", "rotate"):
        model = Tiny()
        opt = attach(model, "galore", **SETTINGS)
        for b in opt.bases:
            if change == "flip":
                b.q.copy_(b.q[:, torch.randperm(4, generator=g)] * torch.tensor([1.0, -1, -1, 1]).double())
            if change == "rotate":
                turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=torch.float64))
                b.q.copy_(b.q @ turn)
            b.cross.copy_(b._cross())
        train(model, opt, batches(6))
        ends.append(model)
    close(ends[0], ends[1])
    assert (flat(ends[0]) - flat(ends[2])).norm() > 1e-3 * moved(ends[0], START)


@kills(
    "optim/unit.py",
    "w, self.p.q, back, keep",
    "w, self.p.q.flip(0), back, keep",
)
@kills("optim/unit.py", "w, n, self.q.q.t(), keep", "w, n, self.q.s.t()[:4], keep")
def test_a_weight_moves_within_its_span_invariant_7(fixed):
    for side in ("input", "output", "both"):
        model, start = Tiny(), Tiny()
        opt = attach(model, "galore", **SETTINGS, side=side)
        train(model, opt, batches(5))
        old = dict(start.named_parameters())
        for u in opt.units:
            if u.projected:
                delta = u.param.detach() - old[u.name].detach()
                assert delta.norm() > 1e-3
                for b, d in ((u.q, delta), (u.p, delta.T)):
                    if b:
                        assert (d - d @ b.q @ b.q.T).norm() <= 1e-12 * d.norm()
                assert torch.linalg.matrix_rank(delta, rtol=1e-10) <= 4


@pytest.mark.parametrize("method", ["adamw", "galore"])
@kills("kernels/reference.py", "beta2 * v + (1 - beta2) * g * g", "beta2 * v + (1 - beta2) * g.abs()")
@kills("kernels/reference.py", "return top / (root + eps)", "return top / (root + 1e-8)")
@kills(
    "optim/subspace.py", "KEEP_OLD * torch.linalg.vector_norm(y, dim=0).amax() * q", "KEEP_OLD * q / inverse"
)
def test_scale_of_the_loss_does_not_matter_invariant_9(method):
    """eps -> 0: gradients c times as large, the same updates, through refreshes too."""
    ends = []
    for c in (1.0, 1e-3, 1e3):
        model = Tiny()
        opt = attach(model, method, **{**keys(method), "eps": 1e-30})
        for tokens in batches(6):
            (summed_loss(model, tokens) * c).backward()
            opt.step()
            opt.zero_grad()
        ends.append(model)
    close(ends[0], ends[1], 1e-9)
    close(ends[0], ends[2], 1e-9)


# ---- modes of execution, for every method


@pytest.mark.parametrize("method", METHODS_TESTED)
@kills("optim/landing.py", "self.accum_steps * self._pass for i", "1 for i")
@kills("optim/unit.py", "grads.append(leaf.grad)", "grads.append(leaf.grad / max(self.fired))")
def test_micro_batches_equal_one_batch_invariant_20(method):
    """K = 4 = K = 1, refresh steps included: the loss is divided by the tokens of the whole step."""
    one, _, losses = reference(method)
    many, _, summed = run(method, micro=4)
    close(one, many)
    assert losses == pytest.approx(summed, rel=1e-12)


@kills("optim/unit.py", "grads.append(leaf.grad)", "grads.append(leaf.grad / max(self.fired))")
@kills("optim/landing.py", "r, z = u.split(grads)", "r, z = u.split([g / self.accum_steps for g in grads])")
def test_a_mean_of_means_is_another_gradient_invariant_20b():
    """What published loops do: each micro-batch divided by its own tokens. With unequal counts that is
    wrong; the engine sums what it is given."""
    tokens = batches(1)[0]
    parts = ((tokens[:6], 6), (tokens[6:], 2))
    moves = []
    for mode in ("one graph", "micro-batches", "own means"):
        model = Tiny()
        opt = attach(model, "galore_sgd", **SETTINGS, accum_steps=1 if mode == "one graph" else 2)
        sums = (summed_loss(model, part[:, :kept]) for part, kept in parts)
        if mode == "one graph":
            (sum(sums) / 36).backward()
        else:
            for loss, counted in zip(sums, (30, 6), strict=True):
                (loss / (2 * counted if mode == "own means" else 36)).backward()
        opt.step()
        now, start = dict(model.named_parameters()), dict(Tiny().named_parameters())
        moves.append(torch.cat([(now[u.name] - start[u.name]).flatten() for u in opt.units if u.projected]))
    assert (moves[0] - moves[1]).norm() <= 1e-12 * moves[0].norm()
    assert (moves[0] - moves[2]).norm() > 0.05 * moves[0].norm()


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("method", METHODS_TESTED)
@kills(
    "optim/landing.py",
    "if self.in_backward and u not in self._late:\n                    u.param.grad = None",
    "if False:\n                    pass",
)
@kills(
    "optim/landing.py",
    "self.accum_steps * self._pass for i",
    "(1 if self.in_backward else self.accum_steps) for i",
)
@kills(
    "optim/landing.py",
    'self._hold("whole", u, u.coordinates(g), g',
    'self._hold("whole", u, u.coordinates(g) + 1e-9 * self.in_backward, g',
)
def test_in_backward_equals_after_bitwise_invariant_19(method, micro, monkeypatch):
    inside, opt, a = run(method, micro=micro, update="in_backward", **off(method))
    after, _, b = run(method, micro=micro, update="after", **off(method))
    assert torch.equal(flat(inside), flat(after)) and a == b
    monkeypatch.setattr(optim.landing, "HELD", 0)
    model = Tiny()
    attach(model, method, update="in_backward", **keys(method), **off(method))
    (summed_loss(model, batches(1)[0]) / 60).backward()
    held = [n for n, p in model.named_parameters() if p.grad is not None]
    assert all("norm" in n or "bias" in n for n in held), held  # everything large was freed inside backward


def off(method):
    return {} if projected(method) else {"clip_mode": "off"}


@pytest.mark.parametrize("method", PROJECTED)  # dense methods clip by the exact global norm
@kills(
    "optim/scalars.py", "coefficient(clip, self.squares[rows, 0].sqrt())", "coefficient(clip, self.total(0))"
)
def test_per_layer_clip_in_backward_equals_after_bitwise(method):
    inside, _, _ = run(method, update="in_backward", clip=0.01, clip_mode="per_layer")
    after, _, _ = run(method, update="after", clip=0.01, clip_mode="per_layer")
    assert torch.equal(flat(inside), flat(after))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", METHODS_TESTED)
def test_checkpointed_equals_not(method, reentrant):
    plain, _, _ = reference(method)
    saved, _, _ = run(method, model=Tiny(checkpointing=reentrant), micro=2)
    close(plain, saved)


@pytest.mark.parametrize("method", METHODS_TESTED)
@kills("optim/refresh.py", '            self._swap(vars(module), "forward", bound)', "            pass")
def test_compiled_equals_eager_with_one_graph_a_block_shape(method):
    """2 T steps with evaluations: one training and one evaluation graph, or the recompile limit raises."""
    torch._dynamo.reset()
    graphs = []

    def counting(gm, inputs):
        graphs.append(gm)
        return gm

    eager, _, _ = run(method, steps=7)
    model = Tiny(blocks=2)
    opt = attach(model, method, **keys(method))
    compile_blocks(model, backend=counting)

    def evaluate(n):
        with torch.no_grad():
            model(batches(1)[0])

    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        train(model, opt, batches(7), after_step=evaluate)
    close(eager, model)
    assert len(graphs) == 2, len(graphs)


def test_compiled_by_inductor_equals_eager():
    eager, _, _ = run("galore", steps=5)
    torch._dynamo.reset()
    fast, _, _ = run("galore", steps=5, compiled=True)
    close(eager, fast, 1e-11)


@pytest.mark.parametrize("how", ["module.compile()", "replaced", "replaced before attach"])
def test_other_ways_to_compile_a_block(how):
    eager, _, _ = run("galore", steps=5)
    torch._dynamo.reset()
    model = Tiny()

    def fasten():
        for n, block in enumerate(model.layers):
            if how == "module.compile()":
                block.compile(backend="aot_eager")
            else:
                model.layers[n] = torch.compile(block, backend="aot_eager")

    if how.endswith("attach"):
        fasten()
        opt = attach(model, "galore", **SETTINGS)
    else:
        opt = attach(model, "galore", **SETTINGS)
        fasten()
    compiles = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    train(model, opt, batches(5))
    close(eager, model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - compiles <= 2
    assert all("_orig_mod" not in u.name for u in opt.units)


def test_a_model_compiled_whole_is_warned_about():
    torch._dynamo.reset()
    model = Tiny()
    opt = attach(model, "galore", **SETTINGS)
    fast = torch.compile(model, backend="aot_eager")
    (summed_loss(fast, batches(1)[0]) / 60).backward()
    with pytest.warns(UserWarning, match="compile the blocks one by one"):
        opt.step()


# ---- clipping


@kills(
    "optim/landing.py",
    "self.scalars.clip_all(self.cfg.clip, self.scalars.total(1))",
    "self.scalars.clip_all(self.cfg.clip, self.scalars.norm)",
)
@kills(
    "optim/landing.py",
    "for x in batch:\n                x.unit.param.grad = None",
    "pass",
)
@kills("optim/scalars.py", "return (clip / (norm + 1e-6)).clamp(max=1)", "return torch.ones_like(norm)")
def test_two_pass_clip_equals_exact_invariant_21():
    exact, a, _ = run("adamw", clip=0.3)
    twice, b, _ = run("adamw", clip=0.3, clip_mode="two_pass")
    free, _, _ = run("adamw")
    assert torch.equal(flat(exact), flat(twice))
    assert (flat(free) - flat(exact)).norm() > 1e-3 * moved(free, START)
    torch.testing.assert_close(a.stats["grad_norm"], b.stats["grad_norm"])


@pytest.mark.parametrize("lagged", [False, True])
@pytest.mark.parametrize("mode", ["global_estimated", "projected", "per_layer"])
@kills(
    "optim/scalars.py",
    "torch.where(self.norm >= 0, coefficient(clip, self.norm), 1.0) if clip",
    "coefficient(clip, self.norm.abs()) if clip",
)
@kills("optim/landing.py", 'NORM_OF = {"projected": 0}', 'NORM_OF = {"projected": 1}')
@kills("optim/scalars.py", "self.squares[rows, 0].sqrt()", "self.squares[rows, 1].sqrt()")
def test_clip_modes_follow_their_definition(mode, lagged, fixed):
    """Against a float64 loop on plain gradients; in backward the global modes use the last step's norm."""
    update, clip = "in_backward" if lagged else "after", 0.01 if mode == "per_layer" else 0.5
    model = Tiny()
    opt = attach(model, "galore", **SETTINGS, clip=clip, clip_mode=mode, update=update, eps=1e-6)
    plain, adam = with_coordinates(opt, 0.25)
    for g in adam.param_groups:
        g["eps"] = 1e-6
    last, used = None, []
    for tokens in batches(6):
        (summed_loss(model, tokens) / 60).backward()
        opt.step()
        opt.zero_grad()
        (summed_loss(plain, tokens) / 60).backward()
        parts = {n: p.grad.norm() for n, p in plain.named_parameters()}
        if mode == "per_layer":
            for n, p in plain.named_parameters():
                c = (clip / (parts[n] + 1e-6)).clamp(max=1)
                used.append(float(c))
                p.grad *= c
        else:
            own = torch.stack(list(parts.values())).norm() if mode == "projected" else opt.stats["grad_norm"]
            norm, last = (last, own) if lagged else (own, own)
            c = 1.0 if norm is None else (clip / (norm + 1e-6)).clamp(max=1)
            used.append(float(c))
            for p in plain.parameters():
                p.grad *= c
        adam.step()
        adam.zero_grad()
    assert min(used[1:]) < 1
    for u in opt.units:
        if u.projected:
            c = plain.get_submodule(u.name.removesuffix(".weight")).c
            want = Tiny().get_parameter(u.name) + c @ u.q.q.T
            torch.testing.assert_close(u.param.data, want.data, rtol=1e-10, atol=1e-12)


# ---- ranks


def on_rank(rank, world, method, settings, rows, held=None):
    import torch.distributed as dist

    if held is not None:
        optim.landing.HELD = held
    model, group = Tiny(), dist.group.WORLD
    if rows:
        group = shard(model, world)
    opt = attach(model, method, accum_steps=2, group=group, reduce="sum", **keys(method), **settings)
    hashes = []

    def note(n):
        if n % 3 == 2 and not rows:
            buffer = io.BytesIO()
            state = opt.state_dict()["state"]
            state["engine"] = {k: v for k, v in state["engine"].items() if k != "fallbacks"}
            torch.save([model.state_dict(), state], buffer)
            hashes.append(hash(buffer.getvalue()))

    train(model, opt, batches(6), micro=2, rank=rank, world=world, after_step=note)
    return flat(model), float(opt.stats["grad_norm"]), hashes


@pytest.mark.parametrize(("method", "world"), [*((m, 2) for m in METHODS_TESTED), ("galore_8bit", 3)])
@kills(
    "optim/reduce.py",
    "works = [dist.all_reduce(g, group=self.group, async_op=True) for g in grads]",
    "works = []",
)
@kills(
    "optim/reduce.py",
    "return Flight(grads, works, [], self.divide)",
    "return Flight(grads, works, [], self.world)",
)
@kills("optim/landing.py", "grads = flight.land()", "grads = flight.out")
@kills("optim/refresh.py", "self.reduce.from_owner_(q, owner)", "pass")
@kills("optim/attach.py", 'comm = Reduce(group, reduce == "mean")', "comm = Reduce(group, True)")
def test_ranks_equal_one_and_each_other_invariant_23(method, world):
    """Replicas on different data = one process on all of it; bit-equal weights, bases and state on all
    ranks."""
    one, opt, _ = reference(method, micro=2)
    ranks = parallel(world, on_rank, method, {}, False)
    assert len(ranks[0][2]) == 2 and all(
        torch.equal(r[0], ranks[0][0]) and r[2] == ranks[0][2] for r in ranks
    )
    assert (ranks[0][0] - flat(one)).norm() <= 1e-12 * moved(one, START)
    assert ranks[0][1] == pytest.approx(float(opt.stats["grad_norm"]), rel=1e-12)


@pytest.mark.parametrize(
    ("method", "world"),
    [*((m, 2) for m in METHODS_TESTED if m not in ("adamw_8bit", *DEFERRED)), ("galore_8bit", 3)],
)
@kills("optim/reduce.py", "out.append(mine[:rows])", "out.append(mine[:rows] * 2)")
@kills("optim/reduce.py", "return torch.where(mask, total, t)", "return t")
def test_row_shards_equal_one(method, world):
    """fully_shard before attach: R is reduce-scattered by rows, moments and update stay on the shard."""
    one, opt, _ = reference(method, micro=2)
    ranks = parallel(world, on_rank, method, {}, True)
    for flat_weights, norm, _ in ranks:
        assert (flat_weights - flat(one)).norm() <= 1e-12 * moved(one, START)
        assert norm == pytest.approx(float(opt.stats["grad_norm"]), rel=1e-12)


@kills("optim/landing.py", "rows = self.reduce.rows(u.param) if u.sharded else", "rows =")
def test_uneven_shards_meet_in_every_sum():
    """16 rows on 3 ranks are 6, 6, 4: what waits is counted alike, or sums of different units would meet."""
    one, opt, _ = reference("galore", micro=2)
    for flat_weights, norm, _ in parallel(3, on_rank, "galore", {}, True, 600):
        assert (flat_weights - flat(one)).norm() <= 1e-12 * moved(one, START)
        assert norm == pytest.approx(float(opt.stats["grad_norm"]), rel=1e-12)


def refused(rank, world):
    """What attach says of row shards that it cannot train."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = Tiny(), init_device_mesh("cpu", (world,))
    fully_shard(model, mesh=mesh)
    said = []
    for given in ({"side": "both", "group": mesh.get_group(), "reduce": "sum"}, {"side": "output"}):
        with pytest.raises(ValueError) as error:
            attach(model, "galore", **SETTINGS, **given)
        said.append(str(error.value))
    twice = Tiny()
    fully_shard(twice, mesh=init_device_mesh("cpu", (1, world), mesh_dim_names=("replicas", "shards")))
    with pytest.raises(ValueError) as error:
        attach(twice, "galore", **SETTINGS, group=mesh.get_group(), reduce="sum")
    return [*said, str(error.value)]


def test_row_shards_that_cannot_be_trained_are_refused():
    both, output, twice = parallel(2, refused)[0]
    assert both.startswith("side=both: ") and "rows of embed.weight" in both and "side=input" in both
    assert "mesh.get_group()" in output and "side=output" in output
    assert "placed as" in twice and "one-dimensional" in twice


def diverging(rank, world):
    model = Tiny()
    if rank:
        with torch.no_grad():
            model.head.weight[0, 0] += 1e-3
    import torch.distributed as dist

    opt = attach(model, "galore", group=dist.group.WORLD, reduce="sum", **SETTINGS)
    train(model, opt, batches(4), rank=rank, world=world)
    return flat(model)


def test_a_divergent_rank_is_seen():
    a, b = parallel(2, diverging)
    assert not torch.equal(a, b)


# ---- saving


@pytest.mark.parametrize("method", METHODS_TESTED)
@kills(
    "optim/state.py", 'e.updates, e.seed = int(own["updates"])', 'e.updates, e.seed = 0 * int(own["updates"])'
)
@kills(
    "optim/unit.py",
    "self.count, self.fresh = int(count), bool(fresh)",
    "pass",
)
@kills("optim/state.py", 'e.scalars.norm.copy_(own["norm"])', "pass")
@kills("optim/state.py", 'e.scalars.t[u.index] = state[u.name]["t"]', "pass")
@kills("optim/state.py", "tensor.copy_(state[u.name][key])", "pass")
def test_resumes_bitwise_after_any_step_invariant_22(method):
    """Saved after each of 7 steps, one before and one after refreshes among them, through a file."""
    steps, clip = 7, {"clip": 0.5} if projected(method) else {}
    tokens = batches(steps)
    model = Tiny()
    opt = attach(model, method, **keys(method), **clip)
    saves = []

    def save(n):
        buffer = io.BytesIO()
        torch.save([model.state_dict(), opt.state_dict()], buffer)
        saves.append(buffer)

    train(model, opt, tokens, after_step=save)
    for n, buffer in enumerate(saves[:-1]):
        buffer.seek(0)
        weights, state = torch.load(buffer, weights_only=True)
        again = Tiny(seed=5)
        torch.manual_seed(99)
        other = attach(again, method, **{**keys(method), "lr": 5e-2}, **clip)
        again.load_state_dict(weights)
        other.load_state_dict(state)
        train(again, other, tokens[n + 1 :])
        assert torch.equal(flat(again), flat(model)), f"after step {n + 1}"
        a, b = (torch.utils._pytree.tree_leaves(o.state_dict()) for o in (opt, other))
        assert all(
            torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True)
        )


def test_a_state_of_another_method_or_shape_changes_nothing():
    _, opt, _ = run("galore", steps=2)
    before = copy.deepcopy(opt.state_dict())
    saved = copy.deepcopy(before)
    saved["state"]["layers.1.down_proj.weight"]["m"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"layers\.1\.down_proj\.weight.*\(3,\)"):
        opt.load_state_dict(saved)
    _, dense, _ = run("adamw", steps=2)
    with pytest.raises(ValueError, match="only one of"):
        opt.load_state_dict(dense.state_dict())
    leaves = torch.utils._pytree.tree_leaves
    assert all(
        torch.equal(a, b)
        for a, b in zip(leaves(before["state"]), leaves(opt.state_dict()["state"]), strict=True)
    )


# ---- refresh


@kills("optim/refresh.py", "            b.due = False\n", "            b.due = b.due\n")
@kills("optim/layer.py", "if self.refresh:", "if self.refresh and False:")
@kills("optim/refresh.py", "self.held[u.index] = u, g, s", "self.held[u.index] = u, g / 3, s")
@kills("optim/refresh.py", "b.replace_(q)", "pass")
@kills("optim/refresh.py", "[self.held.pop(n) for n in done]", "[self.held[n] for n in done]")
def test_refresh_step_invariant_49(monkeypatch):
    """R = G Q_new exactly, with G summed over micro-batches; those of one block are alive together."""
    model, plain = Tiny(), Tiny()
    opt = attach(model, "galore_sgd", lr=1e-2, scale=1.0, rank=4, refresh_every=50, accum_steps=3)
    most = 0

    def watched(u=None):
        nonlocal most
        most = max(most, sum(u.full.grad is not None for u in opt.units if u.projected))
        most = max(most, len(opt.refresher.held))

    for u in opt.units:
        if u.projected:
            u.full.register_post_accumulate_grad_hook(lambda p: watched())
    train(model, opt, batches(1), micro=3)
    plain.load_state_dict(model.state_dict())
    second = batches(2)[1]
    due_now = [b for b in opt.bases if b.due]
    assert len(due_now) == 4 and len({b.turn for b in due_now}) == 1
    (summed_loss(plain, second) / 60).backward()
    old = {u.name: u.param.detach().clone() for u in opt.units}
    old_q = [b.q.clone() for b in due_now]
    train(model, opt, [second], micro=3)
    assert most == sum(len(b.units) for b in due_now) == 7
    for b, before in zip(due_now, old_q, strict=True):
        assert not torch.allclose(b.q, before)
        for u in b.units:
            g = dict(plain.named_parameters())[u.name].grad
            after = old[u.name] - 1e-2 * g @ b.q @ b.q.T
            torch.testing.assert_close(u.param.data, after, rtol=1e-12, atol=1e-14)


@kills("optim/engine.py", "b.arrived = len(b.units) if b.due else 0", "b.arrived = 0")
@kills("optim/engine.py", "due and (not self._alone or self.adapters)", "due and self.adapters")
@kills("optim/engine.py", "        if self.in_backward:\n            self._flush()\n", "")
@pytest.mark.parametrize("method", ["galore_8bit", "gradnormlorp_8bit", "natural_galore", "adamw"])
@pytest.mark.parametrize("more", [{}, {"update": "after", "clip": 0.5}, {"refresh": "together"}])
def test_a_step_in_its_parts_is_the_step(method, more):
    """As a captured one runs: what collect() leaves for a basis lies elsewhere when conclude() finds it, and
    by then every other weight has moved."""
    settings = keys(method) | {k: v for k, v in more.items() if k != "refresh" or method != "adamw"}
    models = Tiny(), Tiny()
    opts = [attach(m, method, **settings) for m in models]
    train(models[0], opts[0], batches(8))
    opt, kinds = opts[1], []
    for tokens in batches(8):
        kinds.append(opt.kind)
        before = {u.name: u.param.detach().clone() for u in opt.units if u.projected}
        (summed_loss(models[1], tokens) / 60).backward()
        opt.collect()
        waits = {u.name for u, _, _ in opt.held.values()}
        if opt.in_backward and (opt.kind or 0) >= 0:
            now = dict(models[1].named_parameters())
            assert waits == {n for n, w in before.items() if torch.equal(w, now[n])}
        opt.held = {n: (u, g.clone(), s if s is None else s.clone()) for n, (u, g, s) in opt.held.items()}
        opt.conclude()
        opt.advance()
        opt.zero_grad()
    assert torch.equal(flat(models[0]), flat(models[1]))
    if method == "adamw":
        assert kinds == [None] + [-1] * 7
    elif more:
        assert set(kinds) <= {None, -1} and -1 in kinds
    else:
        assert {0, 1} <= set(kinds)


def test_overlap_and_energy_are_what_they_say():
    model, plain = Tiny(), Tiny()
    opt = attach(model, "galore", **SETTINGS, refresh="together")
    train(model, opt, batches(3))
    plain.load_state_dict(model.state_dict())
    old = {b.name: b.q.clone() for b in opt.bases}
    tokens = batches(4)[3]
    (summed_loss(plain, tokens) / 60).backward()
    train(model, opt, [tokens])
    want = [(old[b.name].T @ b.q).square().sum() / b.r for b in opt.bases]
    torch.testing.assert_close(opt.stats["overlap"], torch.stack(want).mean())
    assert 0 < float(opt.stats["overlap"]) < 0.999
    grads = {n: p.grad for n, p in plain.named_parameters()}
    captured = sum((grads[u.name] @ u.q.q).square().sum() for u in opt.units if u.projected)
    whole = sum(grads[u.name].square().sum() for u in opt.units if u.projected)
    torch.testing.assert_close(opt.stats["energy"], captured / whole)
    norm = torch.stack([g.norm() for g in grads.values()]).norm()
    torch.testing.assert_close(opt.stats["grad_norm"], norm)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_a_zero_or_non_finite_gradient_keeps_the_basis(bad):
    model = Tiny()
    opt = attach(model, "galore", lr=1e-2, rank=4, refresh_every=50)
    train(model, opt, batches(1))
    b = next(b for b in opt.bases if b.due)
    q, w = b.q.clone(), [u.param.detach().clone() for u in b.units]
    t = float(opt.scalars.t[b.units[0].index])
    loss = summed_loss(model, batches(2)[1]) / 60
    poison = b.units[0].full.register_hook(lambda g: g * bad if bad == 0 else g + bad)
    others = [u.full.register_hook(lambda g: g * 0) for u in b.units[1:]] if bad == 0 else []
    loss.backward()
    opt.step()
    assert torch.equal(b.q, q) and opt.stats["bases_kept"] == 1 and b.count == 0
    if bad != 0:
        assert torch.equal(b.units[0].param, w[0]) and int(opt.stats["skipped"]) == 1
        assert float(opt.scalars.t[b.units[0].index]) == t
    for handle in (poison, *others):
        handle.remove()
    train(model, opt, batches(4)[2:])
    assert torch.isfinite(flat(model)).all() and b.count >= 0


@pytest.mark.parametrize("method", METHODS_TESTED)
def test_a_non_finite_coordinate_skips_its_matrix_whole(method):
    model = Tiny()
    opt = attach(model, method, **{**keys(method), **({"refresh_every": 50} if projected(method) else {})})
    train(model, opt, batches(7))
    name = "layers.0.down_proj.weight"
    u = next(u for u in opt.units if u.name.startswith(name))  # an adapter's first
    assert not u.refresh

    def remembered():
        state = opt.state_dict()["state"]
        parts = {f"{n} {k}": t for n in state if n.startswith(name) for k, t in state[n].items()}
        return copy.deepcopy(parts), model.state_dict()[name].clone()

    before, w = remembered()
    others = flat(model)
    handle = u.leaves[0].register_hook(lambda g: g + float("nan"))
    train(model, opt, batches(8)[7:])
    after, still = remembered()
    assert torch.equal(still, w) and not torch.equal(flat(model), others)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert int(opt.stats["skipped"]) == 1 and torch.isfinite(opt.stats["grad_norm"])
    handle.remove()
    train(model, opt, batches(9)[8:])
    assert not torch.equal(remembered()[1], w) and int(opt.stats["skipped_in_a_row"]) == 0


# ---- a closed step


@pytest.mark.parametrize("method", METHODS_TESTED)
def test_a_step_is_closed(method):
    model = Tiny()
    opt = attach(model, method, accum_steps=2, **keys(method))
    tokens = batches(4)
    with pytest.raises(RuntimeError, match=r"0 backward.*accum_steps=2"):
        opt.step()
    (summed_loss(model, tokens[0]) / 60).backward()
    with pytest.raises(RuntimeError, match=r"1 backward.*accum_steps=2"):
        opt.step()
    opt.zero_grad()
    for _ in range(3):
        (summed_loss(model, tokens[0]) / 60).backward()
    with pytest.raises(RuntimeError, match=r"3 backward.*accum_steps=2"):
        opt.step()
    for part in tokens[:2]:
        (model.head(model.embed(part)).sum()).backward()  # the blocks are not used
    with pytest.raises(RuntimeError, match=r"layers\.0\.q_proj\.weight.*more"):
        opt.step()
    train(model, opt, tokens, micro=2)  # and it goes on


def test_zero_grad_drops_an_unfinished_step():
    a, b = Tiny(), Tiny()
    opts = [attach(m, "galore", **SETTINGS, accum_steps=2) for m in (a, b)]
    (summed_loss(a, batches(1, seed=7)[0]) / 60).backward()
    opts[0].zero_grad()
    for m, o in zip((a, b), opts, strict=True):
        train(m, o, batches(3), micro=2)
    assert torch.equal(flat(a), flat(b))


def test_accumulation_may_change_between_steps():
    one, _, _ = run("galore", steps=6)
    model = Tiny()
    opt = attach(model, "galore", **SETTINGS)
    for n, tokens in enumerate(batches(6)):
        opt.accum_steps = 1 + n % 3
        train(model, opt, [tokens], micro=opt.accum_steps)
    close(one, model)


@kills(
    "optim/methods.py",
    '"adamw_8bit": Method(adam, OptimConfig, {"moments": "int8"})',
    '"adamw_8bit": Method(adam, OptimConfig)',
)
def test_no_two_methods_train_alike():
    """Same seed, same data: the losses of any two methods differ."""
    losses = [tuple(reference(m)[2]) for m in METHODS_TESTED if m not in DEFERRED]
    assert len(set(losses)) == len(losses)
