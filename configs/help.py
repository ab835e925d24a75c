"""The text of --help: what a newcomer needs, with the group files and dataclasses as they are. 80 columns."""

from __future__ import annotations

import textwrap
from typing import Any

from .groups import GROUPS, group_options
from .schema import SCHEMAS, Config, blank, methods
from .values import get, leaves

HEAD = """\
subspan pre-trains LLaMA models on text, on one card, many, or a CPU.

  make train                                    learn English on a CPU, minutes
  python train.py model=llama_60m data=c4       a real run on a GPU
  torchrun --nproc-per-node 2 train.py ...      the same on two GPUs
  python -m llama.generate runs/NAME "Once"     text from a trained model
  python -m llama.export runs/NAME OUT          a folder transformers can load

The same command again resumes from the newest checkpoint in runs/NAME.
--cfg prints the composed configuration and stops.
"""

# One phrase a key; a key that is missing here fails a test.
PHRASES = {
    "steps": "optimizer steps; null: by model size",
    "tokens_per_step": "token positions a step, over all ranks",
    "micro_batch": "sequences a rank takes at once: memory",
    "seq_len": "tokens a sequence",
    "seed": "weights and data order",
    "eval_every": "steps between evaluations",
    "save_every": "steps between checkpoints",
    "save_minutes": "or so long without one; 0: off",
    "keep_last": "checkpoints kept",
    "spike": "of the loss: off, skip or rewind",
    "deterministic": "true: the same bits every time, slower",
    "profile": "true: a trace of three steps",
    "weights": "bf16 or fp32; null: bf16 on a GPU",
    "dist": "how ranks share work: replicate",
    "compile": "auto (on a GPU) or off",
    "graph": "auto (a step as one CUDA graph, on one GPU) or off",
    "log": "none, wandb, tensorboard or [wandb,tensorboard]",
    "run.dir": "parent of the run's folder",
    "run.name": "the folder; null: MODEL_OPTIM_SEED",
    "data.train": "files: a glob or [glob,glob]",
    "data.validation": "likewise",
    "data.packing": "dense, or paper: one document a sequence",
    "data.tokenizer": "a SentencePiece file, t5, llama or train",
    "data.workers": "tokenizing processes; null: by machine",
    "data.cache": "null: ~/.cache/subspan",
    "data.cache_gib": "data=c4: GiB of shards kept, two or more",
    "data.path": "data=c4: a folder with its layout, or a mirror",
    "optim.lr": "null: by model size",
    "optim.scale": "matrices in blocks run at lr * scale",
    "optim.beta1": "first moment",
    "optim.beta2": "second moment",
    "optim.eps": "added to the denominator",
    "optim.decay": "weight decay, matrices only",
    "optim.clip": "gradient norm; 0: off",
    "optim.clip_mode": "exact, two_pass (two backwards) or off",
    "optim.update": "in_backward or after; null: by clip_mode",
    "optim.moments": "fp32, bf16 or int8",
    "optim.embed_moments": "fp32: of embedding and head; null: alike",
    "optim.rounding": "of bf16 weights at an update: stochastic or nearest",
    "optim.schedule": "cosine, linear or constant",
    "optim.warmup": "share of steps",
    "optim.min_lr_ratio": "last lr / highest lr",
    "optim.lr_range": "true: a short run that finds an lr",
    "model.init_from": "start from a Hugging Face folder",
    "activations.checkpoint": "share of blocks computed again in backward",
    "activations.recompute": "none or down: its input, again in backward",
    "activations.layers": "VeLoRA's, as [v,down]; null: none",
    "activations.group": "numbers of a sub-token; null: about 32",
    "activations.init": "average, svd or random; null: average",
}
# Likewise for keys that only low-rank methods have, or with another default.
LOW_RANK = {
    "optim.scale": "as above",
    "optim.clip_mode": "projected, per_layer or off",
    "optim.rank": "null: by model size",
    "optim.refresh_every": "steps between bases; null: by model size",
    "optim.refresh": "staggered or together",
    "optim.finder": "of a basis: warm, svd or randomized",
    "optim.transport": "of moments: keep, reset, rotate, rotate_fill",
    "optim.growth_limit": "of an update's norm to the last; 0: off",
    "optim.basis_dtype": "bf16 or fp32; null: as weights",
    "optim.lift": "into W: now, deferred to the next basis, auto",
}

