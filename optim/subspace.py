"""Bases: which r directions of a gradient are kept, and how moments move when they change.

Functions on tensors, written for the row space. `gs` is a list of gradients (out_i, n) that share one basis
Q (n, r) with orthonormal columns; the default finder never forms their stack G (sum of out_i, n). For a basis
of the column space pass [G.t()]. Arithmetic is in fp32 without TF32, in float64 if any input is.

Finders of the r leading right singular vectors:

warm        subspace iteration from the old basis, Q <- orth(G^T orth(G Q)), in products and r x r Cholesky
            factors only. Bare CholeskyQR2 (Fukaya et al. 2014) fails on the condition number of a gradient,
            whose rank is often far below r; so the first factor is damped, as in shifted CholeskyQR3
            (Fukaya et al. 2020). Where G has no directions left the old ones stay.
svd         exact (GaLore).
randomized  range finder with power iterations (Halko et al. 2011, algorithms 4.4 and 5.1).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

FOUND, FALLBACK, KEPT = 0, 1, 2
# Of a refresh. On 108 gradients of 1B and 7B runs, steps 5 to 500: residual 1.13 to 1.26 times that of exact
# SVD with one, 1.04 to 1.07 with two; the next batch's energy in them differs by 0.003 (finders.py).
ITERATIONS = 2
OVERSAMPLING = 10  # of the randomized finder
POWER_ITERATIONS = 2  # of the randomized finder
KEEP_OLD = 1e-5  # weight of the old directions, relative to G's largest
SMALL = 1e-3  # columns of G Q below this part of the largest are not scaled up
LIMIT = 1e-5  # on the entries of Q^T Q - I; fp32 reaches 1e-6 at 11008 x 1024
ROWS = 1024  # of G are cast at a time


class Ranks(NamedTuple):
    """A rank by energy: the least multiple of `step` in [least, most] that holds the share `energy` of
    ||G||^2, else `most`. AdaRankGrad (arXiv 2410.17881), Eq. 2; adarank.py says where Algorithm 2 differs."""

    energy: float
    step: int
    least: int
    most: int
    room: int | None = None  # columns that the basis can have now; None: most

    def choose(self, held: list[float]) -> int:
        """held[i]: the share in the first i + 1 columns; `most` numbers."""
        first = -(-self.least // self.step) * self.step
        enough = (r for r in range(first, self.most, self.step) if held[r - 1] >= self.energy)
        return next(enough, self.most)


class Attempt(NamedTuple):
    """What a finder made of gradients, before the host has looked at it."""

    q: Tensor  # (n, r) fp32 or float64, orthonormal columns if all went well
    told: Tensor  # max|G|, error of q, what each factorisation reported; then the shares that columns hold


class Found(NamedTuple):
    q: Tensor  # (n, r) fp32 or float64, orthonormal columns
    asked: int  # rank: r, or more than there was room for
    outcome: int  # FOUND | FALLBACK: Householder QR, or not the finder asked for | KEPT: q is the old basis


@contextmanager
def ieee() -> Iterator[None]:
    """fp32 products in fp32: TF32's 11 bits leave Q^T Q - I at 1e-3."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def mix(*numbers: int) -> int:
    """A seed in [0, 2^63) from integers: the same in every process and version of Python."""
    digest = hashlib.blake2b(repr([int(n) for n in numbers]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def gaussian(n: int, k: int, seed: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """(n, k) of N(0, 1), the same for the same seed on one kind of device."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(n, k, generator=generator, device=device, dtype=dtype)


@ieee()
def random_basis(n: int, r: int, seed: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """(n, r) orthonormal columns of a uniformly random span, the largest entry of each positive."""
    x = gaussian(n, r, seed, device, dtype)
    infos: list[Tensor] = []
    q = _orthonormal(_unit(x), infos)
    if not torch.stack([*infos, _error(q) > LIMIT]).eq(0).all():
        q = _orthonormal(_unit(x), None)
    return q * _signs(q, None)


@ieee()
def find(
    gs: list[Tensor], old: Tensor, finder: str, seed: int, first: bool = False, ranks: Ranks | None = None
) -> Found:
    """A basis of the r leading right singular vectors of the stack of `gs`.

    gs      (out_i, n) of any float dtype, on one device
    old     (n, r) of any float dtype, orthonormal columns; r <= n
    finder  "warm" | "svd" | "randomized"
    seed    of the randomized finder
    first   `old` is random: the largest entry of each column is made positive. Otherwise the diagonal of
            old^T q is, so that moments keep their sign
    ranks   r is chosen, as far as there is room: the first columns of a basis of `most`. They continue old's
            in their order, and more follow; None: r is old's

    The old basis stays (KEPT) where G holds a NaN or an infinity, is all zero, or nothing worked. The host
    waits for the device once, at the end; "svd" and "randomized" wait inside too.
    """
    q_old = old.to(_wide(*gs, old))
    start = q_old if ranks is None else _widened(q_old, ranks.most, seed)
    for tried in ["warm", "householder"] if finder == "warm" else [finder, "warm", "householder"]:
        try:
            made = attempt(gs, start, tried, seed, first, ranks)
        except torch.linalg.LinAlgError:  # no convergence, or G holds a NaN
            continue
        there, good, held = judged(made, ranks.most if ranks else 0)
        if not there:
            break
        if good:
            asked = r = q_old.shape[1]
            if ranks is not None:
                asked = ranks.choose(held)
                r = min(asked, ranks.room or asked)
            return Found(made.q[:, :r], asked, FOUND if tried == finder else FALLBACK)
    return Found(q_old, q_old.shape[1], KEPT)


def judged(made: Attempt, most: int = 0) -> tuple[bool, bool, list[float]]:
    """Whether there was a gradient, without NaN or infinity; whether q is a basis for it; the shares that its
    columns hold, `most` numbers. The host waits."""
    told = made.told.tolist()
    largest, error, *failed = told[: len(told) - most]
    there = 0 < largest < float("inf")
    return there, there and error <= LIMIT and not any(failed), told[len(told) - most :]


@ieee()
def attempt(
    gs: list[Tensor], start: Tensor, finder: str, seed: int, first: bool = False, ranks: Ranks | None = None
) -> Attempt:
    """As `find` has it, of a start with as many columns as are wanted, fp32 or float64. finder: also
    "householder", warm by QR. The host waits for nothing with "warm", which a CUDA graph can hold.
    """
    infos: list[Tensor] = []
    top = _largest(gs, start.dtype)
    # Products are of G / max|G|, so that no norm overflows or vanishes; the factor goes to the thin side.
    inverse = 1 / top.clamp(min=torch.finfo(start.dtype).tiny)
    if finder == "svd":
        q = _svd(gs, start, inverse)
    elif finder == "randomized":
        q = _randomized(gs, start, inverse, seed)
    else:
        q = _iterate(gs, start, inverse, ITERATIONS, infos if finder == "warm" else None)
    told = torch.stack([f.to(q.dtype) for f in (top, _error(q), *infos)])
    if ranks is not None:
        told = torch.cat([told, _held(gs, q, inverse).to(q.dtype)])
    return Attempt(q * _signs(q, None if first else start), told)


def _iterate(
    gs: list[Tensor], q: Tensor, inverse: Tensor, iterations: int, infos: list[Tensor] | None
) -> Tensor:
    """Subspace iteration. Columns of G Q_old nearly dependent, as for a G of low rank, come out of the damped
    factor with small norms, and their Y is then overruled by the old direction.

    Between iterations one damped pass is enough: on spectra from 1/j to exp(-j/8) the residual is the same to
    four digits. Without it, it is up to 1.5% larger.
    """
    for left in reversed(range(iterations)):
        z = _orthonormal(_unit(_right(gs, q * inverse), SMALL), infos, rough=True)
        y = _left(gs, z * inverse)
        y += KEEP_OLD * torch.linalg.vector_norm(y, dim=0).amax() * q
        q = _orthonormal(_unit(y), infos, rough=left > 0)
    return q


def _svd(gs: list[Tensor], old: Tensor, inverse: Tensor) -> Tensor:
    stack = torch.cat([block * inverse for g in gs for block in _blocks(g, old.dtype)])
    _, s, vt = torch.linalg.svd(stack, full_matrices=False)
    return _complete(vt.t(), s, old, max(stack.shape))


def _randomized(gs: list[Tensor], old: Tensor, inverse: Tensor, seed: int) -> Tensor:
    """A range finder's columns are not ordered by energy: its first r need the rotation at the end."""
    (n, r), rows = old.shape, sum(g.shape[0] for g in gs)
    y = _left(gs, gaussian(rows, min(r + OVERSAMPLING, rows, n), seed, old.device, old.dtype) * inverse)
    for _ in range(POWER_ITERATIONS):
        z = torch.linalg.qr(_right(gs, torch.linalg.qr(y).Q * inverse)).Q
        y = _left(gs, z * inverse)
    y = torch.linalg.qr(y).Q
    # Of the triangular factor, not of the Gram matrix: that squares the condition number.
    _, s, ut = torch.linalg.svd(torch.linalg.qr(_right(gs, y * inverse), mode="r").R)
    return _complete(y @ ut.t(), s, old, max(rows, n))


def _complete(v: Tensor, s: Tensor, old: Tensor, size: int) -> Tensor:
    """(n, r): the leading columns of v (n, k) with a singular value above rounding, then the directions of
    span(old) that are orthogonal to them: there are at least as many as are missing."""
    r = old.shape[1]
    rank = min(r, int((s > size * torch.finfo(s.dtype).eps * s[0]).sum()))
    v = v[:, :rank]
    if rank < r:
        rest = torch.linalg.qr(old.t() @ v, mode="complete").Q[:, rank:]  # (r, r - rank), v^T old rest = 0
        v = torch.cat([v, old @ rest], 1)
    return _orthonormal(_unit(v), [])  # `old` may have come from bf16, 2e-3 off


def _widened(q: Tensor, r: int, seed: int) -> Tensor:
    """(n, r): the columns of q (n, fewer or as many), then random ones orthogonal to them and each other."""
    more = gaussian(q.shape[0], r - q.shape[1], seed, q.device, q.dtype)
    if not more.shape[1]:
        return q
    return torch.cat([q, _orthonormal(_unit(more - q @ (q.t() @ more)), [])], 1)


def _held(gs: list[Tensor], q: Tensor, inverse: Tensor) -> Tensor:
    """(r,) the shares of ||G||^2 in the first column of q, the first two, ..., float64."""
    energies = torch.linalg.vector_norm(_right(gs, q * inverse), dim=0, dtype=torch.float64).square()
    total = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) * inverse for g in gs])
    return energies.cumsum(0) / total.square().sum()


