"""Speed and memory on one GPU, ours beside peers: same shapes, data, batch and dtype, in one run on one card.

    python bench.py [data=FOLDER] [out=bench.jsonl] [cases=llama_60m,llama_1b] [pairs=5] [loader=GLOB]
                    [optim=galore_8bit,...] [peers=liger,...] [tokens=N] [micro_batches=K] [warm=N]
                    [commit=ID]
    python bench.py profile=yes [optim=galore_8bit,...] [cases=llama_1b] [data=FOLDER] [tokens=N] [warm=N]
    python bench.py saves=yes optim=galore_8bit cases=llama_7b [data=FOLDER]    how long a save holds training
    python bench.py limit=23.4 KEY=VALUE ...    train.py in a process that cannot pass so many GiB

By itself: galore_8bit and gradnormlorp_8bit beside our own adamw (moments bf16), then every peer beside our
adamw, at 7B, where both would not fit, beside galore_8bit. What is in the record already, of this commit and
card, is not measured again. `optim` names other methods, `peers` what stands beside them: adamw (ours) or
another of our methods, or a name of peers.py. Each peer is measured in a process of its own: Liger replaces
what others run too.

Steps that replace the bases of a block, and those that do not, are measured apart, after two rounds of bases,
as CUDA graphs, and weighted as if bases were replaced every 200 steps: at 7b 32 of 200 replace a block's. A
side with a refresh or refresh_every of its own, the adapter methods, and adarankgrad unless with
optim.adapt_refresh=false, are timed as they run. Settings of one side follow it after a plus:
optim=galore_8bit+optim.lift=deferred. `tokens`: of each of a step's `micro_batches` (1). `warm`: steps of
each method before the timed ones, and of a peer that replaces bases.
`profile` says where the time goes, after `warm` steps; with optim=METHOD+graph=off by shapes of products too.

FOLDER comes from `python -m data.prepare`; without one the bundled sample is prepared. Each row of the record
is one JSON object: what, sizes, GPU, versions, commit, numbers. Ours is `train.Run` itself: loader, logging
and optimizer included. Sides alternate in blocks of steps; the medians of the blocks count, and of each pair
the ratio.
"""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from glob import glob
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch

import data
from configs.cli import parse
from data.prepare import prepare
from llama import checkpoint
from optim import Comm
from optim.config import AdaRankConfig, BasisConfig, ProjectedConfig
from optim.methods import METHODS
from peers import PEERS, Peer
from train import Run

# model: (tokens a step, sequences a micro-batch)
CASES = {"llama_60m": (65_536, 256), "llama_1b": (4_096, 16), "llama_7b": (4_096, 16)}
EVERY = 200  # steps that a basis lives
KEYS = "data out cases pairs loader optim peers tokens micro_batches warm commit profile saves"
BLOCK_S = 2.0  # seconds of steps in a block
PACKAGES = ("torch", "triton", "transformers", "bitsandbytes", "liger-kernel")


