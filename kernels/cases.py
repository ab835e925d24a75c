"""Every kernel with inputs as training has them: for check.py and bench.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import dispatch, history, reference
from .dispatch import Impl
from .reference import PROBE, QUANT, Column

BETAS = (0.9, 0.999, 1e-8)
STORES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


@dataclass
class Case:
    """make(rows, cols, device) -> inputs, the same numbers each time; call(inputs, impl) -> results: nests of
    tensors. bytes(inputs): moved at least, what is read and what is written."""

    name: str
    make: Callable[[int, int, torch.device], dict[str, Any]]
    call: Callable[[dict[str, Any], Impl], Any]
    bytes: Callable[[dict[str, Any]], int]


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def random(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    g = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=g, device=device).to(dtype)


def row(device: torch.device) -> Tensor:
    """A parameter's row of the table, in its third update."""
    h = {Column.LR: 1e-2, Column.KEEP: 0.999, Column.CLIP: 0.7, Column.OK: 1, Column.T: 3, Column.INDEX: 0}
    h |= {Column.FIX1: 0.271, Column.FIX2: 0.002997}
    return torch.tensor([h[c] for c in sorted(h)], device=device, dtype=torch.float32)


def falling(device: torch.device, cols: int) -> Tensor:
    return 1 / torch.arange(1, cols + 1, device=device)