def _polished(x: Tensor) -> Tensor:
    """Columns that are nearly orthonormal, once more so: Newton-Schulz' step to the polar factor squares the
    error."""
    correction = (x.t() @ x).mul_(-0.5)
    correction.diagonal().add_(1.5)
    return x @ correction


def _unit(x: Tensor, least: float = 0.0) -> Tensor:
    """x with columns of norm 1; those whose norm is below `least` of the largest stay as much smaller.

    A column of G Q that is rounding, 1e-7 of the largest, brought to norm 1 would give Y a column whose own
    rounding is 1% of KEEP_OLD.
    """
    norms = torch.linalg.vector_norm(x, dim=0)
    return x / torch.maximum(norms, least * norms.amax()).clamp(min=torch.finfo(x.dtype).tiny)


def _orthonormal(x: Tensor, infos: list[Tensor] | None, rough: bool = False) -> Tensor:
    """(rows, r) with the span of x, whose columns have norm 1. What Cholesky reports is appended to `infos`;
    None: Householder QR. rough: well conditioned, as far as damping lets it, but not orthonormal.

    x L^-T by a triangular solve: at 4096 x 1024, G of rank 400, 0.50 ms on an H100 and an error of 4e-5. With
    L^-1 formed first it is 0.61 ms and 7e-4. The last step is two products, where a third factor would take
    1.2 ms.
    """
    r, u = x.shape[1], torch.finfo(x.dtype).eps / 2
    if infos is None:  # with fewer rows than columns the last columns are 0
        return torch.nn.functional.pad(torch.linalg.qr(x).Q, (0, max(0, r - x.shape[0])))
    for damping in (r * u,) if rough else (r * u, 0):
        gram = x.t() @ x
        gram.diagonal().add_(damping)
        factor, info = torch.linalg.cholesky_ex(gram)
        infos.append(info)
        x = torch.linalg.solve_triangular(factor.t(), x, upper=True, left=False)
    return x if rough else _polished(x)


