"""Public ops and the choice between kernel and reference."""

from __future__ import annotations

import os
from typing import Literal

import torch
from torch import Tensor

from . import history, reference

Impl = Literal["auto", "triton", "ref"]


State = dict[str, Tensor]  # of one tensor: reference.py says what is in it
FLOATS = (torch.float32, torch.bfloat16)


def choose(tensors: list[Tensor], impl: Impl, dtypes: tuple[torch.dtype, ...], problem: str = "") -> str:
    """ "triton" or "ref". ValueError where impl="triton" cannot run, with what is in the way."""
    for t in tensors:
        if problem:
            break
        if t.dtype not in dtypes:
            problem = f"dtype {t.dtype}"
        elif not t.is_contiguous() or t.data_ptr() % 16:
            problem = "a tensor that is not contiguous on a 16-byte boundary"
    if impl == "triton" and problem:
        raise ValueError(f"impl=triton: {problem} is not supported; use ref or auto")
    if impl == "auto":
        return "triton" if not problem and tensors[0].is_cuda else "ref"
    return impl


def _kinds(
    ws: list[Tensor], gs: list[Tensor], states: list[State]
) -> dict[tuple[torch.dtype, ...], list[int]]:
    """Which parameters share their dtypes of weight, gradient and moments: those go in one launch."""
    kinds: dict[tuple[torch.dtype, ...], list[int]] = {}
    for n, (w, g, state) in enumerate(zip(ws, gs, states, strict=True)):
        kinds.setdefault((w.dtype, g.dtype, state["m"].dtype), []).append(n)
    return kinds


def plan(ws: list[Tensor], states: list[State]) -> dict[tuple[int, ...], Tensor] | None:
    """What adam_ needs to know of the sizes, made once; None for the reference.

    Gradients are expected in the weights' dtype.
    """
    if not ws[0].is_cuda and "TRITON_INTERPRET" not in os.environ:
        return None
    from . import adam

    kinds = _kinds(ws, ws, states)
    return {tuple(ns): adam.tile_table([ws[n] for n in ns], kind[2]) for kind, ns in kinds.items()}


def adam_(
    ws: list[Tensor],  # weights, one tensor a parameter as in all lists, any shape; in place but for gs
    gs: list[Tensor],  # gradients
    states: list[State],  # "m" and "v", each parameter's in a store of its own
    table: Tensor,  # (parameters, 8) fp32 (float64 weights: float64), reference.Column
    plan: dict[tuple[int, ...], Tensor] | None,  # plan(ws, states)
    beta1: float,
    beta2: float,
    eps: float,
    noise: bool = False,  # bf16 weights are rounded stochastically
    impl: Impl = "auto",
) -> None:
    """reference.adam for every parameter; Triton takes one launch for all that share their dtypes."""
    for (weight, grad, moment), ns in _kinds(ws, gs, states).items():
        w, g, s = [ws[n] for n in ns], [gs[n] for n in ns], [states[n] for n in ns]
        problem = ""
        if weight != grad:
            problem = f"{grad} gradients of {weight} weights"
        if any("d" in state for state in s):
            problem = "a column scale in a dense update"
        tensors = [*w, *g, table, *(t for state in s for t in state.values())]
        if choose(tensors, impl, (*FLOATS, torch.int8, torch.uint8), problem) == "triton":
            from . import adam

            tiles = plan.get(tuple(ns)) if plan else None
            if tiles is None:
                tiles = adam.tile_table(w, moment)
            adam.launch(w, g, s, ns, table, tiles, beta1, beta2, eps, noise)
        else:
            for n in ns:
                reference.adam(ws[n], gs[n], states[n], table[n], beta1, beta2, eps, noise)


def adam_direction(
    g: Tensor,  # (rows, cols) projected gradient, contiguous in its rows, which may lie apart
    state: State,  # "m" and "v" of g's shape, in place
    h: Tensor,  # (8,) fp32 (float64 g: float64): the parameter's row of the table
    beta1: float,
    beta2: float,
    eps: float,
    dtype: torch.dtype,  # of the result
    impl: Impl = "auto",
) -> Tensor:
    """reference.adam_direction, same arguments: (rows, cols) contiguous, -lr times Adam's direction."""
    if _choose_direction(g, state, h, dtype, impl) == "ref":
        return reference.adam_direction(g, state, h, beta1, beta2, eps, dtype)
    from . import adam

    return adam.launch_direction(g, state, h, beta1, beta2, eps, dtype)


def adam_parts(g: Tensor, state: State, h: Tensor, beta1: float, beta2: float, impl: Impl = "auto") -> Tensor:
    """reference.adam_parts, same arguments, as of adam_direction: (2, rows, cols) contiguous."""
    if _choose_direction(g, state, h, torch.float32, impl) == "ref":
        return reference.adam_parts(g, state, h, beta1, beta2)
    from . import adam

    return adam.launch_direction(g, state, h, beta1, beta2, None, torch.float32)


