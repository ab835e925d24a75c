"""LLaMA, with the parameter names of Hugging Face's LlamaForCausalLM.

    x = x + o(attention(rope(q(n1)), rope(k(n1)), v(n1)))      n1 = gain * x / rms(x)
    x = x + down(silu(gate(n2)) * up(n2))                      n2 likewise, after the first line

No biases, no dropout, no buffers: the state is the parameters, and every projection is a plain nn.Linear.
With cfg.pad the hidden side of an MLP is stored as a multiple of PAD: rows of zeros in gate and up give zeros
that meet columns of zeros in down, so neither has a gradient. out_features, in_features and a state_dict are
those without padding.
Norms and rotations are computed in fp32 whatever the activations are, in float64 for a float64 model.

B batch, T tokens, D width, H heads, d head dimension, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import ModelConfig, flops_per_token, num_params
from .loss import linear_cross_entropy

__all__ = [
    "Llama",
    "ModelConfig",
    "build_model",
    "compile_blocks",
    "eager",
    "empty_model",
    "flops_per_token",
    "num_params",
]

INIT_STD = 0.02
PAD = 64  # 128 bytes in bf16: what NVIDIA's guide to matrix products asks of sides from the A100 on


class RMSNorm(nn.Module):
    """gain * x / sqrt(mean(x^2) + eps); the quotient in fp32, rounded to x's dtype before the gain."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., D)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)


