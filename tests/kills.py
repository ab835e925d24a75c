"""Kills a run again and again at random instants, and compares what it becomes with one left alone.

    python tests/kills.py [kills=100] [method=adamw,galore_8bit] [seed=0] [KEY=VALUE ...]

Each method's run goes on until the kills are used up and it ends: every process trains until a SIGKILL at a
random instant after its first step, a third of them while a save is being written (the write is held open
between the last byte and the rename). Then the metrics from each resume on, the weights, the optimizer's
state and the hash of all tokens must equal those of a run that was left alone. Prints a table; exit code 1
if anything differs. KEY=VALUE are settings of train.py, for another model, data or device:

    python tests/kills.py kills=10 method=galore_8bit model=llama_60m deterministic=true compile=off \\
        data=tokens data.train=FOLDER tokens_per_step=8192 micro_batch=16 seq_len=256

Every process is a fork of this one, so that a kill costs half a second and not the import of torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

METHODS = ("adamw", "galore_8bit", "gradnormlorp_8bit")
STEPS, SAVE_EVERY = 60, 4
TIMED = ("tokens_per_s", "peak_mem_gib", "refresh_s", "refresh_share")  # differ between equal runs


@dataclass
class Outcome:
    method: str
    kills: int
    in_saves: int
    resumes: int  # of processes that went on from a save
    same: bool


def arguments(folder: Path, corpus: Path, method: str, extra: dict[str, str]) -> list[str]:
    """Two micro-batches a step; the 8-bit methods replace a basis every few steps."""
    shape = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=384
    )
    given = {
        "model": "llama_tiny",
        **{f"model.{k}": v for k, v in shape.items()},
        "data": "local",
        "data.train": f"{corpus}/train.jsonl",
        "data.validation": f"{corpus}/validation.jsonl",
        "data.cache": f"{corpus}/cache",
        "data.workers": 0,
        "steps": STEPS,
        "tokens_per_step": 128,
        "micro_batch": 2,
        "seq_len": 32,
        "eval_every": 20,
        "save_every": SAVE_EVERY,
        "keep_last": STEPS,
        "run.dir": folder,
        "run.name": "r",
        "optim": method,
    }
    if method != "adamw":
        given |= {"optim.rank": 8, "optim.refresh_every": 7}
    for group in ("model", "data"):  # another one brings its own settings
        if group in extra:
            given = {k: v for k, v in given.items() if not k.startswith(f"{group}.")}
    given |= extra
    return [f"{k}={v}" for k, v in given.items()]


def child(args: list[str], hold: float, flag: Path) -> int:
    """A fork that trains; its pid. hold: seconds between a save's last byte and its name; `flag` exists
    meanwhile."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        import train
        from llama import checkpoint

        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        real: Callable[..., None] = os.rename

        def rename(a: str, b: str) -> None:
            if hold and str(a).endswith(".tmp") and "step_" in str(a):
                flag.touch()
                time.sleep(hold)
                flag.unlink(missing_ok=True)
            real(a, b)

        checkpoint.os.rename = rename  # type: ignore[attr-defined]
        code = train.main(args)
    finally:
        os._exit(code)


def rows_of(run: Path) -> dict[int, list[str]]:
    """step -> its rows of metrics.jsonl, without what is timed."""
    from llama import metrics

    found: dict[int, list[str]] = {}
    for row in metrics.read(run / "metrics.jsonl"):
        kept = {k: v for k, v in row.items() if k not in TIMED}
        found.setdefault(row["step"], []).append(json.dumps(kept, sort_keys=True))
    return found


def digest(run: Path) -> str:
    """SHA-256 of the newest save's weights, optimizer state, position and token hash."""
    from llama import checkpoint

    path = checkpoint.latest(run)
    assert path is not None
    h = hashlib.sha256()
    for name in ("model.safetensors", "optim.safetensors"):
        h.update((path / name).read_bytes())
    state = checkpoint.read_state(path)
    h.update(json.dumps([state[k] for k in ("step", "data", "stream", "tokens")], sort_keys=True).encode())
    return h.hexdigest()


