"""Shape of a LLaMA model. No torch here: `--help` and the checks of a command line read this file."""

from __future__ import annotations

from dataclasses import dataclass


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
