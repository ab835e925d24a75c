"""Every variant compiled ahead of time for five cards, without a GPU; a process of test_kernels.py."""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import adam, cross_entropy

CARDS = (80, 86, 89, 90, 120)  # A100, RTX 3090, RTX 4090, H100 and H200, RTX 5090
SHARED = 101_376  # bytes a program may have on a 3090, 4090 or 5090

failed = False


def check(kernel, arguments, constants, warps, *what):
    """Cubin for every card within its shared memory, with 16-byte accesses."""
    global failed
    signature = arguments | dict.fromkeys(constants, "constexpr")
    for card in CARDS:
        source = ASTSource(kernel, signature, constants)
        built = triton.compile(source, target=GPUTarget("cuda", card, 32), options={"num_warps": warps})
        wide = built.asm["ptx"].count("ld.global.v4")
        ok = len(built.asm["cubin"]) > 0 and built.metadata.shared <= SHARED
        ok &= wide > 0 or kernel is not adam.adam_kernel
        failed |= not ok
        print("ok " if ok else "BAD", card, *what, "shared", built.metadata.shared, "16-byte loads", wide)


for weight, grad, moment in adam.VARIANTS:
    kinds = {"WEIGHT": adam.DTYPES[weight], "GRAD": adam.DTYPES[grad], "MOMENT": adam.DTYPES[moment]}
    arguments = {"addresses": "*i64", "blocks": "*i32", "table": "*fp32"}
    arguments |= dict.fromkeys(("beta1", "rest1", "beta2", "rest2", "eps"), "fp32")
    check(adam.adam_kernel, arguments, kinds | {"BLOCK": adam.BLOCK}, adam.WARPS, "adam", weight, moment)
for dtype, grad in cross_entropy.VARIANTS:
    pointer = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}[dtype]
    arguments = {"logits": pointer, "labels": "*i64", "nll": "*fp32", "V": "i32", "ignore": "i32"}
    constants = {"GRAD": grad, "BLOCK": cross_entropy.BLOCK}
    check(cross_entropy.cross_entropy_kernel, arguments, constants, cross_entropy.WARPS, "loss", dtype, grad)
sys.exit(failed)
