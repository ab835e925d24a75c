"""Natural GaLore: its step against dense solves, its history in every store and through refreshes, ranks and
saves. What all methods share is tested in test_engine.py."""

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kernels import Column
from kernels import history as reference
from optim import attach, moments
from optim.comm import local
from optim.refresh import Refresher
from optim.rules.adam import Adam
from optim.rules.natural import Natural
from tests.mutants import kills
from tests.test_engine import SIDES, START, close, on_rank
from tests.tiny import Oracle, Tiny, batches, flat, keys, moved, parallel, ranks, run, summed_loss, train

KEYS = {**keys("natural_galore"), "eps": 1e-6}


def row(t=1, ok=1.0, clip=1.0, dtype=torch.float64):
    """A unit's scalars with lr 1."""
    h = torch.zeros(8, dtype=dtype)
    h[Column.LR], h[Column.KEEP], h[Column.CLIP], h[Column.OK], h[Column.T] = 1, 1, clip, ok, t
    h[Column.FIX1], h[Column.FIX2] = 1 - 0.9**t, 1 - 0.999**t
    return h


def gradients(n, shape=(3, 2), seed=0, dtype=torch.float64):
    """Correlated, of unequal lengths."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=g, dtype=torch.float64)
    sizes = 10 ** torch.randn(n, generator=g, dtype=torch.float64)
    return [(s * (base + torch.randn(shape, generator=g, dtype=torch.float64))).to(dtype) for s in sizes]


def fresh(rule, shape=(3, 2), store="fp32", dtype=torch.float64):
    state = rule.begin(store, shape, torch.device("cpu"), dtype)
    if store == "int8":
        state["d"] = torch.linspace(0.5, 2, shape[1])
    return state


def dense(past, damping):
    """lambda F^-1 g for the newest of `past`, F in full."""
    h = torch.stack([x.flatten() for x in past], 1)
    damp = damping * h.square().sum() / len(past)
    f = damp * torch.eye(len(h), dtype=h.dtype) + h @ h.t()
    return damp * torch.linalg.solve(f, h[:, -1]).view(past[-1].shape)


def push(rule, state, g):
    """g~ of the next gradient."""
    h = row(dtype=state["gram"].dtype)
    w, place = reference.natural_weights_(reference.natural_dots_(g, state, h), state, h, rule.damping)
    return reference.natural_mix(g, state, w, place, h)


# ---- the step


@pytest.mark.parametrize("store", ["bf16", "int8"])
@kills("kernels/history.py", "past.index_copy_(0, slot, g.reshape(1, -1))", "pass")
@kills(
    "kernels/history.py", "past.index_copy_(0, place, (g.to(wide) * h[Column.CLIP]).reshape(1, -1))", "pass"
)
@kills("kernels/history.py", "torch.cat([past.index_select(0, slot), stored])", "torch.cat([stored, stored])")
@kills("kernels/history.py", "stored = past.index_select(0, slot)", "stored = g.reshape(1, -1).clone()")
def test_this_gradient_enters_before_it_is_rounded(store):
    """Products with it as it is for this update, as it is stored for the next; the mix has it as it is."""
    rule, h = Natural(history=3), row(clip=0.5, dtype=torch.float32)
    state = fresh(rule, (5, 40), store, torch.float32)
    *before, g = gradients(5, (5, 40), dtype=torch.float32)
    for x in before:
        push(rule, state, x)
    slot = int(state["slot"])
    dots = reference.natural_dots_(g, state, h)
    past = moments.load(state, "history", torch.float32).flatten(1)
    stored, g_ = past[slot].clone(), 0.5 * g.flatten()
    assert 1e-4 < (stored - g_).norm() / g_.norm() < 0.05
    want = torch.stack([past @ g_, past @ stored])
    want[0, slot] = g_ @ g_
    torch.testing.assert_close(dots, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    only = torch.zeros(3).index_fill_(0, torch.tensor([slot]), 1.0)
    assert torch.equal(reference.natural_mix(g, state, only, torch.tensor([slot]), h), 0.5 * g)


@pytest.mark.parametrize("history", [1, 2, 4, 7])
@pytest.mark.parametrize("damping", [1e-3, 1.0, 30.0])
@kills("kernels/history.py", "clamp(max=history)", "clamp(max=99)")
@kills("kernels/history.py", "(slot + 1) % history, slot)", "slot, slot)")
@kills("kernels/history.py", "damping / count.to(gram.dtype)", "damping / history")
@kills("kernels/history.py", "torch.where(trace > info.tiny / info.eps, 1 / trace, 0.0)", "1 / (1 + trace)")
@kills("kernels/history.py", ".index_copy(1, slot, row[:, None])", "")
@kills("kernels/history.py", "index_fill_(0, slot, 1.0)", "index_fill_(0, slot * 0, 1.0)")
@kills("kernels/history.py", "solve_triangular(factor.t(), half", "solve_triangular(factor.t(), newest")
@kills("kernels/history.py", "x.index_copy_(0, slot, one[k][None])", "x[0].copy_(one[k])")
def test_equals_a_dense_solve_invariant_24(history, damping):
    """(lambda I + H H^T) g~ = lambda g over 9 updates, cleared after the third, rotated after the sixth; the
    paper's Woodbury form is that over lambda."""
    rule, past = Natural(history=history, damping=damping), []
    state = fresh(rule)
    turn = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(1)).double()).Q
    for n, g in enumerate(gradients(9)):
        past = [*past, g][-history:]
        want, got = dense(past, damping), push(rule, state, g)
        assert (got - want).norm() <= 1e-9 * want.norm()
        h = torch.stack([x.flatten() for x in past], 1)
        damp, k = damping * h.square().sum() / len(past), h.t() @ h
        z = torch.linalg.solve(torch.eye(len(k), dtype=k.dtype) + k / damp, h.t() @ g.flatten())
        assert (got.flatten() - (g.flatten() - h @ z / damp)).norm() <= 1e-8 * want.norm()
        assert int(state["filled"]) == len(past)
        if n == 2:
            rule.moved_(state, False)
            past = []
        if n == 5:
            state["history"].copy_(state["history"] @ turn)
            rule.moved_(state, True)
            past = [x @ turn for x in past]


