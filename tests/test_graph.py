"""Steps that are captured and replayed, on a CPU: a stand-in records operations and runs them again.

What it shows is that everything a step needs of the host happens outside the captured part; that CUDA can
capture it, test_graph_gpu.py shows.
"""

from contextlib import contextmanager, nullcontext
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import optim.graph
from optim import Steps, attach, kernels
from optim.methods import METHODS
from optim.unit import Basis
from tests.mutants import kills
from tests.tiny import Tiny, batches, everything, flat, keys, summed_loss

STEPS = 14
METHODS_CAPTURED = [m for m in METHODS if "adapter" not in m]


class Recorder(TorchDispatchMode):
    """In the place of torch.cuda.CUDAGraph. Recording computes, so the replay right after it does nothing."""

    recording = False

    def __init__(self):
        super().__init__()
        self.calls, self.fresh = [], True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        if self.fresh:
            self.fresh = False
            return
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new.view(old.shape))  # some are squeezed in place later


@contextmanager
def record(graph, *args, **kwargs):
    Recorder.recording = True
    try:
        with graph:
            yield
    finally:
        Recorder.recording = False


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    cuda = optim.graph.torch.cuda
    monkeypatch.setattr(cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(cuda, "graph", record)
    monkeypatch.setattr(cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(cuda, "current_stream", lambda: None)
    monkeypatch.setattr(Steps, "memory", lambda self: nullcontext())
    monkeypatch.setattr(kernels, "capturing", lambda device: Recorder.recording)


class Training:
    """Two micro-batches a step, a rate that changes from step to step."""

    def __init__(self, method, wanted, dtype=torch.float64, **settings):
        self.model = Tiny(dtype=dtype)
        self.opt = attach(self.model, method, accum_steps=2, **{**keys(method), **settings})
        self.runner = Steps(self.opt, wanted, 4)
        self.tokens, self.seen = torch.zeros(12, 6, dtype=torch.int64), []

    def work(self):
        total = torch.zeros((), dtype=torch.float64)
        for part in self.tokens.chunk(2):
            loss = summed_loss(self.model, part) / 60
            total += loss.detach()
            loss.backward()
        return total

    def train(self, steps=STEPS, seed=1):
        for n, tokens in enumerate(batches(steps, seed)):
            self.tokens.copy_(tokens)
            for g in self.opt.param_groups:
                g["lr"] = 1e-2 / (1 + n)
            self.seen.append(self.runner.run(self.work))


def compare(a, b):
    (tensors, values), (want, wanted) = (everything(t.model, t.opt, t.seen) for t in (a, b))
    assert values == wanted
    for name, t in want.items():
        assert torch.equal(tensors[name], t), name


@kills("optim/graph.py", "                opt.held = graph.held\n", "                pass\n")
@kills("optim/graph.py", "        opt.load_rates()\n", "")
@kills(
    "optim/graph.py",
    "{k: v.clone() for k, v in graph.written.items()",
    "{k: v for k, v in graph.written.items()",
)
@kills("optim/graph.py", 'loss = graph.written["loss"].clone()', 'loss = graph.written["loss"]')
@kills("optim/graph.py", "opt.held = self._left(opt.held)", "opt.held = {}")
@kills("optim/landing.py", "if not kernels.capturing(self.scalars.table.device):", "if True:")
@pytest.mark.parametrize("method", METHODS_CAPTURED)
def test_a_replayed_step_is_the_step(method, monkeypatch):
    """Weights, state and statistics to the bit, over five rounds of bases."""
    monkeypatch.setattr("optim.magnitude.READ", 5)
    full = {"energy": 0.9} if method.startswith("adarankgrad") else {}  # ranks that change: below
    sides = [Training(method, wanted, **full) for wanted in (True, False)]
    for t in sides:
        t.train()
    assert set(sides[0].runner.graphs) == ({-1, 0, 1} if sides[0].opt.bases else {-1})
    assert not sides[1].runner.graphs
    compare(*sides)


@kills("optim/graph.py", "old.copy_(b.used)", "pass")
@kills("optim/graph.py", "            search.graph.replay()\n", "            pass\n")
@kills("optim/graph.py", "if key not in self.searches:", "if True:")
@kills("optim/graph.py", "fresh = kind not in self.rests", "fresh = True")
@kills("optim/graph.py", "b.draw_(refresher.seed, b.count + 1)", "b.draw_(refresher.seed, b.count)")
@kills("optim/graph.py", "        rest.graph.replay()\n", "")
@kills("optim/graph.py", "opt.concluded(stats, rest.overlaps)", "opt.concluded(stats, [])")
@kills("optim/graph.py", "subspace.judged(m)[1]", "subspace.judged(m)[0]")
@kills("optim/engine.py", "            self.refresher.noted(b, b.asked)\n", "            pass\n")
@kills("optim/engine.py", "        self.refresher.found.clear()\n", "")
@kills("optim/refresh.py", "self.found.get(b.index) or", "")
@kills(
    "optim/refresh.py",
    "if not kernels.capturing(q.device):\n                b.draw",
    "if True:\n                b.draw",
)
@pytest.mark.parametrize("fails", [False, True])
def test_bases_are_found_and_taken_in_graphs(fails, monkeypatch):
    """One search for both blocks, which are alike; one that fails is followed by another."""
    looks, graphs, attempt = [], [], optim.refresh.subspace.attempt

    def look(gs, start, finder, *args):
        made = attempt(gs, start, finder, *args)
        looks.append((finder, Recorder.recording))
        return made._replace(told=made.told + 1) if fails and finder == "warm" else made

    def draw_(self, *args):
        assert not Recorder.recording, "a generator's numbers would be the same in every replay"
        draw(self, *args)

    draw = Basis.draw_
    monkeypatch.setattr(Basis, "draw_", draw_)
    monkeypatch.setattr(optim.refresh.subspace, "attempt", look)
    monkeypatch.setattr(
        optim.graph.torch.cuda, "CUDAGraph", lambda: (graphs.append(Recorder()), graphs[-1])[1]
    )
    sides = [Training("galore_8bit", wanted) for wanted in (True, False)]
    sides[0].train(STEPS - 3)
    runner, bases = sides[0].runner, len(sides[0].opt.bases)
    assert len(runner.searches) == 1 and set(runner.rests) == (set() if fails else {0, 1})
    assert len(graphs) == 3 + 1 + len(runner.rests)
    seen = list(looks)
    runner.wanted = False  # the last steps look for themselves
    sides[0].train(3, 2)
    sides[1].train(STEPS - 3)
    sides[1].train(3, 2)
    assert seen.count(("warm", True)) == bases // 2, "once, of one block's bases"
    if not fails:
        assert seen.count(("warm", False)) == bases, "for the first ones"
    compare(*sides)


@kills("optim/refresh.py", "not any(b.fresh for b in bases)", "True")
def test_a_basis_that_comes_after_a_random_one_is_found_without():
    sides = [Training("galore_8bit", wanted) for wanted in (True, False)]
    for t in sides:
        t.train(9)
        for b in t.opt.bases:
            b.fresh = True  # as where the first round's gradients were zero
        t.train(5, 2)
    compare(*sides)


@kills("optim/refresh.py", 'and self._policy(bases[0], False) == "keep"', "")
@kills("optim/refresh.py", 'if self.finder != "warm" or self.ranks', 'if self.finder == "svd" or self.ranks')
@kills("optim/graph.py", "                self.searched = False\n", "")
@pytest.mark.parametrize(
    "settings", [{"transport": "rotate"}, {"finder": "randomized", "transport": "keep"}, {}]
)
def test_bases_that_a_graph_cannot_find_are_found_without(settings, monkeypatch, caplog):
    tries, attempt = [], optim.refresh.subspace.attempt

    def look(*args):
        if Recorder.recording:
            tries.append(args)
            raise RuntimeError("operation not permitted when stream is capturing")
        return attempt(*args)

    monkeypatch.setattr(optim.refresh.subspace, "attempt", look)
    sides = [Training("galore_8bit", wanted, **settings) for wanted in (True, False)]
    for t in sides:
        t.train()
    assert set(sides[0].runner.graphs) == {-1, 0, 1}
    assert len(tries) == (0 if settings else 1)
    assert caplog.text.count("bases are found without a CUDA graph: operation not permitted") == len(tries)
    compare(*sides)


OF_BOTH = [
    {"clip": 0.5},
    {"clip": 0.5, "clip_mode": "per_layer"},
    {"clip": 0.5, "update": "after"},
    {"side": "output"},
    {"lift": "deferred"},
    {"growth_limit": 1.01},
    {"dtype": torch.bfloat16},
]


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        *product(("galore_8bit", "gradnormlorp"), OF_BOTH),
        ("galore_8bit", {"side": "both", "decay": 0.1}),
    ],
)
def test_settings_are_replayed_alike(method, settings):
    sides = [Training(method, wanted, **settings) for wanted in (True, False)]
    for t in sides:
        t.train()
    assert -1 in sides[0].runner.graphs
    compare(*sides)