class Ours:
    """The training loop's own step, with its loader and its metrics."""

    def __init__(
        self, model: str, tokens: int, micro: int, folder: str, overrides: list[str], steps: int = 100_000
    ) -> None:
        self.scratch = tempfile.TemporaryDirectory()
        cfg = parse(
            [
                f"model={model}",
                "data=tokens",
                f"data.train={folder}",
                f"tokens_per_step={tokens}",
                f"steps={steps}",
            ]
            + [
                f"micro_batch={micro}",
                f"run.dir={self.scratch.name}",
                "optim.lr=1e-4",
                *overrides,
            ]
        ).resolved()
        self.run = Run(cfg, Comm.from_env(), Path(self.scratch.name), None)
        self.done, self.weighted, self.settled = 0, False, 10 + self.run.opt.turns
        # of steps: whether bases were found in it, and whether it was a graph already, or never will be one
        self.ends: list[tuple[bool, bool, torch.cuda.Event]] = []

    def weigh(self) -> None:
        """Steps with a refresh count as if bases were replaced every EVERY steps, not twice as many steps as
        there are blocks; `settled` steps, two rounds, capture every kind of step."""
        self.weighted, self.settled = True, 4 * self.run.opt.turns + 6

    def block(self, n: int) -> float:
        """Seconds a step over n steps."""
        first = len(self.ends)
        wall = timed(self, n)
        if not self.weighted:
            return wall
        kinds = self.kinds(first)
        if not all(kinds.values()):
            raise ValueError(
                f"{n} steps without a refresh, or all with one: leave warm out, or more warm steps"
            )
        share = self.run.opt.turns / EVERY
        plain = sum(kinds[False]) / len(kinds[False])  # the mean: some of them write the log
        return ((1 - share) * plain + share * median(kinds[True])) / 1e3

    def kinds(self, first: int) -> dict[bool, list[float]]:
        """Milliseconds of steps without and with a refresh, from one on; of those that capture a graph, or
        run before one is captured, only where there are no others."""
        torch.cuda.synchronize()
        times: dict[bool, dict[bool, list[float]]] = {k: {False: [], True: []} for k in (False, True)}
        for (_, _, before), (refresh, lasting, end) in pairwise(self.ends[first:]):
            times[refresh][lasting].append(before.elapsed_time(end))
        return {refresh: of[True] or of[False] for refresh, of in times.items()}

    def steps(self, n: int) -> None:
        for _ in range(n):
            self.done += 1
            opt, runner = self.run.opt, self.run.runner
            refresh, kind = any(b.due for b in opt.bases), opt.kind
            graphs = {} if runner.version != opt.version else runner.graphs
            never = not runner.wanted or refresh and not runner.refreshes
            batch = next(self.run.loader)
            lasting = never or kind in graphs
            self.run.step(self.done, batch, batch.valid)
            self.ends.append((refresh, lasting, torch.cuda.Event(enable_timing=True)))
            self.ends[-1][2].record()
            if self.run.book and self.run.book.due():
                self.run.book.flush()

    def refreshes(self) -> dict[str, Any]:
        """Milliseconds of steps with and without a refresh, after the first ten, as the GPU saw them."""
        names = {False: "plain_step_ms", True: "refresh_step_ms"}
        return {names[k]: round(median(v), 2) for k, v in self.kinds(10).items() if v}

    def loss(self, step: int) -> float | None:
        """Of a step that was done."""
        assert self.run.book
        self.run.book.flush()
        rows = map(json.loads, open(self.run.book.path, encoding="utf-8"))
        return next((r["loss"] for r in rows if r["step"] == step and "loss" in r), None)

    def close(self) -> None:
        self.run.close()


def timed(side: Any, n: int) -> float:
    """Seconds a step over n steps."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    side.steps(n)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / n


def sizes(model: str, tokens: int | None, parts: int) -> tuple[int, int]:
    """Tokens a step, sequences a micro-batch."""
    each, micro = (tokens, tokens // 256) if tokens else CASES[model]
    return each * parts, micro


def make_side(side: str, model: str, step: int, micro: int, folder: str, steps: int = 100_000) -> Ours:
    """METHOD[+KEY=VALUE...]; without others adamw's moments are bf16."""
    method, *more = side.split("+")
    usual = {"optim.moments": "bf16"} if method == "adamw" else {}
    given, config = {m.partition("=")[0] for m in more}, METHODS[method].config
    lives = issubclass(config, AdaRankConfig) and "optim.adapt_refresh=false" not in more
    weigh = issubclass(config, ProjectedConfig) and not lives
    weigh = weigh and not given & {"optim.refresh", "optim.refresh_every"}
    if weigh:  # without warm-up the first round of bases takes as many steps as there are blocks
        layers = parse([f"model={model}", "data=sample"]).model.num_hidden_layers
        usual |= {"optim.refresh_every": str(2 * layers), "optim.warmup": "0"}
    elif issubclass(config, BasisConfig):
        usual["optim.refresh_every"] = str(EVERY)
    more += [f"{k}={v}" for k, v in usual.items() if k not in given]
    made = Ours(model, step, micro, folder, [f"optim={method}", *more], steps)
    if weigh:
        made.weigh()
    return made


def listed(text: str) -> list[str]:
    """Of a,b+activations.layers=[v,down]: a and the rest."""
    return [name for name in re.split(r",(?![^\[{]*[\]}])", text) if name]


