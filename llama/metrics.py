"""What a run tells: metrics.jsonl, the live line, loss.png, samples.txt, wandb and TensorBoard.

One row a training step, numbered 1..steps; evaluation rows carry val_* and no loss. Numbers of a step stay on
the device until the next flush: logging every step costs no synchronisation every step. Only rank 0 owns one.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .journal import Journal

FLUSH_S = 0.5  # the host waits for the device this often at most: about 1 ms each
PLAIN_S = 10.0  # seconds between plain progress lines where there is no terminal


class Sink(Protocol):
    def log(self, row: Mapping[str, float], step: int) -> None: ...
    def finish(self) -> None: ...


class Metrics:
    """Rows of one run. `step` takes device scalars and returns at once; `flush` reads them and writes."""

    def __init__(
        self,
        run: Path,
        *,
        start: int,  # the step the run goes on from; later rows of an interrupted try are cut off
        steps: int,
        flops_per_token: float,
        peak_flops: float | None,  # of all ranks together; None (a CPU): no MFU is shown
        device: torch.device,
        sinks: Sequence[Sink] = (),
    ) -> None:
        self.path, self.start, self.steps, self.device, self.sinks = (
            run / "metrics.jsonl",
            start,
            steps,
            device,
            sinks,
        )
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.tokens = cut(self.path, start)
        self.journal = Journal(self.path)
        self.pending: list[tuple[dict[str, Any], dict[str, Tensor | float]]] = []
        self.judge: Callable[[list[dict[str, Any]]], None] = lambda rows: None  # sees every row of a step
        self.note = ""
        self.line = Console.line = Line(sys.stderr)
        self.begun = time.perf_counter()
        self.resume_clock()

    def resume_clock(self) -> None:
        """Starts the throughput window anew: time spent in evaluation and saving is not training time."""
        self.since = time.perf_counter()
        self.window = 0

    def step(
        self, step: int, lr: float, tokens: int, scalars: dict[str, Tensor | float], note: str = ""
    ) -> None:
        """tokens: positions of this step over all ranks; scalars: numbers, or 0-dim device tensors that are
        not read here; note: a few words for the live line."""
        self.note = note
        self.tokens += tokens
        self.window += tokens
        self.pending.append(({"step": step, "lr": lr, "tokens": self.tokens}, scalars))

    def due(self) -> bool:
        return time.perf_counter() - self.since >= FLUSH_S

    def flush(self) -> list[dict[str, Any]]:
        """Reads the pending steps (one synchronisation), writes their rows, shows the last; returns them."""
        if not self.pending:
            return []
        stacked = self.read()
        now = time.perf_counter()
        rate = self.window / (now - self.since)
        spent = sum(got.pop("refresh_s", 0.0) for got in stacked) / (now - self.since)
        peak = (
            torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else rss_gib()
        )
        rows = []
        for (row, scalars), values in zip(self.pending, stacked, strict=True):
            got = {n: (v if math.isfinite(v) else None) for n, v in values.items()}
            if "refresh_s" in scalars:
                got["refresh_share"] = round(spent, 5)  # of the time since the rows before
            rows.append(
                {"step": row["step"], "loss": got.pop("loss"), "lr": row["lr"], "tokens": row["tokens"]}
                | {"tokens_per_s": round(rate, 1), "peak_mem_gib": round(peak, 3), **got}
            )
        self.pending.clear()
        self.judge(rows)
        self.write(rows)
        self.line.show(self.describe(rows[-1]), last=rows[-1]["step"] == self.steps)
        self.resume_clock()
        return rows

    def read(self) -> list[dict[str, float]]:
        """The pending steps' scalars as numbers: one copy from the device for all of them."""
        flat = [(n, k) for n, (_, s) in enumerate(self.pending) for k in s if isinstance(s[k], Tensor)]
        values = torch.stack([self.pending[n][1][k].double() for n, k in flat]).tolist()  # type: ignore[union-attr]
        found = [{k: v for k, v in s.items() if not isinstance(v, Tensor)} for _, s in self.pending]
        for (n, k), value in zip(flat, values, strict=True):
            found[n][k] = value
        return found

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        self.flush()
        self.write([{"step": step, **values}])
        self.line.print(
            f"step {step}/{self.steps}  validation loss {values['val_loss']:.4f}"
            f"  perplexity {values['val_ppl']:.2f}  bits/byte {values['val_bpb']:.4f}"
        )

    def write(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            for sink in self.sinks:
                sink.log({k: v for k, v in row.items() if k != "step" and v is not None}, row["step"])
        self.journal.write("".join(json.dumps(row) + "\n" for row in rows))

    def sync(self) -> None:
        """Everything up to now is on disk: called before a save, so that no save is newer than its rows."""
        self.flush()
        self.journal.sync()

    def back(self, step: int) -> None:
        """The run goes back to `step`: the rows after it go."""
        self.flush()
        self.journal.close()
        self.tokens = cut(self.path, step)
        self.journal = Journal(self.path)
        self.resume_clock()

    def describe(self, row: dict[str, Any]) -> str:
        """The live line, at most 80 columns for any run."""
        loss = "  nan" if row["loss"] is None else f"{row['loss']:.3f}"
        rate = row["tokens_per_s"]
        done = row["step"] - self.start
        eta = (time.perf_counter() - self.begun) / done * (self.steps - row["step"])
        mfu = f" mfu {rate * self.flops_per_token / self.peak_flops:.0%}" if self.peak_flops else ""
        if self.note:
            mfu = f" {self.note}"
        return (
            f"{row['step']}/{self.steps} loss {loss} lr {row['lr']:.1e} {short(rate)} tok/s"
            f"{mfu} mem {row['peak_mem_gib']:.1f}G eta {duration(eta)}"
        )

    def close(self) -> None:
        self.flush()
        self.line.end()
        Console.line = None
        self.journal.close()
        for sink in self.sinks:
            sink.finish()


class Console(logging.StreamHandler):  # type: ignore[type-arg]
    """Log lines on stderr that do not run into the live line."""

    line: Line | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if Console.line:
            Console.line.clear()
        super().emit(record)


class Line:
    """One line that is overwritten on a terminal, plain lines every PLAIN_S seconds elsewhere."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.live, self.width, self.last = stream, stream.isatty(), 0, -math.inf

    def show(self, text: str, last: bool = False) -> None:
        if self.live:
            self.stream.write("\r" + text[:79].ljust(self.width))
            self.width = min(len(text), 79)
        elif last or time.monotonic() - self.last >= PLAIN_S:
            self.stream.write(text + "\n")
            self.last = time.monotonic()
        self.stream.flush()

    def print(self, text: str) -> None:
        """A line that stays."""
        self.clear()
        self.stream.write(text + "\n")
        self.stream.flush()

    def clear(self) -> None:
        if self.live and self.width:
            self.stream.write("\r" + " " * self.width + "\r")
            self.width = 0

    def end(self) -> None:
        if self.live and self.width:
            self.stream.write("\n")
            self.width = 0


def cut(path: Path, start: int) -> int:
    """Keeps the rows up to step `start` and returns the tokens seen by then; at start 0 everything goes.

    Training rows beyond `start` belong to a try that was not saved, as does a torn last line.
    """
    rows = [row for row in read(path) if row["step"] <= start] if start else []
    tmp = path.with_suffix(".tmp")
    tmp.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    os.replace(tmp, path)
    return max((r.get("tokens", 0) for r in rows), default=0)


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line torn by a kill is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def running_mean(values: Sequence[float]) -> list[float]:
    """Over a window of 4% of the run, centred so that the curve does not lag; as many numbers as came in."""
    half = len(values) // 50
    sums = list(itertools.accumulate(values, initial=0.0))
    spans = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]


def draw(run: Path) -> None:
    """loss.png from metrics.jsonl: training loss with its running mean, validation loss, over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read(run / "metrics.jsonl")
    train = [(r["tokens"], r["loss"]) for r in rows if r.get("loss") is not None]
    at = {r["step"]: r["tokens"] for r in rows if "loss" in r}
    val = [(at.get(r["step"], 0), r["val_loss"]) for r in rows if "val_loss" in r]
    if not train:
        return
    fig, ax = plt.subplots(figsize=(8, 4.5), dpi=120)
    tokens, losses = zip(*train, strict=True)
    ax.plot(tokens, losses, color="0.75", lw=0.8, label="training, each step")
    ax.plot(tokens, running_mean(losses), color="C0", label="training, running mean")
    if val:
        ax.plot(
            *zip(*val, strict=True), "o-", color="C1", ms=4, label=f"validation (last: {val[-1][1]:.3f} nats)"
        )
    low, high = min([*losses, *(v for _, v in val)]), max([*losses[:1], *(v for _, v in val)])
    ax.set(
        xlabel="tokens",
        ylabel="loss (nats per token)",
        title=run.name,
        ylim=(low - 0.05 * (high - low), high * 1.02),
    )
    ax.xaxis.set_major_formatter(lambda x, _: short(x))
    ax.grid(alpha=0.3)
    ax.legend()
    fig.tight_layout()
    tmp = run / "loss.tmp.png"
    fig.savefig(tmp)
    plt.close(fig)
    os.replace(tmp, run / "loss.png")


def open_sinks(names: Sequence[str], run: Path, config: dict[str, Any]) -> list[Sink]:
    """wandb and TensorBoard, when asked. ImportError names the package that is missing."""
    makers: dict[str, Callable[[Path, dict[str, Any]], Sink]] = {"wandb": Wandb, "tensorboard": TensorBoard}
    return [makers[name](run, config) for name in names if name != "none"]


class Wandb:
    """Offline unless WANDB_MODE says otherwise (`wandb sync runs/NAME/wandb/...` uploads later).

    One id per run folder, so that a resumed run goes on in the same place.
    """

    def __init__(self, run: Path, config: dict[str, Any]) -> None:
        import wandb

        file = run / "wandb_id"
        if not file.exists():
            file.write_text(uuid.uuid4().hex[:8])
        self.run = wandb.init(
            project="subspan",
            name=run.name,
            id=file.read_text().strip(),
            resume="allow",
            dir=str(run),
            config=config,
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
            settings=wandb.Settings(silent=True),
        )

    def log(self, row: Mapping[str, float], step: int) -> None:
        self.run.log(dict(row), step=step)

    def finish(self) -> None:
        self.run.finish()


class TensorBoard:
    def __init__(self, run: Path, config: dict[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as e:
            raise ImportError(
                "log=tensorboard: the package tensorboard is missing; pip install tensorboard"
            ) from e
        self.writer = SummaryWriter(str(run / "tensorboard"))
        self.writer.add_text("config", "```\n" + json.dumps(config, indent=1) + "\n```")

    def log(self, row: Mapping[str, float], step: int) -> None:
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self.writer.close()


def short(x: float) -> str:
    """1234567 -> 1.23M: three digits, at most five characters."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if x >= 0.9995 * size:
            return f"{x / size:.3g}{unit}" if x / size < 999.5 else f"{x / size:.0f}{unit}"
    return f"{x:.0f}"


def duration(seconds: float) -> str:
    """93784 -> 1d02h, 3723 -> 1h02m, 62 -> 1m02s."""
    s = int(seconds)
    for big, small, b, u in (("d", "h", 86400, 3600), ("h", "m", 3600, 60), ("m", "s", 60, 1)):
        if s >= b:
            return f"{s // b}{big}{s % b // u:02d}{small}"
    return f"{s}s"


def rss_gib() -> float:
    """Peak resident memory of this process."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux: kilobytes