@kills("optim/engine.py", "self.version += bool(bases)", "pass")
@pytest.mark.parametrize("method", ["adarankgrad", "adarankgrad_8bit"])
def test_graphs_hold_bases_with_columns_to_spare(method):
    """A rank falls while steps are replayed, and later its room: the graphs before it end then."""
    sides = [Training(method, wanted, refresh_every=12) for wanted in (True, False)]
    spare, versions = 0, set()
    for seed in range(4):
        for t in sides:
            t.train(10, seed=seed)
        opt, graphs = sides[0].opt, sides[0].runner.graphs
        spare += bool(graphs) and any(b.rank < b.r for b in opt.bases)
        versions |= {opt.version} if graphs else set()
    assert spare and len(versions) > 1
    compare(*sides)


@kills("optim/graph.py", "if self.version != opt.version:", "if False:")
@kills("optim/graph.py", "self.drop()\n            self.wait = EAGER", "self.drop()")
@kills("optim/engine.py", "self.version += 1", "pass")
def test_graphs_end_where_tensors_are_replaced(monkeypatch):
    monkeypatch.setattr(optim.graph, "EAGER", 6)
    sides = [Training("galore_8bit", wanted) for wanted in (True, False)]
    for t in sides:
        t.train(12)
    first = sides[0].runner.graphs[-1]
    for t in sides:
        t.model.to(torch.float32).to(torch.float64)  # new storage for everything
        t.train(6, seed=2)
    assert not sides[0].runner.graphs
    for t in sides:
        t.train(6, seed=3)
    assert sides[0].runner.graphs[-1] is not first
    compare(*sides)


