"""Saves: complete or absent, refused by name when touched, written beside training."""

import errno
import json
import logging
import os
import shutil
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from llama import checkpoint, saver
from llama.saver import SaveFailed, Saver
from tests.mutants import kills

FILES = {"config.json", "model.safetensors", "optim.safetensors", "state.json", "manifest.json"}


def contents(step, value=0.0):
    model = nn.Linear(4, 3)
    nn.init.constant_(model.weight, value)
    moments = {"weight:m": torch.full((3, 4), value), "weight:t": torch.tensor(1.0 * step)}
    tensors = {"model.safetensors": dict(model.state_dict()), "optim.safetensors": moments}
    state = {"step": step, "tokens": 5, "stream": "", "data": None, "config": {}}
    return tensors, {"config.json": "{}", "state.json": json.dumps(state)}


def save(run, step, keep_last=2, value=0.0):
    return checkpoint.write(run, step, *contents(step, value), keep_last=keep_last)


def test_round_trip_and_keep_last(tmp_path):
    for step in (1, 2, 3):
        path = save(tmp_path, step, value=step / 3)
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step_00000003", "step_00000002"]
    assert checkpoint.latest(tmp_path) == path
    assert checkpoint.read_state(path)["step"] == 3
    loaded = checkpoint.load_optim(path)
    assert loaded.keys() == {"weight"} and loaded["weight"]["t"] == 3
    assert torch.equal(loaded["weight"]["m"], torch.full((3, 4), 1.0))
    assert {p.name for p in path.iterdir()} == FILES


dtypes = st.sampled_from(list(checkpoint.NAMES))
shapes = st.lists(st.integers(0, 5), max_size=3)


@kills("llama/checkpoint.py", "(-tensors[name].itemsize, name)", "name")
@kills("llama/checkpoint.py", "t.contiguous().reshape(-1)", "t.reshape(-1).contiguous()[: t.numel() - 1]")
@given(st.lists(st.tuples(dtypes, shapes, st.booleans()), max_size=6))
def test_the_writer_is_read_by_the_safetensors_library(tmp_path_factory, made):
    """Any dtype and shape, views too; each tensor begins at a multiple of its item."""
    path = tmp_path_factory.mktemp("s") / "t.safetensors"
    tensors = {}
    for n, (dtype, shape, turned) in enumerate(made):
        t = torch.randint(0, 2, shape).to(dtype)
        tensors[f"t{n}"] = t.T if turned and t.ndim == 2 else t
    wrote = checkpoint.write_file(path, checkpoint.safetensors(tensors))
    assert wrote == {"bytes": path.stat().st_size, "sha256": checkpoint.sha256(path)}
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, t in tensors.items():
        assert loaded[name].dtype == t.dtype and torch.equal(loaded[name], t)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    for name, t in tensors.items():
        assert (8 + length + header[name]["data_offsets"][0]) % t.itemsize == 0
    with safe_open(path, "pt") as f:
        assert f.metadata() == {"format": "pt"}


def test_an_interrupted_save_is_not_seen_and_tidied(tmp_path, monkeypatch):
    good = save(tmp_path, 1)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    monkeypatch.undo()
    left = tmp_path / "checkpoints/step_00000002.tmp"
    assert left.exists() and checkpoint.latest(tmp_path) == good
    checkpoint.tidy(tmp_path)
    assert not left.exists() and checkpoint.latest(tmp_path) == good