def _signs(q: Tensor, old: Tensor | None) -> Tensor:
    """(r,) of 1 and -1: times them, q_j^T old_j >= 0; without `old`, q_j's largest entry is positive."""
    x = q.gather(0, q.abs().argmax(0, keepdim=True))[0] if old is None else (q * old).sum(0)
    return torch.where(x < 0, -1.0, 1.0).to(q.dtype)


def _error(q: Tensor) -> Tensor:
    """Largest entry of |Q^T Q - I|; NaN if q holds one."""
    return (q.t() @ q - torch.eye(q.shape[1], dtype=q.dtype, device=q.device)).abs().amax()


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _largest(gs: list[Tensor], dtype: torch.dtype) -> Tensor:
    """max|G|; NaN and infinity come through."""
    return torch.stack([torch.linalg.vector_norm(g, float("inf")).to(dtype) for g in gs]).amax()


def _blocks(g: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Rows of g, ROWS at a time, in `dtype`: no copy of all of g."""
    return (block.to(dtype) for block in g.split(ROWS))


def _native(g: Tensor, x: Tensor) -> bool:
    """bf16 operands and an fp32 sum: the basis captures the same energy to 3 digits."""
    return g.is_cuda and g.dtype == torch.bfloat16 and x.dtype == torch.float32


def _right(gs: list[Tensor], q: Tensor) -> Tensor:
    """G q, (sum of out_i, r)."""
    parts = []
    for g in gs:
        if _native(g, q):
            parts.append(torch.mm(g, q.bfloat16(), out_dtype=torch.float32))
        else:
            parts += [block @ q for block in _blocks(g, q.dtype)]
    return torch.cat(parts)


def _left(gs: list[Tensor], z: Tensor) -> Tensor:
    """G^T z, (n, r)."""
    y = z.new_zeros(gs[0].shape[1], z.shape[1])
    for g, part in zip(gs, z.split([g.shape[0] for g in gs]), strict=True):
        if _native(g, z):
            y += torch.mm(g.t(), part.bfloat16(), out_dtype=torch.float32)
        else:
            for block, rows in zip(_blocks(g, z.dtype), part.split(ROWS), strict=True):
                y.addmm_(block.t(), rows)
    return y


@ieee()
def captured(gs: list[Tensor], q: Tensor) -> Tensor:
    """|| G q ||^2 / || G ||^2, 0-dim; 0 for G = 0."""
    q = q.to(_wide(*gs, q))
    top = _largest(gs, q.dtype).clamp(min=torch.finfo(q.dtype).tiny)
    # float64: the square of a large fp32 norm is out of fp32's range
    total = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in gs]).square().sum()
    kept = torch.linalg.vector_norm(_right(gs, q / top), dtype=torch.float64) * top
    return (kept.square() / total.clamp(min=torch.finfo(torch.float64).tiny)).to(q.dtype)


def overlap(c: Tensor) -> Tensor:
    """Share of the new basis that lies in the old one, in [0, 1]; c = Q_old^T Q_new, (r_old, r_new)."""
    return c.square().sum() / c.shape[1]


@ieee()
def transport(
    m: Tensor | None, v: Tensor | None, c: Tensor, policy: str, dim: int = -1
) -> tuple[Tensor | None, Tensor | None]:
    """Moments in the coordinates of a new basis.

    m       first moment or any signed sum of coordinates, (out, r_old) if dim = -1, (r_old, in) if dim = -2
    v       second moment, of m's shape, not negative
    c       Q_old^T Q_new, (r_old, r_new); all three fp32 or float64
    policy  keep         as they are (GaLore)
            reset        zeros; the caller sets t = 0
            rotate       m C and v C^2, C^2 elementwise: right for v if the coordinates are uncorrelated
            rotate_fill  what a new direction lacks in the old basis is filled with the mean of v over the old
                         directions: with m and v near 0 and t large, Adam's step would grow to 6.6 times lr
    """
    assert policy in ("keep", "reset", "rotate", "rotate_fill") and dim in (-1, -2)
    if policy == "keep":
        assert c.shape[0] == c.shape[1]
        return m, v
    if policy == "reset":
        c = torch.zeros_like(c)

    def move(x: Tensor, by: Tensor) -> Tensor:
        return x @ by if dim == -1 else by.t() @ x

    if m is not None:
        m = move(m, c)
    if v is not None:
        share = c.square()
        mean = v.mean(dim, keepdim=True)
        v = move(v, share)
        if policy == "rotate_fill":
            v = v + move(mean, (1 - share.sum(0, keepdim=True)).clamp(min=0))
    return m, v
