"""Exact evaluation: every validation token scored once, whatever the micro-batch and the number of ranks.

    val_loss = sum of NLL over all ranks / scored tokens        val_ppl = exp(val_loss)
    val_bpb  = sum of NLL / ln 2 / bytes of the scored pieces

Command: python -m llama.eval RUN|FOLDER [data=... data.validation=... micro_batch=... seq_len=...]
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .loss import IGNORE
from .pretrained import FolderError, load_model, resolve

USAGE = "usage: python -m llama.eval RUN|FOLDER [data=... data.validation=... micro_batch=... seq_len=...]"


@torch.no_grad()
def evaluate(
    model: nn.Module,  # model(x, labels) -> summed loss, as Llama's
    evalset: Any,  # data.EvalSet: x, y (N, S) integers on the CPU; tokens, bytes: ints
    micro_batch: int,  # rows in a forward
    *,
    rank: int = 0,
    world: int = 1,
    all_sum: Callable[[Tensor], Tensor] = lambda t: t,  # sum of a float64 tensor over ranks
    device: torch.device | str,
) -> dict[str, float]:
    """val_loss (nats a token), val_ppl, val_bpb; the same on every rank.

    Equal to fp32 rounding for any micro_batch and world. Every forward of every rank has the shape
    (micro_batch, S), the rows beyond the end being ignored ones: one graph to compile, and as many forwards
    on each rank.
    """
    rows, length = evalset.x.shape
    share = -(-rows // (micro_batch * world)) * micro_batch  # rows of a rank, whole micro-batches
    total = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(rank * share, (rank + 1) * share, micro_batch):
        x = torch.zeros(micro_batch, length, dtype=torch.int64)
        y = torch.full((micro_batch, length), IGNORE, dtype=torch.int64)
        part = slice(start, min(start + micro_batch, rows))
        count = max(0, part.stop - start)
        if count:
            x[:count], y[:count] = evalset.x[part], evalset.y[part]
        total += model(x.to(device), y.to(device)).double()
    nats = all_sum(total).item()
    loss = nats / evalset.tokens
    ppl = torch.tensor(loss, dtype=torch.float64).exp().item()  # inf, not an exception, beyond 709 nats
    return {"val_loss": loss, "val_ppl": ppl, "val_bpb": nats / math.log(2) / evalset.bytes}


def settings(schema: Any, run: Path, overrides: list[str]) -> Any:
    """Config with the data settings, micro_batch and seq_len to evaluate with.

    From run/config.yaml where there is one, else the defaults; overrides win. `data=` starts from that
    group's values. Validation alone is enough: a missing data.train is set to it.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for item in overrides:
        key = item.split("=", 1)[0]
        if "=" not in item or not (key in ("data", "micro_batch", "seq_len") or key.startswith("data.")):
            raise FolderError(f"{item}: not a setting of llama.eval; {USAGE}")
    of_data = [item for item in overrides if item.startswith("data")]
    fresh = any(item.startswith("data=") for item in overrides)
    saved = run / "config.yaml"
    if fresh or not saved.is_file():
        validation = [item for item in of_data if item.startswith("data.validation=")]
        if validation and not any(item.startswith("data.train=") for item in of_data):
            of_data.append(validation[-1].replace("validation", "train", 1))
        cfg = schema.parse(of_data)
        overrides = [item for item in overrides if not item.startswith("data")]
        if saved.is_file():
            chosen, cfg = cfg.data, schema.from_yaml(saved)
            cfg.data = chosen
    else:
        cfg = schema.from_yaml(saved)
    try:
        cfg = OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(cfg), OmegaConf.from_dotlist(overrides))
        )
    except OmegaConfBaseException as error:
        raise FolderError(f"{' '.join(overrides)}: {str(error).splitlines()[0]}") from None
    for key in ("micro_batch", "seq_len"):
        if getattr(cfg, key) < 1:
            raise FolderError(f"{key}={getattr(cfg, key)}: must be at least 1")
    return cfg


def main(argv: list[str] | None = None) -> int:
    import data
    from configs import schema

    args = sys.argv[1:] if argv is None else argv
    try:
        if not args or args[0] in ("-h", "--help"):
            raise FolderError(USAGE)
        folder, tokenizer = resolve(args[0])
        cfg = settings(schema, Path(args[0]), args[1:])
        cfg.data.tokenizer = str(tokenizer)  # the one the model was trained with
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_model(folder, device)
        source = data.build(cfg.data, vocab_size=model.cfg.vocab_size, seq_len=cfg.seq_len, seed=cfg.seed)
        evalset = source.validation()
        result = evaluate(model, evalset, cfg.micro_batch, device=device)
    except (FolderError, data.DataError, schema.ConfigError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"model          {folder}")
    print(f"tokens         {evalset.tokens:,}")
    print(f"val loss       {result['val_loss']:.6f} nats a token")
    print(f"perplexity     {result['val_ppl']:.4f}")
    print(
        f"unigram        {evalset.unigram_ppl:.4f} perplexity of the same tokens from their frequencies alone"
    )
    print(f"bits per byte  {result['val_bpb']:.6f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