def state(
    device: torch.device, rows: int, cols: int, store: str, d: Tensor | None = None
) -> dict[str, Tensor]:
    """Moments of gradients whose columns fall off as 1 / n, which a column scale d may even out."""
    fall = falling(device, cols)
    dtype, found = STORES[store], {} if d is None else {"d": d}
    wide = [random(device, rows, cols, dtype=torch.float32, seed=n) * fall for n in range(2)]
    for name, value in (("m", wide[0]), ("v", wide[1].square())):
        if store == "int8":
            found[name] = torch.empty(rows, cols, dtype=torch.uint8 if name == "v" else dtype, device=device)
            found[f"{name}_scale"] = torch.empty(rows, -(-cols // QUANT), device=device)
        else:
            found[name] = torch.empty(rows, cols, dtype=dtype, device=device)
        one = torch.ones((), device=device)
        reference.save_(found, name, value, one, one, one)
    return found


def past(device: torch.device, rows: int, cols: int) -> dict[str, Tensor]:
    """Natural GaLore's state with its four last gradients in 8 bit; the next one goes in the second place.

    With a column scale: without one, 0.2% of the numbers of a bf16 gradient are half of their block's largest
    to the bit, and 63.5 is rounded either way."""
    found = {
        "history": torch.zeros(4, rows, cols, dtype=torch.int8, device=device),
        "history_scale": torch.zeros(4 * rows, -(-cols // QUANT), device=device),
        "gram": torch.zeros(4, 4, device=device),
        "slot": torch.zeros(1, dtype=torch.int64, device=device),
        "filled": torch.full((), 4, device=device),
        "d": random(device, 1, cols, dtype=torch.float32)[0].abs() + 0.5,
    }
    one = torch.ones((), device=device)
    for n in range(4):
        g = random(device, rows, cols, dtype=torch.float32, seed=n + 1)
        history.push_(found, "history", found["slot"] + n, g, one, one, one)
    found["slot"] += 1
    return found


def _adam(store: str) -> Case:
    def make(rows: int, cols: int, device: torch.device) -> dict[str, Any]:
        w, g = random(device, rows, cols), random(device, rows, cols, seed=1) * 1e-2
        states = [state(device, rows, cols, store)]
        return {"w": w, "g": g, "state": states[0], "h": row(device), "plan": dispatch.plan([w], states)}

    def call(x: dict[str, Any], impl: Impl) -> Any:
        dispatch.adam_([x["w"]], [x["g"]], [x["state"]], x["h"][None], x["plan"], *BETAS, True, impl=impl)

    return Case(f"adam_{store}", make, call, lambda x: size(x["g"]) + 2 * size(x["w"], *x["state"].values()))


def _direction(store: str) -> Case:
    def make(rows: int, cols: int, device: torch.device) -> dict[str, Any]:
        both = random(device, rows, cols + PROBE, seed=2) / torch.arange(1, cols + PROBE + 1, device=device)
        own = state(device, rows, cols, store, 1.3 * falling(device, cols) if store == "int8" else None)
        return {"g": both.bfloat16()[:, :cols], "state": own, "h": row(device)}

    def call(x: dict[str, Any], impl: Impl) -> Any:
        return dispatch.adam_direction(x["g"], x["state"], x["h"], *BETAS, torch.bfloat16, impl=impl)

    return Case(f"direction_{store}", make, call, lambda x: 2 * size(x["g"]) + 2 * size(*x["state"].values()))


def _rescale() -> Case:
    def make(rows: int, cols: int, device: torch.device) -> dict[str, Any]:
        return {
            "state": state(device, rows, cols, "int8", 1.3 * falling(device, cols)),
            "d": 2 * falling(device, cols),
        }

    def call(x: dict[str, Any], impl: Impl) -> Any:
        dispatch.rescale_(x["state"], ("m", "v"), x["d"], impl=impl)

    return Case("rescale", make, call, lambda x: 2 * size(*x["state"].values()))


def _squares() -> Case:
    def make(rows: int, cols: int, device: torch.device) -> dict[str, Any]:
        return {"x": [random(device, rows, cols + PROBE, seed=n)[:, :cols] for n in range(3)]}

    def call(x: dict[str, Any], impl: Impl) -> Any:
        return dispatch.squares(x["x"], torch.float32, impl=impl)

    return Case("squares", make, call, lambda x: size(*x["x"]))


def _probe() -> Case:
    def make(rows: int, cols: int, device: torch.device) -> dict[str, Any]:
        both = [random(device, rows, cols + PROBE, seed=n) for n in range(3)]
        cross = random(device, cols, PROBE, seed=3) * 1e-2
        return {"r": [b[:, :cols] for b in both], "z": [b[:, cols:] for b in both], "cross": [cross] * 3}

    def call(x: dict[str, Any], impl: Impl) -> Any:
        # The kernel rounds nothing on the way: the reference of bf16 would.
        kinds = (x["r"], x["z"], x["cross"])
        r, z, cross = ([t.float() for t in ts] if impl == "ref" else ts for ts in kinds)
        return dispatch.probe_squares(r, z, cross, torch.float32, impl=impl)

    return Case("probe_squares", make, call, lambda x: size(*x["r"], *x["z"]))


def _cross_entropy() -> Case:
    def make(rows: int, cols: int, device: torch.device) -> dict[str, Any]:
        labels = torch.randint(cols, (rows,), generator=torch.Generator(device).manual_seed(0), device=device)
        labels[::7] = -100
        return {"logits": random(device, rows, cols) * 3, "labels": labels}

    def call(x: dict[str, Any], impl: Impl) -> Any:
        return dispatch.cross_entropy_(x["logits"], x["labels"], True, impl=impl)

    return Case("cross_entropy", make, call, lambda x: 2 * size(x["logits"]))


def _rows() -> Case:
    def make(rows: int, cols: int, device: torch.device) -> dict[str, Any]:
        keep, factor = (1 + 1e-3 * random(device, rows, dtype=torch.float32, seed=n) for n in (4, 5))
        product = random(device, rows, cols, seed=1) * 1e-2
        return {
            "w": random(device, rows, cols),
            "product": product,
            "keep": keep,
            "factor": factor,
            "h": row(device),
        }

    def call(x: dict[str, Any], impl: Impl) -> Any:
        dispatch.rows_(x["w"], x["product"], x["keep"], x["factor"], x["h"], impl=impl)

    return Case("rows", make, call, lambda x: 2 * size(x["w"]) + size(x["product"]))


def _tangent(deferred: bool) -> Case:
    def make(rows: int, cols: int, device: torch.device) -> dict[str, Any]:
        sums, mag, n, rho = (random(device, rows, dtype=torch.float32, seed=n) for n in (3, 4, 5, 6))
        x, a = (random(device, rows, cols + PROBE, seed=n) for n in range(2))
        c, z = random(device, rows, cols, seed=7), random(device, rows, PROBE, seed=8)
        both = {"x": x, "a": a, "sums": sums, "mag": mag.abs() + 1, "n": n.abs() + 1}
        return both | {"beside": (c, z, rho.abs() + 1) if deferred else None}

    def call(x: dict[str, Any], impl: Impl) -> Any:
        return dispatch.tangent_(x["x"], x["a"], x["sums"], x["mag"], x["n"], 1e-6, x["beside"], impl=impl)

    def moved(x: dict[str, Any]) -> int:
        return 2 * size(x["x"]) + size(x["a"], *(x["beside"] or ()))

    return Case("tangent_deferred" if deferred else "tangent", make, call, moved)


def _magnitude(side: str) -> Case:
    """Input side: of a step N and A = W Q; deferred: with C and rho beside. Output side: of P, W dV^T and
    P dV dV^T, fp32 beside bf16."""
    same, deferred = side != "output", side == "deferred"

    def make(rows: int, cols: int, device: torch.device) -> dict[str, Any]:
        names = ("mag", "n", "mag_m", "mag_v")
        own = {k: random(device, rows, dtype=torch.float32, seed=n).abs() + 1 for n, k in enumerate(names)}
        own |= {k: own[k][None] for k in ("mag_m", "mag_v")}
        a, s = random(device, rows, cols + PROBE, seed=1), random(device, rows, dtype=torch.float32)
        x = random(device, rows, cols, dtype=torch.bfloat16 if same else torch.float32) * 1e-3  # n stays > 0
        c, rho = random(device, rows, cols, seed=7), 1 + random(device, rows, dtype=torch.float32, seed=8) / 9
        b, beside = x if same else x * 0.5, (c, rho) if deferred else None
        return {"state": own, "s": s, "x": x, "a": a[:, :cols], "b": b, "h": row(device), "beside": beside}

    def call(x: dict[str, Any], impl: Impl) -> Any:
        given = (x["state"], x["s"], x["x"], x["a"], x["b"], x["h"], 0.5, *BETAS, 1e-6, x["beside"], True)
        return dispatch.magnitude_(*given, impl=impl)

    def moved(x: dict[str, Any]) -> int:
        others = () if same else (x["b"],)
        return size(x["x"], x["a"], *others) + 2 * size(*(x["beside"] or ())) + 11 * size(x["s"])

    return Case({"input": "magnitude"}.get(side, f"magnitude_{side}"), make, call, moved)


def _parts() -> Case:
    def make(rows: int, cols: int, device: torch.device) -> dict[str, Any]:
        g = random(device, rows, cols, seed=2)
        return {"g": g, "state": state(device, rows, cols, "int8"), "h": row(device)}

    def call(x: dict[str, Any], impl: Impl) -> Any:
        return dispatch.adam_parts(x["g"], x["state"], x["h"], *BETAS[:2], impl=impl)

    return Case("parts_int8", make, call, lambda x: 5 * size(x["g"]) + 2 * size(*x["state"].values()))


def _grouped() -> Case:
    def make(rows: int, cols: int, device: torch.device) -> dict[str, Any]:
        many = next(m for m in (32, 30, 1) if cols % m == 0)
        parts = random(device, 2, rows, cols // many, dtype=torch.float32, seed=1).abs() * 1e-2
        d = torch.nn.functional.normalize(random(device, many, seed=2), dim=0)
        return {"w": random(device, rows, cols), "parts": parts, "d": d, "h": row(device)}

    def call(x: dict[str, Any], impl: Impl) -> Any:
        dispatch.grouped_(x["w"], x["parts"], x["d"], BETAS[2], None, x["h"], impl=impl)

    return Case("grouped", make, call, lambda x: 2 * size(x["w"]) + size(x["parts"]))


def _natural_dots() -> Case:
    def make(rows: int, cols: int, device: torch.device) -> dict[str, Any]:
        return {
            "g": [random(device, rows, cols, seed=n) for n in range(3)],
            "state": [past(device, rows, cols) for _ in range(3)],
            "h": [row(device) for _ in range(3)],
        }

    def call(x: dict[str, Any], impl: Impl) -> Any:
        return dispatch.natural_dots_(x["g"], x["state"], x["h"], impl=impl).sum(1)

    return Case(
        "natural_dots", make, call, lambda x: size(*x["g"], *(t for s in x["state"] for t in s.values()))
    )


def _natural_weights() -> Case:
    def make(rows: int, cols: int, device: torch.device) -> dict[str, Any]:
        states, parts = [past(device, 8, 32) for _ in range(8)], 300
        for n, own in enumerate(states):
            g = random(device, 4, 64, dtype=torch.float32, seed=n)
            own["gram"] = g @ g.t()
        dots = torch.stack([own["gram"][1:3] for own in states])[:, None].expand(-1, parts, -1, -1) / parts
        return {"dots": dots.contiguous(), "state": states, "h": [row(device) for _ in states]}

    def call(x: dict[str, Any], impl: Impl) -> Any:
        return dispatch.natural_weights_(x["dots"], x["state"], x["h"], 1.0, impl=impl)

    return Case("natural_weights", make, call, lambda x: size(x["dots"], *(s["gram"] for s in x["state"])))


def _natural_direction() -> Case:
    def make(rows: int, cols: int, device: torch.device) -> dict[str, Any]:
        w = torch.tensor([0.1, 0.7, -0.2, 0.05], device=device)
        place = torch.ones(1, dtype=torch.int64, device=device)
        own = past(device, rows, cols)
        own |= state(device, rows, cols, "int8", own["d"])
        return {"g": random(device, rows, cols), "state": own, "w": w, "place": place, "h": row(device)}

    def call(x: dict[str, Any], impl: Impl) -> Any:
        return dispatch.natural_direction_(
            x["g"], x["state"], x["w"], x["place"], x["h"], *BETAS, torch.bfloat16, impl=impl
        )

    def moved(x: dict[str, Any]) -> int:
        moments = [x["state"][k] for k in ("m", "v", "m_scale", "v_scale")]
        return 2 * size(x["g"], *moments) + 3 * size(x["state"]["history"]) // 4

    return Case("natural_direction", make, call, moved)


CASES = {
    c.name: c
    for c in (
        *map(_adam, STORES), *map(_direction, STORES), _rescale(), _squares(), _probe(), _cross_entropy(),
        _rows(), *map(_tangent, (False, True)), *map(_magnitude, ("input", "output", "deferred")),
        _parts(), _grouped(), _natural_dots(), _natural_weights(), _natural_direction(),
    )
}  # fmt: skip
