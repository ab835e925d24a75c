"""Throws mutated command lines and mutated saves at train.main, and holds it to what the README promises.

    python tests/fuzz.py [lines=2000] [processes=50] [saves=500] [seed=0]

lines      in this process, nine of ten invalid by construction: exit code 2, nothing on stdout, a line that
           names key and value, no traceback, no run touched. The others take one step and save.
processes  the same as real ones, a fifth of them valid.
saves      tests/fuzz_saves.py.

Prints a table of kinds; exit code 1 if anything was wrong.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.fuzz_lines import Case, invalid, valid  # noqa: E402 - after the path
from tests.fuzz_place import Place  # noqa: E402

VALID_SHARE = 0.1


@dataclass
class Tally:
    """What was tried, by kind, and every failure in words."""

    tried: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[str, str]] = field(default_factory=list)

    def add(self, kind: str, wrong: str) -> None:
        self.tried[kind] += 1
        if wrong:
            self.failures.append((kind, wrong))
            print(f"WRONG {kind}: {wrong}", flush=True)

    def table(self) -> str:
        bad = Counter(kind for kind, _ in self.failures)
        rows = [f"{n:>6} {bad[kind]:>6}  {kind}" for kind, n in sorted(self.tried.items())]
        total = f"{self.tried.total():>6} {len(self.failures):>6}  in all"
        return "\n".join([f"{'tried':>6} {'wrong':>6}", *rows, total])


@dataclass
class End:
    code: int
    out: str
    err: str


def call(argv: list[str], main: object = None) -> End:
    """train.main(argv), or another command's, in this process."""
    import torch

    import train

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
        try:
            code = (main or train.main)(argv)  # type: ignore[operator]
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            code = -1
            err.write(f"\nTraceback: {error!r} at {where(error)}\n")
    torch.use_deterministic_algorithms(False)
    return End(code, out.getvalue(), err.getvalue())


def where(error: BaseException) -> str:
    at = error.__traceback__
    while at and at.tb_next:
        at = at.tb_next
    return f"{at.tb_frame.f_code.co_filename}:{at.tb_lineno}" if at else "?"


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Without what takes most of a short run's time and is not tried here: the samples and the plot."""
    with mock.patch("train.write_samples"), mock.patch("llama.metrics.draw"):
        yield


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but locks, which name the last process."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def judge_invalid(case: Case, end: End) -> str:
    said = end.err.splitlines()
    if "Traceback" in end.err:
        return f"traceback: {end.err[-300:]}"
    if end.code != 2:
        return f"exit code {end.code}: {end.err[-300:]}"
    if end.out:
        return f"on stdout: {end.out[:200]}"
    if not any(all(part in line for part in case.named) for line in said):
        return f"no line names {case.named}: {end.err[-300:]}"
    return ""


def judge_valid(end: End, run: Path) -> str:
    from llama import checkpoint, metrics

    if end.code != 0 or "Traceback" in end.err:
        return f"exit code {end.code}: {end.err[-500:]}"
    losses = [row["loss"] for row in metrics.read(run / "metrics.jsonl") if "loss" in row]
    if len(losses) != 1 or not (losses[0] and math.isfinite(losses[0])):
        return f"losses {losses}"
    source = checkpoint.latest(run)
    return "" if source and checkpoint.step_of(source) == 1 else "no save"


def process(argv: list[str]) -> End:
    # No text can hold what a process cannot be given.
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *argv], capture_output=True, cwd=ROOT, timeout=300
    )
    return End(done.returncode, *(b.decode(errors="surrogateescape") for b in (done.stdout, done.stderr)))


def try_lines(place: Place, count: int, rng: random.Random, tally: Tally, real: bool = False) -> None:
    """`count` lines in this process, or as real ones."""
    good = round(count * (0.2 if real else VALID_SHARE))
    run, prefix = (process, "process: ") if real else (call, "")
    before = contents(place.runs)
    for case in cases(place, rng, count - good, real):
        wrong = said(judge_invalid(case, run(case.argv)), case.argv)
        changed = touched(place, before, case)
        tally.add(prefix + case.kind, wrong or changed)
    for n in range(good):
        argv = valid(place, rng, f"v{n}")
        tally.add(f"{prefix}valid: {method(argv)}", said(judge_valid(run(argv), place.new / f"v{n}"), argv))
        shutil.rmtree(place.new / f"v{n}", ignore_errors=True)


def cases(place: Place, rng: random.Random, count: int, real: bool) -> Iterator[Case]:
    while count:
        case = invalid(place, rng)
        if real and any("\0" in arg or len(arg) > 100_000 for arg in case.argv):
            continue  # no command line can hold them
        count -= 1
        yield case


def touched(place: Place, before: dict[str, bytes], case: Case) -> str:
    """What a refused line changed: nothing in the run that is there, and no row, save or setting of a new
    one."""
    now = contents(place.runs)
    wrong = [name for name in now.keys() | before.keys() if now.get(name) != before.get(name)]
    made = [str(p.relative_to(place.new)) for p in place.new.rglob("*")]
    if not case.late and made or any(p.name != ".lock" and p.is_file() for p in place.new.rglob("*")):
        wrong += made
    for path in place.new.iterdir():
        shutil.rmtree(path)
    return said(f"changed {sorted(wrong)}" if wrong else "", case.argv)


def said(wrong: str, argv: list[str]) -> str:
    return f"{wrong}\n      {' '.join(a[:80] for a in argv)!r}" if wrong else ""


def method(argv: list[str]) -> str:
    return next((arg[6:] for arg in argv if arg.startswith("optim=")), "adamw")


def fuzz(lines: int, processes: int, saves: int, seed: int) -> Tally:
    import torch

    from data import pack

    torch.set_num_threads(1)
    pack.GROUP_TOKENS = 256  # a small corpus is not read a hundred times to fill a group
    rng, tally = random.Random(seed), Tally()
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder))
        assert call(place.line()).code == 0
        if lines:
            try_lines(place, lines, rng, tally)
        if processes:
            try_lines(place, processes, rng, tally, real=True)
        if saves:
            from tests import fuzz_saves

            fuzz_saves.try_saves(place, saves, rng, tally)
    return tally


def main(argv: list[str]) -> int:
    given = {"lines": 2000, "processes": 50, "saves": 500, "seed": 0}
    given |= {key: int(value) for key, value in (arg.split("=", 1) for arg in argv)}
    tally = fuzz(**given)
    print(tally.table())
    print(json.dumps({"tried": tally.tried.total(), "wrong": len(tally.failures)}))
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
