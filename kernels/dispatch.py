"""Public ops and the choice between kernel and reference."""

from __future__ import annotations

import os
from typing import Literal

import torch
from torch import Tensor

from . import reference

Impl = Literal["auto", "triton", "ref"]


def choose(tensors: list[Tensor], impl: Impl, dtypes: tuple[torch.dtype, ...]) -> str:
    """ "triton" or "ref". ValueError where impl="triton" cannot run, with what is in the way."""
    problem = ""
    for t in tensors:
        if t.dtype not in dtypes:
            problem = f"dtype {t.dtype}"
        elif not t.is_contiguous() or t.data_ptr() % 16:
            problem = "a tensor that is not contiguous on a 16-byte boundary"
        if problem:
            break
    if impl == "triton" and problem:
        raise ValueError(f"impl=triton: {problem} is not supported; use ref or auto")
    if impl == "auto":
        return "triton" if not problem and tensors[0].is_cuda else "ref"
    return impl


def plan(ws: list[Tensor]) -> Tensor | None:
    """What adam_ needs to know of the sizes, made once: 8 bytes for 2048 numbers; None for the reference."""
    if not ws[0].is_cuda and "TRITON_INTERPRET" not in os.environ:
        return None
    from . import adam

    return adam.block_table([w.numel() for w in ws], ws[0].device)


def adam_(
    ws: list[Tensor],  # weights, one tensor a parameter as in all lists, any shape; in place but for gs
    gs: list[Tensor],  # gradients
    ms: list[Tensor],  # first moments
    vs: list[Tensor],  # second moments
    table: Tensor,  # (parameters, 8) fp32 (float64 weights: float64), reference.Column
    blocks: Tensor | None,  # plan(ws)
    beta1: float,
    beta2: float,
    eps: float,
    impl: Impl = "auto",
) -> None:
    """reference.adam for every parameter.

    Triton does it in one launch and needs all weights of one dtype, likewise gradients and moments.
    """
    kinds = {tuple(t.dtype for t in four) for four in zip(ws, gs, ms, vs, strict=True)}
    wanted = impl if len(kinds) == 1 or impl != "auto" else "ref"
    if choose([*ws, *gs, *ms, *vs], wanted, (torch.float32, torch.bfloat16)) == "triton":
        from . import adam

        if blocks is None:
            blocks = adam.block_table([w.numel() for w in ws], table.device)
        adam.launch(ws, gs, ms, vs, table, blocks, beta1, beta2, eps)
        return
    for n, (w, g, m, v) in enumerate(zip(ws, gs, ms, vs, strict=True)):
        reference.adam(w.view(-1), g.view(-1), m.view(-1), v.view(-1), table[n], beta1, beta2, eps)


def cross_entropy_(
    logits: Tensor, labels: Tensor, grad: bool, ignore: int = -100, impl: Impl = "auto"
) -> Tensor:
    """reference.cross_entropy_, same arguments: token losses, and the logits' gradient in their place."""
    if choose([logits], impl, (torch.float32, torch.bfloat16)) == "ref":
        return reference.cross_entropy_(logits, labels, grad, ignore)
    from . import cross_entropy

    return cross_entropy.launch(logits, labels, grad, ignore)
