"""The training loop as users run it: whole runs, stops and resumes, ranks, damaged gradients, exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from configs.cli import parse
from llama import checkpoint, metrics
from optim import Comm
from tests.mutants import kills

pytestmark = pytest.mark.usefixtures("small_groups")

ROOT = Path(__file__).parent.parent
TIMED = ("tokens_per_s", "peak_mem_gib")  # what differs between two equal runs


def rows(run):
    return [{k: v for k, v in r.items() if k not in TIMED} for r in metrics.read(run / "metrics.jsonl")]


def result(run):
    """Everything a run ends with, to the bit."""
    path = checkpoint.latest(run)
    state = checkpoint.read_state(path)
    files = {n: load_file(path / n) for n in ("model.safetensors", "optim.safetensors")}
    tensors = {f"{n}/{k}": t.numpy().tobytes() for n, f in files.items() for k, t in f.items()}
    return {
        "step": state["step"],
        "data": state["data"],
        "stream": state["stream"],
        "tokens": state["tokens"],
    } | tensors


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    assert train.main(command(folder)) == 0
    return folder / "r"


def stop_after(monkeypatch, steps):
    """A SIGTERM that arrives while step number `steps` of this process runs."""
    real, seen = train.Run.step, []

    def step(self, *args):
        real(self, *args)
        seen.append(1)
        if len(seen) == steps:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train.Run, "step", step)


def test_a_run_is_built_without_a_command(whole, command, tmp_path):
    """As bench.py and compare.py do: no run folder was prepared."""
    cfg = parse(command(tmp_path, f"data.tokenizer={whole}/tokenizer.model")).resolved()
    run = train.Run(cfg, Comm(), tmp_path, None)
    batch = next(run.loader)
    run.step(1, batch, batch.valid)
    run.close()
    assert [r["step"] for r in rows(tmp_path)] == [1]


def test_a_run_leaves_what_it_promises(whole):
    names = {"config.yaml", "metrics.jsonl", "loss.png", "samples.txt", "tokenizer.model", "checkpoints"}
    assert names <= {p.name for p in whole.iterdir()}
    got = rows(whole)
    assert [r["step"] for r in got if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in got if "val_loss" in r] == [0, 3, 6]
    assert [r["tokens"] for r in got if "loss" in r] == [256 * s for s in range(1, 7)]
    assert got[-1]["val_loss"] < got[0]["val_loss"] - 0.05
    path = checkpoint.latest(whole)
    assert path.name == "step_00000006"
    assert json.loads((path / "config.json").read_text())["hidden_size"] == 32
    assert "=== step 6" in (whole / "samples.txt").read_text()


@pytest.mark.parametrize(("stop", "workers"), [(1, 0), (2, 0), (3, 0), (4, 0), (5, 0), (2, 2)])
def test_stopped_anywhere_and_resumed_equals_uninterrupted(
    whole, command, tmp_path, monkeypatch, stop, workers
):
    args = command(tmp_path, f"data.workers={workers}")
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        assert train.main(args) == 0
    assert checkpoint.latest(tmp_path / "r").name == f"step_{stop:08d}"
    assert train.main(args) == 0
    assert result(tmp_path / "r") == result(whole)
    assert rows(tmp_path / "r") == rows(whole)


def test_stopped_after_every_step(whole, command, tmp_path, monkeypatch):
    """Resuming many times is no different from resuming once; old saves are pruned."""
    for _ in range(6):
        with monkeypatch.context() as patch:
            stop_after(patch, 1)
            assert train.main(command(tmp_path)) == 0
    assert result(tmp_path / "r") == result(whole)
    assert rows(tmp_path / "r") == rows(whole)
    assert len(checkpoint.complete(tmp_path / "r")) == 2


def test_a_finished_run_says_so(whole, command, capfd):
    before = (whole / "metrics.jsonl").read_bytes()
    assert train.main(command(whole.parent)) == 0
    assert "is finished" in capfd.readouterr().err
    assert (whole / "metrics.jsonl").read_bytes() == before


def torchrun(n, args, program=("-m", "tests.small")):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(n),
        "--standalone",
        *program,
    ]
    return subprocess.run(
        [*command, *args],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_one_rank_then_two_then_one(whole, command, tmp_path):
    """The same tokens in the same order as one process that never stopped."""
    assert train.main(command(tmp_path, "steps=2")) == 0
    two = torchrun(2, command(tmp_path, "steps=4"))
    assert two.returncode == 0, two.stderr
    assert "2 x CPU" in two.stderr and "going on from step 2" in two.stderr
    assert checkpoint.latest(tmp_path / "r").name == "step_00000004"
    assert train.main(command(tmp_path)) == 0
    ours, want = result(tmp_path / "r"), result(whole)
    for key in ("stream", "data", "tokens"):
        assert ours[key] == want[key]
    assert [r["step"] for r in rows(tmp_path / "r") if "loss" in r] == [1, 2, 3, 4, 5, 6]


@kills("train.py", "files = comm.first(lambda: data.listing(cfg.data, before))", "files = None")
@kills("train.py", "data.listing(cfg.data, before)", "data.listing(cfg.data)")
def test_two_ranks_ask_the_hub_once_and_go_on_without_it(stand_in, c4_model, command, tmp_path):
    args = [
        a
        for a in command(
            tmp_path,
            "data=c4",
            f"data.tokenizer={c4_model}",
            "data.packing=paper",
            "steps=4",
            "eval_every=100",
        )
        if not a.startswith(("data.train", "data.validation", "data.cache"))
    ]
    args.append(f"data.cache={tmp_path}/cache")
    two = torchrun(2, args)
    assert two.returncode == 0, two.stderr
    asked = [path.partition("?")[0].rpartition("/")[2] for path, _ in stand_in.requests]
    assert asked.count("main") == 1 and asked.count("en") == 3  # pages of one list
    assert set(stand_in.downloads().values()) == {1}
    stand_in.down, stand_in.revision = True, "ab" * 20
    before = len(stand_in.requests)
    assert train.main([a for a in args if not a.startswith("steps=")] + ["steps=6"]) == 0
    assert checkpoint.latest(tmp_path / "r").name == "step_00000006"
    assert len(stand_in.requests) == before  # its own list and its shards are kept


def test_two_ranks_equal_one(whole, command, tmp_path):
    """Evaluation to 1e-6, losses and gradient norms to fp32 rounding; rank 0 alone writes."""
    two = torchrun(2, command(tmp_path))
    assert two.returncode == 0, two.stderr
    assert result(tmp_path / "r")["stream"] == result(whole)["stream"]
    for a, b in zip(rows(tmp_path / "r"), rows(whole), strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        for key in ("loss", "grad_norm", "val_loss", "val_bpb"):
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=1e-6 if a["step"] == 0 else 1e-5), (a, b)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_real_signal_saves_and_exits_0(command, tmp_path, name):
    args = command(tmp_path, "steps=100000", "eval_every=100000", "save_every=100000")
    process = subprocess.Popen(
        [sys.executable, "train.py", *args], cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    deadline = time.monotonic() + 120
    while len(metrics.read(tmp_path / "r/metrics.jsonl")) < 5 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert name in err and "goes on from there" in err
    path = checkpoint.latest(tmp_path / "r")
    assert path is not None and checkpoint.read_state(path)["step"] == rows(tmp_path / "r")[-1]["step"]


def test_non_finite_gradients_never_reach_the_weights_and_end_the_run(command, tmp_path, monkeypatch, capfd):
    real = train.Run.step

    def poisoned(self, step, batch, valid):
        if step >= 3:
            for p in self.model.parameters():
                p.register_hook(lambda g: g * float("inf"))
        real(self, step, batch, valid)

    monkeypatch.setattr(train.Run, "step", poisoned)
    monkeypatch.setattr(metrics.Metrics, "due", lambda self: True)
    assert train.main(command(tmp_path, "steps=40", "save_every=2", "eval_every=40")) == 3
    message = capfd.readouterr().err
    assert "non-finite" in message and "stopped" in message
    path = checkpoint.latest(tmp_path / "r")
    weights = load_file(path / "model.safetensors")
    assert all(torch.isfinite(w).all() for w in weights.values())
    after = checkpoint.complete(tmp_path / "r")
    assert result(tmp_path / "r")["step"] >= 10 and len(after) == 2


def test_unreachable_ranks_and_bad_splits_are_one_line(command, tmp_path, capfd, monkeypatch):
    assert train.main(command(tmp_path, "tokens_per_step=250")) == 2
    assert "tokens_per_step=250" in capfd.readouterr().err
    assert not (tmp_path / "r").exists()


def test_vocabulary_larger_than_the_model_is_refused(whole, command, tmp_path, capfd):
    args = command(tmp_path, f"data.tokenizer={whole}/tokenizer.model", "model.vocab_size=300")
    assert train.main(args) == 2
    message = capfd.readouterr().err
    assert "data.tokenizer" in message and "300" in message and "384" in message


def test_init_from_takes_weights_and_shapes(whole, command, tmp_path):
    source = checkpoint.latest(whole)
    args = [a for a in command(tmp_path, "steps=1", "optim.lr=1e-12") if not a.startswith("model")]
    args += [f"model.init_from={source}", f"data.tokenizer={whole}/tokenizer.model"]
    assert train.main(args) == 0
    assert rows(tmp_path / "r")[0]["val_loss"] == pytest.approx(rows(whole)[-1]["val_loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["optim=galore", "optim.rank=4000"], "optim.rank=4000: no matrix is wider"),
        (["optim=galore_sgd", "optim.transport=reset"], "optim.transport=reset: galore_sgd keeps no moments"),
    ],
)
def test_what_only_the_model_shows_is_a_bad_configuration(whole, command, capsys, changes, says):
    args = command(whole.parent, "run.name=refused", f"data.tokenizer={whole}/tokenizer.model", *changes)
    assert train.main(args) == 2
    assert says in capsys.readouterr().err


@kills("train.py", "        time.sleep(LEAVE_S)", "        pass")
def test_another_rank_lets_the_first_say_why(command, tmp_path, monkeypatch, capsys):
    slept = []
    monkeypatch.setattr(train.time, "sleep", slept.append)
    for rank in (0, 1):
        for key, value in (("RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(key, str(value))
        assert train.main(command(tmp_path, "steps=-3")) == 2
        assert ("steps=-3" in capsys.readouterr().err) == (rank == 0)
    assert slept == [train.LEAVE_S]


def test_two_ranks_report_a_bad_setting_once(whole, command):
    for change, says in (("tokens_per_step=192", "2 ranks"), ("model.vocab_size=300", "384")):
        args = command(whole.parent, change, "run.name=other", f"data.tokenizer={whole}/tokenizer.model")
        two = torchrun(2, args, ["train.py"])
        lines = [line for line in two.stderr.splitlines() if change.split("=")[0] in line]
        assert two.returncode != 0 and len(lines) == 1 and says in lines[0], two.stderr
        assert 'train.py", line' not in two.stderr  # torchrun shows a traceback of its own, we none
