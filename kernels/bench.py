"""One kernel beside its reference, run eagerly and compiled: does it earn its place?

    python -m kernels.bench OP [OP ...] [shape=ROWSxCOLS,...]

OP: a name of kernels.check's table, or the beginning of some. Milliseconds on this card, and the ratio to the
faster of the others.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
import torch._dynamo

from .cases import CASES
from .check import shape_of, timed


def main(argv: list[str]) -> int:
    given = dict(a.split("=", 1) for a in argv if "=" in a)
    wanted = [a for a in argv if "=" not in a]
    names = [n for n in CASES if any(n.startswith(w) for w in wanted)]
    if not names or set(given) - {"shape"}:
        print(f"{__doc__}\nOP is one of: {' '.join(CASES)}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print(f"{__doc__}\nThis needs an NVIDIA GPU, and torch sees none here.", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    print(f"{'kernel':<18}{'rows x columns':>16}{'ours':>10}{'compiled':>10}{'eager':>10}{'ratio':>8}")
    for name in names:
        case = CASES[name]
        shapes = [tuple(map(int, s.split("x"))) for s in given.get("shape", "").split(",") if s]
        for rows, cols in shapes or [shape_of(name)]:
            torch._dynamo.reset()  # its limit is for all cases together; a second shape would be any shape
            x = case.make(rows, cols, device)
            ours, eager = (partial(case.call, x, impl) for impl in ("triton", "ref"))
            ms = [1e3 * timed(way) for way in (ours, torch.compile(eager), eager)]
            print(
                f"{name:<18}{f'{rows}x{cols}':>16}" + "".join(f"{v:>10.3f}" for v in ms)
                + f"{min(ms[1:]) / ms[0]:>8.2f}", flush=True,
            )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
