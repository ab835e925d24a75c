"""Shape of a LLaMA model, and what its backward keeps.

No torch here: `--help` and the checks of a command line read this file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any


@dataclass
class ModelConfig:
    """Keys are those of Hugging Face's LlamaConfig, so that a model folder's config.json reads one to one."""

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 1376
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None  # None: as many as num_attention_heads (multi-head attention)
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    init_from: str | None = None  # a Hugging Face folder to start from; its shapes replace the ones above
    # intermediate_size is stored and computed as the next multiple of 64, the rest zeros; files and counts
    # keep the size above. None: on a GPU, and where it is no multiple of 8, as 1B's 5461, on which products
    # are slow. For those who compare, and for tests on a CPU.
    pad: bool | None = None

    @property
    def kv_heads(self) -> int:
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def problems(self) -> list[str]:
        """One line for each value that cannot work: key, value, reason, way out. Empty: it can be built.

        Never raises. With init_from the shapes come from its config.json, so only the folder is looked at.
        """
        if self.init_from is not None:
            if os.path.isfile(os.path.join(self.init_from, "config.json")):  # Path: OSError, too long
                return []
            return [
                f"model.init_from={self.init_from}: no config.json there; give a folder that export wrote"
            ]
        found = [
            f"model.{key}={getattr(self, key)}: outside {low} to {high}; {hint}"
            for key, (low, high, hint) in RANGES.items()
            if getattr(self, key) is not None and not low <= getattr(self, key) <= high  # NaN fails too
        ]
        return found or self._shape_problems()

    def _shape_problems(self) -> list[str]:
        hidden, heads, kv = self.hidden_size, self.num_attention_heads, self.kv_heads
        found = []
        fitting = [
            n for n in range(1, hidden // 2 + 1) if hidden % (2 * n) == 0
        ]  # head dimension even (rotary)
        if hidden % 2:
            found.append(f"model.hidden_size={hidden}: odd; rotary pairs need an even size, use {hidden + 1}")
        elif hidden % heads:
            found.append(
                f"model.num_attention_heads={heads}: does not divide model.hidden_size={hidden}; "
                f"use {nearest(heads, fitting)}"
            )
        elif heads not in fitting:
            found.append(
                f"model.num_attention_heads={heads}: head dimension {hidden // heads} is odd, "
                f"rotary pairs need an even one; use {nearest(heads, fitting)}"
            )
        if heads % kv:
            found.append(
                f"model.num_key_value_heads={kv}: does not divide model.num_attention_heads={heads}; "
                f"use {nearest(kv, [n for n in range(1, heads + 1) if heads % n == 0])}"
            )
        return found


LAYERS = ("q", "k", "v", "o", "gate", "up", "down")  # matrices of a block


@dataclass
class ActivationsConfig:
    checkpoint: float = 0.0  # share of blocks, the first ones, that are computed again in backward
    recompute: str = "none"  # none | down: the input of down, from gate and up, in the other blocks
    layers: Any = None  # VeLoRA's, a name or a list of LAYERS; None: no VeLoRA
    group: Any = None  # numbers of a sub-token, one or {layer: number}; None: about 32, by the layer's width
    init: str | None = None  # of its direction: average | svd | random; None: average

    @property
    def names(self) -> list[str]:
        """VeLoRA's layers."""
        return [] if self.layers is None else self.layers if isinstance(self.layers, list) else [self.layers]

    @property
    def size(self) -> Any:
        """`group`, of which a command line gives the text."""
        text = isinstance(self.group, str) and self.group.isascii() and self.group.isdigit()
        return int(self.group) if text and len(self.group) < 6 else self.group

    def problems(self) -> list[str]:
        found = []
        if not 0 <= self.checkpoint <= 1:
            found.append(
                f"activations.checkpoint={self.checkpoint}: outside [0, 1]; "
                "it is a share of blocks, 0 keeps every activation"
            )
        if self.recompute not in ("none", "down"):
            found.append(f"activations.recompute={self.recompute}: no such choice; choose none or down")
        elif self.recompute == "down" and self.checkpoint == 1:
            found.append(
                "activations.recompute=down: would be ignored with activations.checkpoint=1.0, which "
                "computes all of every block again; leave out one of them"
            )
        return found + self._velora_problems()

    def _velora_problems(self) -> list[str]:
        found = []
        if self.layers is None:
            for key in ("group", "init"):
                if getattr(self, key) is not None:
                    found.append(
                        f"activations.{key}={getattr(self, key)}: would be ignored without VeLoRA; "
                        "add activations=velora or leave it out"
                    )
            return found
        if not self.names or any(name not in LAYERS for name in self.names):
            found.append(
                f"activations.layers={self.layers}: not names of layers; choose of [{','.join(LAYERS)}], "
                "or null for no VeLoRA"
            )
        elif len(set(self.names)) < len(self.names):
            found.append(f"activations.layers={self.layers}: a name stands twice; write each once")
        sizes = self.size if isinstance(self.size, dict) else {None: self.size}
        if self.group is not None and (
            not sizes or any(type(m) is not int or not 1 <= m <= 65536 for m in sizes.values())
        ):
            found.append(
                f"activations.group={self.group}: not a number of 1 to 65536, nor {{layer:number}} of such; "
                "null is usual"
            )
        elif isinstance(self.group, dict) and (others := [n for n in self.group if n not in self.names]):
            found.append(
                f"activations.group={self.group}: {others[0]} is not in activations.layers={self.layers}; "
                "add it there or leave it out"
            )
        if self.init not in ("average", "svd", "random", None):
            found.append(f"activations.init={self.init}: no such choice; choose average, svd, random or null")
        return found


