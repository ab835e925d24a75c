"""The configuration of a run: a dataclass for each group, everything checked before anything is allocated.

Group files under this folder give values; the dataclasses give keys, types and defaults.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from data.config import DataConfig
from llama.config import LAYERS, ActivationsConfig, ModelConfig, num_block_params, num_params
from optim.config import (
    AdapterConfig,
    AdaRankConfig,
    BasisConfig,
    MagnitudeConfig,
    NaturalConfig,
    OptimConfig,
    ProjectedConfig,
    Velora,
    default_lr,
    default_rank,
    default_refresh_every,
    either,
)

from .groups import FOLDER, group_options, group_schema
from .values import ConfigError, apply, leaves, read_yaml, show

# Group -> schema name -> dataclass. A group file opens with `defaults: [/schema/<group>/<name>@_here_]`.
SCHEMAS: dict[str, dict[str, type]] = {
    "model": {"llama": ModelConfig},
    "optim": {
        "adamw": OptimConfig,
        "low-rank": BasisConfig,  # of no method by itself
        "projected": ProjectedConfig,
        "natural": NaturalConfig,
        "adarank": AdaRankConfig,
        "magnitude": MagnitudeConfig,
        "adapter": AdapterConfig,
    },
    "data": {"text": DataConfig},
    "activations": {"activations": ActivationsConfig},
}
CHOICES = {
    "weights": ("bf16", "fp32"),
    "dist": ("replicate",),
    "compile": ("auto", "off"),
    "graph": ("auto", "off"),
    "spike": ("off", "skip", "rewind"),
}
SINKS = ("none", "wandb", "tensorboard")
# key -> (smallest, largest, what it counts)
RANGES = {
    "steps": (1, 10**9, "optimizer steps"),
    "tokens_per_step": (2, 2**30, "token positions over all ranks"),
    "micro_batch": (1, 65536, "sequences per rank"),
    "seq_len": (2, 131072, "tokens per sequence"),
    "seed": (0, 2**31 - 1, "one number for weights and data order"),
    "eval_every": (1, 10**9, "optimizer steps"),
    "save_every": (1, 10**9, "optimizer steps"),
    "save_minutes": (0, 10**6, "minutes, 0 for steps alone"),
    "keep_last": (1, 10**6, "checkpoints kept"),
}
SPIKE_LAG = 20  # steps from a spike's first loss to going back, at most
LR_RANGE_STEPS = 200  # of a test of learning rates
# Published pre-training lengths: up to this many parameters -> steps of 131,072 positions.
STEPS = ((100e6, 10_000), (250e6, 20_000), (600e6, 60_000), (2e9, 100_000), (float("inf"), 150_000))


@dataclass
class RunConfig:
    dir: str = "runs"  # parent of the run's folder
    name: str | None = None  # the run's folder; None: model_optim_seed


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    activations: ActivationsConfig = field(default_factory=ActivationsConfig)
    run: RunConfig = field(default_factory=RunConfig)
    steps: int | None = None  # None: by model size
    tokens_per_step: int = 131072  # token positions over all ranks and micro-batches
    micro_batch: int = 16  # sequences per rank and forward pass
    seq_len: int = 256
    seed: int = 0
    eval_every: int = 1000
    save_every: int = 1000
    save_minutes: float = 30.0  # minutes without a save before one is made; 0: only every save_every steps
    keep_last: int = 2
    spike: str = "off"  # off | skip | rewind: what a loss out of line with those before does
    deterministic: bool = False  # kernels that give the same bits every time, on a GPU slower ones
    profile: bool = False  # a trace of three steps in the run folder
    weights: str | None = None  # bf16 | fp32; None: bf16 on a GPU, fp32 on a CPU
    dist: str = "replicate"
    compile: str = "auto"  # auto | off; auto acts on a GPU only
    graph: str = "auto"  # auto | off: a step as one CUDA graph; auto acts on one GPU alone
    log: Any = "none"  # none | wandb | tensorboard, or a list of them

    def check(self) -> list[str]:
        """Every problem that needs no world size to see; combinations once each value alone is in range."""
        return self.ranges() or self.combinations()

    def ranges(self) -> list[str]:
        """Every value that cannot be meant, whatever the others are."""
        found = []
        for key, (low, high, unit) in RANGES.items():
            value = getattr(self, key)
            if value is None and key == "steps":
                continue
            if not low <= value <= high:
                found.append(f"{key}={value}: outside {low}..{high} ({unit}); choose one inside")
        for key, names in CHOICES.items():
            value = getattr(self, key)
            if value not in names and not (value is None and key == "weights"):
                found.append(f"{key}={value}: no such choice; choose {' or '.join(names)}")
        found += self._log_problems() + self._run_problems()
        for group in SCHEMAS:
            found += getattr(self, group).problems()
        return found

    def _log_problems(self) -> list[str]:
        names = self.log if isinstance(self.log, list) else [self.log]
        if not names or any(name not in SINKS for name in names):
            return [f"log={self.log}: no such choice; choose none, wandb, tensorboard or [wandb,tensorboard]"]
        if len(set(names)) < len(names):
            return [f"log={self.log}: a name stands twice; write each once"]
        if "none" in names and len(names) > 1:
            return [f"log={self.log}: none goes with nothing else; drop it or the others"]
        return []

    def _run_problems(self) -> list[str]:
        found = []
        if not self.run.dir.strip() or not self.run.dir.isprintable():
            found.append(f"run.dir={self.run.dir}: not a folder's path; runs is the default")
        name = self.run.name
        if name is None:
            return found
        plain = (
            name.isprintable() and name == name.strip() and name not in ("", ".", "..") and len(name) <= 200
        )
        if not plain or set(name) & set("/\\") or name.startswith("-"):
            found.append(
                f"run.name={name}: not a plain folder name; give it without / and \\, put the path in run.dir"
            )
        return found

    def combinations(self) -> list[str]:
        """Pairs of values that are fine alone and impossible together."""
        found = []
        share, layers = self.activations.checkpoint, self.model.num_hidden_layers
        if share and not round(share * layers) and not self.model.init_from:
            found.append(
                f"activations.checkpoint={share}: less than one block with model.num_hidden_layers={layers}; "
                f"give {math.ceil(1000 / layers) / 1000} or more, or 0"
            )
        found += self._velora_problems()
        if self.optim.lr_range:
            for key, off in (("spike", "off"), ("profile", False)):
                if getattr(self, key) != off:
                    found.append(
                        f"{key}={getattr(self, key)}: would be ignored with optim.lr_range=true; leave it out"
                    )
        kept = (self.keep_last - 1) * self.save_every
        if self.spike == "rewind" and kept < SPIKE_LAG:
            enough = -(-SPIKE_LAG // self.save_every) + 1
            found.append(
                f"keep_last={self.keep_last}: with spike=rewind and save_every={self.save_every} any save "
                f"may be younger than a spike once it is found; give {enough} or more"
            )
        try:
            self.accumulation(1)
        except ConfigError as error:
            found += error.problems
        return found

    def _velora_problems(self) -> list[str]:
        """What VeLoRA does not go with: the shapes, unless a folder will give them, and the method."""
        kept, model = self.activations, self.model
        if kept.layers is None:
            return []
        how = Velora(kept.names, kept.size)
        found = how.clashes(self.optim)
        try:
            for name in [] if model.init_from else kept.names:
                how.size(name, model.intermediate_size if name == "down" else model.hidden_size)
        except ValueError as e:
            found.append(str(e))
        if isinstance(self.optim, BasisConfig) and set(kept.names) == set(LAYERS):
            found.append(
                f"activations.layers={kept.layers}: leaves no matrix to {self.optim.name}; "
                "choose optim=adamw, or fewer layers"
            )
        return found

    def accumulation(self, world: int) -> int:
        """Micro-batches per optimizer step on each of `world` ranks.

        Raises ConfigError when tokens_per_step is no whole number of them, with the nearest values that are.
        """
        once = self.micro_batch * self.seq_len * world
        whole, rest = divmod(self.tokens_per_step, once)
        if rest == 0 and whole > 0:
            return whole
        near = " or ".join(str(k * once) for k in (whole, whole + 1) if k > 0)
        ranks = f" x {world} ranks" if world > 1 else ""
        raise ConfigError(
            [
                f"tokens_per_step={self.tokens_per_step}: not a multiple of micro_batch={self.micro_batch} x "
                f"seq_len={self.seq_len}{ranks} = {once}; nearest: {near}"
            ]
        )

    def smaller(self, world: int) -> str:
        """The nearest setting that needs less memory and gives the same steps, as a line for people."""
        smaller = replace(self)
        for size in range(self.micro_batch - 1, 0, -1):
            smaller.micro_batch = size
            try:
                smaller.accumulation(world)
            except ConfigError:
                continue
            return f"try micro_batch={size}: the same step in more passes"
        if getattr(self.optim, "lift", "now") != "now":
            return "try optim.lift=now: the same step without a matrix beside each weight"
        share = self.activations.checkpoint
        if share < 1:
            more = min(1.0, math.floor(4 * share + 1) / 4)
            return f"try activations.checkpoint={more:g}: that share of the blocks is computed again"
        return "try optim=galore_8bit, a smaller optim.rank, a smaller model, or more memory"

    def resolved(self) -> Config:
        """A copy with the nulls that depend on the model filled: steps, run.name, optim's."""
        cfg = copy.deepcopy(self)
        size = num_params(cfg.model)
        cfg.activations.group = cfg.activations.size
        if cfg.optim.lr_range:
            cfg.steps = cfg.steps or LR_RANGE_STEPS
            cfg.run.name = f"{cfg.run.name}_lr_range" if cfg.run.name else None
        if cfg.steps is None:
            cfg.steps = next(steps for limit, steps in STEPS if size <= limit)
        if cfg.optim.lr is None:
            cfg.optim.lr = default_lr(size, isinstance(cfg.optim, BasisConfig))
        if isinstance(cfg.optim, BasisConfig):
            if cfg.optim.rank is None:
                cfg.optim.rank = default_rank(num_block_params(cfg.model), cfg.model.hidden_size)
            if cfg.optim.refresh_every is None:
                cfg.optim.refresh_every = default_refresh_every(size)
        if cfg.run.name is None:
            cfg.run.name = f"llama_{size / 1e6:.0f}m_{cfg.optim.name}_{cfg.seed}"
            cfg.run.name += "_lr_range" if cfg.optim.lr_range else ""
        return cfg


