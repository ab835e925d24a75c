"""What the kernels compute, in plain torch, in any float dtype. These functions are the specification.

State of one tensor: a dict. "m" and "v" of its shape in fp32, bf16 or (float64 weights) float64, or in 8 bit:
"m" int8, "v" uint8, "m_scale", "v_scale" (rows, ceil(cols / 256)) fp32, and, where the columns of the tensor
differ much, "d" (cols,) fp32: m / d and v / d^2 are what is quantised.
"""

from __future__ import annotations

from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor

QUANT = (
    256  # numbers that share a scale; a block never crosses a row, so any split by rows gives the same codes
)
FLOOR = 2.0**-100  # least scale: FLOOR / 255^2, what a code 1 decodes to, is still a normal fp32 number
PROBE = 16  # columns of the norm probe that its kernel takes
SECOND = ("v",)  # state that is never negative: unsigned codes, stochastic rounding in bf16


class Column(IntEnum):
    """Columns of a parameter's row of per-step scalars: on the device, never read by the host."""

    LR = 0  # the parameter's own, scale included
    KEEP = 1  # 1 - lr * decay
    CLIP = 2  # coefficient on the gradient
    OK = 3  # 0: the gradient is not finite, skip
    T = 4  # updates of this parameter, this one included
    INDEX = 5  # of the parameter: tells random numbers apart
    FIX1 = 6  # the rule's own: for Adam 1 - beta1^t
    FIX2 = 7  # and 1 - beta2^t


def adam_core(
    g: Tensor,  # gradient, any float dtype, before clipping
    state: dict[str, Tensor],  # "m" and "v" of g's shape, in place
    h: Tensor,  # (8,) fp32 or float64: Column
    beta1: float,
    beta2: float,
    wide: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Both parts of Adam's direction, top / (root + eps): Kingma and Ba, Algorithm 1.

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  top = m / fix1;  root = sqrt(v) / sqrt(fix2)

    eps is added to the corrected root, as in the paper and in torch.optim.AdamW. The fresh moments are used
    before they are rounded.
    """
    m, v, g = load(state, "m", wide), load(state, "v", wide), g.to(wide) * h[Column.CLIP]
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    for name, value in (("m", m), ("v", v)):
        save_(state, name, value, h[Column.OK], h[Column.T], h[Column.INDEX])
    return m / h[Column.FIX1], torch.sqrt(v) / torch.sqrt(h[Column.FIX2])


def _direction(
    g: Tensor, state: dict[str, Tensor], h: Tensor, beta1: float, beta2: float, eps: float, wide: torch.dtype
) -> Tensor:
    top, root = adam_core(g, state, h, beta1, beta2, wide)
    return top / (root + eps)


def adam(
    w: Tensor,  # weights, any shape and float dtype, updated in place
    g: Tensor,  # gradient, of w's shape, any float dtype
    state: dict[str, Tensor],  # in place
    h: Tensor,  # (8,) fp32 or float64: Column
    beta1: float,
    beta2: float,
    eps: float,
    noise: bool = False,  # a bf16 w is rounded stochastically: write_
) -> None:
    """One AdamW update (Loshchilov and Hutter, Algorithm 2), all in fp32 (float64 weights: float64).

    w <- keep w - lr direction. Where ok is 0 nothing changes.
    """
    wide = torch.promote_types(w.dtype, torch.float32)
    direction = _direction(g, state, h, beta1, beta2, eps, wide)
    new = w.to(wide) * h[Column.KEEP] - h[Column.LR] * direction
    write_(w, torch.where(h[Column.OK] > 0, new, w.to(wide)), h if noise else None)


def adam_direction(
    g: Tensor,  # (rows, cols) projected gradient, any float dtype and strides
    state: dict[str, Tensor],  # in place
    h: Tensor,  # (8,) fp32 or float64: Column
    beta1: float,
    beta2: float,
    eps: float,
    dtype: torch.dtype,  # of the result
) -> Tensor:
    """(rows, cols): -lr direction, to be lifted to the weight; zero and the state untouched where ok is 0."""
    wide = torch.promote_types(g.dtype, torch.float32)
    direction = _direction(g, state, h, beta1, beta2, eps, wide)
    return torch.where(h[Column.OK] > 0, -h[Column.LR] * direction, 0.0).to(dtype)


def adam_parts(
    g: Tensor,  # (rows, cols), any float dtype and strides
    state: dict[str, Tensor],  # in place
    h: Tensor,  # (8,) fp32 or float64: Column
    beta1: float,
    beta2: float,
) -> Tensor:
    """(2, rows, cols) fp32 (float64 g: float64): -lr top and root, for grouped_; zero and the state untouched
    where ok is 0."""
    parts = torch.stack(adam_core(g, state, h, beta1, beta2, torch.promote_types(g.dtype, torch.float32)))
    parts[0] *= -h[Column.LR]
    return torch.where(h[Column.OK] > 0, parts, 0.0)


def grouped_(
    w: Tensor,  # (rows, groups size) any float dtype, rows that may lie apart; in place
    parts: Tensor,  # (2, rows, groups) wide: adam_parts; or (rows, groups) any float dtype: a step A itself
    direction: Tensor,  # (size,) any float dtype: d
    eps: float,
    keep: Tensor | None,  # 0-dim wide: 1 - lr * decay; None without decay
    h: Tensor | None,  # as write_ takes it
) -> None:
    """W <- keep W + U, rounded once: U[o, j size + q] = top[o, j] d[q] / (root[o, j] |d[q]| + eps), which is
    -lr times Adam's direction for gradients A (x) d, whatever eps; or A[o, j] d[q]."""
    wide = torch.promote_types(w.dtype, torch.float32)
    d = direction.to(wide)
    if parts.ndim == 2:
        u = parts.to(wide)[:, :, None] * d
    else:
        u = parts[0, :, :, None] * d / (parts[1, :, :, None] * d.abs() + eps)
    write_(w, (w if keep is None else w.to(wide) * keep) + u.flatten(1), h)


def squares(
    tensors: list[Tensor],  # any shapes, strides and float dtypes
    dtype: torch.dtype,  # of the sums
) -> Tensor:
    """(n,): each tensor's sum of squares."""
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=dtype)).square()


