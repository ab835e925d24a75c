"""Kernels without a GPU: through Triton's interpreter, and compiled for the cards that users have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels.reference import Column

ROOT = Path(__file__).parent.parent
pytest.importorskip("triton")


def run(script, **env):
    command = [sys.executable, str(ROOT / "tests/kernels" / script)]
    # 3.10 stops fusing multiply and add by default: named, so that results do not change with the version
    env = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_DEFAULT_FP_FUSION": "1"} | env
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_interpreted_kernels_equal_the_reference():
    code, out = run("interpreted.py", TRITON_INTERPRET="1")
    assert code == 0 and out.count("ok ") == 32, out


def test_kernels_compile_for_five_cards(tmp_path):
    code, out = run("compiled.py", TRITON_CACHE_DIR=str(tmp_path))
    assert code == 0 and out.count("ok ") == 40, out


def tensors(dtype=torch.float32, n=10):
    return [[torch.ones(n, dtype=dtype)] for _ in range(4)]


def test_a_kernel_that_cannot_run_says_why():
    table = torch.ones(1, 8)
    with pytest.raises(ValueError, match=r"impl=triton.*float64"):
        kernels.adam_(*tensors(torch.float64), table, None, 0.9, 0.999, 1e-8, impl="triton")
    with pytest.raises(ValueError, match=r"impl=triton.*16-byte"):
        odd = [[t[0][1:]] for t in tensors()]
        kernels.adam_(*odd, table, None, 0.9, 0.999, 1e-8, impl="triton")


def test_auto_is_the_reference_on_a_cpu():
    assert kernels.choose([torch.ones(4)], "auto", (torch.float32,)) == "ref"


def test_reference_skips_whole():
    ws, gs, ms, vs = tensors()
    table = torch.ones(1, 8)
    table[0, Column.OK] = 0
    kernels.adam_(ws, gs, ms, vs, table, None, 0.9, 0.999, 1e-8, impl="ref")
    assert all(torch.equal(t[0], torch.ones(10)) for t in (ws, ms, vs))
