"""The text of --help: what a newcomer needs, with the group files and dataclasses as they are. 80 columns."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from .schema import Config
from .values import get, leaves

FOLDER = Path(__file__).parent
GROUPS = {
    "model": "size and shapes",
    "optim": "optimizer",
    "data": "text to learn from",
    "experiment": "recipe: selects groups and sizes",
}

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
    "keep_last": "checkpoints kept",
    "weights": "bf16 or fp32; null: bf16 on a GPU",
    "dist": "how ranks share work: replicate",
    "compile": "auto (on a GPU) or off",
    "log": "none, wandb, tensorboard or [wandb,tensorboard]",
    "run.dir": "parent of the run's folder",
    "run.name": "the folder; null: MODEL_OPTIM_SEED",
    "data.train": "files: a glob or [glob,glob]",
    "data.validation": "likewise",
    "data.packing": "dense, or paper: one document a sequence",
    "data.tokenizer": "a SentencePiece file, t5, llama or train",
    "data.workers": "tokenizing processes; null: by machine",
    "data.cache": "null: ~/.cache/subspan",
    "data.path": "data=c4: a folder with its layout",
    "optim.lr": "null: by model size",
    "optim.scale": "matrices in blocks run at lr * scale",
    "optim.beta1": "first moment",
    "optim.beta2": "second moment",
    "optim.eps": "added to the denominator",
    "optim.decay": "weight decay, matrices only",
    "optim.clip": "gradient norm; 0: off",
    "optim.moments": "fp32, bf16 or int8",
    "optim.schedule": "cosine, linear or constant",
    "optim.warmup": "share of steps",
    "optim.min_lr_ratio": "last lr / highest lr",
    "model.init_from": "start from a Hugging Face folder",
}

TAIL = """\
Exit codes: 0 done or saved on a signal, 2 bad configuration,
            3 training stopped (non-finite, limits), 4 out of memory"""


def group_options(group: str, folder: Path = FOLDER) -> list[str]:
    """Names that `group=NAME` takes: the files of its folder, models by size."""

    def size(name: str) -> tuple[float, str]:
        found = re.search(r"_(\d+)([mb])$", name)
        return (float(found[1]) * (1000 if found[2] == "b" else 1) if found else 0.0, name)

    return sorted((path.stem for path in (folder / group).glob("*.yaml")), key=size)


def help_text() -> str:
    """The whole text, about 60 lines."""
    cfg = Config()
    lines = [HEAD, "Groups, chosen with GROUP=OPTION (first the default):"]
    defaults = {"model": "llama_60m", "optim": "adamw", "data": "c4"}
    for group in GROUPS:
        options = sorted(group_options(group), key=lambda name: name != defaults.get(group))
        lines += textwrap.wrap(
            f"  {group:<11} {', '.join(options)}", 80, subsequent_indent=" " * 14, break_on_hyphens=False
        )
    lines += ["", "Keys, set with KEY=VALUE:"]
    shapes = []
    for key in sorted(leaves(cfg), key=lambda k: ("." in k, 0)):
        if key in ("optim.name", "data.name"):  # chosen with the group
            continue
        value = get(cfg, key)
        text = "null" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}"
        if key in PHRASES:
            lines.append(f"  {key + '=' + text:<26} {PHRASES[key]}")
        elif key.startswith("model."):
            shapes.append(f"{key}={text}")
    lines += textwrap.wrap(
        "  shapes: " + " ".join(shapes), 80, subsequent_indent=" " * 4, break_on_hyphens=False
    )
    return "\n".join([*lines, "", TAIL])
