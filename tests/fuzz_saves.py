"""Mutated saves for tests/fuzz.py: what going on, and what reads a run, make of each.

A run of six steps with saves at 2 and 4 is copied, the save of step 4 is mutated, and the same command goes
on. Allowed: the save is refused by name and the result is that of the run left alone; the result is that of
the run left alone; exit code 2 or 3 with a line that names the save, everything still there. The last is
allowed beside an older good save only for settings in state.json, which a person has to decide about.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from tests.kills import digest, rows_of
from tests.mutations import DECIDED, KINDS, Mutation

if TYPE_CHECKING:
    from tests.fuzz import End, Tally
    from tests.fuzz_place import Place

METHODS = ("adamw", "galore_8bit", "gradnormlorp_adapter_8bit")
COMMANDS = ("eval", "generate", "export")
SAVE, OLDER = "step_00000004", "step_00000002"


@dataclass
class Whole:
    """A run that was left alone, and what it comes to."""

    method: str
    run: Path
    digest: str
    rows: dict[int, list[str]]
    said: dict[tuple[str, str], Any]  # (command, save): what the command says of it


def line(place: Place, folder: Path, method: str) -> list[str]:
    more = [] if method == "adamw" else ["optim.rank=8", "optim.refresh_every=3"]
    given = [
        f"optim={method}",
        "steps=6",
        "save_every=2",
        "keep_last=9",
        "eval_every=100",
        "micro_batch=4",
        *more,
    ]
    return place.line(*given, dir=str(folder), name="r")


def every_save() -> Any:
    """Training waits for each save: without memory for a copy none is left out on a slow disk."""
    return mock.patch("llama.saver.available", return_value=0.0)


def whole(place: Place, method: str) -> Whole:
    from tests.fuzz import call

    folder = place.folder / f"whole_{method}"
    with every_save():
        end = call(line(place, folder, method))
    assert end.code == 0, end.err
    run = folder / "r"
    return Whole(method, run, digest(run), rows_of(run), {})


def answer_of(done: Whole, command: str, save: str) -> Any:
    """What the command says of the run when this is its only save."""
    if (command, save) not in done.said:
        copy = done.run.parent / "one" / "r"
        shutil.copytree(done.run, copy)
        for path in (copy / "checkpoints").iterdir():
            if path.name != save:
                shutil.rmtree(path)
        done.said[command, save] = ask(command, copy)[1]
        shutil.rmtree(copy)
    return done.said[command, save]


def ask(command: str, run: Path) -> tuple[End, Any]:
    """A command about a run folder, and its answer but for the folder's own name."""
    import llama.eval
    import llama.export
    import llama.generate
    from tests.fuzz import call

    if command == "eval":
        end = call([str(run), "data.cache=unused"], llama.eval.main)
        return end, end.out.splitlines()[1:]
    if command == "generate":
        end = call([str(run), "The people", "tokens=8"], llama.generate.main)
        return end, end.out
    out = run.parent / "exported"
    end = call([str(run), str(out)], llama.export.main)
    answer = {p.name: p.read_bytes() for p in out.iterdir()} if out.is_dir() else {}
    shutil.rmtree(out, ignore_errors=True)
    return end, answer


def tree(run: Path) -> dict[str, object]:
    """What must not be lost: saves, rows and settings."""
    found: dict[str, object] = {}
    for path in [run / "metrics.jsonl", run / "config.yaml", *sorted((run / "checkpoints").rglob("*"))]:
        if not path.is_dir() and not str(path).endswith((".tmp", ".old")):
            plain = path.is_file() and not path.is_symlink()
            found[str(path.relative_to(run))] = path.read_bytes() if plain else "special"
    return found


def judge(end: End, done: Whole, run: Path, before: dict[str, object], m: Mutation, older: bool) -> str:
    """What was wrong with going on."""
    said = end.err.replace("\0", "")
    if "Traceback" in said:
        return f"traceback: {said[-400:]}"
    if end.code in (2, 3):
        if SAVE not in said:
            return f"exit code {end.code} without the save's name: {said[-300:]}"
        if older and m.kind not in DECIDED:
            return f"exit code {end.code} beside an older save: {said[-400:]}"
        now = tree(run)
        lost = [name for name in before if now.get(name) != before[name]]
        return f"lost {lost}" if lost else ""
    if end.code:
        return f"exit code {end.code}: {said[-300:]}"
    refused = [row for row in said.splitlines() if " refused: " in row and "step_" in row]
    if digest(run) != done.digest or rows_of(run) != done.rows:
        return f"another result, refused: {refused}"
    if refused and not any(m.file in row for row in refused):
        return f"refused without naming {m.file}: {refused}"
    if not refused and not m.harmless:
        return "taken as if nothing had been changed"
    return ""


def judge_command(command: str, run: Path, done: Whole, older: bool) -> str:
    end, answer = ask(command, run)
    if "Traceback" in end.err:
        return f"{command}: traceback: {end.err[-400:]}"
    refused = f"{SAVE} refused: " in end.err
    if end.code == 2 and end.err.strip() and (not older or "not finite" in end.err):
        return ""
    if end.code:
        return f"{command}: exit code {end.code}: {end.err[-300:]}"
    if answer != answer_of(done, command, OLDER if refused else SAVE):
        return f"{command}: another answer, refused: {refused}: {str(answer)[:200]}"
    return ""


def try_saves(place: Place, count: int, rng: random.Random, tally: Tally) -> None:
    from tests.fuzz import quick

    with quick():
        runs = [whole(place, method) for method in METHODS]
        for n in range(count):
            try_one(place, n, runs, rng, tally)


def try_one(place: Place, n: int, runs: list[Whole], rng: random.Random, tally: Tally) -> None:
    from tests.fuzz import call

    done, other = rng.sample(runs, 2)
    older = rng.random() < 0.75
    folder = place.folder / f"mutated_{n}"
    run = folder / "r"
    shutil.copytree(done.run, run)
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    if not older:
        shutil.rmtree(run / "checkpoints" / OLDER)
    kind = KINDS[n % len(KINDS)] if n < len(KINDS) else rng.choice(KINDS)
    m = kind(run / "checkpoints" / SAVE, done.run / "checkpoints", other.run / "checkpoints", rng)
    before = tree(run)
    wrong = ""
    if m.readers and rng.random() < 0.25:
        wrong = judge_command(rng.choice(COMMANDS), run, done, older)
    wrong = wrong or judge(call(line(place, folder, done.method)), done, run, before, m, older)
    where = f"{done.method}, {'with' if older else 'without'} an older save, {m.file} {m.note}"
    tally.add(f"save: {m.kind}", f"{wrong}\n      {where}" if wrong else "")
    shutil.rmtree(folder)