# key: lowest, highest, what to do. The upper ends are far beyond any published LLaMA (405B: hidden 16384,
# 126 layers, vocabulary 128256); they catch a slipped digit before anything is allocated.
RANGES: dict[str, tuple[float, float, str]] = {
    "vocab_size": (256, 1_000_000, "use the number of pieces of the tokenizer"),
    "hidden_size": (2, 65536, "512 is the 60M model's"),
    "intermediate_size": (1, 262144, "8/3 of model.hidden_size is usual"),
    "num_hidden_layers": (1, 1024, "8 is the 60M model's"),
    "num_attention_heads": (1, 1024, "use model.hidden_size / 64"),
    "num_key_value_heads": (1, 1024, "use null for as many as model.num_attention_heads"),
    "rope_theta": (1, 10**12, "10000 is usual"),
    "rms_norm_eps": (1e-12, 0.1, "1e-6 is usual"),
}


def nearest(value: int, choices: list[int]) -> str:
    """'8 or 4': the choices next to value, the closest first."""
    below = max((c for c in choices if c < value), default=None)
    above = min((c for c in choices if c > value), default=None)
    both = sorted((c for c in (above, below) if c is not None), key=lambda c: abs(c - value))
    return " or ".join(str(c) for c in both)


def block_params(cfg: ModelConfig) -> int:
    """Parameters in the seven matrices of one block: q, k, v, o, gate, up, down."""
    kv_width = cfg.kv_heads * cfg.head_dim
    return cfg.hidden_size * (2 * cfg.hidden_size + 2 * kv_width + 3 * cfg.intermediate_size)


def num_block_params(cfg: ModelConfig) -> int:
    """Parameters in the matrices of all blocks."""
    return cfg.num_hidden_layers * block_params(cfg)


def num_params(cfg: ModelConfig) -> int:
    """Exact number of parameters; L(4h^2 + 3hi) + 2Vh + (2L + 1)h when untied and without grouped queries."""
    ends = cfg.vocab_size * cfg.hidden_size * (1 if cfg.tie_word_embeddings else 2)
    gains = (2 * cfg.num_hidden_layers + 1) * cfg.hidden_size
    return num_block_params(cfg) + ends + gains


def flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """Floating-point operations of forward and backward for one token of a sequence of seq_len.

    6 for each parameter of a matrix that multiplies (blocks and head; the embedding is a look-up), plus
    attention: 12 L h S for full scores, of which the causal half, 6 L h S, is needed and counted.
    Recomputation is not counted.
    """
    matmul = num_block_params(cfg) + cfg.vocab_size * cfg.hidden_size
    return 6.0 * matmul + 6.0 * cfg.num_hidden_layers * cfg.hidden_size * seq_len
