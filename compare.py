"""Loss curves at 60M: methods, learning rates and seeds on the same tokens in the same order, none seen
twice.

    python compare.py data=FOLDER half_b=FOLDER [out=bench.jsonl] [runs=NAME,NAME] [steps=600] [seeds=0+1]
                      [commit=ID] [beside=3]
    python compare.py plot=curves_60m.png [methods=NAME,NAME] [rounding=stochastic] [out=bench.jsonl]
    python compare.py claims=claims_60m.png [out=bench.jsonl]    what the papers say, on these gradients
    python compare.py rows=all data=FOLDER [out=bench.jsonl] [commit=ID]     rows of bf16 weights, see drift()
    python compare.py split=validation.json.xz        writes half_a.json.gz and half_b.json.gz here, by work

FOLDER comes from `python -m data.prepare`; its validation split is half A, on which settings are chosen;
`half_b` holds half B, which is reported. Each run is one row of the record: settings, loss every 10 steps,
perplexity on both halves. Ours are `train.Run`; the peer is galore-torch on transformers' model, its recipe
as published, but with the clock, the loss normalisation and the data of ours. `beside` says how many other
runs share the card: speeds are left out of the row then.
"""

from __future__ import annotations

import gzip
import json
import lzma
import sys
import tempfile
import time
import zlib
from itertools import product
from pathlib import Path
from typing import Any

import torch

import data
from bench import facts, refused
from configs.cli import parse
from llama import pretrained
from llama.eval import evaluate
from llama.loss import linear_cross_entropy
from optim import Comm, factor
from train import Run

