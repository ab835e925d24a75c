"""What only a GPU runs: bf16 products summed in fp32, loss kernel, compiled blocks, no synchronisation."""

import pytest
import torch

from llama.loss import IGNORE, linear_cross_entropy
from llama.model import ModelConfig, build_model, compile_blocks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CFG = ModelConfig(hidden_size=256, intermediate_size=688, num_hidden_layers=2, num_attention_heads=4)


def inputs(N=1000, D=256, V=32100, dtype=torch.bfloat16):
    g = torch.Generator("cuda").manual_seed(0)
    h = torch.randn(N, D, generator=g, device="cuda").to(dtype).requires_grad_()
    w = (torch.randn(V, D, generator=g, device="cuda") / 8).to(dtype).requires_grad_()
    y = torch.randint(V, (N,), generator=g, device="cuda")
    y[::7] = IGNORE
    return h, w, y


def result(h, w, y, **kw):
    out = linear_cross_entropy(h, w, y, **kw)
    return out.detach(), *torch.autograd.grad(out / 131073, (h, w))


@pytest.mark.parametrize("chunk", [300, None])
def test_bf16_loss_error_is_at_most_twice_torchs(chunk):
    h, w, y = inputs()
    exact = result(*(t.detach().double().requires_grad_() for t in (h, w)), y, impl="plain")
    torchs, ours = result(h, w, y, impl="plain"), result(h, w, y, chunk=chunk)
    for name, a, b, e in zip(("loss", "dh", "dw"), ours, torchs, exact, strict=True):
        allowed = 2 * (b - e).norm() + 2**-9 * e.norm() * (name == "loss")
        assert (a - e).norm() <= allowed, name


def test_loss_never_holds_the_logits():
    h, w, y = inputs(N=65536, V=32000)
    linear_cross_entropy(h, w, y).backward()
    h.grad = w.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(h, w, y).backward()
    used = torch.cuda.max_memory_allocated() - before
    assert used < 0.75 * 2**30  # all logits in bf16: 3.9 GiB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_model_agrees_with_float64(dtype):
    model = build_model(CFG, "cuda", dtype, 0)
    exact = build_model(CFG, "cuda", torch.float64, 0)
    exact.load_state_dict(model.state_dict())
    g = torch.Generator("cuda").manual_seed(0)
    x, y = torch.randint(CFG.vocab_size, (2, 4, 128), generator=g, device="cuda")
    reference = exact(x, y)
    reference.backward()
    compile_blocks(model)
    for autocast in (False, dtype == torch.float32):
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(x, y)
        loss.backward()
        rtol = 1e-4 if dtype == torch.float32 and not autocast else 3e-2
        assert abs(loss - reference) <= rtol * reference
        for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
            assert (p.grad - q.grad).norm() <= rtol * q.grad.norm(), name


def test_a_step_does_not_wait_for_the_gpu():
    model = build_model(CFG, "cuda", torch.bfloat16, 0)
    compile_blocks(model)
    x = torch.randint(CFG.vocab_size, (4, 128), device="cuda")
    model(x, x).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x, x).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
