"""Linear layer and cross-entropy in one: the summed loss of a vocabulary head without holding all logits.

    logits = h W^T        NLL_t = logsumexp(logits_t) - logits_t[label_t]
    d NLL_t / d logits_t = softmax(logits_t) - onehot(label_t)

The loss ends the graph, so its gradients are formed in the forward, a chunk of tokens at a time: the chunk's
logits are overwritten by their gradient, which goes straight into dh and dW. What remains is dh (N, D) and
dW (V, D) in fp32. Where one chunk holds all tokens dW waits for backward instead, beside which nothing of
fp32 is ever whole: at 256 tokens of a 7B model the peak of a step falls by 0.46 GiB.

Precision: matrix products in h's dtype (autocast's if it is on), softmax and loss in fp32, dW summed over
chunks in fp32; everything in float64 when the inputs are. The chunk's gradients are those of the plain sum,
entries of order 1; the caller's 1/tokens arrives as grad_output and multiplies once, in fp32, at the end, so
that nothing small is rounded on the way.

N tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import kernels

IGNORE = -100  # a label that counts nowhere
# Logits in a chunk. GPU: 0.5 GiB in bf16, 8192 tokens of 32,000; fp32 dW is read and written once a chunk,
# which smaller chunks would pay for. CPU: 16 MiB in fp32, so that the softmax's passes stay in the cache.
CHUNK = {"cuda": 2**28, "cpu": 2**22}
SLICE = 2**22  # numbers of dW that are in fp32 at a time, 16 MiB: 1024 of 7B's rows, a wave of tiles


def linear_cross_entropy(
    h: Tensor,  # (N, D) any float dtype
    weight: Tensor,  # (V, D) any float dtype
    labels: Tensor,  # (N,) int64, IGNORE where nothing is to be predicted
    *,
    impl: Literal["chunked", "plain"] = "chunked",  # plain holds all logits and is the reference
    chunk: int | None = None,  # tokens in a chunk; None: from CHUNK
) -> Tensor:
    """Sum of the token losses, an fp32 scalar (float64 for float64 inputs); 0 if all labels are ignored."""
    if impl == "plain":
        logits = F.linear(h, weight)
        return F.cross_entropy(
            logits.to(_accumulator(logits.dtype)), labels, ignore_index=IGNORE, reduction="sum"
        )
    kind = h.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype
    if chunk is None:
        chunk = max(1, CHUNK.get(kind, CHUNK["cuda"]) // weight.shape[0])
    pieces = max(1, -(-h.shape[0] // chunk))
    chunk = max(1, -(-h.shape[0] // pieces))  # even pieces: the last one is as large as the others
    if torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(h, weight, labels, dtype, chunk)
    with torch.no_grad():
        return _run(h, weight, labels, dtype, chunk, False, False, False)[0]


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype, chunk: int
    ) -> Tensor:
        need_h, need_weight = ctx.needs_input_grad[:2]
        ctx.waits = need_weight and h.shape[0] <= chunk
        loss, dh, dw, dlogits = _run(
            h, weight, labels, dtype, chunk, need_h, need_weight and not ctx.waits, True
        )
        ctx.save_for_backward(dh, dw, *((dlogits, h.to(dtype)) if ctx.waits else ()))
        ctx.dtypes = h.dtype, weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dh, dw, *waiting = ctx.saved_tensors
        of_h, of_weight = ctx.dtypes
        dh = None if dh is None else _scaled(dh, grad, of_h)
        if ctx.waits:
            dlogits, h = waiting
            dw = _scaled_product(dlogits, h, grad, of_weight)
        elif dw is not None:
            dw = _scaled(dw, grad, of_weight)
        return dh, dw, None, None, None


def _scaled(g: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """g * scale in fp32, rounded once to dtype, with no temporary on CUDA.

    A 0-dimensional scale would be rounded to bf16 before it multiplies a bf16 g: up to 0.4% on all gradients.
    """
    return torch.mul(g, scale.reshape(1, 1), out=torch.empty_like(g, dtype=dtype))


def _scaled_product(dlogits: Tensor, h: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """dlogits^T h * scale, (V, D): products and scale in fp32, rounded once to dtype."""
    (V, D), acc = (dlogits.shape[1], h.shape[1]), _accumulator(h.dtype)
    out, rows = torch.empty(V, D, dtype=dtype, device=h.device), max(1, SLICE // D)
    buffer = torch.empty(min(rows, V), D, dtype=acc, device=h.device)
    with torch.autocast(h.device.type, enabled=False):
        for start in range(0, V, rows):
            a = dlogits[:, start : start + rows].t()
            part = buffer[: a.shape[0]]
            if acc == h.dtype:
                torch.mm(a, h, out=part)
            elif h.is_cuda:
                torch.mm(a, h, out_dtype=acc, out=part)
            else:
                part.copy_(torch.mm(a, h))
            torch.mul(part, scale.reshape(1, 1), out=out[start : start + rows])
    return out


def _run(
    h: Tensor,
    weight: Tensor,
    labels: Tensor,
    dtype: torch.dtype,
    chunk: int,
    need_h: bool,
    need_w: bool,
    gradients: bool,  # needed later; need_h and need_w: now
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Loss and, where needed, dh (N, D) in dtype and dW (V, D) in fp32, both for the unscaled sum; and the
    last chunk's logits (chunk, V) or, with gradients, theirs."""
    N, acc = h.shape[0], _accumulator(dtype)
    with torch.autocast(h.device.type, enabled=False):
        h, weight = h.to(dtype), weight.to(dtype)
        nll = torch.empty(N, dtype=acc, device=h.device)
        dh = torch.empty_like(h) if need_h else None
        dw = torch.zeros(weight.shape, dtype=acc, device=h.device) if need_w else None
        buffer = torch.empty(min(chunk, N), weight.shape[0], dtype=dtype, device=h.device)
        for start in range(0, N, chunk):
            part = slice(start, start + chunk)
            rows = h[part]
            logits = torch.mm(rows, weight.t(), out=buffer[: rows.shape[0]])
            nll[part] = kernels.cross_entropy_(logits, labels[part], gradients, IGNORE)
            if dh is not None:
                torch.mm(logits, weight, out=dh[part])
            if dw is not None:
                _add_product_(dw, logits.t(), rows)
        return nll.sum(), dh, dw, buffer


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (V, D) += a (V, n) b (n, D); total in fp32 also where a and b are bf16."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)  # bf16 operands, fp32 sum and result
    else:
        total.add_(torch.mm(a, b))
