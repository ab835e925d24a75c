"""VeLoRA (Miles et al. 2024, arXiv 2405.17991): layers that keep of their input one number for each m.

Forward and the gradient of the input are exact. A sub-token s, m numbers of an input in a row, is kept as s.v
and stands for (s.v) v. With z (tokens, groups) of these products the weight's gradient is (dY^T z) (x) v, and
A = dY^T z (out, groups) is all that is formed, summed over micro-batches and ranks, and trained: a layer that
is projected on the input side with Q = I (x) v, Grouped. The whole matrix' Adam is rules/velora.py.
Norms and clips are of that gradient: ||A (x) v|| = ||A||. What W has outside of the span of Q it keeps.

Where we differ from published code: v is found from all micro-batches and ranks of the first step, not from
each rank's first micro-batch; z and v are in the weights' dtype, not in fp16, which inputs of down overflow;
moments are A's, exactly. Its scale on the gradient is not offered: Adam divides by it.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from . import subspace
from .assign import family_of, side_of
from .config import BasisConfig, OptimConfig, ProjectedConfig, Velora, either
from .layer import project
from .rules import velora as rules
from .rules.adam import Adam
from .rules.sgd import Sgd
from .unit import PROBE, Basis, Unit

if TYPE_CHECKING:
    from .engine import Engine

UNSEEN = (
    "VeLoRA's directions are not found yet. Before the first step let its micro-batches go forward:\n"
    "    with opt.observing():\n        for x in micro_batches: model(x)"
)
# Names of linears whose input something else keeps for backward: attention its output.
KEPT = re.compile(r"o|out|wo|dense")
# And whose output is kept for a magnitude only: that of others attention and SwiGLU keep, and of o a compiled
# block keeps the sum that it is a part of in its place.
ALONE = re.compile(r"down|w2|fc2")


@dataclass(eq=False)
class Grouped(Basis):
    """VeLoRA's: Q = I (x) v takes each m numbers of an input, a sub-token, to their product with v. It is not
    formed, and never replaced: `fresh` until `observing` has found v. No probe: ||A (x) v|| = ||A||."""

    grouped: ClassVar[bool] = True
    m: int = 1  # qs is v (m,), a unit vector
    how: str = "average"  # it is found: config.Velora.init
    beside: str = ""  # for the start table: what keeps the input anyway

    @property
    def q(self) -> Tensor:
        """Q as other bases have it (n, r)."""
        return torch.kron(torch.eye(self.r, dtype=self.qs.dtype, device=self.qs.device), self.qs[:, None])

    def _cross(self) -> Tensor:
        return self.qs.new_empty(self.r, 0)

    def _allocate(self, device: torch.device, dtype: torch.dtype) -> None:
        self.qs = torch.empty(self.m, dtype=dtype, device=device)
        self.cross = self._cross()

    def begin(self, seed: int, device: torch.device, dtype: torch.dtype) -> None:
        """A random v."""
        self._allocate(device, dtype)
        if device.type != "meta":
            wide = torch.promote_types(dtype, torch.float32)
            draw = subspace.mix(seed, self.index, 3)
            self.qs.copy_(subspace.random_basis(self.m, 1, draw, device, wide)[:, 0])


def short(u: Unit) -> str:
    """Its layer's name: v of model.layers.0.self_attn.v_proj.weight."""
    return u.name.removesuffix(".weight").rpartition(".")[2].removesuffix("_proj")


def give_groups(units: list[Unit], cfg: OptimConfig, how: Velora) -> list[Grouped]:
    """Bases of the layers that `how` names; their units learn theirs. ValueError says what does not fit."""
    if how.init not in how.INITS:
        raise ValueError(f"activations.init={how.init}: no such choice; choose {either(how.INITS)}")
    matrices = [u for u in units if u.role == "matrix" and type(u.owner) is nn.Linear]
    there, wanted = {short(u) for u in matrices}, set(how.layers)
    if not wanted or not wanted <= there:
        raise ValueError(
            f"activations.layers={list(how.layers)}: there is no such nn.Linear in a block; choose of "
            f"{sorted(there)}"
        )
    if isinstance(how.group, Mapping) and (others := sorted(set(how.group) - wanted)):
        raise ValueError(
            f"activations.group={how.group}: {others[0]} is not in activations.layers={list(how.layers)}; "
            "add it there or leave it out"
        )
    chosen = [u for u in matrices if short(u) in wanted]
    if isinstance(cfg, BasisConfig) and all(u in chosen for u in units if u.role == "matrix"):
        raise ValueError(
            f"activations.layers={list(how.layers)}: leaves no matrix to {cfg.name}; choose optim=adamw, or "
            "fewer layers"
        )
    bases: dict[tuple[str, int], Grouped] = {}
    for u in chosen:
        n, family = u.size[1], family_of(u)
        m = how.size(short(u), n)
        u.rule = rule_of(u, cfg)
        if (family, m) not in bases:
            b = Grouped(f"velora {u.name}", len(bases), "input", n, n // m, 0, how=how.init, m=m)
            b.fresh = how.init != "random"
            beside = [short(x) for x in matrices if family_of(x) == family and x not in chosen]
            alone = compressed(u, cfg) or not KEPT.fullmatch(short(u))
            b.beside = listed(beside) if beside else "" if alone else "attention"
            bases[family, m] = b
        u.q = bases[family, m]
        u.q.units.append(u)
    return list(bases.values())


def project_layers(model: nn.Module, units: list[Unit]) -> None:
    """Once nothing can be refused any more."""
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear]
    for u in units:
        if u.grouped:
            u.layers = [project(layer) for layer in layers if layer.weight is u.param]


