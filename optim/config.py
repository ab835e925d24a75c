"""Settings of an optimizer. No torch here: `--help` and the checks of a command line read this file."""

from __future__ import annotations

from dataclasses import dataclass

NAMES = ("adamw",)
MOMENTS = ("fp32", "bf16", "int8")
SCHEDULES = ("cosine", "linear", "constant")


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
    moments: str = "fp32"  # fp32 | bf16 | int8
    schedule: str = "cosine"  # cosine | linear | constant
    warmup: float = 0.1  # share of steps
    min_lr_ratio: float = 0.1

    def problems(self) -> list[str]:
        """Every value out of range, one line each: `optim.key=value: reason; way out`. NaN is in no range."""
        found = []

        def need(ok: bool, key: str, reason: str, way_out: str) -> None:
            if not ok:
                found.append(f"optim.{key}={getattr(self, key)}: {reason}; {way_out}")

        def one_of(key: str, names: tuple[str, ...]) -> None:
            need(getattr(self, key) in names, key, "no such choice", f"choose {' or '.join(names)}")

        one_of("name", NAMES)
        need(
            self.lr is None or 0 < self.lr <= 10,
            "lr",
            "outside (0, 10]",
            "null takes the model size's, 1e-3 is usual",
        )
        need(0 < self.scale <= 100, "scale", "outside (0, 100]", "1 runs the matrices at lr itself")
        need(0 <= self.beta1 < 1, "beta1", "outside [0, 1)", "0.9 is usual")
        need(0 <= self.beta2 < 1, "beta2", "outside [0, 1)", "0.999 or 0.95 are usual")
        need(0 < self.eps <= 1, "eps", "outside (0, 1]", "1e-8 is usual")
        need(0 <= self.decay <= 1, "decay", "outside [0, 1]", "0 switches decay off, 0.1 is usual")
        need(0 <= self.clip <= 1e6, "clip", "outside [0, 1e6]", "0 switches clipping off, 1 is usual")
        one_of("moments", MOMENTS)
        one_of("schedule", SCHEDULES)
        need(0 <= self.warmup <= 1, "warmup", "outside [0, 1]", "it is a share of steps, 0.1 is usual")
        need(
            0 <= self.min_lr_ratio <= 1, "min_lr_ratio", "outside [0, 1]", "it is a share of lr, 0.1 is usual"
        )
        if self.schedule == "constant":
            need(
                self.min_lr_ratio == OptimConfig.min_lr_ratio or not 0 <= self.min_lr_ratio <= 1,
                "min_lr_ratio",
                "would be ignored with optim.schedule=constant",
                "leave it out or choose cosine or linear",
            )
        return found


def default_lr(numbers: int) -> float:
    """Peak lr of dense methods for a model of so many parameters."""
    return 1e-3 if numbers < 1_000_000_000 else 5e-4
