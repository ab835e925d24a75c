"""Losses out of line: one shuffled batch at fifty times the learning rate is skipped, or undone."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train
from configs.schema import SPIKE_LAG
from llama import checkpoint, metrics
from llama.spike import CHECK_EVERY, IN_A_ROW, LEAST, Rewind, Skip
from tests.mutants import kills

pytestmark = pytest.mark.usefixtures("small_groups", "undrawn")

ROOT = Path(__file__).parent.parent
PLANTED = 83
LONG = ("steps=160", "micro_batch=4", "eval_every=1000", "save_every=5", "keep_last=99", "optim.lr=1e-2")

PLANT = """
import torch, train

def plant(at):
    '''The batch number `at` of the process is shuffled and its step taken at 50 times the lr.'''
    step_, set_lr, done = train.Run.step, train.Run.set_lr, [0]

    def step(self, step, batch, valid):
        done[0] += 1
        if done[0] == at:
            for seed, name in enumerate(("x", "y")):
                t = getattr(batch, name)
                mixed = torch.randperm(t.numel(), generator=torch.Generator().manual_seed(seed))
                setattr(batch, name, t.flatten()[mixed].view_as(t))
        step_(self, step, batch, valid)

    def higher(self, step):
        lr = set_lr(self, step) * (50 if done[0] == at else 1)
        for g in self.opt.param_groups:
            g["lr"] = lr
        return lr

    train.Run.step, train.Run.set_lr = step, higher