def probe_squares(
    rs: list[Tensor],  # (rows, r) gradients in a basis Q, any float dtype and strides
    zs: list[Tensor],  # (rows, k) G S
    crosses: list[Tensor],  # (r, k) Q^T S
    dtype: torch.dtype,
) -> Tensor:
    """(2, n): ||R||^2, and ||Z - R Q^T S||^2, which is S's view of the part of G that Q does not hold."""
    outside = [torch.addmm(z, r, cross, alpha=-1) for r, z, cross in zip(rs, zs, crosses, strict=True)]
    return squares([*rs, *outside], dtype).view(2, -1)


def load(state: dict[str, Tensor], name: str, wide: torch.dtype) -> Tensor:
    """state[name], whatever its store, as a fresh tensor of dtype `wide` (fp32 or float64)."""
    stored, scales = state[name], state.get(f"{name}_scale")
    if scales is None:
        return stored.to(wide, copy=True)
    x = dequantise(stored.view(-1, stored.shape[-1]), scales, wide=wide)
    if "d" in state:
        d = state["d"].to(wide)
        x *= d * d if name in SECOND else d
    return x.view(stored.shape)


def save_(
    state: dict[str, Tensor],
    name: str,
    value: Tensor,  # of the state's shape, fp32 or float64
    ok: Tensor,  # () nothing changes where it is 0
    t: Tensor,  # () with `index` the seed of stochastic rounding
    index: Tensor,  # ()
) -> None:
    """state[name] <- value, rounded to its store.

    bf16 rounds "v" stochastically, seeded by (t, index, element): with beta2 = 0.999 every one of the 128
    bf16 mantissas times 0.999 rounds back to itself, so nearest rounding would never let v fall.
    """
    stored, scales, second = state[name], state.get(f"{name}_scale"), name in SECOND
    if scales is not None:
        if "d" in state:
            inverse = 1 / state["d"].to(value.dtype)
            value = value * (inverse * inverse if second else inverse)
        codes, fresh = quantise(value.reshape(-1, value.shape[-1]), signed=not second)
        scales.copy_(torch.where(ok > 0, fresh, scales))
        value = codes.view(stored.shape)
    elif second and stored.dtype == torch.bfloat16:
        value = stochastic_bf16(value.reshape(-1), t, index).view(stored.shape)
    stored.copy_(torch.where(ok > 0, value, stored))


def rescale_(
    state: dict[str, Tensor],  # 8-bit, with "d"
    names: tuple[str, ...],  # of the moments
    d: Tensor,  # (cols,) fp32: the new column scale
) -> None:
    """The moments' values stay, up to rounding; what is quantised is m / d and v / d^2 for the new d."""
    values = {name: load(state, name, d.dtype) for name in names}
    state["d"].copy_(d)
    yes = d.new_ones(())
    for name, value in values.items():
        save_(state, name, value, yes, yes, yes)