TOKENS, MICRO, EVERY = 65_536, 256, 10
LOW_RANK = (
    "galore", "galore_8bit", "galore_torch", "gradnormlorp", "gradnormlorp_8bit", "gradnormlorp_adapter_8bit",
    "natural_galore", "natural_galore_8bit", "adarankgrad", "adarankgrad_8bit",
)  # fmt: skip
LRS = dict.fromkeys(("adamw", "adamw_8bit"), (1e-3, 2e-3, 4e-3)) | dict.fromkeys(LOW_RANK, (5e-3, 1e-2, 2e-2))
# Methods that also run with their matrices at twice the rate.
TWICE = tuple(m for m in LOW_RANK if m not in ("galore", "galore_torch"))
MORE = {"adamw": ["optim.beta2=0.95"], "adamw_8bit": ["optim.beta2=0.95"]}
# name -> (method, overrides)
RUNS: dict[str, tuple[str, list[str]]] = {
    f"{m} lr={lr:g}": (m, [f"optim.lr={lr}", *MORE.get(m, [])]) for m, lrs in LRS.items() for lr in lrs
}
RUNS |= {
    f"{m} lr={lr:g} scale=0.5": (m, [f"optim.lr={lr}", "optim.scale=0.5"]) for m in TWICE for lr in LRS[m]
}
ADAPTER = "gradnormlorp_adapter_8bit"
RUNS |= {
    f"{m} lr={lr:g} {' '.join(more)}".rstrip(): (m, [f"optim.lr={lr}", *(f"optim.{x}" for x in more)])
    for m, lr, more in (
        ("gradnormlorp_8bit", 0.01, ["mag_scale=1"]),
        (ADAPTER, 0.01, ["normalize=false"]),
        *((ADAPTER, lr, ["project=false"]) for lr in (0.0025, 0.005, 0.01)),
        (ADAPTER, 0.01, ["merge_every=0"]),
        (ADAPTER, 0.01, ["detach_norm=true"]),
        (ADAPTER, 0.01, ["finder=svd"]),
        (ADAPTER, 0.01, ["core_rank=32"]),
        *(
            (m, lr, more)
            for m in ("galore_8bit", "gradnormlorp_8bit")
            for lr in (0.001, 0.01)
            for more in (["lift=deferred"], ["rounding=nearest"], ["lift=deferred", "rounding=nearest"])
        ),
        *((m, 0.001, []) for m in ("galore_8bit", "gradnormlorp_8bit")),
        *(("galore_8bit", 0.01, [f"rank={r}"]) for r in (64, 88)),  # adarankgrad's least, and its mean
        *(
            ("natural_galore_8bit", lr, more)
            for lr in (0.005, 0.01, 0.02)
            for more in (
                *([f"damping={d}"] for d in (0.1, 1, 3, 30, 100)),
                ["history=16"],
                ["history=16", "damping=1"],
            )
        ),
        *(("adarankgrad_8bit", 0.01, [f"energy={e}", "rank_min=8"]) for e in (0.52, 0.77, 0.9)),
        ("adarankgrad_8bit", 0.01, ["energy=0.97"]),
        ("adarankgrad_8bit", 0.01, ["adapt_rank=false"]),
        ("adarankgrad_8bit", 0.01, ["adapt_refresh=false"]),
    )
}
VELORA = [  # method, rate, scale, group; sub-tokens of 8 to 172 numbers; layers
    *((m, lr, None, None, None) for m in ("adamw", "galore_8bit", "gradnormlorp_8bit") for lr in LRS[m]),
    *(("galore_8bit", lr, 0.5, None, None) for lr in LRS["galore_8bit"]),
    ("adamw", 8e-3, 0.125, None, None),
    *(("galore_8bit", 1e-2, None, g, None) for g in ("8", "16", "{v:64,down:86}", "{v:128,down:172}")),
    *(("galore_8bit", *x, "8", None) for x in ((5e-3, None), (5e-3, 0.5))),
    *(
        (m, lr, None, "8", None)
        for m, lr in (("adamw", 2e-3), ("gradnormlorp_8bit", 1e-2), ("gradnormlorp_8bit", 5e-3))
    ),
    *(
        ("gradnormlorp_8bit", lr, None, g, layers)
        for lr, layers, g in product((5e-3, 1e-2), ("down,o", "v,down,o"), (None, "8"))
    ),
]
RUNS |= {
    " ".join(
        [m, f"lr={lr:g}", *([f"scale={scale:g}"] if scale else []), "velora"]
        + ([f"layers={layers.replace(',', ' ')}"] if layers else [])
        + ([f"group={group.strip('{}').replace(',', ' ')}"] if group else [])
    ): (
        m,
        [f"optim.lr={lr}", *MORE.get(m, []), *([f"optim.scale={scale}"] if scale else [])]
        + ["activations=velora", f"activations.group={group or 'null'}"]
        + ([f"activations.layers=[{layers}]"] if layers else []),
    )
    for m, lr, scale, group, layers in VELORA
}
RUNS |= {
    f"adamw lr={lr:g}{more}": ("adamw", [f"optim.lr={lr}", "optim.beta2=0.95", *settings])
    for lr, more, settings in (
        (2.5e-4, "", []),
        *((lr, " rounding=nearest", ["optim.rounding=nearest"]) for lr in (2.5e-4, 2e-3)),
    )
}
RUNS |= {
    f"adamw lr={lr:g} scale={scale}": (
        "adamw",
        [f"optim.lr={lr}", f"optim.scale={scale}", "optim.beta2=0.95"],
    )
    for lr, scale in ((4e-3, 0.25), (8e-3, 0.25), (8e-3, 0.125), (1.6e-2, 0.125))
}
RUNS |= {
    "adamw fp32 lr=0.002": ("adamw", ["optim.lr=2e-3", "optim.beta2=0.95", "weights=fp32"]),
    "adamw fp32 lr=0.001": ("adamw", ["optim.lr=1e-3", "optim.beta2=0.95", "weights=fp32"]),
    "adamw fp32 lr=0.002 clip=1": (
        "adamw", ["optim.lr=2e-3", "optim.beta2=0.95", "weights=fp32", "optim.clip=1"],
    ),
    "adamw fp32 lr=0.008 scale=0.125": (
        "adamw", ["optim.lr=8e-3", "optim.scale=0.125", "optim.beta2=0.95", "weights=fp32"],
    ),
    "galore_8bit svd together": (
        "galore_8bit",
        ["optim.lr=0.01", "optim.finder=svd", "optim.refresh=together", "optim.transport=keep"],
    ),
    "galore_sgd scale=10": ("galore_sgd", ["optim.lr=0.01", "optim.scale=10"]),
    "galore_sgd scale=50": ("galore_sgd", ["optim.lr=0.01", "optim.scale=50"]),
    "galore_sgd scale=100": ("galore_sgd", ["optim.lr=0.01", "optim.scale=100"]),
}  # fmt: skip


