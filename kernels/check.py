"""Are the kernels right on this card, and how fast?

    python -m kernels.check [out=FILE.json] [shape=ROWSxCOLUMNS]

Each kernel beside its reference on the same inputs, of the sizes of a 7B model; then its time, and the rate
at which it moves what it must (read and written once). Then what the card itself does: copies, products,
launches, copies from the host; and one line that says whether all agree, exit code 1 if not. With `out` all
of it as JSON.

With `shape` that size is checked and nothing timed, as for `compute-sanitizer python -m kernels.check
shape=33x300`; so are small sizes without a GPU, under Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .cases import CASES, Case, random

# rows x columns: a matrix of 7B and its gradient in a basis; logits of 8192 tokens.
WIDE, NARROW, LOGITS, SMALL = (4096, 11008), (11008, 1024), (8192, 32000), (33, 300)
CODES = (torch.int8, torch.uint8)
REPEATS = 20
WAIT = 2_000_000  # clock cycles, a millisecond


def shape_of(name: str) -> tuple[int, int]:
    if name == "cross_entropy":
        return LOGITS
    return WIDE if name.startswith(("adam", "rows", "grouped")) else NARROW


def far(a: Tensor, b: Tensor) -> float:
    """How far apart two results are, in units of what is allowed; inf where one is NaN alone.

    Codes: one apart, and one in a thousand of them. Floats: by the norm 2^-8 (bf16; in Triton's interpreter,
    which truncates, 2^-7) or 1e-5 of it, and each number four times that of the largest.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if b.dtype in CODES:
        off = (a.int() - b.int()).abs()
        return max(float(off.max()), float((off > 0).double().mean()) * 1e3)
    if not b.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    tol = (2**-8 if b.is_cuda else 2**-7) if b.dtype == torch.bfloat16 else 1e-5
    x, y = a.double(), b.double()
    both = torch.isnan(x) & torch.isnan(y)
    gap, y = torch.where(both, 0, x - y), torch.where(both, 0, y)
    if not bool(torch.isfinite(gap).all()):
        return float("inf")
    norm, largest = (max(float(t), 1e-30) for t in (y.norm(), y.abs().max()))
    return max(float(gap.norm()) / (tol * norm), float(gap.abs().max()) / (4 * tol * largest))


def apart(case: Case, shape: tuple[int, int], device: torch.device) -> float:
    """The worst of what the kernel returns and writes."""
    inputs = [case.make(*shape, device) for _ in "ab"]
    results = [case.call(inputs[0], "triton"), case.call(inputs[1], "ref")]
    sides = [tree_leaves(both) for both in zip(inputs, results, strict=True)]
    tensors = [[t for t in side if isinstance(t, Tensor)] for side in sides]
    return max(far(a, b) for a, b in zip(*tensors, strict=True))


def timed(run: Callable[[], Any]) -> float:
    """Seconds: the median of some runs, each after 256 MiB were read, so that no cache holds the inputs, nor
    what would be written back beside them.

    The GPU is kept busy before, or it would wait for the host in between."""
    flush = torch.zeros(2**26, device="cuda")
    times = []
    for _ in range(REPEATS + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.amax()
        torch.cuda._sleep(WAIT)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return median(times[3:])


def constants() -> dict[str, float]:
    """What a card does at best: bytes/s of a copy and from pinned host memory, FLOP/s, seconds a launch."""
    device = torch.device("cuda")
    a, b = (random(device, 8192, 8192, seed=n) for n in range(2))
    host = torch.empty(2**27, dtype=torch.uint8).pin_memory()
    there, small = torch.empty(2**27, dtype=torch.uint8, device=device), torch.empty(32, device=device)
    narrow, basis = random(device, 4096, 1024), random(device, 1024, 4096)

    def many() -> None:
        for _ in range(1000):
            small.add_(1)

    return {
        "copy_bytes_per_s": 2 * a.numel() * 2 / timed(lambda: b.copy_(a)),
        "host_bytes_per_s": 2**27 / timed(lambda: there.copy_(host, non_blocking=True)),
        "product_flops": 2 * 8192**3 / timed(lambda: a @ b),
        "lift_flops": 2 * 4096 * 1024 * 4096 / timed(lambda: narrow @ basis),
        "launch_s": timed(many) / 1000,
    }


def main(argv: list[str]) -> int:
    given = dict(a.split("=", 1) for a in argv)
    if set(given) - {"out", "shape"}:
        print(__doc__, file=sys.stderr)
        return 2
    gpu = torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ
    if not gpu and "TRITON_INTERPRET" not in os.environ:
        print(f"{__doc__}\nThis needs an NVIDIA GPU, and torch sees none here.", file=sys.stderr)
        return 2
    device = torch.device("cuda" if gpu else "cpu")
    rows, cols = map(int, given["shape"].split("x")) if "shape" in given else SMALL
    small = (rows, cols) if "shape" in given or not gpu else None
    found: dict[str, Any] = {"kernels": {}}
    peak = 0.0
    if not small:
        found |= constants()
        peak = found["copy_bytes_per_s"]
    card = torch.cuda.get_device_name() if gpu else "Triton's interpreter"
    print(f"{card}, torch {torch.__version__}")
    print(f"{'kernel':<18}{'rows x columns':>16}{'off by':>8}{'':>6}{'ms':>9}{'GB/s':>7}{'of copy':>9}")
    for name, case in CASES.items():
        shape = small or shape_of(name)
        off = apart(case, shape, device)
        line: dict[str, Any] = {"shape": shape, "off": off}
        text = f"{name:<18}{'x'.join(map(str, shape)):>16}{off:>8.2f}{'' if off <= 1 else ' WRONG':>6}"
        if not small:
            x = case.make(*shape, device)
            line["seconds"] = timed(lambda case=case, x=x: case.call(x, "triton"))  # type: ignore[misc]
            rate = case.bytes(x) / line["seconds"]
            text += f"{1e3 * line['seconds']:>9.3f}{rate / 1e9:>7.0f}{rate / peak:>9.0%}"
        print(text, flush=True)
        found["kernels"][name] = line
    if not small:
        products = (
            f"{found['product_flops'] / 1e12:.0f} TFLOP/s, of rank 1024 {found['lift_flops'] / 1e12:.0f}"
        )
        print(
            f"this card   copies {peak / 1e9:.0f} GB/s, products {products}\n            from the host "
            f"{found['host_bytes_per_s'] / 1e9:.0f} GB/s, a launch {1e6 * found['launch_s']:.1f} us"
        )
    wrong = [name for name, line in found["kernels"].items() if not line["off"] <= 1]
    verdict = (
        f"WRONG: {', '.join(wrong)}" if wrong else f"all {len(CASES)} kernels agree with their references"
    )
    print(verdict)
    if "out" in given:
        with open(given["out"], "w", encoding="utf-8") as f:
            json.dump({"card": card, "torch": torch.__version__, **found}, f, indent=1)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
