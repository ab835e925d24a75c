"""What only a GPU runs: the compiled update against the eager one, and a step without synchronisation."""

import copy

import pytest
import torch
from torch import nn

from optim import attach

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def model(dtype):
    torch.manual_seed(0)
    layers = [nn.Linear(33, 129, bias=False), nn.LayerNorm(129, bias=False), nn.Linear(129, 64, bias=False)]
    return nn.Sequential(nn.Embedding(77, 33), *layers).to(dtype)


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_update_equals_the_eager_one(dtype, moments):
    settings = {"lr": 1e-2, "decay": 0.1, "clip": 0.5, "moments": moments, "scale": 0.5}
    cpu = model(dtype)
    gpu = copy.deepcopy(cpu).cuda()
    opts = attach(cpu, "adamw", **settings), attach(gpu, "adamw", **settings)
    g = torch.Generator().manual_seed(0)
    for step in range(6):
        for a, b in zip(cpu.parameters(), gpu.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=g).to(dtype)
            if step == 2 and a.ndim == 1:
                a.grad[5] = float("inf")  # skipped whole
            b.grad = a.grad.cuda()
        for opt in opts:
            opt._fired = [1] * len(opt.owned)
            opt.step()
    for (name, a), b in zip(cpu.named_parameters(), gpu.parameters(), strict=True):
        # one unit in the last place: the devices sum the norm, and so the clip coefficient, in another order
        tol = 2**-7 if torch.bfloat16 in (dtype, opts[0].state[a]["m"].dtype) else 1e-5
        torch.testing.assert_close(b.cpu(), a, rtol=tol, atol=tol * 1e-2, msg=name)
        assert (b.cpu() - a).norm() <= 0.1 * tol * a.norm()
    assert int(opts[1].stats["skipped_in_a_row"]) == 0
    assert [float(t) for t in opts[1]._t] == [6, 6, 5, 6]


def test_a_step_reads_nothing_back():
    m = model(torch.bfloat16).cuda()
    opt = attach(m, "adamw", lr=1e-3, clip=1.0)
    x = torch.randint(77, (8, 4), device="cuda")
    for checked in (False, True):
        loss = m(x).float().square().mean()
        torch.cuda.set_sync_debug_mode("error" if checked else "default")
        try:
            loss.backward()
            opt.step()
            opt.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