class NaturalOracle(Oracle):
    """The last gradients of each matrix in a list, F in full, bases and Adam as the dense oracle's."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.past = {u.name: [] for u in self.engine.units}

    def project(self, u, g):
        g = super().project(u, g)
        if not u.projected:
            return g
        cfg = self.engine.cfg
        self.past[u.name] = [*self.past[u.name], g.clone()][-cfg.history :]
        return dense(self.past[u.name], cfg.damping)

    def refresh(self, b):
        old, first, policy = self.q[b.name], self.found[b.name] == 0, self.engine.cfg.transport
        super().refresh(b)
        if policy == "auto":
            policy = "reset" if first else "keep" if self.engine.cfg.finder == "warm" else "rotate"
        c = old.T @ self.q[b.name]
        for u in b.units:
            turned = [x @ c if b.side == "input" else c.T @ x for x in self.past[u.name]]
            self.past[u.name] = turned if policy.startswith("rotate") else []


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"share": False, "transport": "reset", "decay": 0.1},
        {"finder": "svd", "transport": "rotate_fill", "history": 2},
        {"transport": "rotate", "damping": 0.1},
    ],
    ids=str,
)
@kills("optim/refresh.py", "            u.rule.moved_(u.state, False)\n", "")
@kills("optim/refresh.py", 'u.rule.moved_(u.state, policy != "reset"', "u.rule.moved_(u.state, True")
@kills("optim/refresh.py", "len(c)) for k in u.rule.stored}", "len(c)) for k in u.rule.moments}")
@kills("optim/rules/natural.py", "gram.copy_(total(past @ past.t()))", "pass")
@kills("optim/rules/natural.py", '"slot", "filled"):\n', '"slot"):\n')
@kills("optim/rules/natural.py", '("history", "gram", "slot", "filled"):\n', '("history", "filled"):\n')
def test_equals_the_dense_oracle_over_refreshes(side, settings):
    """Nine updates through the engine, every basis replaced three times."""
    model, plain = Tiny(), Tiny()
    opt = attach(model, "natural_galore", **{**KEYS, "side": side, **settings})
    oracle = NaturalOracle(plain, opt, eps=1e-6)
    losses, expected = train(model, opt, batches(9)), train(plain, oracle, batches(9))
    assert all(b.count >= 3 for b in opt.bases)
    close(plain, model, 1e-9)
    assert losses == pytest.approx(expected, rel=1e-9)


@kills("optim/methods.py", "if not cfg.history:", "if cfg.history == 7:")
@pytest.mark.parametrize("twin", ["", "_8bit"])
def test_no_history_is_galore_bitwise_invariant_52(twin):
    plain, opt, a = run(f"galore{twin}")
    natural, other, b = run(f"natural_galore{twin}", history=0)
    assert torch.equal(flat(plain), flat(natural)) and a == b
    assert [u.state.keys() for u in opt.units] == [u.state.keys() for u in other.units]


@kills("kernels/history.py", "damping / count.to(gram.dtype)", "damping / count")
def test_one_vector_is_a_rescaling():
    rule = Natural(history=1, damping=0.3)
    state = fresh(rule)
    for g in gradients(4):
        torch.testing.assert_close(push(rule, state, g), 0.3 * g / 1.3, rtol=1e-12, atol=0)


@kills("kernels/history.py", "index_fill_(0, slot, 1.0)", "index_fill_(0, slot, -1.0)")
@hypothesis_settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 9),
    cols=st.integers(1, 7),
    history=st.integers(1, 6),
    damping=st.floats(1e-3, 1e6),
    store=st.sampled_from(["fp32", "bf16", "int8"]),
)
def test_it_never_points_uphill(seed, rows, cols, history, damping, store):
    """<g~, g> > 0 in fp32 and every store, gradients of very unequal lengths and equal ones."""
    rule = Natural(history=history, damping=damping)
    state = fresh(rule, (rows, cols), store, torch.float32)
    for g in gradients(6, (rows, cols), seed, torch.float32):
        for again in (g, g):
            found = push(rule, state, again)
            assert torch.isfinite(found).all() and float((found.double() * again.double()).sum()) > 0


@kills("kernels/history.py", "damping / count.to(gram.dtype)", "1 / count")
@kills("kernels/history.py", "upper=True)[:, 0] * damp", "upper=True)[:, 0] / trace")
def test_large_damping_is_galore():
    """Of gradients whose lengths differ by orders: g~ is g, and Adam's direction GaLore's."""
    natural, adam = Natural(eps=1e-30, damping=1e6), Adam(eps=1e-30)
    states = fresh(natural), fresh(adam)
    for t, g in enumerate(gradients(6, seed=3), 1):
        g = g * 10.0 ** (t % 3)
        a, b = (
            r.step_(g, s, row(t), g.dtype).flatten() for r, s in zip((natural, adam), states, strict=True)
        )
        torch.testing.assert_close(a, b, rtol=1e-4, atol=0)


@kills("kernels/history.py", "torch.where(trace > info.tiny / info.eps, 1 / trace, 0.0)", "1 / trace")
@pytest.mark.parametrize("store", ["fp32", "bf16", "int8"])
def test_a_zero_gradient_gives_zero(store):
    rule = Natural()
    state = fresh(rule, store=store, dtype=torch.float32)
    zero = torch.zeros(3, 2)
    for g in (zero, zero, *gradients(2, dtype=torch.float32), zero, 1e-30 * torch.ones(3, 2)):
        found = push(rule, state, g)
        assert torch.isfinite(found).all()
        if not g.any():
            assert not found.any()
    assert all(torch.isfinite(x.float()).all() for x in state.values())


@kills("kernels/history.py", 'g.to(wide) * h[Column.CLIP], state["slot"]', 'g.to(wide), state["slot"]')
@kills("kernels/history.py", "(g.to(wide) * h[Column.CLIP]).reshape(1, -1)", "g.to(wide).reshape(1, -1)")
@kills("kernels/history.py", "row[Column.CLIP].fill_(1.0)", "pass")
def test_clipping_comes_before_everything():
    rule = Natural(eps=1e-30)
    a, b = fresh(rule), fresh(rule)
    for t, g in enumerate(gradients(5), 1):
        clip = 1 / t
        x, y = rule.step_(g, a, row(t, clip=clip), g.dtype), rule.step_(g * clip, b, row(t), g.dtype)
        torch.testing.assert_close(x, y, rtol=1e-12, atol=0)
        assert all(torch.equal(a[k], b[k]) for k in a)


# ---- the history


@kills(
    "kernels/history.py",
    "torch.where(ok, _border(gram, slot, dots[1]), gram)",
    "_border(gram, slot, dots[1])",
)
@kills("kernels/history.py", 'torch.where(ok, count, state["filled"])', "count")
@kills("kernels/history.py", "torch.where(ok, (slot + 1) % history, slot)", "(slot + 1) % history")
@kills("kernels/history.py", '"history", slot, g, h[Column.OK]', '"history", slot, g, h[Column.OK] + 1')
@pytest.mark.parametrize("store", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_skipped_update_changes_nothing(store, bad):
    rule = Natural()
    state = fresh(rule, store=store)
    for t, g in enumerate(gradients(6), 1):
        state["gram"].mul_(1.25)  # K computed anew would show
        before = copy.deepcopy(state)
        step = rule.step_(g + bad, state, row(t, ok=0.0), g.dtype)
        assert not step.any() and all(torch.equal(before[k], state[k]) for k in state)
        assert rule.step_(g, state, row(t), g.dtype).any()


@kills("kernels/history.py", "dots[:-1, 1].index_copy(0, slot, dots[-1:, 1])", "dots[:-1, 0]")
@pytest.mark.parametrize(("store", "off"), [("bf16", 0.01), ("int8", 0.05)])
def test_a_small_store_is_within_rounding(store, off):
    """K is what is stored times itself; the newest gradient acts before it is rounded."""
    wide, small, one = Natural(damping=0.1), Natural(damping=0.1), Natural(history=1, damping=1)
    shape = (5, 300)
    a, b = fresh(wide, shape, dtype=torch.float32), fresh(small, shape, store, torch.float32)
    single = fresh(one, shape, store, torch.float32)
    for g in gradients(7, shape, dtype=torch.float32):
        g = g / g.norm()
        x, y = push(wide, a, g), push(small, b, g)
        assert 0 < (x - y).norm() < off * x.norm() or int(a["filled"]) == 1
        torch.testing.assert_close(push(one, single, g), g / 2, rtol=1e-4, atol=0)
        kept = moments.load(b, "history", torch.float32).flatten(1)
        torch.testing.assert_close(b["gram"], kept @ kept.t(), rtol=1e-5, atol=1e-6)
        stored = kept[(int(b["slot"]) - 1) % 4].view(shape)
        assert (stored - g).abs().max() <= off * g.abs().max()
    bytes_of = {k: sum(t.nbytes for n, t in s.items() if "history" in n) for k, s in (("a", a), ("b", b))}
    assert bytes_of["b"] < 0.51 * bytes_of["a"]


@kills("optim/rules/natural.py", '("history", "gram", "slot", "filled"):\n', '("gram", "slot", "filled"):\n')
@pytest.mark.parametrize("method", ["natural_galore", "natural_galore_8bit"])
@pytest.mark.parametrize("policy", ["keep", "reset", "rotate", "rotate_fill"])
def test_the_history_at_a_refresh(method, policy, monkeypatch):
    """Cleared with keep and reset; else each vector times C, K anew, its place and number as they were."""
    seen, carry = [], Refresher._carry

    def watched(self, u, b, g, c, said):
        before = copy.deepcopy(u.state)
        carry(self, u, b, g, c, said)
        seen.append(int(before["filled"]))
        past, after = (moments.load(s, "history", c.dtype) for s in (before, u.state))
        if policy in ("keep", "reset"):
            assert not any(u.state[k].any() for k in ("gram", "slot", "filled")) and not after.any()
            return
        assert all(torch.equal(u.state[k], before[k]) for k in ("slot", "filled"))
        want = past @ c if b.side == "input" else c.T @ past
        close = 1e-12 if method == "natural_galore" else 0.02
        assert (after - want).norm() <= close * want.norm()
        whole = after.flatten(1)
        torch.testing.assert_close(u.state["gram"], (whole @ whole.T).to(u.state["gram"].dtype))

    monkeypatch.setattr(Refresher, "_carry", watched)
    _, opt, _ = run(method, steps=7, transport=policy, side="both", history=3)
    assert len(seen) >= 30 and max(seen) == 3
    assert all(int(u.state["filled"]) for u in opt.units if u.projected)


@kills("optim/assign.py", "        u.rule = u.rule.dense\n", "        pass\n")
def test_a_matrix_too_narrow_for_a_basis_is_adams():
    model = Tiny()
    opt = attach(model, "natural_galore", **{**KEYS, "rank": 16})
    for u in opt.units:
        assert ("history" in u.state) == u.projected == ("down_proj" in u.name)
        assert isinstance(u.rule, Natural) == u.projected
    train(model, opt, batches(3))
    assert "nat." in opt.table() and "history" in opt.table()


# ---- ranks and saves


@kills(
    "optim/reduce.py",
    "works = [dist.all_reduce(g, group=self.group, async_op=True) for g in grads]",
    "works = []",
)
def test_two_ranks_equal_one():
    for transport in ("auto", "rotate"):
        settings = {**KEYS, "transport": transport, "eps": 1e-6}
        alone = run("natural_galore", steps=6, **settings)[0]
        for w in ranks(2, "natural_galore", 6, 1, settings):
            assert (w - flat(alone)).norm() <= 1e-11 * moved(alone, START)


@kills("optim/landing.py", "partial(self.reduce.sum_parts, u.param) if u.sharded else alone", "alone")
@kills("optim/rules/natural.py", "if any(total is not alone for total in totals):", "if False:")
@kills(
    "optim/refresh.py", 'policy != "reset", partial(self.reduce.sum_parts, u.param))', 'policy != "reset")'
)
def test_row_shards_equal_one():
    """K's inner products are sums over all rows, at a rotation too; 16 rows on 3 ranks are 6, 6, 4."""
    settings = {"transport": "rotate", "growth_limit": 1.2}
    one, _, _ = run("natural_galore", micro=2, **settings)
    for weights, _, _ in parallel(3, on_rank, "natural_galore", settings, True):
        assert (weights - flat(one)).norm() <= 1e-11 * moved(one, START)