@kills("llama/checkpoint.py", "os.rename(final, before)", "shutil.rmtree(final)")
@kills("llama/checkpoint.py", "shutil.rmtree(before) if final.exists() else", "None if final.exists() else")
def test_a_step_saved_twice_is_never_absent(tmp_path, monkeypatch):
    """Killed between its two renames: the old save gets its name back."""
    save(tmp_path, 1, value=1.0)
    real, calls = os.rename, []

    def once(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(os, "rename", once)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 1, value=2.0)
    monkeypatch.undo()
    checkpoint.tidy(tmp_path)
    assert checkpoint.load_optim(checkpoint.latest(tmp_path))["weight"]["m"][0, 0] == 1.0
    save(tmp_path, 1, value=2.0)
    (tmp_path / "checkpoints/step_00000001.old").mkdir()
    checkpoint.tidy(tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    assert checkpoint.load_optim(checkpoint.latest(tmp_path))["weight"]["m"][0, 0] == 2.0


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def unnamed(path):
    """A manifest that does not speak of the weights judges nothing."""
    files = json.loads(path.read_text())["files"]
    del files["model.safetensors"]
    path.write_text(json.dumps({"files": files}))


def elsewhere(path):
    files = json.loads(path.read_text())["files"]
    path.write_text(json.dumps({"files": files | {"../../x": files["config.json"]}}))


DAMAGE = {
    "model.safetensors": flip,
    "optim.safetensors": lambda p: os.truncate(p, p.stat().st_size - 1),
    "state.json": lambda p: p.unlink(),
    "config.json": lambda p: p.write_text("{ }"),
    "manifest.json": lambda p: p.write_text(json.dumps({"files": []})),
    "manifest.json names": unnamed,
    "manifest.json paths": elsewhere,
}


@kills(
    "llama/checkpoint.py",
    '                return f"{MANIFEST} does not name {name}"',
    "                continue",
)
@kills("llama/checkpoint.py", "if not name or os.path.basename(name) != name:", "if not name:")
@pytest.mark.parametrize("case", DAMAGE)
def test_a_touched_file_is_named_and_the_save_before_wins(tmp_path, case, caplog):
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    name = case.split()[0]
    shutil.copyfile(newer / "config.json", tmp_path / "x")
    DAMAGE[case](newer / name)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest(tmp_path) == older
    assert name in caplog.text and "step_00000002" in caplog.text


# ---- beside training


@kills("llama/saver.py", "kept = tensors if self._buffer is None else self._copy(tensors)", "kept = tensors")
def test_training_goes_on_while_a_save_is_written(tmp_path, monkeypatch, caplog):
    """What is saved is what was there when save() returned; one that is due meanwhile is left out."""
    real, go = checkpoint.write, threading.Event()
    monkeypatch.setattr(checkpoint, "write", lambda *a, **k: go.wait() and real(*a, **k))
    s = Saver(tmp_path, keep_last=2)
    tensors, texts = contents(1, value=1.0)
    s.save(1, tensors, texts)
    for some in tensors.values():
        for t in some.values():
            t.detach().fill_(-7)
    s.save(2, *contents(2))
    assert "step 2 is not saved: step 1 is still being written" in caplog.text
    assert not checkpoint.complete(tmp_path) and s.newest == 0
    go.set()
    s.save(3, *contents(3, value=3.0), last=True)
    assert s.newest == 3 and [checkpoint.step_of(p) for p in checkpoint.complete(tmp_path)] == [3, 1]
    for step in (1, 3):
        kept = checkpoint.load_optim(checkpoint.folder(tmp_path, step))["weight"]
        assert (kept["m"] == step).all() and kept["t"] == step


def full_disk(monkeypatch, after):
    """The disk takes so many more files."""
    real, wrote = checkpoint.write_file, []

    def write_file(path, content):
        wrote.append(path)
        if len(wrote) > after:
            path.write_bytes(b"some")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, content)

    monkeypatch.setattr(checkpoint, "write_file", write_file)


@pytest.mark.parametrize("after", range(5))
def test_a_full_disk_is_said_and_keeps_the_last_save(tmp_path, monkeypatch, caplog, after):
    s = Saver(tmp_path, keep_last=1)
    s.save(1, *contents(1), last=True)
    full_disk(monkeypatch, after)
    s.save(2, *contents(2))
    s.poll(wait=True)
    assert "step 2 is not saved: No space left on device; the newest save is step 1" in caplog.text
    assert s.newest == 1 and [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    with pytest.raises(SaveFailed, match="step 3 is not saved: No space left.*newest save is step 1"):
        s.save(3, *contents(3), last=True)
    monkeypatch.undo()
    s.save(4, *contents(4), last=True)
    assert s.newest == 4 and checkpoint.latest(tmp_path).name == "step_00000004"


@kills("llama/saver.py", "if need > there:", "if False:")
def test_what_cannot_fit_is_not_begun(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(checkpoint, "free", lambda path: 10.0)
    monkeypatch.setattr(checkpoint, "write", lambda *a, **k: pytest.fail("written"))
    s = Saver(tmp_path, keep_last=1)
    s.save(1, *contents(1))
    assert "step 1 is not saved: it needs 0.0 MiB, the disk has 0.0 MiB free" in caplog.text
    assert "there is no save yet" in caplog.text


def test_without_host_memory_the_step_waits_for_the_disk(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(saver, "available", lambda: 1000.0)
    s = Saver(tmp_path, keep_last=1)
    for step in (1, 2):
        s.save(step, *contents(step))
        assert s.newest == step and checkpoint.latest(tmp_path).name == f"step_0000000{step}"
    assert caplog.text.count("saves hold training") == 1