def rule_of(u: Unit, cfg: OptimConfig) -> Adam | Sgd:
    rule = u.rule.dense
    if type(rule) is Adam:
        return rules.Velora(rule.beta1, rule.beta2, rule.eps)
    if isinstance(rule, Sgd):  # linear: its step (x) v is the whole matrix'
        return rule
    raise ValueError(
        f"activations.layers: {cfg.name} has no form for gradients A (x) v; Adam and gradient descent have"
    )


@contextmanager
def observing(e: Engine) -> Iterator[None]:
    """No gradients inside. v from the inputs of all forwards in it, on all ranks; it is any unit vector
    where these are zero or not finite."""
    sums: list[Tensor] = []
    hooks: list[Any] = []
    seen: set[int] = set()
    for b in e.grouped:
        wide = torch.promote_types(b.qs.dtype, torch.float32)
        found = torch.zeros([b.m] * (2 if b.how == "svd" else 1), dtype=wide, device=b.qs.device)

        def look(layer: nn.Module, args: tuple[Tensor, ...], b: Grouped = b, found: Tensor = found) -> None:
            seen.add(b.index)
            s = args[0][..., : b.n].reshape(-1, b.m).to(found.dtype)  # without padding
            found += s.t() @ s if found.ndim == 2 else s.sum(0)

        sums.append(found)
        hooks += [layer.register_forward_pre_hook(look) for layer in b.units[0].layers]
    try:
        e._eager.enter([e._paths[id(b.units[0].layers[0])] for b in e.grouped])  # hooks would be compiled
        with torch.no_grad():
            yield
    finally:
        e._eager.leave()
        e._form_g()
        for hook in hooks:
            hook.remove()
    if len(seen) < len(e.grouped):
        raise RuntimeError(UNSEEN)
    with torch.no_grad():
        for b, found in zip(e.grouped, sums, strict=True):
            if b.fresh:
                _settle(e, b, found)


def _settle(e: Engine, b: Grouped, found: Tensor) -> None:
    """v from the sum of sub-tokens (m,), or of their products with themselves (m, m)."""
    e.reduce.sum_(found)
    if found.ndim == 2:
        found = torch.linalg.eigh(torch.nan_to_num(found, 0.0, 0.0, 0.0))[1][:, -1]
    v = found / torch.linalg.vector_norm(found)
    b.qs.copy_(torch.where(torch.isfinite(v).all(), v, b.qs))
    e.reduce.from_owner_(b.qs, b.index)
    b.fresh = False


def lines(e: Engine) -> list[str]:
    """For the start table: what is kept of the inputs, and where something else keeps them anyway."""
    kinds: dict[str, list[str]] = {}
    freed, magnitudes = 0, any(u.mag for u in e.units)
    for b in e.grouped:
        before, what = b.n, "their input"
        if compressed(b.units[0], e.cfg) and (rank := max(x.r for x in e.bases)) < b.n:
            what, before = "x Q", rank + PROBE
        if b.beside:
            before, what = 0, f"more, {what} stays for {b.beside}"
        else:
            what = f"instead of {before}"
        out = sum(u.size[0] for u in b.units if magnitudes and ALONE.fullmatch(short(u)))
        if out:
            before, what = before + out, f"{what}, nor {out} of its output"
        kinds.setdefault(f"{b.r} numbers a token {what}", []).append(listed([short(u) for u in b.units]))
        freed += (before - b.r) * b.qs.element_size()
    said = [f"{', '.join(dict.fromkeys(names))}: {text}" for text, names in kinds.items()]
    said.append(f"in all {abs(freed) / 1024:.1f} KiB a token {'less' if freed > 0 else 'more'}")
    return textwrap.wrap(f"{'velora':<10}{'; '.join(said)}", 80, subsequent_indent=" " * 10)


def compressed(u: Unit, cfg: OptimConfig) -> bool:
    """Whether the method keeps x Q instead of the input, without VeLoRA."""
    return isinstance(cfg, ProjectedConfig) and side_of(u, cfg.side) != "output"


def listed(names: list[str]) -> str:
    """a, b and c."""
    return either(names).replace(" or ", " and ")
