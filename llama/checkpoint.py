"""Checkpoints: tensors and JSON only, written aside, hashed, synced, renamed.

    checkpoints/step_00001000/   config.json model.safetensors optim.safetensors state.json manifest.json

A folder without .tmp is complete by definition: it got its name by one rename after every file was on disk.
Reading checks each file's size and SHA-256 against the manifest, names what does not agree and falls back to
the save before.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

log = logging.getLogger("subspan")
MANIFEST = "manifest.json"


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def complete(run: Path) -> list[Path]:
    """Complete saves of a run folder, newest first; a *.tmp folder is a save that never ended."""
    return sorted(
        (p for p in run.glob("checkpoints/step_????????") if (p / MANIFEST).is_file()), reverse=True
    )


def latest(run: Path) -> Path | None:
    """The newest complete save whose files agree with its manifest; names every newer one that it refuses."""
    for path in complete(run):
        bad = damage(path)
        if not bad:
            return path
        log.warning("%s refused: %s; going back to the save before it", path, bad)
    return None


def damage(path: Path) -> str:
    """What is wrong with a save, empty if nothing."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        for name, entry in files.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            size = (path / name).stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes, its manifest says {entry['bytes']}"
            if sha256(path / name) != entry["sha256"]:
                return f"{name} was changed after it was written (SHA-256 differs)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        return f"{MANIFEST} cannot be read ({e})"
    return ""


def save(
    run: Path,
    step: int,
    model: nn.Module,
    optim_state: dict[str, dict[str, Tensor]],  # {parameter name: {state name: tensor}}
    state: dict[str, Any],  # JSON: data position, tokens, resolved configuration
    *,
    keep_last: int,
    write_config: Callable[[Path], None],  # writes config.json into the folder
) -> Path:
    """Writes one save and removes all but the newest `keep_last`. Call on rank 0 only."""
    final = folder(run, step)
    tmp = final.with_name(final.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    weights = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
    flat = {f"{name}:{k}": t.detach().contiguous() for name, s in optim_state.items() for k, t in s.items()}
    save_file(weights, tmp / "model.safetensors", metadata={"format": "pt"})
    save_file(flat, tmp / "optim.safetensors")
    write_config(tmp)
    for p in tmp.glob("*.safetensors"):  # written for the owner alone; as open as the others
        p.chmod((tmp / "config.json").stat().st_mode)
    (tmp / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
    files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(tmp.iterdir())}
    (tmp / MANIFEST).write_text(json.dumps({"files": files}, indent=1))
    for p in [*tmp.iterdir(), tmp]:
        sync(p)
    if final.exists():  # the same step saved again, by a run that went back to an older save
        shutil.rmtree(final)
    os.rename(tmp, final)
    sync(final.parent)
    for old in complete(run)[keep_last:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def read_state(path: Path) -> dict[str, Any]:
    return json.loads((path / "state.json").read_text())


def load_optim(path: Path, device: torch.device) -> dict[str, dict[str, Tensor]]:
    """{parameter name: {state name: tensor}} of a save."""
    state: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(path / "optim.safetensors", device=str(device)).items():
        name, _, kind = key.rpartition(":")
        state.setdefault(name, {})[kind] = tensor
    return state


def sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