def settings(side: Ours) -> dict[str, Any]:
    """Of a row: what its speed and memory depend on."""
    o, opt = side.run.cfg.optim, side.run.opt
    keys = ("refresh_every", "side", "share", "lift", "rounding", "moments", "embed_moments")
    row = {k: getattr(o, k) for k in keys if hasattr(o, k)}
    if side.weighted:
        row |= {"refresh_every": EVERY, "refresh": "measured apart, weighted"}
    if opt.bases:
        row["bases"] = str(opt.bases[0].qs.dtype).removeprefix("torch.")
    how = side.run.cfg.activations
    return row | {"checkpoint": how.checkpoint, "recompute": how.recompute, "velora": how.names}


def compare_methods(
    model: str, methods: str, peer: str, folder: str, pairs: int, tokens: int | None, parts: int,
    warm: int | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Methods beside one of PEERS or another method: a row each."""
    step, micro = sizes(model, tokens, parts)
    makers: dict[str, Any] = {
        name: partial(make_side, name, model, step, micro, folder) for name in listed(methods)
    }
    makers["peer"] = partial(Peer if peer in PEERS else make_side, peer, model, step, micro, folder)
    rows = alternate(makers, step, pairs, warm)
    return [
        {"what": f"{model} {name}, {step} tokens a step", "micro_batches": parts, **row}
        | {"peer": PEERS.get(peer, f"our {peer}" + (", moments bf16" if peer == "adamw" else ""))}
        for name, row in zip(makers, rows, strict=False)
    ]


def in_a_process(job: Callable[[], Any]) -> Any:
    """Its result, or its error, from a new process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(job).result()


def alternate(makers: dict[str, Any], tokens: int, pairs: int, warm: int | None) -> list[dict[str, Any]]:
    """All sides in turn: medians of their blocks, and of each pair the ratio. A row for each but the peer."""
    sides: dict[str, Any] = {}
    peaks, static, held, card, counts = {}, {}, {}, {}, {}
    for name, make in makers.items():
        before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        free, _ = torch.cuda.mem_get_info()
        sides[name] = make()
        sides[name].steps(4)  # compiles
        torch.cuda.synchronize()
        static[name] = (torch.cuda.memory_allocated() - before) / 2**30
        counts[name] = max(6, round(BLOCK_S / timed(sides[name], 5)))
        if isinstance(sides[name], Ours):
            usual = warm is None or name == "peer" and not sides[name].weighted
            sides[name].steps(sides[name].settled if usual else warm)
            sides[name].ends.clear()
        peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**30  # `before`: the other side's
        torch.cuda.empty_cache()
        held[name] = (torch.cuda.memory_reserved() - reserved) / 2**30
        card[name] = (free - torch.cuda.mem_get_info()[0]) / 2**30
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(pairs):
        for name, side in sides.items():
            one = side.block if isinstance(side, Ours) else partial(timed, side)
            times[name].append(one(counts[name]))
    rows = []
    for name in [name for name in sides if name != "peer"]:
        row = settings(sides[name]) | ({} if warm is None else {"warm_steps": warm})
        row["loss_50"] = sides[name].loss(50)
        opt = getattr(getattr(sides[name], "run", None), "opt", None)
        if opt is not None and opt.bases:
            row |= {"bases_found": list(opt.first_round), **sides[name].refreshes()}
            if opt.adarank:
                row["mean_rank"] = round(sum(b.r for b in opt.bases) / len(opt.bases), 1)
        rows.append(row | {
            "tokens_per_s": round(tokens / median(times[name])),
            "peer_tokens_per_s": round(tokens / median(times["peer"])),
            "ratio": round(median(p / o for o, p in zip(times[name], times["peer"], strict=True)), 4),
            "peak_gib": round(peaks[name], 2),
            "peer_peak_gib": round(peaks["peer"], 2),
            "static_gib": round(static[name], 2),
            "reserved_gib": round(held[name], 2),  # by the allocator, after what is free was given back
            "card_gib": round(card[name], 2),  # with CUDA's own, graphs among it
            "peer_static_gib": round(static["peer"], 2),
            "ms": [round(1e3 * t, 2) for t in times[name]],
            "peer_ms": [round(1e3 * t, 2) for t in times["peer"]],
            "sequence": 256,
            "weights": "bf16",
        })  # fmt: skip
    for side in sides.values():
        side.close()
    return rows


def limited(gib: float, argv: list[str]) -> int:
    """train.py with everything of this process, the CUDA context included, held below so many GiB."""
    import train

    free, total = torch.cuda.mem_get_info()
    context = total - free
    if context > 2**30:  # others are on the card
        context = int(0.8 * 2**30)  # more than a context takes: 0.5 on an H200
    torch.cuda.set_per_process_memory_fraction((gib * 2**30 - context) / total)
    code = train.main(argv)
    held = torch.cuda.max_memory_reserved()
    free, total = torch.cuda.mem_get_info()
    print(
        f"exit {code}; most held: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB in tensors, "
        f"{held / 2**30:.2f} by the allocator, {(held + context) / 2**30:.2f} with the context "
        f"({context / 2**30:.2f}); in use on the card at the end {(total - free) / 2**30:.2f}; limit {gib}"
    )
    return code


def profile(model: str, folder: str, side: str, tokens: int | None, warm: int) -> None:
    """Prints on which kernels some steps of a method spend the GPU's time, and where the GPU waits and what
    for."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    trained = make_side(side, model, *sizes(model, tokens, 1), folder)
    trained.steps(max(12, trained.settled, warm))
    torch.cuda.synchronize()
    with record(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], record_shapes=True) as seen:
        trained.steps(12)
        torch.cuda.synchronize()
    events = seen.events() or []
    cuda = torch.autograd.DeviceType.CUDA
    busy = sorted((e.time_range.start, e.time_range.end) for e in events if e.device_type == cuda)
    host = [e for e in events if e.device_type != cuda]
    idle, end, gaps = 0.0, busy[0][1], []
    for start, stop in busy:
        if start > end:
            idle += start - end
            gaps.append((start - end, end))
        end = max(end, stop)
    found, whole = sum(refresh for refresh, *_ in trained.ends[-12:]), end - busy[0][0]
    kernels: dict[str, list[float]] = {}
    for e in events:
        if e.device_type == cuda:
            kernels.setdefault(e.name, []).append(e.time_range.elapsed_us())
    print(
        f"{model} {side}: {whole / 12e3:.2f} ms a step, {found} of 12 with a refresh, idle {idle / whole:.1%}"
    )
    for name, times in sorted(kernels.items(), key=lambda x: -sum(x[1]))[:40]:
        total = sum(times)
        print(f"{total / 12e3:8.2f} ms {total / whole:6.1%} {len(times) / 12:7.1f} a step  {name[:90]}")
    small = [t for times in kernels.values() for t in times if t < 5]
    launches = f"{sum(map(len, kernels.values())) / 12:.0f} launches a step"
    print(f"{launches}, {len(small) / 12:.0f} of them below 5 us, {sum(small) / 12e3:.2f} ms together:")
    for name, times in sorted(kernels.items(), key=lambda x: -len(x[1]))[:16]:
        print(f"{len(times) / 12:7.1f} a step, {sum(times) / 12e3:6.2f} ms  {name[:90]}")
    shaped = seen.key_averages(group_by_input_shape=True)  # without graph=off of steps with a refresh only
    products = [e for e in shaped if e.key in ("aten::mm", "aten::addmm") and e.self_device_time_total]
    for e in sorted(products, key=lambda e: -e.self_device_time_total)[:16]:
        a, b = [x for x in e.input_shapes if len(x) == 2][-2:]
        rate = 2 * a[0] * a[1] * b[1] * e.count / e.self_device_time_total / 1e6
        times = f"{e.self_device_time_total / 12e3:8.2f} ms {e.count / 12:7.1f} a step"
        print(f"{times}  {rate:5.0f} TFLOP/s  {e.key} {a} x {b}")
    for length, at in sorted(gaps, reverse=True)[:12]:
        during = [e for e in host if e.time_range.start <= at + length / 2 <= e.time_range.end]
        names = [e.name for e in sorted(during, key=lambda e: e.time_range.elapsed_us())[:4]]
        print(f"idle {length / 1e3:6.2f} ms at {(at - busy[0][0]) / 1e3:8.1f}: {' < '.join(names)}")
    trained.close()


def saves(model: str, folder: str, method: str) -> dict[str, Any]:
    """Of one model: the stall of the first save and of later ones, and a resume from the newest."""
    cuda = torch.cuda.is_available()
    tokens, micro = CASES.get(model, (4_096, 16))
    begun = time.perf_counter()
    side = make_side(method, model, tokens, micro, folder, 1000)
    built, run = time.perf_counter() - begun, side.run
    assert run.saver is not None
    row: dict[str, Any] = {"what": f"saves, {model} {method}", "build_s": round(built, 2)}
    side.steps(3)
    stalls = []
    for _ in range(2):
        side.steps(2)
        wait_for(cuda)
        start = time.perf_counter()
        run.save(side.done)
        stalls.append(time.perf_counter() - start)
        side.steps(2)
        run.saver.poll(wait=True)
        print(
            f"a save held training for {stalls[-1]:.3f} s, and took {time.perf_counter() - start:.1f}",
            flush=True,
        )
    assert run.saver.newest == side.done - 2
    row |= {"first_stall_s": round(stalls[0], 3), "stall_s": round(stalls[1], 3)}
    row["bytes"] = checkpoint.size_of(run.tensors())
    row["train_peak_gib"] = peak_gib(cuda)
    cfg, place = run.cfg, Path(side.scratch.name)
    run.opt.detach()  # or its hooks would keep all of it beside the run that goes on
    side.close()
    del run, side.run
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    source = checkpoint.latest(place)
    hashed = time.perf_counter() - start
    again = Run(cfg, Comm.from_env(), place, source)
    wait_for(cuda)
    row |= {"hash_s": round(hashed, 2), "resume_s": round(time.perf_counter() - start, 2)}
    row["resume_peak_gib"] = peak_gib(cuda)
    again.close()
    return row


def wait_for(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def peak_gib(cuda: bool) -> float:
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else 0.0


def loader_rate(
    cfg: data.DataConfig, what: str, seconds: float = 10.0, vocab: int = 32_000
) -> dict[str, Any]:
    """Tokens a second that the loader alone delivers, after its first step."""
    dataset = data.build(cfg, vocab_size=vocab, seq_len=256, seed=0)
    with dataset.loader(256) as loader:
        for _ in range(10):
            next(loader)
        start, n = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            next(loader)
            n += 1
        rate = n * 65_536 / (time.perf_counter() - start)
    return {"what": f"loader alone, {what}", "tokens_per_s": round(rate), "workers": cfg.workers or 0}


def refused(argv: list[str], keys: str, text: str | None) -> bool:
    """Whether an argument is not KEY=VALUE with a known key; says which, and how it is used."""
    wrong = [a for a in argv if "=" not in a or a.partition("=")[0] not in keys.split()]
    if wrong:
        print(f"{text}\nnot understood: {' '.join(wrong)}", file=sys.stderr)
    return bool(wrong)


def facts(commit: str | None) -> dict[str, Any]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            pass
    commit = (
        commit
        or subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"gpu": gpu, "versions": versions, "commit": commit.strip(), "date": time.strftime("%Y-%m-%d")}


def main(argv: list[str]) -> int:
    args: dict[str, str] = dict(a.partition("=")[::2] for a in argv)
    if "limit" in args and torch.cuda.is_available():
        return limited(float(args["limit"]), [a for a in argv if not a.startswith("limit=")])
    if refused(argv, KEYS, __doc__):
        return 2
    named = {key: listed(args.get(key, "")) for key in ("optim", "peers")}
    known_as = {"optim": METHODS, "peers": {**METHODS, **PEERS}}
    for key, names in named.items():
        for name in names:
            if name.partition("+")[0] not in known_as[key]:
                print(f"{key}={name}: no such name; choose of {', '.join(known_as[key])}", file=sys.stderr)
                return 2
    if not torch.cuda.is_available():
        print(f"{__doc__}\nThis needs an NVIDIA GPU, and torch sees none here.", file=sys.stderr)
        return 2
    if (
        "data" not in args
    ):  # the bundled sample: less text than the timed steps read, which speed does not mind
        args["data"] = "runs/bench_tokens"
        if not Path(args["data"], "meta.json").exists():
            prepare(data.DataConfig(name="sample"), Path(args["data"]), vocab_size=32_000)
    jobs: dict[str, Callable[[], Any]] = {}  # name -> a row or several
    tokens = int(args["tokens"]) if "tokens" in args else None
    pairs, parts = (int(args.get(k, n)) for k, n in (("pairs", 5), ("micro_batches", 1)))

    def compared(model: str, methods: str, peer: str) -> None:
        warm = int(args["warm"]) if "warm" in args else None
        every = f"{parts} x {tokens or CASES[model][0]} tokens"
        job = partial(compare_methods, model, methods, peer, args["data"], pairs, tokens, parts, warm)
        name = f"{model} {methods} beside {peer}, {every}" + ("" if warm is None else f", warm {warm}")
        jobs[name] = partial(in_a_process, job) if peer in PEERS else job

    for model in args.get("cases", ",".join(CASES)).split(","):
        if "profile" in args:
            for side in listed(args.get("optim", "adamw")):
                profile(model, args["data"], side, tokens, int(args.get("warm", 0)))
        elif "saves" in args:
            method = args.get("optim", "galore_8bit")
            jobs[f"saves {model} {method}"] = partial(saves, model, args["data"], method)
        elif "optim" in args or "peers" in args:
            for peer in listed(args.get("peers", "adamw")):
                compared(model, args.get("optim", "galore_8bit"), peer)
        else:
            compared(model, "galore_8bit,gradnormlorp_8bit", "adamw")
            for peer in PEERS:
                fits = "galore_8bit" if model == "llama_7b" else "adamw"  # beside a whole AdamW
                compared(model, f"{fits}+optim.moments=fp32" if "32bit" in peer else fits, peer)
    if not set(args) & {"optim", "saves", "peers", "profile"}:
        cfg = data.DataConfig(name="tokens", train=args["data"])
        jobs["loader"] = lambda: loader_rate(cfg, "data=tokens")
    if "loader" in args:
        *train, last = sorted(glob(args["loader"]))
        text = {"name": "local", "train": train, "validation": last}
        tokenizer = str(Path(args["data"]) / "tokenizer.model")
        for workers in (0, 4, 8):
            cfg = data.DataConfig(**text, tokenizer=tokenizer, workers=workers)
            jobs[f"loader of text, {workers}"] = partial(loader_rate, cfg, "data=local json.xz text")
    failed, rows, place, known = False, [], Path(args.get("out", "bench.jsonl")), facts(args.get("commit"))
    lines = place.read_text(encoding="utf-8").splitlines() if place.exists() else []
    done = {(r.get("job"), r.get("commit"), r.get("gpu")) for r in map(json.loads, lines)}
    for name, job in jobs.items():
        if (name, known["commit"], known["gpu"]) in done:
            print(f"{name}: in {place} already, of this commit and card")
            continue
        try:
            got = job()
        except (RuntimeError, ImportError, AttributeError, TypeError, ValueError) as e:
            print(f"{name}: not measured, {type(e).__name__}: {str(e).splitlines()[0][:300]}", flush=True)
            failed, got = True, []
        for row in got if isinstance(got, list) else [got]:
            rows.append({"job": name, **row, **known})
            with open(place, "a", encoding="utf-8") as record:
                record.write(json.dumps(rows[-1]) + "\n")
        gc.collect()
        torch.cuda.empty_cache()
    for row in rows:
        peer = f"  peer {row['peer_tokens_per_s']:>10,}  ratio {row['ratio']:.3f}" if "peer" in row else ""
        memory = f"  {row['peak_gib']:.1f} / {row['peer_peak_gib']:.1f} GiB" if "peer" in row else ""
        if "tokens_per_s" not in row:
            print(json.dumps({k: v for k, v in row.items() if k != "versions"}))
            continue
        print(f"{row['what']:<55}{row['tokens_per_s']:>12,} tok/s{peer}{memory}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