def register() -> None:
    """Make the dataclasses known to Hydra, as the schemas that config.yaml and the group files name."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(group="schema", name="config", node=Config)
    for group, schemas in SCHEMAS.items():
        for name, kind in schemas.items():
            store.store(group=f"schema/{group}", name=name, node=kind)


def methods(schema: str, folder: Path = FOLDER) -> list[str]:
    """The options of `optim` that take this schema's keys."""
    kinds, names = SCHEMAS["optim"], group_options("optim", folder)
    return [n for n in names if issubclass(kinds[group_schema("optim", n, folder)], kinds[schema])]


def blank(method: str, folder: Path = FOLDER) -> Config:
    """The dataclasses' defaults, `optim` with this method's keys. Raises ConfigError if there is none."""
    options = group_options("optim", folder)
    if method not in options:
        raise ConfigError([f"optim.name={show(method)}: no such method; choose {either(options)}"])
    kind = SCHEMAS["optim"].get(group_schema("optim", method, folder), OptimConfig)
    return Config(optim=kind(name=method))


def elsewhere(key: str, folder: Path = FOLDER) -> str:
    """Reason and way out for a key that only methods of another schema have; empty if none has it."""
    having = [schema for schema, kind in SCHEMAS["optim"].items() if key in leaves(kind(), "optim.")]
    if not having:
        return ""
    names = [n for n in group_options("optim", folder) if any(n in methods(s, folder) for s in having)]
    return f"belongs to {having[0]} methods; choose optim={either(names)}"


def to_yaml(cfg: Config) -> str:
    """The configuration as YAML text; `from_yaml` gives back an equal one."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(asdict(cfg)))


def from_yaml(path: str | Path, folder: Path = FOLDER) -> Config:
    """The configuration of a run folder's config.yaml. Keys it lacks take their defaults.

    Raises ConfigError with one line per unknown key or bad value, each naming the file.
    """
    values = read_yaml(Path(path))
    try:
        cfg = blank(str(values.get("optim.name", OptimConfig.name)), folder)
        # The folder that the run started from may be gone by now, and nothing reads it again.
        found = apply(cfg, values, lambda key: elsewhere(key, folder)) or [
            line for line in cfg.check() if not line.startswith("model.init_from=")
        ]
    except ConfigError as error:
        found = error.problems
    if found:
        raise ConfigError([f"{path}: {line}" for line in found])
    return cfg
