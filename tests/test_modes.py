"""profile, optim.lr_range, save_minutes, out of memory: what a run does besides training."""

import gzip
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train
from configs.schema import Config
from llama import checkpoint, lr_range, metrics
from tests.mutants import kills

pytestmark = pytest.mark.usefixtures("small_groups", "undrawn")


def rows(run):
    return [r for r in metrics.read(run / "metrics.jsonl") if "loss" in r]


@kills("llama/trace.py", "if self._profile is None or step != self.last", "if self._profile is None")
@pytest.mark.parametrize("steps", [2, 6])
def test_profile_leaves_a_trace_of_three_steps(command, tmp_path, capfd, steps):
    assert train.main(command(tmp_path, "profile=true", f"steps={steps}")) == 0
    events = json.loads(gzip.open(tmp_path / "r" / "trace.json.gz").read())["traceEvents"]
    names = [e.get("name", "") for e in events]
    # four micro-batches a step, a cross-entropy in each
    forwards = names.count("aten::embedding")
    assert forwards == 4 * min(3, steps), forwards
    assert "aten::mm" in (tmp_path / "r" / "profile.txt").read_text()
    said = capfd.readouterr().err
    assert f"profile   steps {steps - min(3, steps) + 1} to {steps} in " in said and "trace.json.gz" in said


@kills("llama/lr_range.py", "SPAN ** (2 * (step - 1)", "SPAN ** (1 * (step - 1)")
@kills(
    "llama/lr_range.py",
    "return pairs[max(0, best - lag)][0] / 3 if",
    "return pairs[max(0, best - lag)][0] * 3 if",
)
@kills("llama/lr_range.py", "return means[-1] > min(means) + WORSE", "return False")
def test_lr_range_finds_a_rate_and_trains_nothing(command, tmp_path, capfd):
    args = command(tmp_path, "optim.lr_range=true", "optim.lr=0.1", "steps=200", "micro_batch=8")
    assert train.main(args) == 0
    folder = tmp_path / "r_lr_range"
    got = rows(folder)
    lrs = [r["lr"] for r in got]
    assert lrs[0] == pytest.approx(1e-3) and lrs == sorted(lrs) and len(lrs) < 200
    assert all(b / a == pytest.approx(lrs[1] / lrs[0], rel=1e-6) for a, b in zip(lrs, lrs[1:], strict=False))
    assert (folder / "lr_range.png").stat().st_size > 5000
    assert not checkpoint.complete(folder) and not (tmp_path / "r").exists()
    said = capfd.readouterr().err
    found = float(said.rpartition("try optim.lr=")[2].split(";")[0])
    losses = [r["loss"] for r in got if r["loss"] is not None]
    best = lrs[losses.index(min(losses))]
    assert best / 30 < found < best
    assert train.main(args) == 0, "again in the same folder"


@given(st.lists(st.none() | st.floats(0.1, 20), max_size=60))
def test_lr_range_takes_any_curve(curve):
    lrs = [lr_range.lr_at(n + 1, max(1, len(curve)), 0.01) for n in range(len(curve))]
    chosen = lr_range.suggest(lrs, curve)
    assert chosen is None or lrs[0] / 3.001 < chosen < lrs[-1] / 2.999
    assert isinstance(lr_range.ended(curve), bool)


def test_lr_range_that_never_falls_says_so():
    assert lr_range.suggest([1e-3, 1e-2, 1e-1], [3.0, 4.0, None]) is None
    assert lr_range.ended([3.0, None]) and lr_range.ended([3.0] * 5 + [math.nan])


@kills("train.py", "60 * self.cfg.save_minutes", "6000 * self.cfg.save_minutes")
def test_save_minutes(command, tmp_path, monkeypatch):
    """One save a minute by a clock on which a step takes 25 s; save_every goes on beside it."""
    clock, real, asked = [0.0], train.Run.step, []

    def step(self, step, batch, valid):
        real(self, step, batch, valid)
        self.saver.poll(wait=True)
        clock[0] += 25

    save = train.Run.save
    monkeypatch.setattr(train.Run, "save", lambda self, n, last=False: asked.append(n) or save(self, n, last))
    monkeypatch.setattr(train.Run, "step", step)
    monkeypatch.setattr(train.time, "monotonic", lambda: clock[0])
    assert train.main(command(tmp_path, "steps=9", "save_minutes=1", "save_every=4")) == 0
    assert asked == [3, 4, 7, 8, 9]
    asked.clear()
    assert train.main(command(tmp_path, "steps=12", "save_minutes=0", "save_every=100")) == 0
    assert asked == [12]


@kills("train.py", "        out_of_memory(e, cfg, comm)\n", "")
def test_out_of_memory_ends_with_4_and_the_nearest_smaller_setting(command, tmp_path, monkeypatch, capfd):
    def step(self, step, batch, valid):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(train.Run, "step", step)
    assert train.main(command(tmp_path, "micro_batch=4")) == 4
    said = capfd.readouterr().err.splitlines()
    assert said[-2:] == [
        "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "try micro_batch=2: the same step in more passes",
    ]


@kills("configs/schema.py", "range(self.micro_batch - 1, 0, -1)", "range(self.micro_batch, 0, -1)")
@kills("configs/schema.py", "math.floor(4 * share + 1) / 4", "math.floor(4 * share) / 4")
def test_the_nearest_smaller_setting():
    cfg = Config(micro_batch=12, tokens_per_step=256 * 36)
    assert "micro_batch=9:" in cfg.smaller(1) and "micro_batch=6:" in cfg.smaller(3)
    cfg = Config(micro_batch=1)
    for share, said in ((0.0, "=0.25"), (0.3, "=0.5"), (0.85, "=1:"), (1.0, "galore_8bit")):
        cfg.activations.checkpoint = share
        assert said in cfg.smaller(1)


def test_deterministic_is_switched_on(command, tmp_path):
    try:
        assert train.main(command(tmp_path, "steps=1", "deterministic=true")) == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
