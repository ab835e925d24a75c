"""What bench.py compares with: other packages' training steps, on our loader.

All on transformers' LlamaForCausalLM with bf16 weights and the moments that each optimizer keeps for them.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch

import data
from configs.cli import parse
from llama import pretrained
from llama.config import ModelConfig

PEERS = {
    "transformers": "transformers, torch.compile, torch fused AdamW",
    "transformers_graphs": "transformers, torch.compile with CUDA graphs, torch fused AdamW",
    "bitsandbytes_32bit": "transformers, torch.compile, bitsandbytes AdamW 32-bit",
    "bitsandbytes": "transformers, torch.compile, bitsandbytes AdamW 8-bit",
    "liger": "transformers, Liger, torch fused AdamW",
    "liger_checkpointing": "transformers, Liger, gradient checkpointing, torch fused AdamW",
    "galore_torch": "transformers, torch.compile, galore-torch AdamW 8-bit between refreshes",
    "galore_torch_adamw": "transformers, torch.compile, galore-torch AdamW between refreshes",
    "apollo_torch": "transformers, torch.compile, apollo-torch AdamW",
}


class Peer:
    """One of PEERS, fed by our loader."""

    def __init__(self, kind: str, model: str, tokens: int, micro: int, folder: str) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        shape: ModelConfig = parse([f"model={model}", "data=sample"]).model
        with tempfile.TemporaryDirectory() as folder_:
            pretrained.write_config(shape, folder_, dtype=torch.bfloat16)
            config = LlamaConfig.from_pretrained(folder_, attn_implementation="sdpa", use_cache=False)
        with torch.device("cuda"):
            self.model = LlamaForCausalLM(config).to(torch.bfloat16)
        if kind.startswith("liger"):
            from liger_kernel.transformers import _apply_liger_kernel_to_instance

            _apply_liger_kernel_to_instance(model=self.model)
            if kind.endswith("checkpointing"):
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        # Liger 0.8.5 under torch.compile ends with an illegal memory access, torch 2.11.
        mode = "reduce-overhead" if kind.endswith("graphs") else None
        self.fast = self.model if kind.startswith("liger") else torch.compile(self.model, mode=mode)
        self.opt = self.optimizer(kind, model)
        cfg = data.DataConfig(name="tokens", train=folder)
        dataset = data.build(cfg, vocab_size=shape.vocab_size, seq_len=256, seed=0)
        self.loader = dataset.loader(tokens // 256, pin=True)
        self.micro = micro

    def optimizer(self, kind: str, model: str) -> Any:
        params = list(self.model.parameters())
        if kind.startswith("bitsandbytes"):
            import bitsandbytes as bnb

            bits = 32 if kind.endswith("32bit") else 8
            return bnb.optim.AdamW(params, lr=1e-4, weight_decay=0.0, optim_bits=bits)
        if not kind.startswith(("galore_torch", "apollo_torch")):
            return torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0, fused=True)
        blocks = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "layers" in n]
        known = {id(p) for p in blocks}
        low: dict[str, Any] = {"params": blocks, "update_proj_gap": 200, "proj_type": "std"}
        low["rank"] = parse([f"model={model}", "data=sample", "optim=galore"]).resolved().optim.rank
        groups = [{"params": [p for p in params if id(p) not in known]}, low]
        if kind == "apollo_torch":
            from apollo_torch import APOLLOAdamW

            low |= {"scale": 1.0, "proj": "random", "scale_type": "channel"}
            return APOLLOAdamW(groups, lr=1e-4)
        from galore_torch import GaLoreAdamW, GaLoreAdamW8bit, galore_projector

        def random_basis(self: Any, weights: Any, rank: int, type: str) -> Any:
            """In place of exact SVD, minutes at 1B: steps between refreshes are what is timed."""
            side = weights.shape[0 if type == "left" else 1]
            q = torch.linalg.qr(torch.randn(side, rank, device=weights.device)).Q.to(weights.dtype)
            return q if type == "left" else q.t().contiguous()

        galore_projector.GaLoreProjector.get_orthogonal_matrix = random_basis
        low |= {"scale": 0.25}
        return (GaLoreAdamW if kind.endswith("adamw") else GaLoreAdamW8bit)(groups, lr=1e-4)

    def steps(self, n: int) -> None:
        for _ in range(n):
            batch = next(self.loader)
            for x in batch.x.split(self.micro):
                x = x.cuda(non_blocking=True)
                torch.compiler.cudagraph_mark_step_begin()
                loss = self.fast(input_ids=x, labels=x).loss / (len(batch.x) / len(x))
                loss.backward()
            self.opt.step()
            self.opt.zero_grad(set_to_none=True)

    def close(self) -> None:
        self.loader.close()
