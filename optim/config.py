"""Settings of an optimizer. No torch here: `--help` and the checks of a command line read this file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class OptimConfig:
    name: str = "adamw"
    lr: float | None = None  # embeddings, head, gains; None: by model size
    scale: float = 1.0  # the matrices in blocks run at lr * scale
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    decay: float = 0.0  # decoupled; never on gains and embeddings
    clip: float = 0.0  # global gradient norm; 0: off
    moments: str = "fp32"  # fp32 | bf16
    schedule: str = "cosine"  # cosine | linear | constant
    warmup: float = 0.1  # share of steps
    min_lr_ratio: float = 0.1

    def problems(self) -> list[str]:
        return []


def default_lr(numbers: int) -> float:
    """Peak lr of dense methods for a model of so many parameters."""
    return 1e-3 if numbers < 1_000_000_000 else 5e-4
