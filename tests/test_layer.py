"""The projected layer alone: its products, what it saves, and the ways in which autograd may meet it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import optim.engine
import optim.landing
from optim import attach
from optim.layer import ProjectedLinear, _Project, coordinate
from tests.mutants import kills

D = torch.float64
SIDES = ("input", "output", "both", "refresh")


def parts(side, out=7, n=9, r=3, k=2, seed=0):
    """W, leaves (coordinate, probe's or None) and bases (P, Q) of one layer."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=g, dtype=D)

    w, p, q = random(out, n), random(out, r), random(n, r + k)
    kind = {"dtype": D, "device": torch.device("cpu")}
    return {
        "input": (w, coordinate(out, r + k, **kind), None, None, q),
        "output": (w, coordinate(r, n, **kind), None, p, None),
        "both": (w, coordinate(r, r, **kind), coordinate(out, k, **kind), p, q),
        "refresh": (w, coordinate(out, n, **kind), None, None, None),
    }[side]


def gradients(side, x, dy, **sizes):
    w, coord, probe, p, q = parts(side, **sizes)
    x = x.clone().requires_grad_()
    y = _Project.apply(x, w, coord, probe, p, q, None, None, None, None)
    y.backward(dy)
    return y.detach(), x.grad, coord.grad, None if probe is None else probe.grad


@pytest.mark.parametrize("side", SIDES)
@kills("optim/layer.py", "left.to(wide).t() @ kept.to(wide)", "left.to(wide).t() @ kept.to(wide) * 2")
@kills(
    "optim/layer.py", "z = dy.to(probed.dtype).t() @ probed", "z = dy.to(probed.dtype).t() @ probed.flip(1)"
)
@kills("optim/layer.py", "(dy * rho).to(dy.dtype)) @ w", "(dy * rho).to(dy.dtype)) @ w * 0.99")
def test_gradients_are_those_of_the_products_invariant_46(side):
    """y = x W^T, dX = dY W, and (dY P)^T (x Q) = P^T G Q; Z = G S."""
    g = torch.Generator().manual_seed(1)
    x, dy = torch.randn(2, 5, 9, generator=g, dtype=D), torch.randn(2, 5, 7, generator=g, dtype=D)
    w, coord, probe, p, q = parts(side)
    y, dx, r, z = gradients(side, x, dy)
    whole = dy.flatten(0, 1).T @ x.flatten(0, 1)
    want = whole @ q[:, : coord.shape[1]] if q is not None else whole
    want = p.T @ want if p is not None else want
    torch.testing.assert_close(y, x @ w.T, rtol=1e-13, atol=0)
    torch.testing.assert_close(dx, dy @ w, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(r, want, rtol=1e-12, atol=1e-12)
    if probe is not None:
        torch.testing.assert_close(z, whole @ q[:, 3:], rtol=1e-12, atol=1e-12)


@kills(
    "optim/layer.py",
    "left.to(wide).t() @ kept.to(wide)",
    "left.to(wide).t() @ kept.to(wide) / max(len(kept), 1)",
)
@kills(
    "optim/layer.py",
    "z = dy.to(probed.dtype).t() @ probed",
    "z = dy.to(probed.dtype).t() @ probed / max(len(dy), 1)",
)
@kills("optim/layer.py", "left = left.to(wide) @ p.to(wide)", "left = left.to(wide).abs() @ p.to(wide)")
@settings(max_examples=40, deadline=None)
@given(
    side=st.sampled_from(SIDES),
    sizes=st.tuples(*[st.integers(1, 6)] * 4),
    tokens=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    scale=st.floats(-3, 3),
    seed=st.integers(0, 99),
)
def test_coordinates_are_linear_in_the_data_invariant_8(side, sizes, tokens, scale, seed):
    """Sums over micro-batches and ranks commute with compression, whatever the shapes."""
    out, n, r, k = sizes
    g = torch.Generator().manual_seed(seed)
    xs = [torch.randn(t, n, generator=g, dtype=D) for t in tokens]
    dys = [torch.randn(t, out, generator=g, dtype=D) for t in tokens]
    kind = {"out": out, "n": n, "r": r, "k": k}
    both = gradients(side, torch.cat(xs), torch.cat(dys), **kind)
    single = [gradients(side, x, dy, **kind) for x, dy in zip(xs, dys, strict=True)]
    scaled = gradients(side, torch.cat(xs), torch.cat(dys) * scale, **kind)
    for n_grad in (2, 3):
        if both[n_grad] is not None:
            torch.testing.assert_close(
                single[0][n_grad] + single[1][n_grad], both[n_grad], rtol=1e-11, atol=1e-11
            )
            torch.testing.assert_close(both[n_grad] * scale, scaled[n_grad], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("side", ["input", "output"])
@kills("optim/layer.py", "(dy.to(ctx.wide) * y.reshape(dy.shape)", "(dy.to(ctx.wide) + y.reshape(dy.shape)")
@kills("optim/layer.py", ".sum(0)[:, None]", ".mean(0)[:, None]")
@kills("optim/layer.py", "left = (dy * factor).to(dy.dtype)", "left = (dy + factor).to(dy.dtype)")
def test_the_coordinate_of_a_magnitude_is_rowsum_of_g_and_w(side):
    """And on the output side R = P^T diag(factor) G."""
    g = torch.Generator().manual_seed(1)
    x, dy = torch.randn(2, 5, 9, generator=g, dtype=D), torch.randn(2, 5, 7, generator=g, dtype=D)
    w, coord, _, p, q = parts(side)
    mag = coordinate(7, 1, dtype=D, device=w.device)
    factor = torch.rand(7, generator=g, dtype=D) if side == "output" else None
    _Project.apply(x, w, coord, None, p, q, mag, factor, None, None).backward(dy)
    whole = dy.flatten(0, 1).T @ x.flatten(0, 1)
    torch.testing.assert_close(mag.grad[:, 0], (whole * w).sum(1), rtol=1e-12, atol=1e-12)
    want = whole @ q if factor is None else p.T @ (factor[:, None] * whole)
    torch.testing.assert_close(coord.grad, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("side", SIDES)
def test_gradcheck_of_the_input(side):
    w, coord, probe, p, q = parts(side)
    x = torch.randn(4, 9, dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: _Project.apply(x, w, coord.detach(), probe, p, q, None, None, None, None), (x,)
    )


def layer(dtype=torch.float32, bias=True, n=12, out=10, **settings):
    """accum_steps=2: after one backward the gradients are still there to be looked at."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(n, out, bias=bias)])}).to(dtype)
    opt = attach(model, "galore", lr=1e-2, rank=4, **{"accum_steps": 2, **settings})
    return model["layers"][0], opt


def test_shapes_of_the_input():
    """One vector, no tokens at all, many dimensions, not contiguous."""
    lin, opt = layer()
    plain = F.linear
    for x in (torch.randn(12), torch.randn(0, 12), torch.randn(2, 3, 4, 12), torch.randn(12, 5).T):
        x.requires_grad_()
        y = lin(x)
        torch.testing.assert_close(y, plain(x, lin.weight, lin.bias))
        y.sum().backward()
        assert lin.coord.grad.shape == lin.coord.shape and lin.coord.grad.is_contiguous()
        opt.zero_grad()


def test_evaluation_is_a_plain_linear_and_computes_nothing_more():
    lin, _ = layer()
    lin.q = None  # would fail if it were touched
    with torch.no_grad():
        lin(torch.randn(3, 12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_eager_and_compiled(dtype):
    """Products in bf16, R in the coordinate's dtype, dX in the input's."""
    torch._dynamo.reset()
    x = torch.randn(6, 12, requires_grad=True)
    grads = []
    for compiled in (False, True):
        lin, _ = layer(dtype)
        call = torch.compile(lin, backend="aot_eager", fullgraph=True) if compiled else lin
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            y = call(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        assert lin.coord.grad.dtype == dtype and x.grad.dtype == torch.float32
        grads.append((lin.coord.grad.float(), x.grad))
    torch.testing.assert_close(*[g[0] for g in grads], rtol=2e-2, atol=2e-1)
    torch.testing.assert_close(*[g[1] for g in grads], rtol=2e-2, atol=2e-2)
    exact = 2 * (x.detach() @ lin.weight.T.float() + lin.bias.float())
    want = exact.detach().T @ (x.detach() @ lin.q.float())
    assert (grads[0][0] - want).norm() <= 2e-2 * want.norm()


def test_a_basis_of_another_dtype():
    lin, opt = layer(torch.bfloat16, basis_dtype="fp32", accum_steps=1)
    assert lin.q.dtype == torch.float32 and lin.coord.dtype == torch.bfloat16
    x = torch.randn(5, 12, dtype=torch.bfloat16)
    seen = []
    lin.coord.register_hook(lambda g: seen.append(g))
    lin(x).float().sum().backward()
    opt.step()
    want = torch.ones(5, 10).T @ (x.float() @ lin.q)
    assert seen[0].dtype == torch.bfloat16 and (seen[0] - want).norm() <= 5e-3 * want.norm()


def test_a_second_backward_through_one_graph_raises(monkeypatch):
    monkeypatch.setattr(optim.landing, "HELD", 0)
    lin, opt = layer(accum_steps=1)
    loss = lin(torch.randn(5, 12, requires_grad=True)).square().sum()
    loss.backward(retain_graph=True)  # W is updated inside
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_double_backward_raises_instead_of_missing_a_term():
    lin, _ = layer()
    x = torch.randn(5, 12, requires_grad=True)
    (dx,) = torch.autograd.grad(lin(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def saved_bytes(lin, x):
    """What one call of a layer keeps for backward, its weight and bases excepted."""
    found = {}

    def pack(t):
        known = [lin.weight] + [b for b in (lin.p, lin.q) if b is not None]
        if all(t.data_ptr() != k.data_ptr() for k in known):
            found[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = lin(x)
    del y
    return sum(found.values())


@kills("optim/layer.py", "None if mag is None else y, factor, c", "y, factor, c")
def test_saves_the_compressed_input_only():
    lin, opt = layer(bias=False, n=256, out=16)
    x = torch.randn(64, 256)
    r_and_probe = lin.q.shape[1]
    assert isinstance(lin, ProjectedLinear) and r_and_probe == 4 + 16
    assert saved_bytes(lin, x) == 64 * r_and_probe * 4
    lin.refresh = True
    assert saved_bytes(lin, x) == 64 * 256 * 4
