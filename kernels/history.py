"""Natural GaLore's step between a gradient and Adam, in plain torch: what natural.py's kernels compute.

State of one tensor, beside its moments: "history" (s, rows, cols), its last s gradients in the moments' store
(8 bit: and "history_scale", with the moments' "d"), "gram" (s, s) wide, their products as they are stored,
"slot" (1,) int64, where the next one goes, and "filled" () int64, how many there are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import Column, adam_direction, load, save_


def push_(
    state: dict[str, Tensor],
    name: str,
    slot: Tensor,  # (1,) int64, on the device
    value: Tensor,  # of the shape of state[name][0], fp32 or float64
    ok: Tensor,  # () nothing changes where it is 0
    t: Tensor,  # () as of save_
    index: Tensor,
) -> None:
    """state[name][slot] <- value, rounded to its store. state[name] is signed, with a leading dimension."""
    stacked = state[name]
    parts = {name: stacked}
    if f"{name}_scale" in state:
        scales = state[f"{name}_scale"]
        parts[f"{name}_scale"] = scales.view(*stacked.shape[:-1], scales.shape[1])
    one = {k: x.index_select(0, slot)[0] for k, x in parts.items()}
    save_({**one, **({"d": state["d"]} if "d" in state else {})}, name, value, ok, t, index)
    for k, x in parts.items():
        x.index_copy_(0, slot, one[k][None])


def natural_dots_(
    g: Tensor,  # any shape, float dtype and strides
    state: dict[str, Tensor],  # "history" and "slot", in place
    h: Tensor,  # (8,) Column
) -> Tensor:
    """(2, s) wide: products of the clipped g, and of g as it is stored, with the last s gradients as they are
    stored, g being among them once as it is and once as it is stored. g is pushed unless OK is 0."""
    wide = torch.promote_types(g.dtype, torch.float32)
    g, slot = g.to(wide) * h[Column.CLIP], state["slot"]
    push_(state, "history", slot, g, h[Column.OK], h[Column.T], h[Column.INDEX])
    past = load(state, "history", g.dtype).flatten(1)
    stored = past.index_select(0, slot)
    past.index_copy_(0, slot, g.reshape(1, -1))
    two = torch.cat([past.index_select(0, slot), stored]).t()  # g as it is, g as it is kept
    dots = torch.cat([past @ two, stored @ two])  # (s + 1, 2)
    return torch.stack([dots[:-1, 0], dots[:-1, 1].index_copy(0, slot, dots[-1:, 1])])


def natural_weights_(
    dots: Tensor,  # (2, s) wide: natural_dots_, over all rows
    state: dict[str, Tensor],  # "gram", "slot" and "filled", in place
    h: Tensor,  # (8,) Column
    damping: float,
) -> tuple[Tensor, Tensor]:
    """w (s,) of g~ = sum of w_i h_i, and place (1,): which of them is g.

    lambda w, all from K / tr(K): with d = damping / c it is d (K / tr(K) + d I)^-1 e_n. The condition number
    is at most 1 + c / damping. An empty place is a row of zeros, and w is 0 there. Where OK is 0 the state
    stays.
    """
    gram, history, ok = state["gram"], len(state["gram"]), h[Column.OK] > 0
    slot, info = state["slot"].clone(), torch.finfo(gram.dtype)
    count = (state["filled"] + 1).clamp(max=history)
    system = _border(gram, slot, dots[0])
    trace = system.diagonal().sum()
    system = system * torch.where(trace > info.tiny / info.eps, 1 / trace, 0.0)
    damp = damping / count.to(gram.dtype)
    system.diagonal().add_(damp)
    factor, _ = torch.linalg.cholesky_ex(system)
    newest = torch.zeros_like(gram[:, :1]).index_fill_(0, slot, 1.0)
    half = torch.linalg.solve_triangular(factor, newest, upper=False)
    w = torch.linalg.solve_triangular(factor.t(), half, upper=True)[:, 0] * damp
    gram.copy_(torch.where(ok, _border(gram, slot, dots[1]), gram))
    state["filled"].copy_(torch.where(ok, count, state["filled"]))
    state["slot"].copy_(torch.where(ok, (slot + 1) % history, slot))
    return w, slot


def natural_mix(
    g: Tensor,  # any shape, float dtype and strides
    state: dict[str, Tensor],  # "history"
    w: Tensor,  # (s,) wide: natural_weights_
    place: Tensor,  # (1,) int64
    h: Tensor,  # (8,) Column
) -> Tensor:
    """g~ of g's shape, wide: the clipped g, as it is, and the others as they are stored, weighted."""
    wide = torch.promote_types(g.dtype, torch.float32)
    past = load(state, "history", wide).flatten(1)
    past.index_copy_(0, place, (g.to(wide) * h[Column.CLIP]).reshape(1, -1))
    return (w @ past).view(g.shape)


def natural_direction_(
    g: Tensor,  # (rows, cols) any float dtype and strides
    state: dict[str, Tensor],  # "history"; "m" and "v" in place
    w: Tensor,  # (s,) wide: natural_weights_
    place: Tensor,  # (1,) int64
    h: Tensor,  # (8,) Column
    beta1: float,
    beta2: float,
    eps: float,
    dtype: torch.dtype,  # of the result
) -> Tensor:
    """(rows, cols): adam_direction of natural_mix; zero and the moments untouched where OK is 0."""
    row = h.clone()
    row[Column.CLIP].fill_(1.0)  # g~ is of the clipped g
    return adam_direction(natural_mix(g, state, w, place, h), state, row, beta1, beta2, eps, dtype)


def _border(gram: Tensor, slot: Tensor, row: Tensor) -> Tensor:
    """K with one row and column replaced."""
    return gram.index_copy(0, slot, row[None]).index_copy(1, slot, row[:, None])
