"""A step as one CUDA graph = the same step by separate launches, to the bit, refreshes and all."""

from contextlib import contextmanager

import pytest
import torch
import torch._dynamo

import optim.graph
from llama import spike
from llama.config import ModelConfig
from llama.model import build_model, compile_blocks
from optim import Steps, attach, use_own_stream
from optim.methods import METHODS
from tests.tiny import everything

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CFG = ModelConfig(
    vocab_size=512, hidden_size=128, intermediate_size=320, num_hidden_layers=3, num_attention_heads=4
)
STEPS, K, ROWS, LENGTH = 26, 2, 8, 64


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Training:
    """What train.Run does with a step, on random tokens; the rate changes from step to step."""

    def __init__(self, method, wanted, compiled=False, **settings):
        torch._dynamo.reset()
        use_own_stream()
        self.model = build_model(CFG, "cuda", torch.bfloat16, 0)
        self.model.checkpoint_blocks(0.34)
        if hasattr(METHODS[method].config, "rank"):
            settings = {"rank": 32, "refresh_every": 6, **settings}
        torch.manual_seed(0)
        self.opt = attach(self.model, method, lr=1e-2, accum_steps=K, **settings)
        self.opt.warmup_steps = 3
        if compiled:
            compile_blocks(self.model)
        self.runner = Steps(self.opt, wanted)
        self.skip = spike.Skip({}, torch.device("cuda"))
        self.tokens = torch.zeros(ROWS, LENGTH + 1, dtype=torch.int64, device="cuda")
        self.random = torch.Generator("cuda").manual_seed(0)
        self.seen = []

    def work(self):
        total = torch.zeros((), device="cuda")
        for part in self.tokens.chunk(K):
            loss = self.model(part[:, :-1], part[:, 1:]) / (ROWS * LENGTH)
            total += loss.detach()
            loss.backward()
        self.skip.factor(total)
        return total

    def train(self, steps):
        for n in range(steps):
            self.tokens.copy_(torch.randint(512, self.tokens.shape, generator=self.random, device="cuda"))
            for g in self.opt.param_groups:
                g["lr"] = 1e-2 / (1 + n)
            self.seen.append(self.runner.run(self.work))

    def everything(self):
        tensors, values = everything(self.model, self.opt, self.seen)
        return tensors | {"ring": self.skip.ring}, values


@pytest.mark.parametrize("method", METHODS)
def test_a_captured_step_is_the_step(method):
    # adarankgrad's blocks have no turns of their own, unless with these
    settings = dict.fromkeys(("adapt_rank", "adapt_refresh"), False) if "adarank" in method else {}
    with deterministic():
        sides = [Training(method, wanted, **settings) for wanted in (True, False)]
        for t in sides:
            t.train(STEPS)
    captured = {-1, 0, 1, 2} if sides[0].opt.bases and not sides[0].opt.adapters else {-1}
    assert set(sides[0].runner.graphs) == captured and not sides[1].runner.graphs
    (tensors, values), (want, wanted) = (t.everything() for t in sides)
    assert values == wanted
    for name, t in want.items():
        assert torch.equal(tensors[name].nan_to_num(), t.nan_to_num()), name


@pytest.mark.parametrize(
    "settings",
    [
        {"compiled": True},
        {"clip": 0.5},
        {"clip": 0.5, "clip_mode": "per_layer"},
        {"update": "after", "clip": 0.5},
        {"side": "output"},
        {"lift": "deferred", "decay": 0.1},
        {"lift": "deferred", "compiled": True},
        {"lift": "deferred", "method": "gradnormlorp_8bit"},
    ],
)
def test_settings_are_captured_alike(settings):
    with deterministic():
        sides = [Training(**{"method": "galore_8bit", **settings}, wanted=wanted) for wanted in (True, False)]
        for t in sides:
            t.train(STEPS)
    assert -1 in sides[0].runner.graphs
    (tensors, _), (want, _) = (t.everything() for t in sides)
    for name, t in want.items():
        assert torch.equal(tensors[name].nan_to_num(), t.nan_to_num()), name


def test_a_rank_that_changes_ends_graphs_and_others_follow(monkeypatch):
    captured, capture = [], Steps._capture
    monkeypatch.setattr(
        Steps, "_capture", lambda self, *a: (captured.append(self.version), capture(self, *a))[1]
    )
    with deterministic():
        sides = [Training("adarankgrad_8bit", wanted) for wanted in (True, False)]
        for t in sides:
            t.train(2 * STEPS)
    assert len(set(captured)) >= 2, "captured anew where tensors were replaced"
    assert len({b.r for b in sides[0].opt.bases}) > 1
    (tensors, values), (want, wanted) = (t.everything() for t in sides)
    assert values == wanted
    for name, t in want.items():
        assert torch.equal(tensors[name].nan_to_num(), t.nan_to_num()), name


def test_steps_outside_borrow_the_graphs_memory_and_leave_nothing_in_it():
    t = Training("gradnormlorp_8bit", True)
    t.runner.refreshes = False
    t.train(6)
    first = t.runner.graphs[-1]
    t.train(8)
    held = torch.cuda.memory_reserved()
    t.train(60)
    assert torch.cuda.memory_reserved() <= held + 2**22
    assert t.runner.graphs[-1] is first and set(t.runner.graphs) == {-1}


def test_a_restored_state_needs_no_new_graph_and_a_moved_model_does():
    with deterministic():
        a, b = Training("galore_8bit", True), Training("galore_8bit", True)
        a.train(9)
        b.train(9)
        state = {n: {k: v.clone() for k, v in s.items()} for n, s in a.opt.state_dict()["state"].items()}
        weights = {k: v.clone() for k, v in a.model.state_dict().items()}
        kept = a.runner.graphs[-1]
        random = a.random.get_state()
        a.train(5)
        a.model.load_state_dict(weights)
        a.opt.load_state_dict({"state": state})
        a.random.set_state(random)
        a.train(12)
        b.train(12)
        assert a.runner.graphs[-1] is kept
        for (name, x), y in zip(a.model.state_dict().items(), b.model.state_dict().values(), strict=True):
            assert torch.equal(x, y), name
        a.opt.version += 1
        a.train(optim.graph.EAGER + 4)
        b.train(optim.graph.EAGER + 4)
        assert a.runner.graphs[-1] is not kept
        for (name, x), y in zip(a.model.state_dict().items(), b.model.state_dict().values(), strict=True):
            assert torch.equal(x, y), name


def test_what_cannot_be_captured_is_said_and_trains_on(caplog):
    t, plain = Training("galore", True), Training("galore", False)
    work = t.work

    def reads_back():
        loss = work()
        float(loss)
        return loss

    t.work = reads_back
    t.train(8)
    plain.train(8)
    assert "without a CUDA graph" in caplog.text and not t.runner.graphs
    torch.cuda.synchronize()
    assert all(torch.isfinite(s["loss"]) for s in t.seen)
    assert abs(float(t.seen[-1]["loss"]) - float(plain.seen[-1]["loss"])) < 0.05