def divisor(mag: Tensor, least: float) -> Tensor:
    """mag, kept away from zero."""
    return torch.where(mag < 0, mag.clamp(max=-least), mag.clamp(min=least))


def tangent_(
    x: Tensor,  # (rows, cols) contiguous, any float dtype, in place: G [Q, S]
    a: Tensor,  # (rows, cols) like x: W [Q, S]
    sums: Tensor,  # (rows,) wide: sums over tokens of dY * y
    mag: Tensor,  # (rows,) wide
    n: Tensor,  # (rows,) wide: lengths of V's rows
    least: float,  # of |mag| as a divisor
    beside: tuple[Tensor, Tensor, Tensor] | None = None,  # C (rows, r), C Q^T S (rows, cols - r), rho (rows,)
) -> Tensor:
    """x <- mag / n (x - s / mag A), what of the gradient is V's; s = sums / mag (rows,) wide: mag's.
    A: a, or rho a + [C, C Q^T S] (optim/lift.py)."""
    mag, a = divisor(mag, least), a.to(n.dtype)
    if beside is not None:
        a = a * beside[2][:, None] + torch.cat(beside[:2], 1).to(n.dtype)
    s = sums / mag
    x.copy_((mag / n)[:, None] * (x.to(n.dtype) - (s / mag)[:, None] * a))
    return s


def magnitude_(
    state: dict[str, Tensor],  # "mag", "n" (rows,), "mag_m", "mag_v" (1, rows): wide, in place
    s: Tensor,  # (rows,) wide: gradient of mag
    x: Tensor,  # (rows, cols) any float dtype, like a and b
    a: Tensor,  # sums over a row of x * a: of the step of V times mag / n V
    b: Tensor,  # sums over a row of x * b: of that step's square
    h: Tensor,  # (8,) Column
    rate: float,  # mag runs at LR * rate
    beta1: float,
    beta2: float,
    eps: float,
    least: float,  # of |mag| as a divisor
    beside: tuple[Tensor, Tensor] | None = None,  # in place: C (rows, cols), rho (rows,)
    noise: bool = False,  # a bf16 C is rounded as write_ does with h
) -> tuple[Tensor, Tensor]:
    """Adam on mag, and the new length of V: W <- keep W + factor dV. keep, factor (rows,) wide. Nothing
    changes where OK is 0. With beside rho a + C stands for a, and C <- keep C + factor x, rho <- keep rho."""
    mag, n, ok = divisor(state["mag"], least), state["n"], h[Column.OK] > 0
    a = a.to(n.dtype)
    if beside is not None:
        a = a * beside[1][:, None] + beside[0].to(n.dtype)
    along, square = ((x.to(n.dtype) * t.to(n.dtype)).sum(1) for t in (a, b))
    moments = {"m": state["mag_m"], "v": state["mag_v"]}
    moved = adam_direction(s[None], moments, h, beta1, beta2, eps, n.dtype)[0] * rate
    new = torch.where(ok, h[Column.KEEP], 1.0) * state["mag"] + moved
    length = (n.square() + 2 * (n / mag) * along + square).clamp(min=0).sqrt()
    length = torch.where(ok, length.clamp(min=torch.finfo(n.dtype).tiny), n)
    keep = torch.where(ok, new * n / (length * mag), 1.0)
    state["mag"].copy_(new)
    n.copy_(length)
    if beside is not None:
        rows_(beside[0], x, keep, new / length, h if noise else None)
        beside[1].mul_(keep)
    return keep, new / length


def rows_(
    w: Tensor,  # (out, in) any float dtype, in place
    product: Tensor,  # (out, in) any float dtype
    keep: Tensor | None,  # (out,) wide, or 0-dim; None: 1
    factor: Tensor | None,  # (out,) wide; None: 1
    h: Tensor | None,  # as write_ takes it
) -> None:
    """W <- keep W + factor product, row by row, rounded once."""
    wide = torch.promote_types(w.dtype, torch.float32)
    kept, new = w.to(wide), product.to(wide)
    if keep is not None:
        kept = kept * keep.view(-1, 1).to(wide)
    write_(w, kept + (new if factor is None else new * factor[:, None].to(wide)), h)


