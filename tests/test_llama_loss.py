"""The chunked loss against F.cross_entropy over full logits."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama import loss as loss_module
from llama.loss import IGNORE, linear_cross_entropy
from tests.mutants import kills

N, D, V = 37, 16, 53


def inputs(dtype, ignored=(3, 4, 36), seed=0):
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(N, D, generator=g).to(dtype).requires_grad_()
    w = torch.randn(V, D, generator=g).to(dtype).requires_grad_()
    y = torch.randint(V, (N,), generator=g)
    y[list(ignored)] = IGNORE
    return h, w, y


def result(function, h, w, y, scale=1.0):
    out = function(h, w, y)
    return out.detach(), *torch.autograd.grad(out * scale, (h, w))


def plain(h, w, y):
    return F.cross_entropy(F.linear(h, w), y, ignore_index=IGNORE, reduction="sum")


def chunked(chunk):
    return lambda h, w, y: linear_cross_entropy(h, w, y, impl="chunked", chunk=chunk)


@kills("llama/loss.py", "start : start + rows].t()", "start : start + rows - 1].t()")
@kills("llama/loss.py", "range(0, V, rows)", "range(0, V - rows, rows)")
@pytest.mark.parametrize("rows", [5, V, V + 1])
@pytest.mark.parametrize("chunk", [1, 7, 36, 37, 64, None])
def test_float64_equals_full_logits_for_every_chunk(chunk, rows, monkeypatch):
    monkeypatch.setattr(loss_module, "SLICE", rows * D)
    h, w, y = inputs(torch.float64)
    for ours, exact in zip(result(chunked(chunk), h, w, y, 0.3), result(plain, h, w, y, 0.3), strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-13)


def test_gradcheck():
    h, w, y = inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, y, chunk=10), (h, w))


def test_plain_is_the_reference():
    h, w, y = inputs(torch.float64)
    assert torch.equal(linear_cross_entropy(h, w, y, impl="plain"), plain(h, w, y))


def test_all_labels_ignored_give_zero_and_zero_gradients():
    h, w, y = inputs(torch.float32, ignored=range(N))
    loss, dh, dw = result(chunked(8), h, w, y)
    assert loss == 0 and not dh.any() and not dw.any()


def test_ignored_rows_are_exact_even_where_their_logits_are_not_finite():
    h, w, y = inputs(torch.float32)
    clean = result(chunked(8), h, w, y)
    poisoned = h.detach().clone()
    poisoned[y == IGNORE] = float("inf")
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(poisoned, w, y, chunk=8), clean[0])


def test_large_logits_do_not_overflow():
    h, w, y = inputs(torch.float32)
    loss, dh, dw = result(chunked(8), h.detach().mul(1e4).requires_grad_(), w, y)
    assert loss.isfinite() and dh.isfinite().all() and dw.isfinite().all()


def test_only_what_needs_a_gradient_gets_one():
    h, w, y = inputs(torch.float64)
    expected = result(plain, h, w, y)
    for frozen in (0, 1):
        leaves = [t.detach().requires_grad_(i != frozen) for i, t in enumerate((h, w))]
        linear_cross_entropy(*leaves, y, chunk=8).backward()
        assert leaves[frozen].grad is None
        torch.testing.assert_close(leaves[1 - frozen].grad, expected[2 - frozen])


@pytest.mark.parametrize("chunk", [8, N])
@pytest.mark.parametrize("scale", [1.0, 1 / 131073])  # as the sum, and divided by a number of tokens
def test_bf16_error_is_at_most_twice_torchs(scale, chunk):
    h, w, y = inputs(torch.bfloat16)
    exact = result(
        plain, h.detach().double().requires_grad_(), w.detach().double().requires_grad_(), y, scale
    )
    ours = result(chunked(chunk), h, w, y, scale)
    torchs = result(lambda h, w, y: linear_cross_entropy(h, w, y, impl="plain"), h, w, y, scale)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == ours[2].dtype == torch.bfloat16
    for name, a, b, e in zip(("loss", "dh", "dw"), ours, torchs, exact, strict=True):
        allowed = 2 * (b - e).norm() + 2**-9 * e.norm() * (name == "loss")
        assert (a - e).norm() <= allowed, name


@kills("llama/loss.py", "torch.mul(part, scale.reshape(1, 1)", "torch.mul(part, scale.to(h.dtype)")
@pytest.mark.parametrize("chunk", [8, N])
def test_scale_is_not_rounded_to_bf16(chunk):
    h, w, y = inputs(torch.bfloat16)
    scale = torch.tensor(0.7012)  # halfway between two bf16 numbers
    one, scaled = result(chunked(chunk), h, w, y), result(chunked(chunk), h, w, y, scale)
    for a, b in zip(one[1:], scaled[1:], strict=True):
        ratio = (b.double() * a.double()).sum() / a.double().square().sum()
        assert abs(ratio / scale - 1) < 5e-4  # rounding the scale to bf16 first is off by 2.7e-3


def test_chunk_of_fp32_weight_gradients_is_summed_in_fp32():
    g = torch.Generator().manual_seed(5)
    h, w = (
        torch.randn(512, 8, generator=g).bfloat16(),
        torch.randn(16, 8, generator=g).bfloat16().requires_grad_(),
    )
    y = torch.randint(16, (512,), generator=g)
    exact = w.detach().double().requires_grad_()
    plain(h.double(), exact, y).backward()
    linear_cross_entropy(h, w, y, chunk=2).backward()
    error = (w.grad - exact.grad).norm() / exact.grad.norm()
    assert error < 2**-8  # 256 chunks added in bf16 lose 2e-2


@pytest.mark.parametrize("chunk", [8, N])
def test_autocast_computes_in_bf16_and_returns_fp32_gradients(chunk):
    h, w, y = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, dh, dw = result(chunked(chunk), h, w, y)
    exact = result(plain, h, w, y)
    assert loss.dtype == dh.dtype == dw.dtype == torch.float32
    for a, e in zip((loss, dh, dw), exact, strict=True):
        assert 1e-6 < (a - e).norm() / e.norm() < 2e-2


def test_nothing_of_the_size_of_the_logits_is_saved_or_made(monkeypatch):
    h, w, y = inputs(torch.float32)
    seen = []
    softmax = loss_module.kernels.cross_entropy_
    monkeypatch.setattr(
        loss_module.kernels, "cross_entropy_", lambda x, *a: (seen.append(x.shape[0]), softmax(x, *a))[1]
    )
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(t.numel()), t)[1], lambda t: t):
        linear_cross_entropy(h, w, y, chunk=8)
    assert seen[:5] == [8, 8, 8, 8, 5] and sorted(seen[5:]) == sorted([h.numel(), w.numel()])


class Sizes(TorchDispatchMode):
    """Of every fp32 tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.seen |= {t.shape for t in tree_leaves(out) if getattr(t, "dtype", None) == torch.float32}
        return out


@kills("llama/loss.py", "ctx.waits = need_weight and h.shape[0] <= chunk", "ctx.waits = False")
def test_with_one_chunk_no_weight_gradient_is_ever_whole_in_fp32(monkeypatch):
    monkeypatch.setattr(loss_module, "SLICE", 10 * D)
    h, w, y = inputs(torch.bfloat16)
    for chunk, whole in ((8, True), (N, False)):
        w.grad = None
        with Sizes() as sizes:
            linear_cross_entropy(h, w, y, chunk=chunk).backward()
        assert ((V, D) in sizes.seen) == whole and w.grad.shape == (V, D)