TAIL = """\
Exit codes: 0 done or saved on a signal, 2 bad configuration,
            3 training stopped (non-finite, limits), 4 out of memory"""

PROJECTED = {
    "optim.side": "input, output, paper, long or both",
    "optim.share": "one basis for weights with the same input",
}
NATURAL = {
    "optim.history": "projected gradients kept; 0: galore",
    "optim.damping": "over their mean squared norm",
}
ADARANK = {
    "optim.adapt_rank": "false: optim.rank throughout",
    "optim.adapt_refresh": "false: every refresh_every steps",
    "optim.energy": "of G in a basis, at the least rank",
    "optim.rank_step": "of ranks; null: rank / 8, 64 at most",
    "optim.rank_min": "the least; null: half of rank",
    "optim.monotone": "true: ranks never rise",
}
MAGNITUDE = {
    "optim.mag_scale": "magnitudes run at lr * mag_scale",
}
ADAPTER = {
    "optim.merge_every": "steps; 0: never; null: as refresh_every",
    "optim.core_rank": "of the factors' gradients; null: as rank",
    "optim.detach_norm": "the norm is a constant to the gradient",
    "optim.normalize": "false: W0 + I J, no magnitude",
    "optim.project": "false: Adam on the factors' whole gradients",
}
SECTIONS = {
    "low-rank": LOW_RANK,
    "projected": PROJECTED,
    "natural": NATURAL,
    "adarank": ADARANK,
    "magnitude": MAGNITUDE,
    "adapter": ADAPTER,
}


def help_text() -> str:
    """The whole text, about 90 lines."""
    cfg = Config()
    lines = [HEAD, "Groups, chosen with GROUP=OPTION (first the default):"]
    defaults = {"model": "llama_60m", "optim": "adamw", "data": "c4", "activations": "plain"}
    for group in GROUPS:
        options = sorted(group_options(group), key=lambda name: name != defaults.get(group))
        lines += textwrap.wrap(
            f"  {group:<11} {', '.join(options)}", 80, subsequent_indent=" " * 14, break_on_hyphens=False
        )
    lines += ["", "Keys, set with KEY=VALUE:"]
    lines += [
        line(cfg, key, PHRASES) for key in sorted(leaves(cfg), key=lambda k: "." in k) if key in PHRASES
    ]
    shapes = [setting(cfg, key) for key in leaves(cfg) if key.startswith("model.") and key not in PHRASES]
    lines += textwrap.wrap(
        "  shapes: " + " ".join(shapes), 80, subsequent_indent=" " * 4, break_on_hyphens=False
    )
    every = methods("adamw")
    for schema, phrases in SECTIONS.items():
        names = [n for n in every if set(phrases) <= set(leaves(blank(n)))]
        if schema == "low-rank":
            lines.append("")
        others = [n for n in every if n not in names]
        which = min((shortened(names), f"all but {shortened(others)}"), key=len)
        cfg = Config(optim=SCHEMAS["optim"][schema]())
        lines += textwrap.wrap(f"Of {schema} methods, {which}:", 80, break_on_hyphens=False)
        lines += [line(cfg, key, phrases) for key in leaves(cfg) if key in phrases]
    return "\n".join([*lines, "", TAIL])


def shortened(names: list[str]) -> str:
    """Method and 8-bit twin as one."""
    return ", ".join(f"{n}(_8bit)" if f"{n}_8bit" in names else n for n in names if not n.endswith("_8bit"))


def setting(cfg: Config, key: str) -> str:
    value: Any = get(cfg, key)
    return f"{key}={'null' if value is None else str(value).lower() if isinstance(value, bool) else value}"


def line(cfg: Config, key: str, phrases: dict[str, str]) -> str:
    return f"  {setting(cfg, key):<26} {phrases[key]}"
