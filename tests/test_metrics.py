"""Rows, the live line, cutting back, cards."""

import json
import time

import pytest
import torch

from llama import card, metrics


def book(run, start=0, steps=10, **kw):
    given = {"flops_per_token": 1e9, "peak_flops": 1e14, "device": torch.device("cpu"), **kw}
    return metrics.Metrics(run, start=start, steps=steps, **given)


def scalars(loss):
    return {"loss": torch.tensor(loss), "grad_norm": torch.tensor(0.5), "skipped": torch.tensor(0)}


def test_rows_have_the_promised_keys_and_numbers(tmp_path):
    b = book(tmp_path)
    b.evaluation(0, {"val_loss": 7.0, "val_ppl": 1096.6, "val_bpb": 2.5})
    for step in (1, 2, 3):
        b.step(step, 1e-3 * step, 100, scalars(5.0 / step))
    b.step(4, 1e-3, 100, scalars(float("nan")))
    b.close()
    rows = metrics.read(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows] == [0, 1, 2, 3, 4]
    assert "loss" not in rows[0] and rows[0]["val_bpb"] == 2.5
    keys = {"step", "loss", "lr", "tokens", "tokens_per_s", "peak_mem_gib", "grad_norm"}
    assert all(keys <= r.keys() for r in rows[1:])
    assert [r["tokens"] for r in rows[1:]] == [100, 200, 300, 400]
    assert rows[2]["loss"] == 2.5 and rows[4]["loss"] is None  # strict JSON knows no NaN


def test_a_resumed_run_cuts_the_file_back(tmp_path):
    b = book(tmp_path)
    for step in range(1, 6):
        b.step(step, 1e-3, 100, scalars(1.0))
    b.close()
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 6, "los')  # torn by a kill
    b = book(tmp_path, start=3)
    b.step(4, 1e-3, 100, scalars(9.0))
    b.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    assert rows[-1]["tokens"] == 400 and rows[-1]["loss"] == 9.0


@pytest.mark.parametrize("rate", [3.2, 999.6, 15_900.0, 1.4637e6, 2.3e9])
@pytest.mark.parametrize("mem", [0.4, 139.3])
def test_the_live_line_fits_80_columns(tmp_path, rate, mem):
    b = book(tmp_path, steps=150_000, flops_per_token=0.9e14 / rate)
    b.begun -= 50 * 86400
    row = {"step": 100_000, "loss": 14.1234, "lr": 1.25e-4, "tokens_per_s": rate, "peak_mem_gib": mem}
    line = b.describe(row)
    assert len(line) < 80
    assert all(
        part in line for part in ("100000/150000", "14.123", "1.3e-04", "tok/s", "mfu 90%", "eta 25d00h")
    )
    b.close()


def test_short_numbers_and_durations():
    assert [metrics.short(x) for x in (12, 999.6, 1234, 15_900, 1_463_700, 999_960)] == [
        *("12", "1k", "1.23k", "15.9k", "1.46M", "1M")
    ]
    assert [metrics.duration(s) for s in (5, 62, 3723, 93784)] == ["5s", "1m02s", "1h02m", "1d02h"]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 311.9),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4080 SUPER", None),
        ("NVIDIA GeForce RTX 3090 Ti", 80.0),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA A10", 125.0),
        ("Tesla T4", None),
    ],
)
def test_peak_of_a_card_is_known_or_measured_never_guessed(name, peak):
    assert card.match(name) == peak


def test_measured_rate_is_plausible():
    assert 1e8 < card.measured_flops(torch.device("cpu"), torch.float32) < 1e14


def test_plot_and_sinks(tmp_path):
    b = book(tmp_path, sinks=metrics.open_sinks(["tensorboard"], tmp_path, {"steps": 10}))
    for step in range(1, 9):
        b.step(step, 1e-3, 100, scalars(5.0 / step))
    b.evaluation(8, {"val_loss": 1.5, "val_ppl": 4.48, "val_bpb": 0.9})
    b.close()
    metrics.draw(tmp_path)
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [round(e.value, 4) for e in events.Scalars("loss")] == [round(5.0 / s, 4) for s in range(1, 9)]
    assert [e.step for e in events.Scalars("val_loss")] == [8]


def wandb_records(raw):
    """Records of a .wandb file: a 7-byte header, then 32 KiB blocks of (crc 4, length 2, type 1, payload)."""
    at, parts = 7, b""
    while at + 7 <= len(raw):
        if 32768 - at % 32768 < 7:  # a block's tail too short for a header is padding
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
        parts += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb_offline_is_written_and_read_back(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    b = book(tmp_path, sinks=metrics.open_sinks(["wandb"], tmp_path, {"steps": 10}))
    for step in range(1, 4):
        b.step(step, 1e-3, 100, scalars(5.0 / step))
    b.evaluation(3, {"val_loss": 1.5, "val_ppl": 4.48, "val_bpb": 0.9})
    b.close()
    from wandb.proto import wandb_internal_pb2

    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    records = []
    for _ in range(300):  # wandb's own process may write the file's last part after finish() returned
        records = [wandb_internal_pb2.Record.FromString(raw) for raw in wandb_records(file.read_bytes())]
        if any(record.HasField("exit") for record in records):
            break
        time.sleep(0.1)
    seen = {}
    for record in records:
        for item in record.history.item:
            seen.setdefault(item.nested_key[0] if item.nested_key else item.key, []).append(
                json.loads(item.value_json)
            )
    assert [round(x, 4) for x in seen["loss"]] == [5.0, 2.5, 1.6667]
    assert seen["val_loss"] == [1.5]
    assert (tmp_path / "wandb_id").read_text() in file.name
