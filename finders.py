"""How good are the bases that `warm` finds, and what rank do gradients have: in runs in progress.

    python finders.py data=FOLDER [model=llama_1b] [each=7] [at=5,50,500] [out=bench.jsonl] [commit=ID]
    python finders.py spectra=adamw,galore_8bit data=FOLDER [out=bench.jsonl] [commit=ID]

Trains with galore_8bit (4096 tokens a step, T = 200). After the steps `at` it forms, for `each` bases of
every kind (qkv, o, gate-up, down), the whole gradient G of the next batch and of the one after it. One row a
kind and step: the residual ||G - G Q Q^T|| of warm with 1 and 2 iterations over that of the exact basis
(where that is above 1% of ||G||), and the energy of the following batch that each captures.

`spectra`: at 60M, 65,536 tokens a step, the singular values of every block matrix' G: how many of the largest
hold a share of ||G||^2, and ||G||^2 over the square of the first (stable rank). The shares are AdaRankGrad's
threshold 0.48 read as an error of squares (0.52), of norms (0.77), and ours (0.9).
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

from bench import Ours, facts, refused
from llama.model import eager
from optim import subspace
from optim.layer import ProjectedLinear

KINDS = {"q_proj": "qkv", "o_proj": "o", "gate_proj": "gate-up", "down_proj": "down"}


def gradients(run: Any, bases: list[Any], batch: Any) -> list[list[Tensor]]:
    """Whole gradients (out, in) of every weight of each basis."""
    flat = whole(run, [u.layers[0] for b in bases for u in b.units], batch)
    return [[flat.pop(0) for _ in b.units] for b in bases]


def whole(run: Any, layers: list[nn.Linear], batch: Any) -> list[Tensor]:
    """Gradients (out, in) of their weights; no hook fires and nothing is updated."""
    projected = [layer for layer in layers if isinstance(layer, ProjectedLinear)]
    for layer in projected:
        layer.__class__ = nn.Linear
        layer.weight.requires_grad_(True)
    with eager(run.model):
        loss = run.model(batch.x.cuda(), batch.y.cuda()) / batch.valid
        found = list(torch.autograd.grad(loss, [layer.weight for layer in layers]))
    for layer in projected:
        layer.weight.requires_grad_(False)
        layer.__class__ = ProjectedLinear
    return found


def exact(gs: list[Tensor], r: int) -> Tensor:
    """The r leading right singular vectors of the stack, by an eigendecomposition in float64 of its
    smaller side."""
    g = torch.cat(gs).double()
    if g.shape[0] < g.shape[1]:
        values, left = torch.linalg.eigh(g @ g.t())
        v = g.t() @ left[:, -r:] / values[-r:].clamp(min=1e-300).sqrt()
        v = torch.linalg.qr(v).Q  # exact already where the singular values are not tiny
    else:
        v = torch.linalg.eigh(g.t() @ g)[1][:, -r:]
    return v


def measure(b: Any, gs: list[Tensor], after: list[Tensor]) -> dict[str, float]:
    def energy(some: list[Tensor], q: Tensor) -> float:
        whole = sum(g.double().square().sum() for g in some)
        return float(sum((g.double() @ q.double()).square().sum() for g in some) / whole)

    best = exact(gs, b.r)
    found = {"svd": (1 - min(1.0, energy(gs, best))) ** 0.5, "svd_next": energy(after, best)}
    for n in (1, 2):
        subspace.ITERATIONS = n
        q = subspace.find(gs, b.q, "warm", 0, first=b.count == 0).q
        found[f"warm{n}"] = max(0.0, 1 - energy(gs, q)) ** 0.5
        found[f"warm{n}_next"] = energy(after, q)
    subspace.ITERATIONS = 2
    return found


SHARES = (0.52, 0.77, 0.9)
SPECTRA_AT = (1, 5, 20, 50, 100, 200, 300, 400, 500, 590)
RATES = {"adamw": "0.002"}  # the best of compare.py; low-rank methods: 0.01


def spectrum(g: Tensor) -> list[float]:
    """How many singular values hold each of SHARES, and the stable rank."""
    squares = torch.linalg.svdvals(g.float()).double().square()
    held = squares.cumsum(0) / squares.sum()
    return [*(int((held < e).sum()) + 1 for e in SHARES), float(squares.sum() / squares[0])]


def spectra(method: str, args: dict[str, str]) -> None:
    """Of one run of compare.py's length and batch; means over the layers of a kind."""
    more = [f"optim={method}", *(["optim.beta2=0.95"] if method == "adamw" else [])]
    side = Ours("llama_60m", 65_536, 256, args["data"], more, 600)
    side.run.lr = float(RATES.get(method, "0.01"))
    layers = {n: m for n, m in side.run.model.named_modules() if isinstance(m, nn.Linear) and "layers" in n}
    row: dict[str, Any] = {"what": f"llama_60m {method}, spectra of gradients", "shares": SHARES}
    row |= {"steps": SPECTRA_AT, "kinds": {}}
    for step in SPECTRA_AT:
        side.steps(step - side.done)
        gs = whole(side.run, list(layers.values()), next(side.run.loader))
        found: dict[str, list[list[float]]] = defaultdict(list)
        for name, g in zip(layers, gs, strict=True):
            found[name.split(".")[-1]].append(spectrum(g))
        for kind, got in found.items():
            means = [round(mean(x), 1) for x in zip(*got, strict=True)]
            row["kinds"].setdefault(kind, []).append(means)
    side.close()
    with open(args.get("out", "bench.jsonl"), "a", encoding="utf-8") as f:
        f.write(json.dumps(row | facts(args.get("commit"))) + "\n")
    for kind, got in row["kinds"].items():
        print(f"{method} {kind:<10}", *(f"{int(a)}/{int(b)}/{int(c)}" for a, b, c, _ in got), flush=True)


