"""What a card can do: dense bf16 peak by name, measured where the name is unknown."""

from __future__ import annotations

import time

import torch

# Dense (no sparsity) bf16 tensor-core TFLOP/s, fp32 accumulation, from the vendors' data sheets. Longest name
# wins: "H100 PCIe" is not "H100". GeForce cards run bf16 with fp32 accumulation at half their headline rate.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H200": 989.4,
    "H200 NVL": 835.0,
    "GH200": 989.4,
    "B200": 2250.0,
    "A100": 311.9,
    "A800": 311.9,
    "A40": 149.7,
    "A10G": 70.0,
    "A10": 125.0,
    "A30": 165.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX A6000": 154.8,
    "RTX 6000 Ada": 364.2,
    "RTX 5090": 209.5,
    "RTX 5080": 112.6,
    "RTX 4090": 165.2,
    "RTX 4080": 97.5,
    "RTX 4070": 58.3,
    "RTX 3090 Ti": 80.0,
    "RTX 3090": 71.2,
}


def peak_flops(device: torch.device) -> float:
    """bf16 FLOP/s of a CUDA device: its data sheet's for a known card, else what a large product reaches."""
    known = match(torch.cuda.get_device_name(device))
    return known * 1e12 if known else measured_flops(device, torch.bfloat16)


def match(name: str) -> float | None:
    """Peak TFLOP/s of a device name; None for laptop parts (other chips) and MIG slices (parts of one)."""
    if any(part in name.lower() for part in ("laptop", "max-q", "mig")):
        return None
    words = name.replace("-", " ").split()
    best = [k for k in PEAK_TFLOPS if _contains(words, k.split())]
    return PEAK_TFLOPS[max(best, key=len)] if best else None


def _contains(words: list[str], part: list[str]) -> bool:
    starts = range(len(words) - len(part) + 1)
    found = any(words[i : i + len(part)] == part for i in starts)
    # "RTX 4080 SUPER" and "RTX 4090 D" are other chips than "RTX 4080" and "RTX 4090"
    extra = {"SUPER", "Ti", "D"} & (set(words) - set(part))
    return found and not extra


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Best rate of a large square product of random numbers, 2 n^3 operations, in about half a second."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + 0.5
    a @ b
    while time.perf_counter() < end:
        _wait(device)
        start = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
