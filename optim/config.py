"""Settings of an optimizer. No torch here: `--help` and the checks of a command line read this file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass
class OptimConfig:
    """Dense methods."""

    name: str = "adamw"
    lr: float | None = None  # embeddings, head, gains; None: by model size
    scale: float = 1.0  # the matrices in blocks run at lr * scale
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    decay: float = 0.0  # decoupled; never on gains and embeddings
    clip: float = 0.0  # global gradient norm; 0: off
    clip_mode: str = "exact"  # exact | two_pass (a backward for the norm, another to update) | off
    update: str | None = None  # in_backward | after; None: see update_resolved
    moments: str = "fp32"  # fp32 | bf16 | int8 (8 bits, a scale for each block of 256)
    embed_moments: str | None = None  # fp32: those of embedding and head; None: as moments
    rounding: str = "stochastic"  # of bf16 weights at an update: stochastic | nearest
    schedule: str = "cosine"  # cosine | linear | constant
    warmup: float = 0.1  # share of steps
    min_lr_ratio: float = 0.1
    lr_range: bool = False  # of train.py: a short run over rising lr instead of training

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "clip_mode": ("exact", "two_pass", "off"),
        "update": ("in_backward", "after"),
        "moments": ("fp32", "bf16", "int8"),
        "embed_moments": ("fp32",),
        "rounding": ("stochastic", "nearest"),
        "schedule": ("cosine", "linear", "constant"),
    }
    # key: interval, what to do
    RANGES: ClassVar[dict[str, tuple[str, str]]] = {
        "lr": ("(0, 10]", "null takes the model size's, 1e-3 is usual"),
        "scale": ("(0, 100]", "1 runs the matrices at lr itself"),
        "beta1": ("[0, 1)", "0.9 is usual"),
        "beta2": ("[0, 1)", "0.999 or 0.95 are usual"),
        "eps": ("(0, 1]", "1e-8 is usual"),
        "decay": ("[0, 1]", "0 switches decay off, 0.1 is usual"),
        "clip": ("[0, 1e6]", "0 switches clipping off, 1 is usual"),
        "warmup": ("[0, 1]", "it is a share of steps, 0.1 is usual"),
        "min_lr_ratio": ("[0, 1]", "it is a share of lr, 0.1 is usual"),
    }

    @property
    def update_resolved(self) -> str:
        """in_backward: a weight changes as soon as its gradient is complete; after: all in step()."""
        return self.update or ("after" if self.clip_mode == "exact" else "in_backward")

    def problems(self) -> list[str]:
        """Every value that cannot be meant, one line each: `optim.key=value: reason; way out`.

        NaN is in no range. `name` is not judged: the list of methods is not kept here.
        """
        found = {}
        for key, (interval, hint) in self.RANGES.items():
            if not self._is_default_null(key) and not inside(getattr(self, key), interval):
                found[key] = f"outside {interval}; {hint}"
        for key, names in self.CHOICES.items():
            if not self._is_default_null(key) and getattr(self, key) not in names:
                null = ("null",) if getattr(type(self), key) is None else ()
                found[key] = f"no such choice; choose {either((*names, *null))}"
        for key, others, text in self._clashes():
            if not {key, *others} & set(found):
                found[key] = text
        return [f"optim.{key}={getattr(self, key)}: {text}" for key, text in found.items()]

    def _is_default_null(self, key: str) -> bool:
        return getattr(self, key) is None and getattr(type(self), key) is None

    def _clashes(self) -> list[tuple[str, tuple[str, ...], str]]:
        """Values that are fine alone and not together: (key, the other keys, reason and way out)."""
        clipping, mode = self.clip != 0, self.clip_mode
        found: list[tuple[str, tuple[str, ...], str]] = []
        if clipping and mode == "off":
            usable = either([name for name in self.CHOICES["clip_mode"] if name != "off"])
            way_out = f"set optim.clip=0 or choose {usable}"
            found.append(("clip", ("clip_mode",), f"would be ignored with optim.clip_mode=off; {way_out}"))
        if not clipping and mode not in ("off", type(self).clip_mode):
            reason = (
                "would run every backward twice for nothing" if mode == "two_pass" else "would be ignored"
            )
            text = f"{reason} with optim.clip=0; set optim.clip, 1 is usual, or leave it out"
            found.append(("clip_mode", ("clip",), text))
        if mode == "two_pass" and self.update == "after":
            text = "optim.clip_mode=two_pass updates in its second backward; leave it out or choose exact"
            found.append(("update", ("clip_mode",), text))
        if clipping and mode == "exact" and self.update == "in_backward":
            reason = (
                f"optim.clip={self.clip} with optim.clip_mode=exact needs all gradients before any update"
            )
            way_out = "set optim.update=after or optim.clip_mode=two_pass"
            found.append(("update", ("clip", "clip_mode"), f"{reason}; {way_out}"))
        if self.moments == self.embed_moments == "fp32":
            text = "would change nothing with optim.moments=fp32; leave it out or choose bf16 or int8 there"
            found.append(("embed_moments", ("moments",), text))
        if self.lr_range:
            for key in ("schedule", "warmup", "min_lr_ratio"):
                if getattr(self, key) != getattr(OptimConfig, key):
                    text = "would be ignored with optim.lr_range=true, which sets lr itself; leave it out"
                    found.append((key, (), text))
        if self.schedule == "constant" and self.min_lr_ratio != OptimConfig.min_lr_ratio:
            reason = "would be ignored with optim.schedule=constant"
            text = f"{reason}; leave it out or choose cosine or linear"
            found.append(("min_lr_ratio", ("schedule",), text))
        return found


@dataclass
class BasisConfig(OptimConfig):
    """Methods that train in a basis of low rank."""

    scale: float = 0.25
    clip_mode: str = "global_estimated"  # global_estimated | projected | per_layer | off
    rank: int | None = None  # None: by model size
    refresh_every: int | None = None  # steps between two bases of a matrix; None: by model size
    refresh: str = "staggered"  # staggered | together
    finder: str = "warm"  # warm | svd | randomized
    transport: str = "auto"  # of moments into a new basis: auto | keep | reset | rotate | rotate_fill
    growth_limit: float = 0.0  # an update's norm is at most this times the last one's; 0: off
    basis_dtype: str | None = None  # bf16 | fp32; None: the weights'
    lift: str = "now"  # into the weight: now | deferred: at each new basis | auto: by tokens an update

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = OptimConfig.CHOICES | {
        "clip_mode": ("global_estimated", "projected", "per_layer", "off"),
        "refresh": ("staggered", "together"),
        "finder": ("warm", "svd", "randomized"),
        "transport": ("auto", "keep", "reset", "rotate", "rotate_fill"),
        "basis_dtype": ("bf16", "fp32"),
        "lift": ("now", "deferred", "auto"),
    }
    RANGES: ClassVar[dict[str, tuple[str, str]]] = OptimConfig.RANGES | {
        "rank": ("[1, 65536]", "null takes the model size's, a quarter of the width is usual"),
        "refresh_every": ("[1, 1e6]", "null takes the model size's, 200 is usual"),
        "growth_limit": ("[0, 1000]", "0 switches it off, 1.01 is usual"),
    }

    def _clashes(self) -> list[tuple[str, tuple[str, ...], str]]:
        found = super()._clashes()
        if 0 < self.growth_limit < 1:
            text = "below 1 every update would be smaller than the last; 1.01 is usual, 0 switches it off"
            found.append(("growth_limit", (), text))
        return found


@dataclass
class ProjectedConfig(BasisConfig):
    """Methods that keep the gradients of matrices in blocks in a basis of low rank."""

    side: str = "input"  # input | output | paper | long | both
    share: bool = True  # one basis for weights with the same input; output bases are never shared

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = BasisConfig.CHOICES | {
        "side": ("input", "output", "paper", "long", "both"),
    }

    def _clashes(self) -> list[tuple[str, tuple[str, ...], str]]:
        found = super()._clashes()
        if self.lift == "deferred" and self.side != "input":
            reason = f"keeps updates where x Q meets them, which optim.side={self.side} does not form"
            found.append(("lift", ("side",), f"{reason}; choose now, or optim.side=input"))
        return found


@dataclass
class NaturalConfig(ProjectedConfig):
    """Natural GaLore: the projected gradient times an inverse Fisher matrix of the last ones."""

    history: int = 4  # projected gradients in it, each as large as a moment; 0: none, GaLore
    damping: float = 10.0  # of the matrix, over the mean square of their norms

    RANGES: ClassVar[dict[str, tuple[str, str]]] = ProjectedConfig.RANGES | {
        "history": ("[0, 64]", "4 is usual, 20 the paper's, 0 is galore"),
        "damping": ("[1e-3, 1e6]", "10 is usual"),
    }

    def _clashes(self) -> list[tuple[str, tuple[str, ...], str]]:
        found = super()._clashes()
        if self.history == 0 and self.damping != type(self).damping:
            text = "would be ignored with optim.history=0; leave it out or choose a history, 4 is usual"
            found.append(("damping", ("history",), text))
        return found


@dataclass
class AdaRankConfig(ProjectedConfig):
    """AdaRankGrad: each basis has the rank that its gradient needs, and lives until that has converged."""

    adapt_rank: bool = True  # False: optim.rank throughout
    adapt_refresh: bool = True  # False: every refresh_every steps, which else is the longest
    energy: float = 0.9  # share of the gradient's squared norm that a basis must hold
    rank_step: int | None = None  # ranks are its multiples; None: an eighth of optim.rank, 64 at most
    rank_min: int | None = None  # the least rank; None: half of optim.rank
    monotone: bool = False  # ranks never rise again

    RANGES: ClassVar[dict[str, tuple[str, str]]] = ProjectedConfig.RANGES | {
        "energy": ("(0, 1]", "0.9 is usual, 0.77 and 0.52 are the paper's 0.48"),
        "rank_step": ("[1, 65536]", "null takes an eighth of the rank, 64 at most"),
        "rank_min": ("[1, 65536]", "null takes half of the rank"),
    }

    def _clashes(self) -> list[tuple[str, tuple[str, ...], str]]:
        found = super()._clashes()
        if self.adapt_refresh and self.refresh == "together":
            text = "each basis has a time of its own; leave it out, or choose optim.adapt_refresh=false"
            found.append(("refresh", ("adapt_refresh",), text))
        if self.rank and self.rank_min and self.rank_min > self.rank:
            found.append(("rank_min", ("rank",), f"above optim.rank={self.rank}, the largest; choose less"))
        ignored = [] if self.adapt_rank else ["rank_step", "rank_min", "monotone"]
        for key in [*ignored, *([] if self.adapt_rank or self.adapt_refresh else ["energy"])]:
            if getattr(self, key) != getattr(type(self), key):
                found.append((key, (), "would be ignored with optim.adapt_rank=false; leave it out"))
        return found


@dataclass
class MagnitudeConfig(ProjectedConfig):
    """Methods that train a matrix as magnitude and direction, a number of each row."""

    mag_scale: float = 0.25  # the magnitudes run at lr * mag_scale

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = ProjectedConfig.CHOICES | {
        "side": ("input", "output", "paper", "long"),  # of both, P and the row factors do not commute
    }
    RANGES: ClassVar[dict[str, tuple[str, str]]] = ProjectedConfig.RANGES | {
        "mag_scale": ("[0, 100]", "0.25 is usual, 0 keeps the magnitudes"),
    }


@dataclass
class AdapterConfig(BasisConfig):
    """Methods that train factors of low rank beside a matrix that rests, and merge them into it."""

    mag_scale: float = 0.25  # the magnitudes run at lr * mag_scale
    merge_every: int | None = None  # steps between two merges; 0: never; None: as refresh_every
    core_rank: int | None = None  # of the factors' gradients; None: as rank
    detach_norm: bool = False  # the norm is a constant to the gradient, as in DoRA's cheap form
    normalize: bool = True  # False: W0 + I J, without magnitude
    project: bool = True  # False: Adam on the whole gradients of the factors

    RANGES: ClassVar[dict[str, tuple[str, str]]] = BasisConfig.RANGES | {
        "mag_scale": MagnitudeConfig.RANGES["mag_scale"],
        "merge_every": ("[0, 1e6]", "null merges with each new basis, 0 never"),
        "core_rank": ("[1, 65536]", "null takes rank itself"),
    }

    def _clashes(self) -> list[tuple[str, tuple[str, ...], str]]:
        found = super()._clashes()
        if self.core_rank and self.rank and self.core_rank > self.rank:
            text = f"above optim.rank={self.rank}, the factors' narrow side; choose at most that, or null"
            found.append(("core_rank", ("rank",), text))
        ignored: dict[str, str] = {}  # key: with what
        if not self.normalize:
            ignored |= dict.fromkeys(("mag_scale", "detach_norm"), "normalize=false")
        if not self.project:
            ignored |= dict.fromkeys(
                ("core_rank", "finder", "transport", "basis_dtype", "growth_limit"), "project=false"
            )
        if self.lift != "now":
            text = f"{self.name} keeps its factors beside the matrix as it is, and merges them; leave it out"
            found.append(("lift", (), text))
        for key, what in ignored.items():
            if getattr(self, key) != getattr(type(self), key):
                found.append((key, (), f"would be ignored with optim.{what}; leave it out"))
        return found


@dataclass(frozen=True)
class Velora:
    """VeLoRA's settings, the keys of activations.*: which layers keep their input compressed, and how.

    layers  last names of their modules, without _proj: v is v_proj
    group   m, the numbers of a sub-token: one for all layers or by name; None: sub_token's choice
    init    of v, from the first batch over all micro-batches and ranks: average, the mean sub-token (the
            paper's best); svd, the leading right singular vector of all sub-tokens; or random

    v is fixed from then on. The paper's other two are not offered: of an instance-wise v, one for each batch,
    coordinates cannot be summed over micro-batches or ranks; a running average moves v between updates, and
    moments of coordinates in the old v carry over by approximation only.
    """

    layers: Sequence[str]
    group: int | Mapping[str, int] | None = None
    init: str = "average"

    INITS: ClassVar[tuple[str, ...]] = ("average", "svd", "random")

    def size(self, layer: str, width: int) -> int:
        """m of a layer of so many inputs. ValueError where the one that was asked for does not divide it."""
        divisors = [m for m in range(1, width + 1) if width % m == 0]
        asked = self.group if self.group is None or isinstance(self.group, int) else self.group.get(layer)
        if asked is None:
            return min(divisors, key=lambda m: abs(m - SUB_TOKEN))
        if asked in divisors:
            return asked
        near = [max(m for m in divisors if m < asked)] + [m for m in divisors if m > asked][:1]
        raise ValueError(
            f"activations.group={self.group}: {asked} does not divide the {width} inputs of {layer}; "
            f"nearest: {either([str(m) for m in near])}, or null"
        )

    def clashes(self, cfg: OptimConfig) -> list[str]:
        """What of a method's settings does not go with it."""
        limit = getattr(cfg, "growth_limit", 0.0)
        if not limit:
            return []
        return [
            f"optim.growth_limit={limit}: measures updates in their basis, and those of VeLoRA's layers "
            "are not in one; leave it out, or activations.layers=null"
        ]


SUB_TOKEN = 32  # numbers of a sub-token, about: 64 to 344 sub-tokens an input from 130M to 7B


def inside(value: float, interval: str) -> bool:
    """Whether value is in an interval written like (0, 10]."""
    low, high = map(float, interval[1:-1].split(", "))
    return low <= value <= high and not (
        value == low and interval[0] == "(" or value == high and interval[-1] == ")"
    )


def either(names: Sequence[str]) -> str:
    """a, b or c."""
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def default_lr(numbers: int, projected: bool = False) -> float:
    """Peak lr for a model of so many parameters."""
    if projected:
        return 0.01 if numbers < 3_000_000_000 else 0.005
    return 1e-3 if numbers < 1_000_000_000 else 5e-4


# Numbers in the matrices of blocks -> rank: the published sizes 60M, 130M, 350M, 1B and 7B.
RANKS = {
    25_296_896: 128,
    84_934_656: 256,
    302_383_104: 256,
    1_207_910_400: 512,
    6_476_005_376: 1024,
}


def default_rank(block_numbers: int, hidden: int) -> int:
    """Rank for a model with so many numbers in the matrices of its blocks.

    Other sizes than RANKS': a quarter of the width, above 60M's rounded up to a multiple of 64.
    """
    if block_numbers in RANKS:
        return RANKS[block_numbers]
    quarter = max(1, hidden // 4)
    return quarter if block_numbers <= min(RANKS) else -(-quarter // 64) * 64


def default_rank_step(rank: int) -> int:
    """What ranks are multiples of. Each new one is a new shape for kernels, and 64 keeps their tiles full."""
    return min(64, max(1, rank // 8))


def default_refresh_every(numbers: int) -> int:
    """Steps between two bases of a matrix for a model of so many parameters."""
    return 200 if numbers < 3_000_000_000 else 500
