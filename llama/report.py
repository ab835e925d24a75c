"""Runs side by side: a Markdown page with a table of results, a figure, and the settings that differ.

Command: python -m llama.report RUN [RUN ...] [out=FOLDER]

Writes report.md and report.png into FOLDER: the run's own folder for one run, `report` for several. A run
that is still going on can be read at any time; each file appears complete or not at all.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from statistics import median
from typing import Any

from .metrics import read, running_mean, short
from .pretrained import FolderError

USAGE = "usage: python -m llama.report RUN [RUN ...] [out=FOLDER]"
POINTS = 1500  # of a curve; more cannot be seen
# A panel: title, key of the rows, logarithmic. A panel whose key no run has is left out. With a slash at the
# end every key that begins so is a line, and its values hold until the next.
PANELS = (
    ("training loss (nats, running mean; dots: validation)", "loss", False),
    ("learning rate", "lr", False),
    ("gradient norm", "grad_norm", True),
    ("energy captured by the bases", "energy", False),
    ("tokens a second", "tokens_per_s", False),
    ("peak memory (GiB)", "peak_mem_gib", False),
    ("rank of each basis", "rank/", False),
    ("saved by lower ranks (MiB)", "saved_mib", False),
)
SMOOTH = ("loss", "grad_norm", "energy")


class Series:
    """What one run folder tells."""

    def __init__(self, run: Path) -> None:
        if not run.is_dir():
            raise FolderError(f"{run}: no such folder; give a run's, as in runs/NAME")
        rows = read(run / "metrics.jsonl")
        self.name, self.config = run.name, flat(read_config(run / "config.yaml"))
        self.train = [r for r in rows if "loss" in r]
        self.val = [r for r in rows if "val_loss" in r]
        if not self.train:
            raise FolderError(f"{run}: metrics.jsonl has no training step yet")
        self.tokens_at = {0: 0} | {r["step"]: r["tokens"] for r in self.train}

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Tokens and values of a key, without steps that have none, thinned to POINTS."""
        pairs = [(r["tokens"], r[key]) for r in self.train if r.get(key) is not None]
        if not pairs:
            return [], []
        xs, ys = (list(t) for t in zip(*pairs, strict=True))
        if key in SMOOTH:
            ys = running_mean(ys)
        stride = -(-len(xs) // POINTS)
        return xs[::stride], ys[::stride]

    def lines(self, key: str) -> list[tuple[list[float], list[float]]]:
        """The curves of a panel."""
        if not key.endswith("/"):
            return [c for c in [self.curve(key)] if c[0]]
        last = self.train[-1]["tokens"]
        found: dict[str, tuple[list[float], list[float]]] = {}
        for r in self.train:
            for name in (k for k in r if k.startswith(key)):
                xs, ys = found.setdefault(name, ([], []))
                xs += [r["tokens"], r["tokens"]]
                ys += [ys[-1] if ys else r[name], r[name]]
        return [([*xs, last], [*ys, ys[-1]]) for xs, ys in found.values()]

    def result(self) -> dict[str, str]:
        """A row of the table: what a reader asks first."""
        last, steps = self.train[-1], self.config.get("steps")
        losses = [r["loss"] for r in self.train if r["loss"] is not None]
        ppls = [r["val_ppl"] for r in self.val if r.get("val_ppl") is not None]
        rates = [r["tokens_per_s"] for r in self.train if r.get("tokens_per_s")]
        memory = [r["peak_mem_gib"] for r in self.train if r.get("peak_mem_gib")]
        skipped = sum(r.get("skipped") or 0 for r in self.train)
        return {
            "run": self.name,
            "method": str(self.config.get("optim.name", "?")),
            "steps": f"{last['step']} of {steps}" if steps else str(last["step"]),
            "tokens": short(last["tokens"]),
            "training loss": f"{running_mean(losses)[-1]:.3f}" if losses else "-",
            "val. perplexity": f"{ppls[-1]:.2f}" if ppls else "-",
            "best": f"{min(ppls):.2f}" if ppls else "-",
            "tokens/s": short(median(rates)) if rates else "-",
            "peak GiB": f"{max(memory):.1f}" if memory else "-",
            "skipped": f"{skipped:.0f}",
        }


def read_config(path: Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}  # an older or foreign folder: its curves can be shown all the same
    return found if isinstance(found, dict) else {}


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def different(runs: list[Series]) -> list[dict[str, str]]:
    """A row a setting that is not the same in all runs; where they lie is left out."""
    keys = dict.fromkeys(key for r in runs for key in r.config if not key.startswith("run."))
    rows = []
    for key in keys:
        values = [r.config.get(key, "-") for r in runs]
        if any(v != values[0] for v in values):
            shown = [
                "null" if v is None else str(v).lower() if isinstance(v, bool) else str(v) for v in values
            ]
            rows.append({"setting": key, **dict(zip((r.name for r in runs), shown, strict=True))})
    return rows


def table(rows: list[dict[str, str]]) -> str:
    """Markdown; a | in a cell is escaped."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(r.values()) for r in rows)]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |" for cells in lines)


def figure(runs: list[Series], to: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [p for p in PANELS if any(r.lines(p[1]) for r in runs)]
    down = -(-len(panels) // 2)
    fig, grid = plt.subplots(
        down, 2, figsize=(12, 3.4 * down), dpi=110, layout="constrained", squeeze=False, sharex=True
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, key, logarithmic) in zip(grid.flat, panels, strict=False):
        for n, run in enumerate(runs):
            for xs, ys in run.lines(key):
                axes.plot(xs, ys, color=f"C{n}", lw=0.6 if key.endswith("/") else 1.2, label=run.name)
            if key == "loss":
                dots = [(run.tokens_at.get(r["step"]), r["val_loss"]) for r in run.val if r["step"]]
                dots = [(x, y) for x, y in dots if x is not None and y is not None]
                axes.plot([x for x, _ in dots], [y for _, y in dots], "o", color=f"C{n}", ms=4)
        if logarithmic and all(y > 0 for line in axes.lines for y in line.get_ydata()):
            axes.set_yscale("log")
        elif key in ("tokens_per_s", "peak_mem_gib", "rank/"):
            axes.set_ylim(bottom=0)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_formatter(lambda x, _: short(x))
        axes.yaxis.set_major_formatter(lambda y, _: short(y) if abs(y) >= 1000 else f"{y:g}")
    grid[0, 0].legend(fontsize=8)
    fig.supxlabel("tokens", fontsize=10)
    fig.savefig(to)
    plt.close(fig)


def write(runs: list[Series], out: Path) -> Path:
    """report.md and report.png in `out`, which is made; the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    picture, page = out / "report.tmp.png", out / "report.md.tmp"
    figure(runs, picture)
    text = [
        f"# {', '.join(r.name for r in runs)}",
        table([r.result() for r in runs]),
        "![curves](report.png)",
    ]
    rows = different(runs)
    if rows:
        text += ["Settings that differ:", table(rows)]
    unfinished = [r.name for r in runs if r.train[-1]["step"] < (r.config.get("steps") or -math.inf)]
    if unfinished:
        text.append(f"Not at their last step: {', '.join(unfinished)}.")
    page.write_text("\n\n".join(text) + "\n", encoding="utf-8")
    os.replace(picture, out / "report.png")
    os.replace(page, out / "report.md")
    return out / "report.md"


def main(argv: list[str] | None = None) -> int:
    args = sys.argv[1:] if argv is None else argv
    try:
        folders = [a for a in args if not a.startswith("out=")]
        given = [a.removeprefix("out=") for a in args if a.startswith("out=")]
        if not folders or len(given) > 1 or given == [""] or args[0] in ("-h", "--help"):
            raise FolderError(USAGE)
        runs = [Series(Path(f)) for f in folders]
        twice = [r.name for r in runs if sum(o.name == r.name for o in runs) > 1]
        if twice:
            raise FolderError(f"{twice[0]}: two runs of this name; rename a folder, or give each once")
        out = Path(given[0]) if given else Path(folders[0]) if len(runs) == 1 else Path("report")
        try:
            page = write(runs, out)
        except OSError as e:
            raise FolderError(f"{out}: cannot write there ({e.strerror}); give out=FOLDER") from None
        for r in runs:
            print("  ".join(f"{k} {v}" for k, v in r.result().items() if k in SHOWN))
        print(f"written: {page}")
    except FolderError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


SHOWN = ("run", "steps", "val. perplexity", "tokens/s", "peak GiB")

if __name__ == "__main__":
    sys.exit(main())
