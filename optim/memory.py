"""What a method holds between steps, from shapes alone, and the table that a run prints at its start.

Elements, as GaLore counts them: N + sum of in * r over bases (of out * r on the output side) + 2 * the size
of R for each projected matrix + 2 E for everything else. The rest are extras; each has a line of its own in
`entries`.
"""

from __future__ import annotations

import math
import re
import textwrap
from typing import TYPE_CHECKING, NamedTuple

import torch

from . import kernels, velora
from .comm import local
from .unit import PROBE, Unit

if TYPE_CHECKING:
    from .engine import Engine

QUANT = kernels.QUANT  # numbers of a row under one scale
GIB = 2**30
SMALL = 2**26  # bytes, below which they are shown in smaller units


class Entry(NamedTuple):
    what: str
    numel: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize


def entries(e: Engine) -> list[Entry]:
    """Every tensor of weights and optimizer by formula; equal kinds summed. Gradients and activations
    excluded."""
    found: dict[tuple[str, torch.dtype], int] = {}

    def add(what: str, numel: int, dtype: torch.dtype) -> None:
        found[what, dtype] = found.get((what, dtype), 0) + numel

    wide, n = e.scalars.dtype, len(e.units)
    for u in e.units:
        w = local(u.param)
        add("adapters" if u.adapter else "weights", w.numel(), w.dtype)
        for kind, numel, dtype in state_of(u):
            add(kind, numel, dtype)
        if u.projected and not u.adapter:
            wider = 1 if u.mag else 0  # coordinates are one element each, whatever their shape
            add("coordinates", len(u.leaves) + 1 - wider, w.dtype)
            add("coordinates", wider, wide_of(u))
    for a in e.adapters:
        w = local(a.weight)
        add("weights", w.numel(), w.dtype)
        add("row norms and factors", 3 * len(a.weight) if a.how.normalize else 0, wide)
    for b in e.bases:
        add("bases", len(b.qs) * b.r, b.qs.dtype)
        add("probe S", len(b.qs) * b.k, b.qs.dtype)
        add("probe Q^T S", b.r * b.k, b.qs.dtype)
    if e.adarank:  # average, reference, threshold; below, and which units a basis has
        add("scalars", 3 * len(e.bases), wide)
        add("scalars", (1 + n) * len(e.bases), torch.bool)
    for b in e.grouped:
        add("directions", b.m, b.qs.dtype)
    # table of 8, t, two squares, two numbers of all; two rates of each group
    add("scalars", (8 + 1 + 2) * n + 2 + 2 * len(e.param_groups), wide)
    add("scalars", n, torch.int64)  # param group of each
    add("scalars", 3 * n, torch.bool)  # projected, counted, may rest
    return [Entry(what, numel, dtype) for (what, dtype), numel in found.items() if numel]