def main(argv: list[str]) -> int:
    if refused(argv, "data model each at spectra out commit", __doc__):
        return 2
    args = dict(a.split("=", 1) for a in argv)
    if not torch.cuda.is_available():
        print(f"{__doc__}\nThis needs an NVIDIA GPU, and torch sees none here.", file=sys.stderr)
        return 2
    if "spectra" in args:
        for method in args["spectra"].split(","):
            spectra(method, args)
        return 0
    model, each = args.get("model", "llama_1b"), int(args.get("each", 7))
    at = [int(n) for n in args.get("at", "5,50,500").split(",")]
    more = ["optim=galore_8bit", "optim.refresh_every=200", f"eval_every={10**6}"]
    side = Ours(model, 4096, 16, args["data"], more, max(at) + 10)
    side.run.lr = 0.01 if model != "llama_7b" else 0.005
    for step in at:
        side.steps(step - side.done)
        bases: dict[str, list[Any]] = defaultdict(list)
        for b in side.run.opt.bases:
            kind = KINDS.get(b.units[0].name.split(".")[-2])
            if kind:
                bases[kind].append(b)
        batches = [next(side.run.loader) for _ in range(2)]
        for kind, some in bases.items():
            chosen = some[:: max(1, len(some) // each)][:each]
            now, after = (gradients(side.run, chosen, batch) for batch in batches)
            with torch.no_grad():
                got = [measure(*three) for three in zip(chosen, now, after, strict=True)]
            row: dict[str, Any] = {"what": f"{model} warm finder, {kind}, step {step}", "gradients": len(got)}
            row["random_before"] = sum(b.count == 0 for b in chosen)
            row["svd_residual"] = round(median(g["svd"] for g in got), 4)
            for n in (1, 2):
                ratios = [g[f"warm{n}"] / g["svd"] for g in got if g["svd"] > 0.01]
                if ratios:
                    row[f"warm{n}_over_svd"] = [round(median(ratios), 4), round(max(ratios), 4)]
                lost = [g["svd_next"] - g[f"warm{n}_next"] for g in got]
                row[f"warm{n}_next_minus_svd"] = [round(-mean(lost), 4), round(-max(lost), 4)]
            row["svd_next"] = round(mean(g["svd_next"] for g in got), 4)
            row |= facts(args.get("commit"))
            with open(args.get("out", "bench.jsonl"), "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
            print(
                {k: v for k, v in row.items() if k not in ("versions", "gpu", "commit", "date")}, flush=True
            )
            del now, after
            torch.cuda.empty_cache()
    side.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
