"""Every method: a rule for the matrices in blocks, how they are parametrised, and what differs from the
defaults.

To add one: a file in rules/, a line here, a YAML in configs/optim/ with the same defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .config import AdapterConfig, AdaRankConfig, MagnitudeConfig, NaturalConfig, OptimConfig, ProjectedConfig
from .rules import Rule
from .rules.adam import Adam
from .rules.natural import Natural
from .rules.sgd import Sgd


@dataclass(frozen=True)
class Method:
    rule: Callable[[OptimConfig], Rule]  # of the matrices; embeddings, head and gains are trained by Adam
    config: type[OptimConfig]  # what the rule sees: ProjectedConfig coordinates, MagnitudeConfig V's
    defaults: dict[str, Any] = field(default_factory=dict)


def adam(cfg: OptimConfig) -> Adam:
    return Adam(cfg.beta1, cfg.beta2, cfg.eps)


def natural(cfg: OptimConfig) -> Adam:
    """Without a history it is GaLore."""
    assert isinstance(cfg, NaturalConfig)
    if not cfg.history:
        return adam(cfg)
    return Natural(cfg.beta1, cfg.beta2, cfg.eps, cfg.history, cfg.damping)


METHODS = {
    "adamw": Method(adam, OptimConfig),
    "adamw_8bit": Method(adam, OptimConfig, {"moments": "int8"}),
    "galore": Method(adam, ProjectedConfig),
    "galore_8bit": Method(adam, ProjectedConfig, {"moments": "int8"}),
    "gradnormlorp": Method(adam, MagnitudeConfig, {"refresh_every": 250}),
    "gradnormlorp_8bit": Method(adam, MagnitudeConfig, {"refresh_every": 250, "moments": "int8"}),
    "gradnormlorp_adapter": Method(adam, AdapterConfig, {"refresh_every": 250}),
    "gradnormlorp_adapter_8bit": Method(adam, AdapterConfig, {"refresh_every": 250, "moments": "int8"}),
    "galore_sgd": Method(lambda cfg: Sgd(), ProjectedConfig, {"scale": 50.0}),
    "adarankgrad": Method(adam, AdaRankConfig),
    "adarankgrad_8bit": Method(adam, AdaRankConfig, {"moments": "int8"}),
    "natural_galore": Method(natural, NaturalConfig),
    "natural_galore_8bit": Method(natural, NaturalConfig, {"moments": "int8"}),
}