def held_out(folder: str) -> Any:
    cfg = data.DataConfig(name="tokens", train=folder)
    return data.build(cfg, vocab_size=32_000, seq_len=256, seed=0).validation()


def halves(model: Any, args: dict[str, str]) -> dict[str, float]:
    """Perplexity and loss on both halves of validation."""
    comm, found = Comm.from_env(), {}
    for half in ("a", "b"):
        got = evaluate(
            model, held_out(args["data" if half == "a" else "half_b"]), MICRO, rank=0, world=1,
            all_sum=comm.sum_, device=comm.device,
        )  # fmt: skip
        found |= {f"val_loss_{half}": round(got["val_loss"], 4), f"val_ppl_{half}": round(got["val_ppl"], 2)}
    return found


def ours(method: str, overrides: list[str], args: dict[str, str], seed: int) -> dict[str, Any]:
    steps = int(args.get("steps", 600))
    with tempfile.TemporaryDirectory() as scratch:
        argv = ["model=llama_60m", "data=tokens", f"data.train={args['data']}", f"optim={method}", *overrides]
        argv += [f"tokens_per_step={TOKENS}", f"micro_batch={MICRO}", f"steps={steps}", f"seed={seed}"]
        cfg = parse([*argv, f"run.dir={scratch}", "run.name=r"]).resolved()
        run = Run(cfg, Comm.from_env(), Path(scratch), None)
        begin = time.perf_counter()
        for step in range(1, steps + 1):
            batch = next(run.loader)
            run.step(step, batch, batch.valid)
            if run.book and run.book.due():
                run.book.flush()
        assert run.book
        run.book.flush()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        rows = [json.loads(line) for line in open(run.book.path, encoding="utf-8")]
        kept = rows[EVERY - 1 :: EVERY]
        row: dict[str, Any] = {"losses": [round(r["loss"], 4) for r in kept]}
        row["rounding"] = cfg.optim.rounding
        if "energy" in rows[0]:
            row["energy"] = [round(r["energy"], 4) for r in kept]
            row["refresh_share"] = round(sum(r["refresh_share"] for r in rows) / len(rows), 5)
            row["bases_kept"] = rows[-1]["bases_kept"]
        if "effective_rank" in rows[0]:
            row["effective_rank"] = [round(r["effective_rank"], 2) for r in kept]
            row["ranks"] = [
                {k: v for k, v in r.items() if k.startswith("rank/")} for r in rows[EVERY :: 20 * EVERY]
            ]
        with run.precision():
            row |= halves(run.model, args)
        run.close()
    return row | {"tokens_per_s": round(steps * TOKENS / seconds), "settings": overrides}


