"""The kernels' source on CPU tensors against their references; a process of test_kernels.py.

Needs TRITON_INTERPRET=1. Prints one line a case: dtypes and the largest differences.
"""

import sys

import torch

from kernels import adam_, cross_entropy_, plan
from kernels.adam import VARIANTS
from kernels.reference import Column

BETAS = (0.9, 0.999, 1e-8)
SIZES = [1, 7, 33, 127, 129, 2047, 2048, 2049, 6000]


def case(weight, grad, moment, seed):
    g = torch.Generator().manual_seed(seed)

    def make(dtype, positive=False):
        out = []
        for n in SIZES:
            x = torch.randn(n, generator=g)
            out.append((x.square() if positive else x).to(dtype))
        return out

    ws, gs, ms, vs = make(weight), make(grad), make(moment), make(moment, positive=True)
    table = torch.zeros(len(SIZES), 8)
    table[:, Column.LR] = torch.linspace(1e-3, 1e-1, len(SIZES))
    table[:, Column.KEEP] = 0.99
    table[:, Column.CLIP] = 0.7
    table[:, Column.OK] = 1
    table[4, Column.OK] = 0
    table[:, Column.T] = 3
    table[:, Column.INDEX] = torch.arange(len(SIZES))
    table[:, Column.FIX1], table[:, Column.FIX2] = 0.271, 0.002997
    return ws, gs, ms, vs, table


def ulps(a, b, before):
    """Largest difference in units of the last place of the larger of old and new value.

    Where an update nearly cancels a weight, the rounding of the old one is all that is left. NaN counts as
    infinitely far.
    """
    bits = 7 if b.dtype == torch.bfloat16 else 23
    size = torch.maximum(b.double().abs(), before.double().abs()).clamp(min=1e-30)
    unit = 2.0 ** (torch.floor(torch.log2(size)) - bits)
    return ((a.double() - b.double()).abs() / unit).nan_to_num(float("inf")).max().item()


failed = False
for weight, grad, moment in VARIANTS:
    for seed in range(2):
        ours, ref = case(weight, grad, moment, seed), case(weight, grad, moment, seed)
        before = [[t.clone() for t in kind] for kind in ours[:4]]
        guard = before[0]
        adam_(*ours, plan(ours[0]), *BETAS, impl="triton")
        adam_(*ref, None, *BETAS, impl="ref")
        worst = {}
        for name, *kinds in zip("wgmv", ours[:4], ref[:4], before, strict=True):
            worst[name] = max(ulps(*three) for three in zip(*kinds, strict=True))
        skipped = torch.equal(ours[0][4], guard[4])
        moved = all(
            not torch.equal(a, b) for n, (a, b) in enumerate(zip(ours[0], guard, strict=True)) if n != 4
        )
        # bf16: the interpreter truncates fp32 where hardware rounds to nearest, one unit; v is rounded by its
        # own random bits and must agree but for an fp32 last place: one unit too.
        # fp32: eight roundings on the way, in another order.
        allowed = {
            n: 1.0 if t[0].dtype == torch.bfloat16 else 8.0 for n, t in zip("wgmv", ref[:4], strict=True)
        }
        other = sum(int((a != b).sum()) for a, b in zip(ours[3], ref[3], strict=True)) / sum(SIZES)
        same_bits = moment != torch.bfloat16 or other < 1e-3
        ok = (
            skipped and moved and same_bits and worst["g"] == 0 and all(worst[n] <= allowed[n] for n in "wmv")
        )
        failed |= not ok
        print("ok " if ok else "BAD", weight, moment, worst, "skipped" if skipped else "NOT SKIPPED")
for dtype in (torch.float32, torch.bfloat16):
    for vocabulary in (1, 7, 4095, 4096, 4097, 9001):
        g = torch.Generator().manual_seed(vocabulary)
        logits = (torch.randn(5, vocabulary, generator=g) * 4).to(dtype)
        logits[3] = torch.arange(vocabulary) % 7 * 30.0 - 90.0  # wide: exp of the plain logits would overflow
        labels = torch.randint(vocabulary, (5,), generator=g)
        labels[1] = -100
        exact = logits.double()
        want = cross_entropy_(exact, labels, True, impl="ref")
        for grad in (False, True):
            ours = logits.clone()
            nll = cross_entropy_(ours, labels, grad, impl="triton")
            off = (nll.double() - want).abs().max().item()
            ok = off <= 4e-6 * want.abs().max().item() + 1e-6
            if grad:  # bf16: one unit of each entry, as the interpreter truncates
                unit = 2**-7 if dtype == torch.bfloat16 else 1e-6
                ok &= ((ours.double() - exact).abs() <= unit * exact.abs() + 1e-6).all().item()
                ok &= ours[1].abs().max().item() == 0
            else:
                ok &= torch.equal(ours, logits)
            failed |= not ok
            print("ok " if ok else "BAD", "cross-entropy", dtype, vocabulary, "grad" if grad else "loss", off)
sys.exit(failed)
