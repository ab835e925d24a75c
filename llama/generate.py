"""Text from a model: sampling one token after another.

Command: python -m llama.generate RUN|FOLDER "prompt" [tokens=100] [temperature=0.8] [top_k=50] [seed=0]
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import Llama, eager
from .pretrained import FolderError, load_model, resolve, seq_len

USAGE = (
    'usage: python -m llama.generate RUN|FOLDER "prompt" [tokens=100] [temperature=0.8] [top_k=50] [seed=0]'
)
# option: type, lowest, highest
OPTIONS: dict[str, tuple[type, float, float]] = {
    "tokens": (int, 1, 100_000),
    "temperature": (float, 0, 100),
    "top_k": (int, 0, 1_000_000),
    "seed": (int, 0, 2**32 - 1),
}


def pick(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """A token id from logits (V,) fp32 on the CPU; temperature 0: the largest; top_k 0: all may be drawn."""
    if temperature == 0:
        return int(logits.argmax())
    if 0 < top_k < logits.numel():
        logits, ids = logits.topk(top_k)
    else:
        ids = torch.arange(logits.numel())
    # subtracting the largest first keeps a tiny temperature from overflowing
    p = torch.softmax((logits - logits.max()) / temperature, dim=0)
    return int(ids[torch.multinomial(p, 1, generator=generator)])


@torch.no_grad()
def generate(
    model: Llama,
    tokenizer: Any,  # data.Tokenizer: encode, decode, eos_id, vocab_size
    prompt: str,
    *,
    tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    window: int = 256,  # positions the model sees: those it was trained on
) -> str:
    """The prompt and up to `tokens` tokens after it; stops at the end-of-text token, which is not shown.

    An empty prompt starts a new text. Each token recomputes the last `window` positions; there is no cache.
    Drawn on the CPU, so a seed means the same on every device up to rounding.
    """
    ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
    start = 0 if prompt else len(ids)
    device = model.head_weight.device
    generator = torch.Generator().manual_seed(seed)
    with eager(model):
        for _ in range(tokens):
            h = model.model(torch.tensor([ids[-window:]], device=device))
            logits = F.linear(h[0, -1], model.head_weight).float().cpu()
            # the model's vocabulary may be larger than the tokenizer's: ids without a piece are never drawn
            new = pick(logits[: tokenizer.vocab_size], temperature, top_k, generator)
            if new == tokenizer.eos_id:
                break
            ids.append(new)
    return tokenizer.decode(ids[start:])


def options(items: list[str]) -> dict[str, Any]:
    """key=value items as generate's arguments; FolderError names what is wrong."""
    found: dict[str, Any] = {}
    for item in items:
        key, _, text = item.partition("=")
        if key not in OPTIONS:
            raise FolderError(f"{item}: not an option; use {', '.join(OPTIONS)} as key=value\n{USAGE}")
        kind, low, high = OPTIONS[key]
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise FolderError(f"{item}: give a {'whole ' * (kind is int)}number from {low} to {high}")
        found[key] = value
    return found


def main(argv: list[str] | None = None) -> int:
    from data import DataError, Tokenizer

    args = sys.argv[1:] if argv is None else argv
    try:
        if len(args) < 2:
            raise FolderError(USAGE)
        chosen = options(args[2:])
        folder, path = resolve(args[0])
        tokenizer = Tokenizer(str(path))
        model = load_model(folder, "cuda" if torch.cuda.is_available() else "cpu")
        window = seq_len(folder, 256)
        print(generate(model, tokenizer, args[1], window=window, **chosen))
    except (FolderError, DataError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
