"""A learning rate range test (Smith, "Cyclical learning rates", section 3.3): lr rises by a constant factor
each step, from a hundredth of optim.lr to a hundred times it; the loss tells where it is too small and too
large."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

SPAN = 100.0  # lr goes from optim.lr / SPAN to optim.lr * SPAN
SMOOTH = 0.1  # weight of a new loss in the running mean
WORSE = 0.5  # nats above the lowest mean: the test ends


def lr_at(step: int, steps: int, lr: float) -> float:
    """Of step 1..steps."""
    return lr * SPAN ** (2 * (step - 1) / max(1, steps - 1) - 1)


def smooth(losses: Sequence[float]) -> list[float]:
    """Running means that start unbiased."""
    mean, out = 0.0, []
    for n, x in enumerate(losses, 1):
        mean += SMOOTH * (x - mean)
        out.append(mean / (1 - (1 - SMOOTH) ** n))
    return out


def ended(losses: Sequence[float | None]) -> bool:
    """Whether a larger lr needs no trying."""
    if not losses:
        return False
    if losses[-1] is None or not math.isfinite(losses[-1]):
        return True
    means = smooth([x for x in losses if x is not None])
    return means[-1] > min(means) + WORSE


def suggest(lrs: Sequence[float], losses: Sequence[float | None]) -> float | None:
    """A third of the lr at which the loss is lowest (by the running mean, which lags); None where it never
    fell."""
    pairs = [(lr, x) for lr, x in zip(lrs, losses, strict=True) if x is not None and math.isfinite(x)]
    if not pairs:
        return None
    means = smooth([x for _, x in pairs])
    best = min(range(len(means)), key=means.__getitem__)
    lag = round(1 / SMOOTH) - 1
    return pairs[max(0, best - lag)][0] / 3 if best and means[best] < means[0] - 0.01 else None


def draw(path: Path, lrs: Sequence[float], losses: Sequence[float | None], chosen: float | None) -> None:
    """lr_range.png: loss and its running mean over lr, the suggestion as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pairs = [(lr, x) for lr, x in zip(lrs, losses, strict=True) if x is not None and math.isfinite(x)]
    fig, ax = plt.subplots(figsize=(8, 4.5), dpi=120)
    if pairs:
        x, y = zip(*pairs, strict=True)
        means = smooth(y)
        ax.plot(x, y, color="0.75", lw=0.8, label="loss")
        ax.plot(x, means, color="C0", label="running mean")
        low, high = min(means), means[0]
        ax.set_ylim(low - 0.1 * (high - low + 0.1), high + 0.5)
    if chosen:
        ax.axvline(chosen, color="C1", ls="--", label=f"optim.lr={chosen:.2g}")
    ax.set(xscale="log", xlabel="optim.lr", ylabel="loss (nats per token)", title=path.parent.name)
    ax.grid(alpha=0.3)
    ax.legend()
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)