@kills("optim/graph.py", "self.wait = EAGER  #", "self.wait = 0  #")
def test_a_process_that_goes_on_runs_two_steps_before_it_captures():
    one, two = Training("galore", True), Training("galore", True)
    one.train(11)  # no basis is replaced in the next
    two.model.load_state_dict(one.model.state_dict())
    two.opt.load_state_dict(one.opt.state_dict())
    two.train(2)
    assert not two.runner.graphs
    two.train(2, seed=2)
    assert two.runner.graphs


def test_few_graphs_for_many_blocks(monkeypatch):
    """Beyond the most passes the steps of refreshes run outside, and beyond it without them all do."""
    for most, kinds in ((24, {-1, 0, 1}), (23, {-1}), (3, set())):
        monkeypatch.setattr(optim.graph, "most_passes", lambda device, most=most: most)
        t = Training("galore", True)
        t.train(9)
        assert set(t.runner.graphs) == kinds


@kills("optim/graph.py", "(self.refreshes and again)", "self.refreshes")
@kills(
    "optim/graph.py", "self.version, self.seen = self.opt.version, set()", "self.version = self.opt.version"
)
def test_a_step_with_a_refresh_is_captured_when_it_comes_again():
    t = Training("galore_8bit", True, refresh_every=6)
    t.train(6)
    assert t.opt.first_round == (8, 8) and set(t.runner.graphs) == {-1}
    t.train(6)
    assert set(t.runner.graphs) == {-1, 0, 1}
    t.opt.version += 1  # as where tensors were replaced
    t.train(6)
    assert set(t.runner.graphs) == {-1}


@kills("optim/graph.py", "PASSES * share * torch", "PASSES * torch")
def test_how_many_a_card_holds(monkeypatch):
    """By the memory that the process may use: at 7B the refreshes, 33 graphs of 32 blocks, not in 24 GB."""
    share = [1.0]
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: share[0])
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=150 * 10**9)
    )
    assert optim.graph.most_passes(torch.device("cuda")) > 33 * 36
    share[0] = 24 / 150
    assert optim.graph.most_passes(torch.device("cuda")) == pytest.approx(720)
    assert optim.graph.most_passes(torch.device("cpu")) == 720


@kills("optim/graph.py", "            opt.zero_grad()\n            self.drop()", "            self.drop()")
def test_a_step_that_cannot_be_captured_runs_outside_and_says_so(monkeypatch, caplog):
    sides = [Training("galore", wanted) for wanted in (True, False)]

    @contextmanager
    def fails(graph, *args, **kwargs):
        kept = [p.detach().clone() for p in sides[0].model.parameters()]
        state = [t.clone() for t in tree_leaves(sides[0].opt.state_dict()["state"])]
        try:
            yield
        finally:  # a capture computes nothing
            for p, old in zip(sides[0].model.parameters(), kept, strict=True):
                p.data.copy_(old)
            for t, old in zip(tree_leaves(sides[0].opt.state_dict()["state"]), state, strict=True):
                t.copy_(old)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(optim.graph.torch.cuda, "graph", fails)
    for t in sides:
        t.train()
    assert caplog.text.count("steps run without a CUDA graph") == 1 and not sides[0].runner.graphs
    assert torch.equal(flat(sides[0].model), flat(sides[1].model))