def rope_tables(
    length: int, dim: int, theta: float, device: torch.device | str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position * theta^(-2j/dim), (length, 1, dim/2); fp32, float64 if dtype is."""
    wide = torch.promote_types(dtype, torch.float32)
    frequency = 1.0 / theta ** (torch.arange(0, dim, 2, device=device, dtype=wide) / dim)
    angle = torch.arange(length, device=device, dtype=wide)[:, None, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x (B, T, H, d): entry j is paired with entry j + d/2 (half-split)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.head_dim = cfg.head_dim
        self.grouped = cfg.kv_heads != cfg.num_attention_heads
        kv_width = cfg.kv_heads * cfg.head_dim
        self.q_proj = nn.Linear(cfg.hidden_size, cfg.hidden_size, bias=False)
        self.k_proj = nn.Linear(cfg.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(cfg.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(cfg.hidden_size, cfg.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        heads = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_proj(x).view(heads), cos, sin)
        k = rotate(self.k_proj(x).view(heads), cos, sin)
        v = self.v_proj(x).view(heads)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=self.grouped
        )
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)
        if cfg.pad and (more := -cfg.intermediate_size % PAD):
            rows, columns = (0, 0, 0, more), (0, more)
            for layer, pad in ((self.gate_proj, rows), (self.up_proj, rows), (self.down_proj, columns)):
                layer.weight = nn.Parameter(F.pad(layer.weight.detach(), pad))
            self.register_state_dict_post_hook(_without_padding)
            self.register_load_state_dict_pre_hook(_with_padding)
        self.recomputed = False  # in training down's input is computed again in backward, to the bit

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.recomputed and torch.is_grad_enabled():
            return checkpoint(self._down, gate, up, use_reentrant=False, preserve_rng_state=False)
        return self._down(gate, up)

    def _down(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.down_proj(F.silu(gate) * up)


def logical(layer: nn.Linear, weight: Tensor) -> Tensor:
    """The layer's weight without padding, a view."""
    return weight[: layer.out_features, : layer.in_features]


def _without_padding(mlp: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, layer in mlp.named_children():
        key = f"{prefix}{name}.weight"
        state[key] = logical(layer, state[key])


def _with_padding(mlp: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, layer in mlp.named_children():
        key = f"{prefix}{name}.weight"
        if key in state and state[key].shape == (layer.out_features, layer.in_features):
            rows, columns = layer.weight.shape
            more = (0, columns - layer.in_features, 0, rows - layer.out_features)
            state[key] = F.pad(state[key], more)


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(cfg)
        self.mlp = MLP(cfg)
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and the last norm: token ids (B, T) -> (B, T, D)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.head_dim, self.theta = cfg.head_dim, cfg.rope_theta
        self.checkpointed = 0  # in training the first so many blocks are computed again in backward

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        cos, sin = rope_tables(input_ids.shape[1], self.head_dim, self.theta, x.device, x.dtype)
        again = self.checkpointed if self.training and torch.is_grad_enabled() else 0
        for n, block in enumerate(self.layers):
            if n < again:  # nothing in a block is random
                x = checkpoint(block, x, cos, sin, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, cos, sin)
        return self.norm(x)


class Llama(nn.Module):
    """forward(input_ids) -> logits; forward(input_ids, labels) -> summed loss. See the module's docstring."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.model = Decoder(cfg)
        if not cfg.tie_word_embeddings:  # tied: no lm_head in the state, as in Hugging Face's saved files
            self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """(V, D): lm_head's, or the embedding's when tied."""
        return self.model.embed_tokens.weight if self.cfg.tie_word_embeddings else self.lm_head.weight

    def forward(
        self,
        input_ids: Tensor,  # (B, T) int64
        labels: Tensor | None = None,  # (B, T) int64: labels[t] follows input_ids[t]; -100 is ignored
    ) -> Tensor:
        """Without labels: logits (B, T, V). With labels (already shifted): the SUM of token losses, an fp32
        scalar (float64 for a float64 model), without ever holding all logits; divide by the number of valid
        labels outside."""
        h = self.model(input_ids)
        if labels is None:
            return F.linear(h, self.head_weight)
        return linear_cross_entropy(h.flatten(0, 1), self.head_weight, labels.flatten())

    def checkpoint_blocks(self, share: float, down: bool = False) -> None:
        """In training keep only the inputs of the first round(share * layers) blocks, and compute those again
        in backward: the same gradients for less memory and up to a third more operations. down: in the other
        blocks the product that is down's input, and the activated gate in it."""
        self.model.checkpointed = round(share * len(self.model.layers))
        blocks = [m for m in self.model.layers if isinstance(m, Block)]
        for n, block in enumerate(blocks):
            block.mlp.recomputed = down and n >= self.model.checkpointed

    def weights(self) -> dict[str, Tensor]:
        """The parameters by name, without padding; writing to one writes to the model."""
        found = {name: p.detach() for name, p in self.named_parameters()}
        for path, module in self.named_modules():
            if isinstance(module, nn.Linear):
                found[f"{path}.weight"] = logical(module, found[f"{path}.weight"])
        return found

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Linears and embedding ~ N(0, 0.02^2), gains 1, in place; overwrites whatever is there.

        Each parameter has its own generator, seeded by (seed, name), on its own device: the result does not
        depend on the order of the parameters or on what was drawn before. Drawn in fp32 and then rounded, so
        a bf16 model starts from the rounded weights of the fp32 one, and a padded one from those of the
        unpadded. CPU and CUDA draw different numbers.
        """
        for name, p in self.weights().items():
            if p.ndim == 1:
                p.fill_(1.0)
                continue
            digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
            generator = torch.Generator(p.device).manual_seed(int.from_bytes(digest[:7], "little"))
            drawn = torch.empty(p.shape, dtype=torch.float32, device=p.device)
            p.copy_(drawn.normal_(0.0, INIT_STD, generator=generator))


def empty_model(cfg: ModelConfig, device: torch.device | str, dtype: torch.dtype) -> Llama:
    """A model whose weights are whatever memory held, with zeros as padding: for init_weights or load_weights
    to fill."""
    if cfg.pad is None:
        odd = cfg.intermediate_size % 8 != 0  # rows of bf16 that do not begin on 16 bytes
        cfg = replace(cfg, pad=odd and torch.device(device).type == "cuda")
    with torch.device("meta"):
        model = Llama(cfg).to(dtype)
    model.to_empty(device=device)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.shape != logical(module, module.weight).shape:
            nn.init.zeros_(module.weight)
    return model


def build_model(cfg: ModelConfig, device: torch.device | str, dtype: torch.dtype, seed: int) -> Llama:
    """Shapes on the meta device, memory once on `device` in `dtype`, then init_weights(seed)."""
    model = empty_model(cfg, device, dtype)
    model.init_weights(seed)
    return model


def compile_blocks(model: Llama) -> None:
    """Compile every block by itself, and the last norm, in place; no name changes.

    Blocks share their graphs: one for training, one for evaluation, for each input shape.
    Compiled one by one, a block's weight gradients are handed out as soon as that block's backward ends;
    compiled as a whole, the model would hold all of them to the end. A deepcopy runs its own weights.
    """
    block, norm = torch.compile(Block.forward, fullgraph=True), torch.compile(RMSNorm.forward, fullgraph=True)
    for layer in model.model.layers:
        layer.forward = MethodType(block, layer)
    model.model.norm.forward = MethodType(norm, model.model.norm)  # type: ignore[method-assign]


@contextmanager
def eager(model: Llama) -> Iterator[Llama]:
    """Inside, the model runs uncompiled: for shapes that change with every call, as in generation."""
    parts = [m for m in (*model.model.layers, model.model.norm) if "forward" in vars(m)]
    saved = [vars(m).pop("forward") for m in parts]
    try:
        yield model
    finally:
        for part, forward in zip(parts, saved, strict=True):
            part.forward = forward
