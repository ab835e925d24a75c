"""Tests that cannot fail are found here: each `@kills` names one-line changes that must turn its test red.

    python tests/mutants.py [PART ...]        of a test's name, a file or a changed line

Applies every change to a copy of the source, runs the test beside which it stands (`make mutants`), and
prints a table. Exit code 1 if a change is no longer found in its file, or survives.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).parents[1]
PACKAGES = ("configs", "data", "kernels", "llama", "optim", "tests", "train.py", "pyproject.toml")
T = TypeVar("T")


def kills(file: str, old: str, new: str) -> Callable[[T], T]:
    """Decorates a test: with `old` replaced by `new` (once, `old` is unique in the file) it must fail."""
    return lambda test: test


@dataclass
class Mutant:
    test: str  # node id
    file: str
    old: str
    new: str


def mutants(path: Path) -> Iterator[Mutant]:
    """Read from the source, so that nothing is imported."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef):
            continue
        for d in node.decorator_list:
            if isinstance(d, ast.Call) and isinstance(d.func, ast.Name) and d.func.id == "kills":
                yield Mutant(f"{path.relative_to(ROOT)}::{node.name}", *(ast.literal_eval(a) for a in d.args))


def verdict(m: Mutant) -> str:
    """killed, or why not."""
    source = (ROOT / m.file).read_text()
    if source.count(m.old) != 1:
        return f"NOT FOUND ({source.count(m.old)} times)"
    with tempfile.TemporaryDirectory() as folder:
        for name in PACKAGES:
            path = ROOT / name
            if path.is_dir():
                shutil.copytree(path, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, folder)
        Path(folder, m.file).write_text(source.replace(m.old, m.new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", m.test]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ)
    return {0: "SURVIVED", 1: "killed"}.get(done.returncode, f"NO TEST RAN ({done.returncode})")


def main(argv: list[str]) -> int:
    found = [m for p in sorted((ROOT / "tests").glob("test_*.py")) for m in mutants(p)]
    found = [m for m in found if not argv or any(part in f"{m.test} {m.file} {m.old}" for part in argv)]
    verdicts = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for m, v in zip(found, pool.map(verdict, found), strict=True):
            verdicts.append(v)
            what = f"{v:<10} {m.test.removeprefix('tests/')}\n{'':11}{m.file}: {m.old!r} -> {m.new!r}"
            print(what, flush=True)
    for test in dict.fromkeys(m.test for m in found):
        own = [v for m, v in zip(found, verdicts, strict=True) if m.test == test]
        print(f"{own.count('killed'):>2}/{len(own)} {test.removeprefix('tests/')}")
    bad = sum(v != "killed" for v in verdicts)
    print(f"{len(found) - bad} of {len(found)} killed")
    return bad > 0 or not found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
