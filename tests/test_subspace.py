"""Bases and the moments that move with them, on matrices of known singular values."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from optim import subspace
from optim.subspace import FALLBACK, FOUND, KEPT, captured, find, mix, overlap, random_basis, transport
from tests.mutants import kills

FINDERS = ("warm", "svd", "randomized")
F64 = torch.float64


def normal(m, n, seed, dtype=F64):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def orthonormal(n, r, seed, dtype=F64):
    return torch.linalg.qr(normal(n, r, seed)).Q.to(dtype)


def matrix(m, n, sigma, seed=0, dtype=F64):
    """(m, n) with singular values `sigma` and random singular vectors."""
    k = len(sigma)
    return ((orthonormal(m, k, seed) * sigma) @ orthonormal(n, k, seed + 1).T).to(dtype)


def decay(power, k=256):
    return torch.arange(1, k + 1, dtype=F64) ** -power


SPECTRA = {
    "j^-1/2": decay(0.5),
    "j^-3/4": decay(0.75),
    "1/j": decay(1),
    "j^-3/2": decay(1.5),
    "exp(-j/50)": torch.exp(-torch.arange(1.0, 257, dtype=F64) / 50),
}


def error(q):
    return (q.T @ q - torch.eye(q.shape[1], dtype=q.dtype)).abs().max().item()


def project(q):
    return q @ q.T


@kills("optim/subspace.py", "return q * _signs(q, None)", "return x * _signs(q, None)")
@kills("optim/subspace.py", "return q * _signs(q, None)", "return q")
def test_invariant_01_random_basis_is_orthonormal():
    q = random_basis(512, 128, 3, "cpu", torch.float32)
    assert error(q) <= 1e-5
    b = q.bfloat16().to(F64)
    assert torch.linalg.matrix_norm(b.T @ b - torch.eye(128, dtype=F64), 2) <= 5e-3
    assert error(random_basis(512, 128, 3, "cpu", F64)) <= 1e-13
    assert error(random_basis(64, 64, 4, "cpu", torch.float32)) <= 1e-5
    assert (q.gather(0, q.abs().argmax(0, keepdim=True)) > 0).all()


@kills("optim/subspace.py", "_complete(vt.t(), s, old", "_complete(vt.t().roll(1, 1), s, old")
@kills("optim/subspace.py", "kept.square() / total", "kept / total")
@kills("optim/subspace.py", "dtype=torch.float64) * top", "dtype=torch.float64)")
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_invariant_02_projection_takes_the_leading_energy(shape):
    sigma, r = 3 * decay(0.75, 24), 7
    g, rest = matrix(*shape, sigma), (sigma[7:] ** 2).sum()
    for side in (g, g.T):  # row space, column space
        q = find([side], orthonormal(side.shape[1], r, 5), "svd", 0).q
        low = side @ q
        assert low.norm() <= side.norm()
        torch.testing.assert_close(low @ q.T @ project(q), low @ q.T, rtol=0, atol=1e-10)
        assert abs((side - low @ q.T).norm() ** 2 - rest) < 1e-10
        assert abs(side.norm() ** 2 - low.norm() ** 2 - rest) < 1e-10
        assert abs(captured([side], q) - (1 - rest / (sigma**2).sum())) < 1e-10


@kills("optim/subspace.py", "_complete(y @ ut.t(), s", "_complete(y, s")
@kills("optim/subspace.py", "_complete(y @ ut.t(), s", "_complete(y @ ut, s")
@kills("optim/subspace.py", "POWER_ITERATIONS = 2", "POWER_ITERATIONS = 0")
def test_invariant_03_randomized_finder():
    low = matrix(60, 50, decay(0.5, 8))
    assert 1 - captured([low], find([low], orthonormal(50, 8, 5), "randomized", 1).q) < 1e-10
    sigma, r = decay(0.5, 50), 8
    g = matrix(60, 50, sigma)
    q = find([g], orthonormal(50, r, 5), "randomized", 1).q
    residual, best = 1 - captured([g], q), (sigma[r:] ** 2).sum() / (sigma**2).sum()
    assert best - 1e-12 <= residual <= 1.02 * best
    gram = (g @ q).T @ (g @ q)
    values = gram.diagonal()
    assert (values.diff() < 0).all()
    assert (gram - torch.diag(values)).abs().max() < 1e-10
    assert abs(residual - (1 - values.sum() / g.norm() ** 2)) < 1e-10


def bases(n, r_old, r_new, seed=0):
    q, p = orthonormal(n, r_old, seed), orthonormal(n, r_new, seed + 1)
    return q, p, q.T @ p


@kills("optim/subspace.py", "m = move(m, c)", "m = -move(m, c)")
@kills("optim/subspace.py", "(1 - share.sum(", "(2 - share.sum(")
@pytest.mark.parametrize("policy", ["keep", "rotate", "rotate_fill"])
def test_invariant_11_same_basis_leaves_the_moments(policy):
    q = orthonormal(30, 6, 0)
    for shape, dim in (((9, 6), -1), ((6, 9), -2)):
        m, v = normal(*shape, 1), normal(*shape, 2).square()
        for got, want in zip(transport(m, v, q.T @ q, policy, dim), (m, v), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@kills("optim/subspace.py", "share = c.square()", "share = c")
@kills("optim/subspace.py", ".clamp(min=0))", ")")
@pytest.mark.parametrize("policy", ["rotate", "rotate_fill"])
def test_invariant_12_second_moments_stay_non_negative(policy):
    _, _, c = bases(20, 8, 5)
    v = normal(11, 8, 2).square()
    assert (v @ c).min() < 0  # what a plain rotation would give
    assert transport(None, v, c, policy)[1].min() >= 0
    assert transport(None, v.T, c, policy, -2)[1].min() >= 0
    over = torch.tensor([[1.01], [0.0]])  # columns of bf16 bases are not of norm 1 exactly
    assert transport(None, torch.tensor([[0.0, 1.0]]), over, policy)[1].min() >= 0


@kills("optim/subspace.py", 'if policy == "rotate_fill"', 'if policy == "none"')
@kills("optim/subspace.py", "mean = v.mean(dim", "mean = v.sum(dim")
@kills("optim/subspace.py", "share.sum(0, keepdim=True)", "share.sum(1)[None]")
def test_invariant_13_transport_does_not_grow():
    for r_old, r_new in ((6, 6), (8, 5), (5, 8)):
        _, _, c = bases(20, r_old, r_new)
        assert torch.linalg.matrix_norm(c, 2) <= 1 + 1e-12
        m, v = normal(11, r_old, 1), normal(11, r_old, 2).square() + 1
        low, high = v.amin(1, keepdim=True), v.amax(1, keepdim=True)
        m_new, rotated = transport(m, v, c, "rotate")
        assert m_new.norm() <= m.norm()
        assert (rotated <= high + 1e-10).all()
        filled = transport(None, v, c, "rotate_fill")[1]
        assert (low - 1e-10 <= filled).all() and (filled <= high + 1e-10).all()
        for policy, want in (("rotate", rotated), ("rotate_fill", filled)):
            m_t, v_t = transport(m.T, v.T, c, policy, -2)
            torch.testing.assert_close(v_t.T, want, rtol=0, atol=1e-12)
            torch.testing.assert_close(m_t.T, m_new, rtol=0, atol=1e-12)
        # the definition, by hand
        share, mean = c.square(), v.mean(1)
        by_hand = v @ share + mean[:, None] * (1 - share.sum(0))
        torch.testing.assert_close(filled, by_hand, rtol=0, atol=1e-12)


@kills("optim/subspace.py", "m = move(m, c)", "m = move(m, c.t() if c.shape[0] == c.shape[1] else c)")
@kills("optim/subspace.py", "by.t() @ x", "(by if by.shape[0] == by.shape[1] else by.t()) @ x")
@pytest.mark.parametrize("r_new", [5, 8])
def test_invariant_14_a_larger_span_keeps_the_momentum(r_new):
    q = orthonormal(20, 5, 0)
    both = torch.cat([q, orthonormal(20, r_new - 5, 1)], 1) @ normal(r_new, r_new, 2)
    p = torch.linalg.qr(both).Q
    m = normal(11, 5, 3)
    for policy in ("rotate", "rotate_fill"):
        right, _ = transport(m, None, q.T @ p, policy)
        torch.testing.assert_close(right @ p.T, m @ q.T, rtol=0, atol=1e-10)
        left, _ = transport(m.T, None, q.T @ p, policy, -2)
        torch.testing.assert_close(p @ left, q @ m.T, rtol=0, atol=1e-10)


@kills("optim/subspace.py", "c = torch.zeros_like(c)", "pass")
@kills("optim/subspace.py", 'if policy == "keep":', 'if policy == "none":')
def test_keep_and_reset():
    _, _, c = bases(20, 6, 6)
    m, v = normal(11, 6, 1), normal(11, 6, 2).square()
    assert transport(m, v, c, "keep") == (m, v)
    _, _, c = bases(20, 6, 4)
    for moments in transport(m, v, c, "reset"):
        assert moments.shape == (11, 4) and not moments.any()
    for moments in transport(m.T, v.T, c, "reset", -2):
        assert moments.shape == (4, 11) and not moments.any()
    with pytest.raises(AssertionError):
        transport(m, v, c, "keep")
    assert transport(None, None, c, "rotate") == (None, None)


@kills("optim/subspace.py", "c.square().sum() / c.shape[1]", "c.square().sum() / c.shape[0]")
def test_overlap_is_the_share_of_the_new_basis():
    q = orthonormal(20, 8, 0)
    assert overlap(q.T @ q[:, :3]) == pytest.approx(1)
    assert overlap(q[:, :3].T @ q) == pytest.approx(3 / 8)


@kills("optim/subspace.py", "return torch.cat(parts)", "return torch.cat(parts[::-1])")
@kills("optim/subspace.py", "block * inverse for g in gs for", "block * inverse for g in gs[:1] for")
@kills("optim/subspace.py", "part.split(ROWS)", "part.flip(0).split(ROWS)")
@pytest.mark.parametrize("finder", FINDERS)
def test_invariant_48_a_shared_basis_is_that_of_the_stack(finder, monkeypatch):
    gs, old = [matrix(30, 24, decay(0.5, 24), seed) for seed in (0, 2, 4)], orthonormal(24, 6, 9)
    shared, stacked = find(gs, old, finder, 7), find([torch.cat(gs)], old, finder, 7)
    torch.testing.assert_close(shared.q, stacked.q, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        torch.cat([g @ shared.q for g in gs]), torch.cat(gs) @ stacked.q, rtol=0, atol=1e-10
    )
    # bf16, cast seven rows at a time, uneven shapes: the same as fp32 copies in one piece
    monkeypatch.setattr(subspace, "ROWS", 7)
    uneven = [gs[0].bfloat16(), gs[1][:8].bfloat16(), gs[2][:1].bfloat16()]
    old = old.float()
    got, want = find(uneven, old, finder, 7).q, find([g.float() for g in uneven], old, finder, 7).q
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def gradient(kind, m, n, seed):
    k = min(m, n)
    if kind == "deficient":
        return matrix(m, n, torch.ones(max(1, k // 4), dtype=F64), seed)
    if kind == "decaying":
        return matrix(m, n, 10 ** -torch.arange(0, k, dtype=F64), seed)
    return normal(m, n, seed) * {"random": 1, "tiny": 1e-30, "huge": 1e34}[kind]


KINDS = ["deficient", "decaying", "random", "tiny", "huge"]


@kills("optim/subspace.py", "add_(damping)", "add_(0)")
@kills("optim/subspace.py", "else (r * u, 0)", "else (r * u,)")
@kills("optim/subspace.py", "add_(1.5)", "add_(1.4)")
@kills("optim/subspace.py", "rough=left > 0", "rough=True")
@kills("optim/subspace.py", "inverse = 1 / top", "inverse = top / top")
@kills("optim/subspace.py", "y += KEEP_OLD *", "y += 0 *")
@pytest.mark.parametrize("kind", KINDS)
def test_invariant_50_warm_is_orthonormal_without_falling_back(kind):
    for m, n, r in ((96, 128, 32), (20, 96, 48), (128, 64, 64)):
        for dtype in (torch.float32, torch.bfloat16):
            g = gradient(kind, m, n, m).to(dtype)
            for first in (True, False):
                found = find([g], orthonormal(n, r, 5, torch.float32), "warm", 0, first)
                assert found.outcome == FOUND, (m, n, r, dtype, first)
                assert error(found.q) <= 1e-5


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_invariant_50_any_shape(data):
    m = data.draw(st.integers(1, 24), "rows")
    n = data.draw(st.integers(1, 24), "n")
    r = data.draw(st.sampled_from([1, n, data.draw(st.integers(1, n))]), "r")
    g = gradient(data.draw(st.sampled_from(KINDS)), m, n, 1)
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]), "dtype")
    old = orthonormal(n, r, 5, data.draw(st.sampled_from([torch.float32, torch.bfloat16]), "basis"))
    for finder in FINDERS:
        found = find([g.to(dtype)], old, finder, 0, data.draw(st.booleans(), "first"))
        assert found.q.shape == (n, r) and found.q.dtype == torch.float32
        assert error(found.q) <= 1e-5 and found.outcome != KEPT


@kills("optim/subspace.py", "y.addmm_(block.t(), rows)", "y.copy_(block.t() @ rows)")
@kills("optim/subspace.py", "y.addmm_(block.t(), rows)", "y.addmm_(block.t(), rows, alpha=-1)")
def test_invariant_51_row_shards_of_the_reduced_gradient():
    ranks = [normal(30, 24, seed) for seed in (0, 1)]
    g, q = sum(ranks), orthonormal(24, 6, 9)
    want = g.T @ (g @ q)
    shards = list(g.split((7, 11, 12)))
    by_shard = sum(subspace._left([s], subspace._right([s], q)) for s in shards)
    torch.testing.assert_close(by_shard, want, rtol=0, atol=1e-10)
    torch.testing.assert_close(subspace._left(shards, subspace._right(shards, q)), want, rtol=0, atol=1e-10)
    unreduced = sum(x.T @ (x @ q) for x in ranks)
    assert (unreduced - want).norm() > 0.3 * want.norm()


@kills(
    "optim/subspace.py",
    "norms = torch.linalg.vector_norm(x, dim=0)",
    "norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)",
)
@kills("optim/subspace.py", "inverse, ITERATIONS, infos", "inverse, 1, infos")
@kills(
    "optim/subspace.py",
    "_left(gs, z * inverse)\n        y += ",
    "q + 0 * _left(gs, z * inverse)\n        y += ",
)
@pytest.mark.parametrize("name", SPECTRA)
def test_residual_from_a_random_basis(name):
    """Over the smallest possible: 1.24 to 1.48 after one iteration, 1.07 to 1.115 after two."""
    sigma = SPECTRA[name]
    g, old = matrix(384, 256, sigma), random_basis(256, 64, 9, "cpu", torch.float32)
    best = (sigma[64:] ** 2).sum() / (sigma**2).sum()
    assert 1 - captured([g], find([g.float()], old, "warm", 0, first=True).q) <= 1.12 * best
    svd = find([g.float()], old, "svd", 0).q
    assert 1 - captured([g], svd) <= 1.001 * best


def drifting(steps, noise, seed=0):
    """G of slowly turning singular vectors, sigma_j = j^-3/4, and fresh noise with a share of the energy."""
    u, v, sigma = orthonormal(160, 128, seed), orthonormal(128, 128, seed + 1), decay(0.75, 128)
    turns = [normal(n, n, seed + 2 + k) * 0.03 / math.sqrt(n) for k, n in enumerate((160, 128))]
    turn_u, turn_v = (torch.linalg.matrix_exp(t - t.T) for t in turns)
    for step in range(steps):
        u, v = turn_u @ u, turn_v @ v
        fresh = normal(160, 128, 1000 + step)
        share = math.sqrt(noise / (1 - noise)) * sigma.norm() / fresh.norm()
        yield ((u * sigma) @ v.T + share * fresh).float()


@kills("optim/subspace.py", "_orthonormal(_unit(y), infos", "_orthonormal(_unit(q), infos")
@pytest.mark.parametrize("noise", [0.08, 0.5])
def test_warm_basis_serves_the_next_batch_as_the_exact_one_does(noise):
    warm = svd = random_basis(128, 32, 3, "cpu", torch.float32)
    ahead = {"warm": [], "svd": []}
    for step, g in enumerate(drifting(25, noise)):
        if step > 5:
            ahead["warm"].append(captured([g], warm))
            ahead["svd"].append(captured([g], svd))
        warm, svd = (find([g], q, f, 0, step == 0).q for q, f in ((warm, "warm"), (svd, "svd")))
    means = {k: torch.stack(v).mean().item() for k, v in ahead.items()}
    assert means["warm"] >= means["svd"] - 0.01, means


@kills("optim/subspace.py", "Attempt(q * _signs(q, None if first else start)", "Attempt(q")
@kills("optim/subspace.py", "None if first else start", "start if first else None")
@pytest.mark.parametrize("finder", FINDERS)
def test_signs(finder):
    g, old = matrix(40, 32, decay(0.5, 32)), orthonormal(32, 8, 5)
    q = find([g], old, finder, 0, first=True).q
    assert (q.gather(0, q.abs().argmax(0, keepdim=True)) > 0).all()
    again = find([g + 0.01 * normal(40, 32, 1)], -q, finder, 0).q
    assert ((-q * again).sum(0) > 0).all()


@kills("optim/subspace.py", "there = 0 < largest < float", "there = 0 < 1 < float")
@kills("optim/subspace.py", "return Found(q_old, q_old", "return Found(made.q, q_old")
@pytest.mark.parametrize("finder", FINDERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0])
def test_a_gradient_without_a_direction_keeps_the_basis(finder, bad):
    old = orthonormal(24, 6, 5, torch.bfloat16)
    good, g = normal(30, 24, 0, torch.bfloat16), torch.zeros(30, 24, dtype=torch.bfloat16)
    g[3, 4] = bad
    found = find([good, g] if bad else [g], old, finder, 0)
    assert found.outcome == KEPT and torch.equal(found.q, old.float())


def fail_after(calls, real):
    """cholesky_ex that reports failure, and returns no factor, from call number `calls` on."""
    left = [calls]

    def fake(x):
        left[0] -= 1
        factor, info = real(x)
        return (factor, info) if left[0] >= 0 else (torch.full_like(factor, math.nan), info + 3)

    return fake


@kills("optim/subspace.py", '["warm", "householder"] if', '["warm"] if')
@kills("optim/subspace.py", 'infos if finder == "warm" else None', "infos")
@kills("optim/subspace.py", "FOUND if tried == finder else FALLBACK", "FOUND")
@kills("optim/subspace.py", "        q = _orthonormal(_unit(x), None)", "        pass")
@pytest.mark.parametrize("calls", range(4))
def test_a_failed_factorisation_falls_back_to_householder(calls, monkeypatch):
    g, old = matrix(40, 32, decay(0.5, 32)), orthonormal(32, 8, 5)
    want = find([g], old, "warm", 0)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", fail_after(calls, torch.linalg.cholesky_ex))
    found = find([g], old, "warm", 0)
    assert found.outcome == FALLBACK and error(found.q) < 1e-12
    torch.testing.assert_close(project(found.q), project(want.q), rtol=0, atol=1e-3)  # KEEP_OLD's mix differs
    assert error(random_basis(32, 8, 0, "cpu", F64)) < 1e-12
    assert find([g[:3]], old, "warm", 0).outcome == FALLBACK  # fewer rows than columns


@kills("optim/subspace.py", "error <= LIMIT and not any(failed)", "not any(failed)")
def test_an_inaccurate_factor_falls_back_to_householder(monkeypatch):
    real = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda x: (1.1 * real(x)[0], real(x)[1]))
    found = find([normal(40, 32, 0)], orthonormal(32, 8, 5), "warm", 0)
    assert found.outcome == FALLBACK and error(found.q) < 1e-12


@kills("optim/subspace.py", "except torch.linalg.LinAlgError:", "except KeyError:")
@pytest.mark.parametrize("finder", ["svd", "randomized"])
def test_no_convergence_falls_back_to_warm(finder, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", fail)
    g, old = matrix(40, 32, decay(0.5, 32)), orthonormal(32, 8, 5)
    found = find([g], old, finder, 0)
    assert found.outcome == FALLBACK and torch.equal(found.q, find([g], old, "warm", 0).q)


@kills("optim/subspace.py", "dim=0).amax() * q", "dim=0).amax() * q.flip(0)")
@kills("optim/subspace.py", "torch.cat([v, old @ rest], 1)", "torch.cat([v, (old @ rest).flip(0)], 1)")
@kills("optim/subspace.py", "rank = min(r, int((s >", "rank = max(r, int((s >")
@pytest.mark.parametrize("finder", FINDERS)
@pytest.mark.parametrize("rows", [5, 40])
def test_a_rank_deficit_keeps_old_directions(finder, rows):
    g, old = (
        matrix(rows, 64, torch.ones(5, dtype=F64), dtype=torch.float32),
        orthonormal(64, 16, 5, torch.float32),
    )
    found = find([g], old, finder, 0)
    assert found.outcome == FOUND and error(found.q) <= 1e-5
    assert captured([g], found.q) > 1 - 1e-5
    span = torch.linalg.qr(torch.cat([g[:5].T if rows == 5 else torch.linalg.svd(g).Vh[:5].T, old], 1)).Q
    assert (found.q - project(span) @ found.q).norm() < 1e-3


@kills("optim/subspace.py", "manual_seed(seed)", "manual_seed(0)")
@kills(
    "optim/subspace.py",
    "gaussian(rows, min(r + OVERSAMPLING, rows, n), seed,",
    "gaussian(rows, min(r + OVERSAMPLING, rows, n), 0,",
)
def test_seeds_and_bits():
    g, old = normal(60, 40, 0, torch.bfloat16), orthonormal(40, 8, 5, torch.bfloat16)
    for finder in FINDERS:
        assert torch.equal(find([g], old, finder, 3).q, find([g], old, finder, 3).q)
    assert not torch.equal(find([g], old, "randomized", 3).q, find([g], old, "randomized", 4).q)
    for make in (random_basis, subspace.gaussian):
        a, b, c = (make(40, 8, seed, "cpu", torch.float32) for seed in (1, 1, 2))
        assert torch.equal(a, b) and not torch.equal(a, c)
    z = subspace.gaussian(500, 16, 1, "cpu", F64)
    assert z.shape == (500, 16) and abs(z.std() - 1) < 0.03 and abs(z.mean()) < 0.03


@kills("optim/subspace.py", '"little") >> 1', '"little") >> 2')
@kills("optim/subspace.py", '"little") >> 1', '"big") >> 1')
def test_mix_is_one_fixed_function():
    assert mix(1, 2, 3) == 3155219076727281641 and mix(0) != mix(0, 0) and mix(12, 3) != mix(1, 23)
    seeds = {mix(a, b) for a in range(40) for b in range(40)}
    assert len(seeds) == 1600 and 2**62 < max(seeds) < 2**63


class Waits(TorchFunctionMode):
    """Counts what makes the host wait for a GPU."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        self.count += name in ("tolist", "item", "cpu", "__bool__", "__float__", "__int__", "nonzero")
        return func(*args, **(kwargs or {}))


