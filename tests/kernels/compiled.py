"""Every variant compiled ahead of time for five cards, without a GPU; a process of test_kernels.py."""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import adam

CARDS = (80, 86, 89, 90, 120)  # A100, RTX 3090, RTX 4090, H100 and H200, RTX 5090
SHARED = 101_376  # bytes a program may have on a 3090, 4090 or 5090

failed = False
for weight, grad, moment in adam.VARIANTS:
    constants = {"WEIGHT": adam.DTYPES[weight], "GRAD": adam.DTYPES[grad], "MOMENT": adam.DTYPES[moment]}
    constants["BLOCK"] = adam.BLOCK
    signature = {"addresses": "*i64", "blocks": "*i32", "table": "*fp32"}
    signature |= dict.fromkeys(("beta1", "rest1", "beta2", "rest2", "eps"), "fp32") | dict.fromkeys(
        constants, "constexpr"
    )
    for card in CARDS:
        source = ASTSource(adam.adam_kernel, signature, constants)
        kernel = triton.compile(source, target=GPUTarget("cuda", card, 32), options={"num_warps": adam.WARPS})
        wide = kernel.asm["ptx"].count("ld.global.v4") + kernel.asm["ptx"].count("ld.global.L1::evict")
        ok = len(kernel.asm["cubin"]) > 0 and kernel.metadata.shared <= SHARED and wide > 0
        failed |= not ok
        print(
            "ok " if ok else "BAD",
            card,
            weight,
            moment,
            "shared",
            kernel.metadata.shared,
            "16-byte loads",
            wide,
        )
sys.exit(failed)