"""


@pytest.fixture(scope="module")
def plant():
    names: dict = {}
    exec(PLANT, names)
    return names["plant"]


@pytest.fixture(scope="module")
def ended(command, plant, tmp_path_factory):
    """ended(mode, planted): (run folder, last validation loss)."""
    known = {}

    def run(mode, planted=True):
        if (mode, planted) not in known:
            folder = tmp_path_factory.mktemp(mode)
            with pytest.MonkeyPatch.context() as patch:
                for name in ("step", "set_lr"):
                    patch.setattr(train.Run, name, getattr(train.Run, name))
                if planted:
                    plant(PLANTED)
                assert train.main(command(folder, *LONG, f"spike={mode}")) == 0
            rows = metrics.read(folder / "r" / "metrics.jsonl")
            known[mode, planted] = folder / "r", rows[-1]["val_loss"]
        return known[mode, planted]

    return run


def test_the_planted_spike_does_harm(ended):
    assert ended("off")[1] > 1.2 * ended("off", planted=False)[1]


@kills("train.py", "loss = loss * factor", "pass")
@kills("train.py", "if self.skip and n == len(xs):", "if False:")
@kills("llama/spike.py", "torch.where(fine, 1.0, math.nan)", "torch.where(fine, 1.0, 1.0)")
@kills("llama/spike.py", "high = ~loss.isfinite() | full & (loss > limit)", "high = ~loss.isfinite()")
@kills("llama/spike.py", "return torch.where(fine, 1.0", "return torch.where(~fine, 1.0")
def test_skip_leaves_the_batch_out(ended):
    folder, loss = ended("skip")
    assert loss == pytest.approx(ended("off", planted=False)[1], rel=0.02)
    rows = [r for r in metrics.read(folder / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in rows if r["skipped"]] == [PLANTED]
    assert rows[PLANTED - 1]["loss"] > rows[PLANTED - 2]["loss"] + 1  # what is told is the loss itself


@kills("train.py", "            self.book.judge = self.judge\n", "")
@kills("train.py", "if checkpoint.step_of(path) >= first:", "if False:")
@kills("train.py", 'self.book.back(saved["step"])', "pass")
@kills("llama/spike.py", "self.first = self.first if self.high else row", "self.first = row")
def test_rewind_goes_back_and_past_the_batch(ended):
    folder, loss = ended("rewind")
    assert loss == pytest.approx(ended("off", planted=False)[1], rel=0.02)
    rows = metrics.read(folder / "metrics.jsonl")
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, 161))
    back = [r for r in rows if "gone_back_from" in r]
    assert back == [{"step": 80, "gone_back_from": 96, "high_from": PLANTED}]
    assert max(r["loss"] for r in rows[80:] if "loss" in r) < 4


@kills("train.py", 'self.save(saved["step"])  # with', "pass  # with")
def test_a_run_killed_after_going_back_does_not_meet_the_batch_again(ended, command, tmp_path):
    """The save that it went back to knows the position behind the spike; from there the same bits."""
    folder, _ = ended("rewind")
    want = checkpoint.latest(folder)
    shutil.copytree(folder, tmp_path / "r")
    for path in checkpoint.complete(tmp_path / "r"):
        if checkpoint.step_of(path) > 80:
            shutil.rmtree(path)
    assert train.main(command(tmp_path, *LONG, "spike=rewind")) == 0
    again = checkpoint.latest(tmp_path / "r")
    for name in ("model.safetensors", "optim.safetensors"):
        assert (again / name).read_bytes() == (want / name).read_bytes()
    assert checkpoint.read_state(again)["stream"] == checkpoint.read_state(want)["stream"]


@kills("train.py", "if self.gone_back.count(to) == REWINDS:", "if self.gone_back.count(to) > REWINDS:")
def test_a_run_does_not_go_back_for_ever(command, tmp_path, monkeypatch, capfd):
    real = train.Run.step

    def step(self, step, batch, valid):
        if step > 50:
            batch.y = torch.randint_like(batch.y, 384)
        real(self, step, batch, valid)

    monkeypatch.setattr(train.Run, "step", step)
    assert train.main(command(tmp_path, *LONG, "spike=rewind", "save_every=40")) == 3
    said = capfd.readouterr().err
    assert said.count("back to the save of step 40") == 3 and "3 times already" in said


def test_without_a_save_from_before_it_stops_and_says_so(command, tmp_path, plant, monkeypatch, capfd):
    for name in ("step", "set_lr"):
        monkeypatch.setattr(train.Run, name, getattr(train.Run, name))
    plant(PLANTED)
    assert train.main(command(tmp_path, *LONG, "spike=rewind", "save_every=1000")) == 3
    said = capfd.readouterr().err
    assert "no save from before" in said and "lower optim.lr" in said and "Traceback" not in said


@kills("train.py", "self.skip.factor(self.comm.sum_(total.clone()))", "self.skip.factor(total.clone())")
@pytest.mark.parametrize("mode", ["skip", "rewind"])
def test_two_ranks_do_it_together(ended, command, tmp_path, mode):
    """Every rank takes the decision of the whole loss, and goes back with the first."""
    (tmp_path / "run.py").write_text(
        f"{PLANT}\nimport sys, tests.small\nplant({PLANTED})\nsys.exit(train.main(sys.argv[1:]))"
    )
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    args = command(tmp_path, *LONG, "micro_batch=2", f"spike={mode}")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    two = subprocess.run(
        [*start, str(tmp_path / "run.py"), *args], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert two.returncode == 0, two.stderr
    rows = metrics.read(tmp_path / "r" / "metrics.jsonl")
    assert rows[-1]["val_loss"] == pytest.approx(ended(mode)[1], rel=0.02)
    judged = checkpoint.read_state(checkpoint.latest(tmp_path / "r"))["spike"]["losses"]
    trained = {round(r["loss"], 4) for r in rows if r.get("loss") is not None}
    assert len(judged) >= LEAST and {round(x, 4) for x in judged} <= trained  # of both ranks together


@kills("llama/spike.py", "(~high | (self.high >= IN_A_ROW))", "~high")
def test_what_lasts_is_not_the_batch():
    """Damage that is done raises every loss: after three the next is trained on, or nothing would mend."""
    skip = Skip({"losses": [3.0 + 0.01 * (n % 5) for n in range(LEAST)]}, torch.device("cpu"))
    high = [math.isfinite(skip.factor(torch.tensor(6.0)).item()) for _ in range(6)]
    assert high == [False] * IN_A_ROW + [True] * 3
    assert not any(math.isfinite(skip.factor(torch.tensor(math.nan)).item()) for _ in range(9))


losses = st.lists(st.floats(1, 10, width=32) | st.just(math.nan) | st.just(math.inf), max_size=200)


@given(losses, losses)
def test_device_and_host_judge_alike(before, after):
    """And what they save is all that they know."""
    skip, host = Skip({}, torch.device("cpu")), Rewind({})
    for n, x in enumerate([*before, *after]):
        if n == len(before):
            skip, host = Skip(skip.state(), torch.device("cpu")), Rewind(host.state())
        skip.high.zero_()
        fine = math.isfinite(skip.factor(torch.tensor(x)).item())
        host.high = 0  # never three in a row: judging goes on
        host.note([{"step": n, "loss": x if math.isfinite(x) else None}])
        assert fine == (host.high == 0)
        assert skip.state()["losses"] == pytest.approx(host.state()["losses"])


@kills("llama/spike.py", "if len(x) < LEAST:", "if len(x) < 2:")
@kills("llama/spike.py", "self.high = 0\n                continue", "continue")
def test_three_in_a_row_after_enough_history():
    host = Rewind({})
    calm = [{"step": n, "loss": 3.0 + 0.01 * (n % 5)} for n in range(1, LEAST + 1)]
    host.note(calm[:5] + [{"step": 6, "loss": 9.0}])
    assert host.high == 0
    host = Rewind({})
    high = [{"step": 40 + n, "loss": 4.0} for n in range(IN_A_ROW)]
    host.note(calm + high[:-1] + [{"step": 50, "loss": 3.0}] + high[:-1])
    assert not host.found
    host.note(high[-1:])
    assert host.found and host.first == 40
    assert SPIKE_LAG >= CHECK_EVERY + IN_A_ROW


@kills("llama/spike.py", "and not stuck and", "and")
def test_gradients_that_stay_infinite_are_found_too():
    host = Rewind({})
    host.note([{"step": n, "loss": 3.0, "skipped_in_a_row": max(0, n - 10)} for n in range(1, 16)])
    assert host.found and host.first == 13
