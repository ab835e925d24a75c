"""Runs side by side: the page of one and of several, of a run in progress, of folders that are none."""

import json

import pytest

from llama import metrics, report
from tests.mutants import kills

CONFIG = "optim:\n  name: {}\n  lr: {}\nsteps: {}\nrun:\n  name: {}\n"


def folder(path, method="adamw", lr=0.001, steps=40, done=40, energy=False, torn=False):
    path.mkdir()
    (path / "config.yaml").write_text(CONFIG.format(method, lr, steps, path.name))
    rows = [{"step": 0, "val_loss": 6.0, "val_ppl": 403.4, "val_bpb": 2.0}]
    for n in range(1, done + 1):
        row = {"step": n, "loss": 6 - n / 20, "lr": lr, "tokens": 100 * n, "tokens_per_s": 1000.0 + n}
        row |= {"peak_mem_gib": 1.5, "grad_norm": 1 / n, "skipped": float(n == 7)}
        rows.append(row | ({"energy": 0.5} if energy else {}))
        if n % 20 == 0:
            rows.append({"step": n, "val_loss": 5 - n / 20, "val_ppl": 100.0 - n, "val_bpb": 1.0})
    rows[5]["loss"] = None  # not finite in that step
    text = "".join(json.dumps(r) + "\n" for r in rows)
    (path / "metrics.jsonl").write_text(text + ('{"step": 99, "lo' if torn else ""))
    return path


def test_one_run_is_reported_in_its_own_folder(tmp_path, capsys):
    run = folder(tmp_path / "a", energy=True)
    assert report.main([str(run)]) == 0
    page = (run / "report.md").read_text()
    assert page.startswith("# a\n") and "![curves](report.png)" in page
    assert (run / "report.png").read_bytes()[:4] == b"\x89PNG"
    cells = [c.strip() for c in page.splitlines()[4].split("|")[1:-1]]
    assert cells == ["a", "adamw", "40 of 40", "4k", "4.000", "60.00", "60.00", "1.02k", "1.5", "1"]
    assert "differ" not in page and "last step" not in page
    assert not list(run.glob("*.tmp*")), "written aside and renamed"
    assert "val. perplexity 60.00" in capsys.readouterr().out


def test_several_runs_with_the_settings_that_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [folder(tmp_path / "a"), folder(tmp_path / "b", "galore|x", 0.01, energy=True, done=25, torn=True)]
    assert report.main([str(r) for r in runs]) == 0
    page = (tmp_path / "report" / "report.md").read_text()
    assert "| b | galore\\|x | 25 of 40 |" in page and "Not at their last step: b." in page
    rows = [line for line in page.splitlines() if line.startswith("| optim")]
    assert rows == ["| optim.name | adamw | galore\\|x |", "| optim.lr | 0.001 | 0.01 |"]
    assert "run.name" not in page and "| steps |" not in page.split("Settings")[1]
    assert report.main([*map(str, runs), f"out={tmp_path / 'c' / 'd'}"]) == 0
    assert (tmp_path / "c" / "d" / "report.md").read_text() == page


def test_curves_are_thinned_smoothed_and_skip_what_is_missing(tmp_path):
    run = report.Series(folder(tmp_path / "a", done=8000, steps=8000))
    xs, ys = run.curve("loss")
    assert len(xs) == len(ys) <= report.POINTS and xs[0] == 100 and None not in ys
    assert abs(ys[len(ys) // 2] - (6 - xs[len(ys) // 2] / 100 / 20)) < 0.05
    assert run.curve("energy") == ([], []) and run.curve("lr")[1][-1] == 0.001


@kills("llama/report.py", "ys += [ys[-1] if ys else r[name], r[name]]", "ys += [r[name], r[name]]")
@kills("llama/report.py", "[([*xs, last], [*ys, ys[-1]])", "[(xs, ys)")
def test_ranks_are_steps(tmp_path):
    run = folder(tmp_path / "a", done=30)
    rows = metrics.read(run / "metrics.jsonl")
    for row in rows:
        if "loss" in row:
            row["saved_mib"] = row["step"] / 10
            row |= {1: {"rank/a": 8.0, "rank/b": 8.0}, 10: {"rank/b": 4.0}, 20: {"rank/b": 6.0}}.get(
                row["step"], {}
            )
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    series = report.Series(run)
    a, b = series.lines("rank/")
    assert a == ([100, 100, 3000], [8, 8, 8])
    assert b == ([100, 100, 1000, 1000, 2000, 2000, 3000], [8, 8, 8, 4, 4, 6, 6])
    assert [len(series.lines(key)) for key in ("saved_mib", "energy", "none/")] == [1, 0, 0]
    assert report.main([str(run)]) == 0


def test_a_folder_without_configuration_is_shown(tmp_path):
    run = folder(tmp_path / "a")
    (run / "config.yaml").write_bytes(b"\xff: [")
    assert report.main([str(run)]) == 0 and "| a | ? | 40 |" in (run / "report.md").read_text()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "usage:"),
        (["--help"], "usage:"),
        (["none"], "none: no such folder"),
        (["empty"], "empty: metrics.jsonl has no training step yet"),
        (["a", "sub/a"], "a: two runs of this name"),
        (["a", "out="], "usage:"),
        (["a", "out=file"], "file: cannot write there"),
    ],
)
def test_what_is_no_run_is_one_clear_line(args, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "sub/a"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        folder(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    assert report.main(args) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith(said) and err.count("\n") == 1