@kills("optim/subspace.py", "infos.append(info)", "infos.append(info) if info == 0 else infos.append(info)")
def test_warm_waits_once():
    with Waits() as waits:
        assert find([normal(40, 32, 0)], orthonormal(32, 8, 5), "warm", 0, first=True).outcome == FOUND
    assert waits.count == 1


@kills("optim/subspace.py", 'torch.set_float32_matmul_precision("highest")', "pass")
@kills("optim/subspace.py", "torch.set_float32_matmul_precision(before)", "pass")
def test_no_tf32(monkeypatch):
    seen, real = [], torch.linalg.cholesky_ex

    def spy(x):
        seen.append(torch.get_float32_matmul_precision())
        return real(x)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", spy)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        find([normal(40, 32, 0)], random_basis(32, 8, 5, "cpu", F64), "warm", 0)
        assert set(seen) == {"highest"} and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@kills("optim/subspace.py", "total.clamp(min=torch.finfo(torch.float64).tiny)", "total")
@kills("optim/subspace.py", "_right(gs, q / top)", "_right(gs, q)")
@pytest.mark.parametrize("size", [1e-30, 1, 1e34])
def test_captured_at_any_size(size):
    g, q = normal(30, 24, 0), orthonormal(24, 6, 5)
    want = ((g @ q).norm() / g.norm()) ** 2
    gs = [x.float() for x in (g * size).split((10, 20))]
    assert captured(gs, q.float()).item() == pytest.approx(want.item(), rel=1e-5)
    assert captured([torch.zeros(3, 24)], q.float()) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("transposed", [False, True])
def test_bf16_products_on_a_gpu(transposed):
    """Against fp32 copies of the same gradients, and without a wait before the last line."""
    sigma = SPECTRA["j^-3/4"]
    wide = [matrix(384, 256, sigma, seed).cuda().bfloat16() for seed in (0, 2)]
    gs = [g.T.contiguous().T for g in wide] if transposed else wide
    old = random_basis(256, 64, 9, "cuda", torch.float32)
    got, want = (find(x, old, "warm", 0, True) for x in (gs, [g.float() for g in gs]))
    assert got.outcome == want.outcome == FOUND and error(got.q.cpu()) <= 1e-5
    assert abs(captured(gs, got.q) - captured(gs, want.q)) < 1e-3