def _choose_direction(g: Tensor, state: State, h: Tensor, dtype: torch.dtype, impl: Impl) -> str:
    problem = ""
    if g.dtype not in FLOATS or dtype not in FLOATS:
        problem = f"{g.dtype} to {dtype}"
    elif g.ndim != 2 or g.stride(1) != 1:
        problem = "a gradient whose rows are not contiguous"
    return choose([h, *state.values()], impl, (*FLOATS, torch.int8, torch.uint8), problem)


def grouped_(
    w: Tensor, parts: Tensor, direction: Tensor, eps: float, keep: Tensor | None, h: Tensor | None,
    impl: Impl = "auto",
) -> None:  # fmt: skip
    """reference.grouped_, same arguments: the update of a VeLoRA weight."""
    problem = f"dtype {parts.dtype} of the parts" if parts.dtype != torch.float32 else ""
    if parts.ndim != 3:
        problem = "a step that is not in parts"
    elif w.dtype not in FLOATS or w.stride(1) != 1:
        problem = f"{w.dtype} weights whose rows may not be contiguous"
    if choose([parts, direction], impl, FLOATS, problem) == "ref":
        reference.grouped_(w, parts, direction, eps, keep, h)
    else:
        from . import grouped

        grouped.launch(w, parts, direction, eps, keep, h)


def rescale_(state: State, names: tuple[str, ...], d: Tensor, impl: Impl = "auto") -> None:
    """reference.rescale_, same arguments: 8-bit moments under a new column scale."""
    problem = f"dtype {d.dtype}" if d.dtype != torch.float32 else ""
    tensors = [d, state["d"], *(state[k] for name in names for k in (name, f"{name}_scale"))]
    if choose(tensors, impl, (torch.float32, torch.int8, torch.uint8), problem) == "ref":
        reference.rescale_(state, names, d)
    else:
        from . import rescale

        rescale.launch(state, names, d)


def rows_(
    w: Tensor, product: Tensor, keep: Tensor | None, factor: Tensor | None, h: Tensor | None,
    impl: Impl = "auto",
) -> None:  # fmt: skip
    """reference.rows_, same arguments: the end of a lift that is more than a product."""
    given = [t for t in (keep, factor) if t is not None]
    wide = {t.dtype for t in given}
    problem = f"{w.dtype} with {wide}" if w.dtype not in FLOATS or wide - {torch.float32} else ""
    if choose([w, product, *given], impl, FLOATS, problem) == "ref":
        reference.rows_(w, product, keep, factor, h)
    else:
        from . import rows

        rows.launch(w, product, keep, factor, h)