@pytest.mark.parametrize("store", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("transport", ["auto", "rotate"])
def test_resumes_bitwise_around_refreshes(store, transport):
    """Bases are replaced at every step of the last four: saved after each of 7."""
    settings, tokens, saves = {**KEYS, "moments": store, "transport": transport}, batches(7), []
    model = Tiny()
    opt = attach(model, "natural_galore", **settings)

    def save(n):
        buffer = io.BytesIO()
        torch.save([model.state_dict(), opt.state_dict()], buffer)
        saves.append(buffer)

    train(model, opt, tokens, after_step=save)
    for n, buffer in enumerate(saves[:-1]):
        buffer.seek(0)
        weights, state = torch.load(buffer, weights_only=True)
        again = Tiny(seed=5)
        other = attach(again, "natural_galore", **settings)
        again.load_state_dict(weights)
        other.load_state_dict(state)
        train(again, other, tokens[n + 1 :])
        assert torch.equal(flat(again), flat(model)), f"after step {n + 1}"
        for u, v in zip(opt.units, other.units, strict=True):
            assert all(torch.equal(u.state[k], v.state[k]) for k in u.state)


@kills("optim/state.py", "        if not same:\n", "        if False:\n")
@kills(
    "optim/state.py",
    'return {"d", *u.rule.stored,',
    'return {"d", *u.rule.moments,',
)
@pytest.mark.parametrize("after", ["bf16", "int8"])
def test_a_history_goes_into_another_store(after):
    """By value, within rounding, and K is computed anew; the run goes on."""
    _, opt, _ = run("natural_galore", steps=5)
    other = attach(Tiny(), "natural_galore", **KEYS, moments=after)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    filled = 0
    for u, v in zip(opt.units, other.units, strict=True):
        if not u.projected:
            continue
        old, new = (moments.load(x.state, "history", torch.float64) for x in (u, v))
        assert (new - old).abs().max() <= 0.03 * old.abs().max()
        torch.testing.assert_close(v.state["gram"], new.flatten(1) @ new.flatten(1).T, rtol=1e-9, atol=1e-12)
        assert all(torch.equal(u.state[k], v.state[k]) for k in ("slot", "filled"))
        filled += int(v.state["filled"])
    assert filled
    train(other.root, other, batches(3))
    assert torch.isfinite(flat(other.root)).all()


def test_a_history_of_another_length_is_refused():
    _, opt, _ = run("natural_galore", steps=2)
    before = copy.deepcopy(opt.state_dict())
    for history in (0, 3):
        other = attach(Tiny(), "natural_galore", **KEYS, history=history)
        with pytest.raises(ValueError, match="optimizer state"):
            other.load_state_dict(before)
    again = attach(Tiny(), "natural_galore", **KEYS, damping=3.0)
    again.load_state_dict(before)


def test_a_skipped_step_of_a_run_leaves_the_history():
    model, opt, _ = run("natural_galore_8bit", steps=5)
    kept = copy.deepcopy([u.state for u in opt.units])
    bases = [b.qs.clone() for b in opt.bases]
    weights = [local(u.param).clone() for u in opt.units]
    (summed_loss(model, batches(1)[0]) * float("nan")).backward()
    opt.step()
    for u, state, w in zip(opt.units, kept, weights, strict=True):
        assert torch.equal(local(u.param), w) and all(torch.equal(u.state[k], state[k]) for k in state)
    assert all(torch.equal(b.qs, q) for b, q in zip(opt.bases, bases, strict=True))