def write_(
    w: Tensor,  # any shape, strides and float dtype, in place
    new: Tensor,  # of w's shape, wide
    h: Tensor | None,  # (8,) Column: a bf16 w is rounded stochastically by its t and index; None: to nearest
) -> None:
    """w <- new; the random bits are also of the number's place in a contiguous w.

    bf16 numbers are 2^-8 to 2^-7 of themselves apart; to nearest, updates of less than half of that are lost.
    """
    if h is not None and w.dtype == torch.bfloat16:
        new = stochastic_bf16(new.reshape(-1), h[Column.T], h[Column.INDEX], high=True).view(w.shape)
    w.copy_(new)


def quantise(
    x: Tensor,  # (rows, cols) fp32 or float64, x >= 0 unless signed
    signed: bool,
) -> tuple[Tensor, Tensor]:
    """Codes (rows, cols) int8 (unsigned: uint8) and scales (rows, ceil(cols / 256)) fp32, 2^-100 at least.

    With a = the block's largest |x|, the scale, and halves rounded to even:
    signed    round(127 x / a)
    unsigned  round(255 sqrt(x) / sqrt(a)), at least 1 where x > 0: with a second moment of 0 the next Adam
              step would divide by sqrt((1 - beta2) g^2)

    The dynamic map of bitsandbytes trained no better (CHANGELOG) and takes a search or a logarithm a number.
    """
    cols = x.shape[1]
    x = F.pad(x, (0, -cols % QUANT)).unflatten(1, (-1, QUANT))
    scales = x.abs().amax(2).clamp(min=FLOOR).float()
    a = scales.to(x.dtype)[:, :, None]
    if signed:
        codes = torch.round(x * (127 / a))
    else:
        codes = torch.maximum(torch.round(torch.sqrt(x) * (255 / torch.sqrt(a))), (x > 0).to(x.dtype))
    return codes.to(torch.int8 if signed else torch.uint8).flatten(1)[:, :cols].contiguous(), scales


def dequantise(
    codes: Tensor,  # (rows, cols) int8: signed, or uint8
    scales: Tensor,  # (rows, ceil(cols / 256)) fp32
    wide: torch.dtype = torch.float32,
) -> Tensor:
    """(rows, cols) of dtype `wide`: a (c / 127) or a (c / 255)^2; the block's largest is exact."""
    c = codes.to(wide)
    x = c * (1 / 127) if codes.dtype == torch.int8 else (c * (1 / 255)).square()
    return x * scales.to(wide).repeat_interleave(QUANT, 1)[:, : c.shape[1]]


def stochastic_bf16(x: Tensor, t: Tensor, index: Tensor, high: bool = False) -> Tensor:
    """bf16 whose expectation is fp32 x (n,): adds 16 random bits below the mantissa, then truncates."""
    x = x.float()
    noisy = (x.view(torch.int32) + random_bits(x.numel(), t, index, high)) & -65536
    return torch.where(torch.isfinite(x), noisy.view(torch.float32), x).to(torch.bfloat16)


def random_bits(n: int, t: Tensor, index: Tensor, high: bool = False) -> Tensor:
    """int32 (n,) in [0, 65536), a function of (t, index, element): multiplies and xor-shifts of integers. The
    high 16 bits of the result are others than the low ones."""
    seed = t.to(torch.int64) * 0x9E3779B1 + index.to(torch.int64) * 0x632BE5AB
    h = (torch.arange(n, device=t.device, dtype=torch.int64) + seed) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h = ((h ^ (h >> shift)) * factor) & 0xFFFFFFFF
    h ^= h >> 16
    return (h >> 16 if high else h & 0xFFFF).to(torch.int32)


def cross_entropy_(
    logits: Tensor,  # (n, V) any float dtype; with grad overwritten by their gradient
    labels: Tensor,  # (n,) int64, `ignore` where nothing is to be predicted
    grad: bool,
    ignore: int = -100,
) -> Tensor:
    """Token losses (n,), fp32 (float64 logits: float64): logsumexp(logits) - logits[label], 0 where ignored.

    With grad the logits become the gradient of the plain sum, softmax - onehot, zero rows where ignored.
    """
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    valid = labels != ignore
    lse = torch.logsumexp(x, dim=1)
    target = x.gather(1, torch.where(valid, labels, 0)[:, None])[:, 0]
    if grad:
        hit = torch.arange(x.shape[1], device=x.device) == labels[:, None]
        p = torch.exp(x - lse[:, None])
        logits.copy_(torch.where(valid[:, None], torch.where(hit, p - 1.0, p), 0.0))
    return torch.where(valid, lse - target, 0.0)