def tangent_(
    x: Tensor, a: Tensor, sums: Tensor, mag: Tensor, n: Tensor, least: float,
    beside: tuple[Tensor, Tensor, Tensor] | None = None, impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """reference.tangent_, same arguments: s (rows,), and x becomes the direction's gradient."""
    wide = {t.dtype for t in (sums, mag, n, *(beside or ())[2:])}
    problem = f"{x.dtype} with {wide}" if wide != {torch.float32} else ""
    if choose([x, a, sums, mag, n, *(beside or ())], impl, FLOATS, problem) == "ref":
        return reference.tangent_(x, a, sums, mag, n, least, beside)
    from . import rows

    return rows.launch_tangent(x, a, sums, mag, n, least, beside)


def magnitude_(
    state: State, s: Tensor, x: Tensor, a: Tensor, b: Tensor, h: Tensor, rate: float,
    beta1: float, beta2: float, eps: float, least: float, beside: tuple[Tensor, Tensor] | None = None,
    noise: bool = False, impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """reference.magnitude_, same arguments: keep, factor (rows,)."""
    vectors = [s, h, *(state[k] for k in ("mag", "n", "mag_m", "mag_v")), *(beside or ())[1:]]
    wide = {t.dtype for t in vectors}
    problem = f"dtype {wide}" if wide != {torch.float32} else ""
    if a.stride(1) != 1 or a.dtype not in FLOATS:
        problem = f"{a.dtype} whose rows may not be contiguous"
    if choose([x, b, *vectors, *(beside or ())[:1]], impl, FLOATS, problem) == "ref":
        return reference.magnitude_(state, s, x, a, b, h, rate, beta1, beta2, eps, least, beside, noise)
    from . import rows

    return rows.launch_magnitude(state, s, x, a, b, h, rate, beta1, beta2, eps, least, beside, noise)


def natural_dots_(
    gs: list[Tensor],
    states: list[State],  # of histories of one length
    hs: list[Tensor],
    impl: Impl = "auto",
) -> Tensor:
    """history.natural_dots_ of each: (n, parts, 2, s), products in parts to be summed; each g is pushed."""
    ways = {_choose_natural(g, s, h, impl) for g, s, h in zip(gs, states, hs, strict=True)}
    if "ref" in ways:
        dots = [history.natural_dots_(g, s, h) for g, s, h in zip(gs, states, hs, strict=True)]
        return torch.stack(dots)[:, None]
    from . import natural

    return natural.launch_dots(gs, states, hs)


def natural_weights_(
    dots: Tensor,  # (n, parts, 2, s)
    states: list[State],
    hs: list[Tensor],
    damping: float,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """history.natural_weights_ of each: w (n, s), place (n, 1)."""
    if choose([dots, *(s["gram"] for s in states), *hs], impl, (torch.float32,)) == "ref":
        several = zip(dots.sum(1), states, hs, strict=True)
        ws, places = zip(*(history.natural_weights_(*x, damping) for x in several), strict=True)
        return torch.stack(ws), torch.stack(places)
    from . import natural

    return natural.launch_weights(dots, states, hs, damping)


def natural_direction_(
    g: Tensor, state: State, w: Tensor, place: Tensor, h: Tensor, beta1: float, beta2: float, eps: float,
    dtype: torch.dtype, impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """history.natural_direction_, same arguments: (rows, cols) contiguous, -lr times the direction of g~."""
    if _choose_natural(g, state, h, impl, dtype) == "ref":
        return history.natural_direction_(g, state, w, place, h, beta1, beta2, eps, dtype)
    from . import natural

    return natural.launch_direction(g, state, w, place, h, beta1, beta2, eps, dtype)


def _choose_natural(
    g: Tensor, state: State, h: Tensor, impl: Impl, dtype: torch.dtype = torch.float32
) -> str:
    problem = ""
    if dtype not in FLOATS:
        problem = f"{g.dtype} to {dtype}"
    elif g.dtype not in FLOATS or g.ndim != 2 or g.stride(1) != 1 or not g.numel():
        problem = f"{g.dtype} gradients of {g.ndim} dimensions, or whose rows are not contiguous,"
    elif g.data_ptr() % 16:
        problem = "a gradient that is not on a 16-byte boundary"
    tensors = [h, *(state[k] for k in ("history", "history_scale", "d") if k in state)]
    return choose(tensors, impl, (*FLOATS, torch.int8), problem)


def squares(
    tensors: list[Tensor],  # any shapes; not contiguous: (rows, cols) with contiguous rows, for Triton
    dtype: torch.dtype,  # of the sums: fp32 or float64
    impl: Impl = "auto",
) -> Tensor:
    """reference.squares, same arguments: (n,), of each tensor the sum of its numbers' squares."""
    kinds = {t.dtype for t in tensors}
    problem = f"dtype {dtype}" if dtype != torch.float32 else ""
    if len(kinds) > 1:
        problem = f"tensors of {' and '.join(map(str, kinds))}"
    elif not all(t.is_contiguous() or t.ndim == 2 and t.stride(1) == 1 for t in tensors):
        problem = "a tensor whose rows are not contiguous"
    elif not kinds <= set(FLOATS):
        problem = f"dtype {kinds.pop()}"
    if choose([tensors[0].new_empty(0)], impl, FLOATS, problem) == "ref":  # strides were judged above
        return reference.squares(tensors, dtype)
    from . import norms

    return norms.launch(tensors)


def probe_squares(
    rs: list[Tensor],
    zs: list[Tensor],
    crosses: list[Tensor],
    dtype: torch.dtype,  # of the sums: fp32 or float64
    impl: Impl = "auto",
) -> Tensor:
    """reference.probe_squares, same arguments: (2, n)."""
    kinds, every = {t.dtype for t in (*rs, *zs, *crosses)}, (*rs, *zs)
    problem = f"dtype {dtype}" if dtype != torch.float32 else ""
    if len(kinds) > 1 or not kinds <= set(FLOATS):
        problem = f"tensors of {' and '.join(sorted(map(str, kinds)))}"
    elif not all(t.stride(1) == 1 for t in every) or not all(c.is_contiguous() for c in crosses):
        problem = "a tensor whose rows are not contiguous"
    elif any(z.shape[1] != reference.PROBE for z in zs):
        problem = f"a probe of other than {reference.PROBE} columns"
    if choose([rs[0].new_empty(0)], impl, FLOATS, problem) == "ref":
        return reference.probe_squares(rs, zs, crosses, dtype)
    from . import norms

    return norms.launch_probe(rs, zs, crosses)


def cross_entropy_(
    logits: Tensor, labels: Tensor, grad: bool, ignore: int = -100, impl: Impl = "auto"
) -> Tensor:
    """reference.cross_entropy_, same arguments: token losses, and the logits' gradient in their place."""
    if choose([logits], impl, (torch.float32, torch.bfloat16)) == "ref":
        return reference.cross_entropy_(logits, labels, grad, ignore)
    from . import cross_entropy

    return cross_entropy.launch(logits, labels, grad, ignore)