def attack(
    method: str, kills: int, rng: random.Random, corpus: Path, folder: Path, extra: dict[str, str]
) -> Outcome:
    flag = folder / "saving"
    alone, killed = (arguments(folder / name, corpus, method, extra) for name in ("alone", "killed"))
    begun = time.monotonic()
    assert os.waitpid(child(alone, 0, flag), 0)[1] == 0
    whole = time.monotonic() - begun
    want, run = rows_of(folder / "alone" / "r"), folder / "killed" / "r"
    out = Outcome(method, 0, 0, 0, True)
    while True:
        last = out.kills >= kills
        in_save = not last and rng.random() < 0.45
        need = rng.choice((0, 1, 1, 2))  # saves of this process before it may be killed
        before, wait = len(saves(run)), rng.uniform(0, 4 * SAVE_EVERY / STEPS) * whole
        flag.unlink(missing_ok=True)
        pid, began = child(killed, 0.3 if in_save else 0, flag), time.monotonic()
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            if len(saves(run)) < before + need:
                began = time.monotonic()
            inside, late = flag.exists(), time.monotonic() - began > wait
            if not last and (inside if in_save and len(saves(run)) >= before + need else late):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                out.kills += 1
                out.in_saves += inside
                break
            time.sleep(0.002)
        else:
            if last:
                break
            go_back(run, rng)  # it ended before its time
            continue
        got = rows_of(run)
        out.resumes += bool(saves(run))
        newest = max(got, default=0)
        # rows on disk may be older than the last flush, but those that are there are the right ones
        out.same &= all(got[s] == want[s] for s in got if s < newest)
    out.same &= rows_of(run) == want and digest(run) == digest(folder / "alone" / "r")
    return out


def saves(run: Path) -> list[Path]:
    return list(run.glob("checkpoints/step_????????"))


def go_back(run: Path, rng: random.Random) -> None:
    """To any of its saves, or to the beginning."""
    from llama import checkpoint

    made = checkpoint.complete(run)
    for path in made[: rng.randint(1, len(made))]:
        shutil.rmtree(path)


def corpus_in(folder: Path) -> Path:
    from tests.conftest import documents

    for name, n, seed in (("train", 200, 0), ("validation", 10, 1)):
        lines = [json.dumps({"text": text}) for text in documents(n, seed)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def attacks(methods: list[str], kills: int, seed: int, extra: dict[str, str] | None = None) -> list[Outcome]:
    import torch

    import train  # noqa: F401 - once, before the forks
    from data import pack

    torch.set_num_threads(1)
    pack.GROUP_TOKENS = 256  # a small corpus is not read a hundred times to fill a group
    rng, out = random.Random(seed), []
    with tempfile.TemporaryDirectory() as place:
        corpus = corpus_in(Path(place))
        for n, method in enumerate(methods):
            folder = Path(place, method)
            folder.mkdir()
            share = kills // len(methods) + (n < kills % len(methods))
            out.append(attack(method, share, rng, corpus, folder, extra or {}))
            o = out[-1]
            print(
                f"{o.method:<20} {o.kills} kills, {o.in_saves} in a save, {o.resumes} resumes, same: {o.same}"
            )
    return out


def main(argv: list[str]) -> int:
    given = dict(a.split("=", 1) for a in argv)
    methods = given.pop("method", ",".join(METHODS)).split(",")
    found = attacks(methods, int(given.pop("kills", 100)), int(given.pop("seed", 0)), given)
    kills, inside = sum(o.kills for o in found), sum(o.in_saves for o in found)
    print(f"{kills} kills, {inside} of them inside a save; same: {all(o.same for o in found)}")
    return 0 if all(o.same for o in found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