def state_of(u: Unit, shape: tuple[int, ...] | None = None) -> list[Entry]:
    """Moments of one unit: R's numbers in their store, a scale for 256 of a row, the column scale; s Rs of
    a history, likewise, with the s x s inner products, the next one's place and their number.

    shape: of R; None: as it is."""
    shape, wide = shape or u.shape, wide_of(u)
    rows, cols = (shape[0], shape[1]) if len(shape) == 2 else (1, shape[0])
    out = []
    for name in u.rule.moments:
        stored = {"fp32": wide, "bf16": torch.bfloat16, "int8": torch.uint8 if name == "v" else torch.int8}
        out.append(Entry("moments", rows * cols, stored[u.store]))
        if u.store == "int8":
            out.append(Entry("moment scales", rows * -(-cols // QUANT), torch.float32))
    if s := u.rule.history:
        stored = {"fp32": wide, "bf16": torch.bfloat16, "int8": torch.int8}
        out.append(Entry("history", s * rows * cols, stored[u.store]))
        if u.store == "int8":
            out.append(Entry("history scales", s * rows * -(-cols // QUANT), torch.float32))
        out += [Entry("history's products", s * s, wide), Entry("history's places", 2, torch.int64)]
    if u.store == "int8" and u.q and not u.grouped and out:
        out.append(Entry("column scale", cols, torch.float32))
    if "grown" in u.state:
        out.append(Entry("scalars", 1, wide))
    if u.deferred:
        w = local(u.param)
        kept = [("deferred C", len(w) * cols, w.dtype)]
        kept += [("deferred rho", len(w) if u.mag else 1, wide)] if u.mag or u.decay else []
        kept += [("deferred W [Q, S]", len(u.w) * (u.q.r + u.q.k), w.dtype)] if u.mag and u.q else []
        out += [Entry(*x) for x in kept]
    if u.mag:
        rows = len(u.w)
        out += [Entry("magnitudes mag, n", 2 * rows, wide), Entry("moments of mag", 2 * rows, wide)]
        out += [Entry("row factors", len(u.param), wide)] if u.p else []
    return out


def saved(e: Engine) -> int:
    """Bytes that bases and state take less than with every basis at its largest rank."""
    total = sum((b.most - b.r) * (len(b.qs) + b.k) * b.qs.dtype.itemsize for b in e.bases)
    for u in (u for u in e.units if u.projected):
        rows, cols = u.shape
        largest = (u.p.most if u.p else rows, u.q.most if u.q else cols)
        total += sum(x.bytes for x in state_of(u, largest)) - sum(x.bytes for x in state_of(u))
    return total


def wide_of(u: Unit) -> torch.dtype:
    return torch.promote_types(local(u.param).dtype, torch.float32)


def table(e: Engine) -> str:
    """Every parameter, those that differ in a number only in one line; then the memory. 80 columns."""
    lines: dict[tuple[str, tuple[int, ...]], list[Unit]] = {}
    for u in e.units:
        a = u.adapter
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", a.name if a else u.name)
        lines.setdefault((name, (a or u).size), []).append(u)
    unit, size = ("KiB", 2**10) if sum(x.bytes for x in entries(e)) < SMALL else ("MiB", 2**20)
    out = [f"{'trained':<38}{'shape':>11} {'rule':<5}{'basis':<9}{'rank':>4} {'lr':>6}{unit:>5}"]
    group = dict(zip(map(id, (u.param for u in e.units)), e._groups, strict=True))
    for (name, shape), units in lines.items():
        u, several = units[0], len({u.adapter.name if u.adapter else u.name for u in units})
        rule = u.rule.label or type(u.rule).__name__.lower()
        name = name.removesuffix(".weight").removeprefix("model.")
        name = (name if len(name) < 34 else "..." + name[-30:]) + (f" x{several}" if several > 1 else "")
        basis, rank = "-", "-"
        if u.adapter:
            basis, rank = "adapter", str(u.adapter.r)
        elif u.projected:
            shared = len(u.q.units) if u.q else 1
            side = "velora" if u.grouped else "both" if u.q and u.p else "input" if u.q else "output"
            basis, rank = side + (f":{shared}" if shared > 1 else ""), str(min(b.rank for b in u.bases))
            ranks = [min(b.rank for b in v.bases) for v in units]
            if len(set(ranks)) > 1:  # the mean
                rank = f"~{sum(ranks) / len(ranks):.0f}"
        elif u.why:
            basis = "none (1)"
        g = e.param_groups[group[id(u.param)]]
        held = sum(x.bytes for v in units for x in state_of(v)) / size
        rate = f"{g['lr'] * g['scale']:.1e}".replace("e-0", "e-")
        out.append(
            f"{name:<38}{'x'.join(map(str, shape)):>11} {rule:<5}{basis:<9}"
            f"{rank:>4} {rate:>6}{held:>5.{0 if held >= 99.5 else 1}f}"
        )
    reasons = {u.why for u in e.units if u.why}
    if reasons:
        out.append(f"(1) not projected: {', '.join(sorted(reasons))}")
    return "\n".join(out + memory(e))


def memory(e: Engine) -> list[str]:
    sums: dict[str, int] = {}
    for x in entries(e):
        kind = (
            x.what
            if x.what in ("weights", "bases", "adapters")
            else "moments"
            if x.what.startswith("moment")
            else "history"
            if x.what.startswith("history")
            else "deferred"
            if x.what.startswith("deferred")
            else "extras"
        )
        sums[kind] = sums.get(kind, 0) + x.bytes
    total = sum(sums.values())
    unit, size = ("MiB", 2**20) if total < SMALL else ("GiB", GIB)
    parts = ", ".join(f"{k} {v / size:.2f}" for k, v in sums.items())
    out = textwrap.wrap(f"{'held':<10}{total / size:.2f} {unit}: {parts}", 80, subsequent_indent=" " * 10)
    if e.bases:
        shared = "" if e.adapters else "; input:n is one for n weights"
        a = e.adarank
        lazy = a is not None and a.cfg.adapt_refresh
        when = f"{a.least} to {e.every} steps old" if a and lazy else f"every {e.every} steps"
        out.append(f"bases     {len(e.bases)}, replaced {when}{shared}")
        if lazy:
            out.append("          each when the gradient in it has converged")
        if a and a.cfg.adapt_rank:
            step, least = (" or ".join(map(str, sorted({f(b) for b in e.bases}))) for f in (a.step, a.floor))
            share = f"{a.cfg.energy:.0%} of ||G||^2"
            out.append(f"          rank: least multiple of {step} from {least} on that holds {share}")
        if not e.adapters:
            out.append(f"          grad_norm is estimated without bias from {PROBE} random columns")
    if late := sum(b.units[0].deferred for b in e.bases):
        out.append(f"lift      deferred to the next basis for {late} of {len(e.bases)} bases")
    if e.adapters:
        out += _adapters(e)
    if e.grouped:
        out += velora.lines(e)
    for rate in {u.mag.rate for u in e.units if u.mag}:
        lr = f"{e.param_groups[0]['lr'] * rate:.1e}".replace("e-0", "e-")
        out.append(f"rows      a magnitude and a direction each; magnitudes by adam, lr {lr}")
        out.append("          their gradient needs y: each layer's output is kept for backward")
    if any(u.noise and u.param.dtype == torch.bfloat16 for u in e.units):
        out.append("rounding  bf16 weights stochastically, at every update")
    if e.cfg.rounding == "nearest" and all(u.param.dtype != torch.bfloat16 for u in e.units):
        out.append("rounding  optim.rounding=nearest changes nothing: no weight is bf16")
    if e.accum_steps > 1 and not e.bases and e.in_backward:
        whole = sum(math.prod(u.shape) * u.param.element_size() for u in e.units) / GIB
        out.append(f"gradients {whole:.2f} GiB are held over {e.accum_steps} micro-batches")
    return out


def _adapters(e: Engine) -> list[str]:
    """What an adapter is here: GradNormLoRP's Definition 1, in words."""
    a, w = e.adapters[0], "W0 + I J"
    out = []
    if a.how.normalize:
        rate = f"{e.param_groups[0]['lr'] * a.units[2].scale:.1e}".replace("e-0", "e-")
        out.append(f"          n: norms of the rows of {w}; mag: by adam, lr {rate}")
        w = f"mag ({w}) / n"
    out.insert(0, f"adapters  W = {w}; W0 rests, I is (out, {a.r}) and J ({a.r}, in)")
    core = f"in bases on both sides, {a.bases[0].r} x {a.bases[0].r}" if a.bases else "whole"
    every = f"every {a.how.merge_every} steps" if a.how.merge_every else "never"
    return [*out, f"          gradients of I and J {core}", f"          I J merged into W0 {every}"]
