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


def settings(cli: Any, schema: Any, run: Path, overrides: list[str], unread: Path) -> Any:
    """Config whose data settings, micro_batch and seq_len are to be evaluated with.

    From run/config.yaml where there is one, else the defaults; overrides win, and `data=` starts afresh.
    data=local asks for training files, which evaluation never reads: `unread` stands in for them.
    """
    given = dict(item.partition("=")[::2] for item in overrides)
    for key in given:
        if key not in ("data", "micro_batch", "seq_len") and not key.startswith("data."):
            raise FolderError(f"{key}={given[key]}: not a setting of llama.eval; {USAGE}")
    saved = run / "config.yaml"
    cfg = schema.from_yaml(saved) if saved.is_file() else cli.parse([])
    chosen = {key: text for key, text in given.items() if key.startswith("data.")}
    if "data" in given:
        if given["data"] == "local":
            chosen = {"data.train": "unread", **chosen}
        cfg.data = cli.parse(
            [f"data={given['data']}", *(f"{key}={text}" for key, text in chosen.items())]
        ).data
        if chosen.get("data.train") == "unread":
            cfg.data.train = str(unread)
    elif chosen:
        known = {
            f"data.{key}": "saved" for key in ("train", "validation") if getattr(cfg.data, key) is not None
        }
        items = [f"data={cfg.data.name}", *(f"{key}={text}" for key, text in {**known, **chosen}.items())]
        typed = cli.parse(items).data
        for key in chosen:
            setattr(cfg.data, key[5:], getattr(typed, key[5:]))
    for key in ("micro_batch", "seq_len"):
        text = given.get(key, str(getattr(cfg, key)))
        if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 2**20):
            raise FolderError(f"{key}={text}: give a whole number from 1 to {2**20}")
        setattr(cfg, key, int(text))
    return cfg


def main(argv: list[str] | None = None) -> int:
    import data
    from configs import cli, schema

    args = sys.argv[1:] if argv is None else argv
    try:
        if not args or args[0] in ("-h", "--help"):
            raise FolderError(USAGE)
        folder, file = resolve(args[0])
        cfg = settings(cli, schema, Path(args[0]), args[1:], folder / "config.json")
        if cfg.data.name != "tokens":  # those bring the one they were made with
            cfg.data.tokenizer = str(file)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_model(folder, device)
        source = data.build(cfg.data, vocab_size=model.cfg.vocab_size, seq_len=cfg.seq_len, seed=cfg.seed)
        if source.tokenizer.sha256 != data.Tokenizer(file).sha256:
            raise FolderError(
                f"data.train={cfg.data.train}: its tokens were made with another tokenizer than {file}; "
                "prepare them with this one"
            )
        evalset = source.validation()
        result = evaluate(model, evalset, cfg.micro_batch, device=device)
    except (FolderError, data.DataError, schema.ConfigError) as error:
        print(error, file=sys.stderr)
        return 2
    unigram = "perplexity of the same tokens from their frequencies alone"
    print(f"model          {folder}")
    print(f"tokens         {evalset.tokens:,} in rows of {cfg.seq_len}")
    print(f"val loss       {result['val_loss']:.6f} nats a token")
    print(f"perplexity     {result['val_ppl']:.4f}")
    print(f"unigram        {evalset.unigram_ppl:.4f} {unigram}")
    print(f"bits per byte  {result['val_bpb']:.6f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
