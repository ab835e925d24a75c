"""Saves: complete or absent, and refused by name when touched."""

import json
import logging
import os

import pytest
import torch
from torch import nn

from llama import checkpoint


def save(run, step, keep_last=2, value=0.0):
    model = nn.Linear(4, 3)
    nn.init.constant_(model.weight, value)
    moments = {"weight": {"m": torch.full((3, 4), value), "t": torch.tensor(1.0 * step)}}
    path = checkpoint.save(
        run,
        step,
        model,
        moments,
        {"data": {"row": 7}, "tokens": 5},
        keep_last=keep_last,
        write_config=lambda f: (f / "config.json").write_text("{}"),
    )
    return path, model, moments


def test_round_trip_and_keep_last(tmp_path):
    for step in (1, 2, 3):
        path, model, moments = save(tmp_path, step, value=step / 3)
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step_00000003", "step_00000002"]
    assert checkpoint.latest(tmp_path) == path
    assert checkpoint.read_state(path) == {"step": 3, "data": {"row": 7}, "tokens": 5}
    loaded = checkpoint.load_optim(path, torch.device("cpu"))
    assert loaded.keys() == {"weight"} and all(
        torch.equal(loaded["weight"][k], v) for k, v in moments["weight"].items()
    )
    names = {"config.json", "model.safetensors", "optim.safetensors", "state.json", "manifest.json"}
    assert {p.name for p in path.iterdir()} == names


def test_an_interrupted_save_is_not_seen(tmp_path, monkeypatch):
    good, _, _ = save(tmp_path, 1)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert (tmp_path / "checkpoints/step_00000002.tmp").exists()
    assert checkpoint.latest(tmp_path) == good
    newer, _, _ = save(tmp_path, 2)  # and the leftovers do not disturb the next try
    assert checkpoint.latest(tmp_path) == newer


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


DAMAGE = {
    "model.safetensors": flip,
    "optim.safetensors": lambda p: os.truncate(p, p.stat().st_size - 1),
    "state.json": lambda p: p.unlink(),
    "config.json": lambda p: p.write_text("{ }"),
    "manifest.json": lambda p: p.write_text(json.dumps({"files": []})),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_touched_file_is_named_and_the_save_before_wins(tmp_path, name, caplog):
    older, _, _ = save(tmp_path, 1)
    newer, _, _ = save(tmp_path, 2)
    DAMAGE[name](newer / name)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest(tmp_path) == older
    assert name in caplog.text and "step_00000002" in caplog.text