def galore_torch(overrides: list[str], args: dict[str, str], seed: int) -> dict[str, Any]:
    """The package's AdamW on transformers' model: rank 128, T 200, scale 0.25, exact SVD of all layers
    together."""
    from galore_torch import GaLoreAdamW
    from transformers import LlamaConfig, LlamaForCausalLM

    steps, lr = int(args.get("steps", 600)), float(overrides[0].split("=")[1])
    shape = parse(["model=llama_60m", "data=tokens", f"data.train={args['data']}"]).model
    with tempfile.TemporaryDirectory() as folder:
        pretrained.write_config(shape, folder, dtype=torch.bfloat16)
        config = LlamaConfig.from_pretrained(folder, attn_implementation="sdpa", use_cache=False)
    torch.manual_seed(seed)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    blocks = [p for n, p in model.named_parameters() if p.ndim == 2 and ("attn" in n or "mlp" in n)]
    known = {id(p) for p in blocks}
    rest = [p for p in model.parameters() if id(p) not in known]
    low = {"params": blocks, "rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    opt = GaLoreAdamW([{"params": rest}, low], lr=lr, no_deprecation_warning=True)
    fast = torch.compile(model.model)
    cfg = data.DataConfig(name="tokens", train=args["data"])
    loader = data.build(cfg, vocab_size=32_000, seq_len=256, seed=seed).loader(TOKENS // 256, pin=True)
    losses, begin = [], time.perf_counter()
    for step in range(1, steps + 1):
        for group in opt.param_groups:
            group["lr"] = lr * factor(step, steps, schedule="cosine", warmup=0.1, min_lr_ratio=0.1)
        batch = next(loader)
        x, y = batch.x.cuda(non_blocking=True), batch.y.cuda(non_blocking=True)
        h = fast(input_ids=x).last_hidden_state
        loss = linear_cross_entropy(h.flatten(0, 1), model.lm_head.weight, y.flatten()) / batch.valid
        loss.backward()
        opt.step()
        opt.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    loader.close()

    class Wrapped(torch.nn.Module):
        def forward(self, x: Any, labels: Any = None) -> Any:
            h = fast(input_ids=x).last_hidden_state
            return linear_cross_entropy(h.flatten(0, 1), model.lm_head.weight, labels.flatten())

    kept = torch.stack(losses).tolist()[EVERY - 1 :: EVERY]
    row: dict[str, Any] = {"losses": [round(v, 4) for v in kept], **halves(Wrapped(), args)}
    return row | {"tokens_per_s": round(steps * TOKENS / seconds), "settings": overrides}


def family(run: str) -> str:
    """A run's name less its learning rate: runs of one family differ in nothing else."""
    name, _, rest = run.partition(" lr=")
    return " ".join([name, *rest.split(" ")[1:]])


def plot(record: str, to: str, methods: str | None, rounding: str | None) -> None:
    """A panel with the learning rates of each family that has several, and one with every method's best."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    families: dict[str, dict[str, dict[str, Any]]] = {}
    for line in open(record, encoding="utf-8"):
        r = json.loads(line)
        name = r.get("run", "").partition(" ")[0]
        if rounding and r.get("rounding") != rounding:
            continue
        if "losses" in r and r["seed"] == 0 and (methods is None or name in methods.split(",")):
            families.setdefault(family(r["run"]), {})[r["run"]] = r  # the newest of a name
    best: dict[str, dict[str, Any]] = {}  # by method
    for r in sorted((r for rows in families.values() for r in rows.values()), key=lambda r: r["val_ppl_a"]):
        if r["run"] in RUNS:  # not what can no longer be run
            best.setdefault(r["run"].partition(" ")[0] + " velora" * ("velora" in r["run"]), r)

    def rate(r: dict[str, Any]) -> str:
        return r["run"].split("lr=")[-1].split(" ")[0]

    panels = [
        (f"{name} (half A)", sorted(rows.values(), key=lambda r: float(rate(r))), "a")
        for name, rows in sorted(families.items())
        if len(rows) > 1
    ]
    ranked = sorted(best.values(), key=lambda r: r["val_ppl_b"])
    panels.append(("best of each method on A (half B)", ranked, "b"))
    down = -(-len(panels) // 3)
    figure, grid = plt.subplots(
        down, 3, figsize=(13, 3.75 * down), layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, rows, half) in zip(grid.flat, panels, strict=False):
        for r in rows:
            steps = [EVERY * (n + 1) for n in range(len(r["losses"]))]
            around = [r["losses"][max(0, n - 2) : n + 3] for n in range(len(steps))]
            label = r["run"] if half == "b" else rate(r)
            line = {"label": f"{label}: {r[f'val_ppl_{half}']:.1f}", "linewidth": 1.2}
            axes.plot(steps, [sum(x) / len(x) for x in around], **line)
        axes.set(title=title, ylim=(4.0, 6.5))
        axes.title.set_fontsize(8.5)
        axes.legend(fontsize=6.5 if half == "b" else 8, title="perplexity", title_fontsize=8)
        axes.grid(alpha=0.3)
    figure.supxlabel(f"step of {TOKENS:,} tokens, 39.3 M in all, none seen twice")
    figure.supylabel("training loss (nats), mean over 50 steps")
    figure.savefig(to, dpi=100)


def claims(record: str, to: str) -> None:
    """A panel each: the rank of gradients over training (finders.py spectra=...), the rank that AdaRankGrad
    chooses by its threshold, Natural GaLore beside GaLore, VeLoRA's group size."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    runs: dict[str, dict[str, Any]] = {}
    spectra: dict[str, dict[str, Any]] = {}
    for line in open(record, encoding="utf-8"):
        r = json.loads(line)
        if "losses" in r and r["seed"] == 0:
            runs[r["run"]] = r
        elif "kinds" in r:
            spectra[r["what"].split()[1].rstrip(",")] = r
    figure, grid = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    rank, chosen, natural, group = grid.flat
    for style, (method, r) in zip(("-", "--"), spectra.items(), strict=False):
        for colour, (n, share) in zip(("C0", "C1", "C2"), enumerate(r["shares"]), strict=True):
            over = zip(*([x[n] for x in kind] for kind in r["kinds"].values()), strict=True)
            label = f"{method}: {share:.0%} of the energy"
            means = [sum(x) / len(x) for x in over]
            rank.plot(r["steps"], means, style, color=colour, label=label, marker=".")
    rank.set(title="singular values that hold a share of ||G||^2, mean of 56 matrices", ylabel="rank", ylim=0)
    for name, r in runs.items():
        steps = [EVERY * (n + 1) for n in range(len(r["losses"]))]
        if "effective_rank" in r and name.startswith("adarankgrad_8bit lr=0.01") and "scale" not in name:
            label = name.removeprefix("adarankgrad_8bit lr=0.01").strip() or "default: energy=0.9"
            chosen.plot(steps, r["effective_rank"], label=f"{label}: {r['val_ppl_a']:.1f}")
        if name.startswith(("natural_galore_8bit lr", "galore_8bit lr")) and name.split(" ", 1)[1] in (
            "lr=0.005", "lr=0.01", "lr=0.01 damping=1", "lr=0.01 damping=100", "lr=0.01 history=16",
        ):  # fmt: skip
            around = [r["losses"][max(0, n - 2) : n + 3] for n in range(len(steps))]
            style = "-" if name.startswith("natural") else "--"
            label = f"{name.replace('_8bit', '')}: {r['val_ppl_a']:.1f}"
            natural.plot(steps, [sum(x) / len(x) for x in around], style, label=label, linewidth=1.2)
    chosen.set(
        title="effective rank of adarankgrad_8bit (perplexity on half A)", ylim=0, ylabel="mean rank so far"
    )
    natural.set(title="Natural GaLore and GaLore (half A)", ylim=(4.0, 6.0), ylabel="training loss (nats)")
    sizes = {"8": 8, "16": 16, "32": None, "64, 86": "v:64 down:86", "128, 172": "v:128 down:172"}
    base = "galore_8bit lr=0.01"
    names = [f"{base} velora" + (f" group={g}" if g else "") for g in sizes.values()]
    found = [(k, runs[n]["val_ppl_a"]) for k, n in zip(sizes, names, strict=True) if n in runs]
    group.plot(*zip(*found, strict=True), marker="o", label=f"{base}, VeLoRA on v and down")
    group.axhline(runs[base]["val_ppl_a"], color="C1", label=f"{base} without")
    group.set(title="VeLoRA: numbers in a sub-token (half A)", ylabel="perplexity", xlabel="v, down")
    for axes in grid.flat:
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
        axes.title.set_fontsize(10)
    for axes in (rank, chosen, natural):
        axes.set_xlabel(f"step of {TOKENS:,} tokens")
    figure.savefig(to, dpi=100)


def drift(args: dict[str, str]) -> None:
    """How far the rows of bf16 weights end from their magnitudes, after 2,000 steps of 16,384 tokens."""
    every = [
        (name, [f"optim.rounding={rounding}"])
        for name in ("gradnormlorp_8bit", "gradnormlorp_adapter_8bit")
        for rounding in ("stochastic", "nearest")
    ]
    for name, more in every if args["rows"] == "all" else [every[int(args["rows"])]]:
        torch._dynamo.reset()
        with tempfile.TemporaryDirectory() as scratch:
            argv = ["model=llama_60m", "data=tokens", f"data.train={args['data']}", f"optim={name}", *more]
            argv += ["tokens_per_step=16384", "micro_batch=64", "steps=2000", f"run.dir={scratch}"]
            run = Run(
                parse([*argv, "run.name=r", "optim.lr=0.005"]).resolved(),
                Comm.from_env(),
                Path(scratch),
                None,
            )
            for step in range(1, 2001):
                batch = next(run.loader)
                run.step(step, batch, batch.valid)
            pairs = [(u.param, u.state["mag"]) for u in run.opt.units if u.mag]
            pairs += [(a.folded(), a.mag) for a in run.opt.adapters if a.mag is not None]
            off = torch.cat([w.float().norm(dim=1) / mag.detach().abs() - 1 for w, mag in pairs]).double()
            run.close()
        row = {
            "what": "llama_60m, ||W_row|| / |mag| - 1 after 2,000 steps in bf16",
            "run": " ".join([name, *more]),
        }
        row |= {"rms": float(off.square().mean().sqrt()), "most": float(off.abs().max()), "rows": len(off)}
        row |= facts(args.get("commit"))
        with open(args.get("out", "bench.jsonl"), "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        print({k: row[k] for k in ("run", "rms", "most")}, flush=True)


def split(path: str) -> None:
    """C4-format lines to two files by the crc32 of their url up to '#': neighbouring lines share a work."""
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(Path(path).suffix, open)
    with opener(path, "rt", encoding="utf-8") as lines:
        with gzip.open("half_a.json.gz", "wt") as a, gzip.open("half_b.json.gz", "wt") as b:
            for line in lines:
                work = json.loads(line)["url"].split("#")[0]
                (b if zlib.crc32(work.encode()) % 2 else a).write(line)


def main(argv: list[str]) -> int:
    keys = "rounding data half_b out runs steps seeds commit beside plot methods claims rows split"
    if refused(argv, keys, __doc__):
        return 2
    args = dict(a.split("=", 1) for a in argv)
    record = args.get("out", "bench.jsonl")
    if "plot" in args:
        plot(record, args["plot"], args.get("methods"), args.get("rounding"))
        return 0
    if "claims" in args:
        claims(record, args["claims"])
        return 0
    if "split" in args:
        split(args["split"])
        return 0
    if not torch.cuda.is_available():
        print(f"{__doc__}\nThis needs an NVIDIA GPU, and torch sees none here.", file=sys.stderr)
        return 2
    if "rows" in args:
        drift(args)
        return 0
    wanted = args["runs"].split(",") if "runs" in args else list(RUNS)
    for seed in map(int, args.get("seeds", "0").split("+")):
        for name in wanted:
            method, overrides = RUNS[name]
            torch._dynamo.reset()
            work = galore_torch if method == "galore_torch" else ours
            got = work(overrides, args, seed) if work is galore_torch else ours(method, overrides, args, seed)
            kind = f"{method} {name.split(' ', 1)[1].split('=')[0]}" if "lr=" not in name else method
            row = {
                "what": "llama_60m trained",
                "run": name,
                "method": kind,
                "seed": seed,
                "tokens": 39_321_600,
            }
            if "beside" in args:
                got = {k: v for k, v in got.items() if k not in ("tokens_per_s", "refresh_share")}
            row |= {**got, "epochs": "less than one", **facts(args.get("commit"))}
            with open(record, "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
            print(f"{name:<36} seed {seed}  A {row['val_ppl_a']:8.2f}  B {row['val_ppl_b']:8.2f}"
                  f"  {row.get('tokens_per_s', 0):>10,} tok/s", flush=True)  # fmt: skip
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
