"""Saves on disk: tensors and JSON only, written aside, hashed, synced, renamed.

    checkpoints/step_00001000/   config.json model.safetensors optim.safetensors state.json manifest.json

A folder without .tmp is complete by definition: it got its name by one rename after every file was on disk.
Reading checks each file's size and SHA-256 against the manifest and that it holds what such a file holds,
names what does not agree and falls back to the save before. What has the right hashes and could have been
written like that is believed. `Saver` (saver.py) does the writing beside training.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

log = logging.getLogger("subspan")
MANIFEST, STATE, OLD = "manifest.json", "state.json", ".old"
NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
CHUNK = 1 << 24  # bytes hashed and written at a time


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def complete(run: Path) -> list[Path]:
    """Saves of a run folder, damaged ones too, newest first; a *.tmp folder is a save that never ended."""
    return sorted(run.glob("checkpoints/step_" + "[0-9]" * 8), reverse=True)


def latest(
    run: Path,
    misfit: Callable[[Path], str] = lambda path: "",  # what else is wrong with a save; empty: nothing
    before: Path | None = None,  # only saves older than this one
) -> Path | None:
    """The newest save that `damage` and `misfit` find nothing wrong with; names every newer one refused."""
    for path in complete(run):
        if before is None or path < before:
            bad = damage(path) or misfit(path)
            if not bad:
                return path
            refuse(path, bad)
    return None


def refuse(path: Path, bad: str) -> None:
    log.warning("%s refused: %s; going back to the save before it", path, bad)


def damage(path: Path) -> str:
    """What is wrong with a save, empty if nothing."""
    if not (path / MANIFEST).is_file():
        return f"{MANIFEST} is missing"
    name = MANIFEST  # of the file that an error below is about
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        for name in (STATE, "config.json", "model.safetensors", "optim.safetensors", *files):
            if name not in files:
                return f"{MANIFEST} does not name {name}"
            if not name or os.path.basename(name) != name:
                return f"{MANIFEST} names {name!r}, which is no file of the folder"
            entry = files[name]
            if not (path / name).is_file():
                return f"{name!r} is missing" if not name.isprintable() else f"{name} is missing"
            size = (path / name).stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes, its manifest says {str(entry['bytes'])[:50]!r}"
            if sha256(path / name) != entry["sha256"]:
                return f"{name} was changed after it was written (SHA-256 differs)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        return f"{name if isinstance(e, OSError) else MANIFEST} cannot be read ({e!r})"
    return misstated(path) or unreadable(path)


def misstated(path: Path) -> str:
    """What is wrong with a save's state.json."""
    try:
        state = json.loads((path / STATE).read_text())
    except (ValueError, RecursionError) as e:
        return f"{STATE} cannot be read ({e!r})"
    if not isinstance(state, dict):
        return f"{STATE} is no JSON object"
    step, data = state.get("step"), state.get("data")
    if type(step) is not int or step != step_of(path):
        return f"{STATE} is of step {str(step)[:50]!r}, the folder of step {step_of(path)}"
    if type(state.get("tokens")) is not int or state["tokens"] < 0:
        return f"{STATE} has no number of tokens"
    if not isinstance(state.get("stream"), str) or not isinstance(state.get("config"), dict):
        return f"{STATE} has no hash of the tokens, or no settings"
    if "data" not in state or not isinstance(data, dict | None):
        return f"{STATE} has no position in the data"
    spike = state.get("spike", {})
    if (
        not isinstance(spike, dict)
        or not all(
            isinstance(spike.get(key, empty), type(empty)) for key, empty in (("losses", []), ("high", 0))
        )
        or not all(isinstance(x, int | float | None) for x in spike.get("losses", []))
    ):
        return f"{STATE} has no history of losses"
    return ""


def unreadable(path: Path) -> str:
    """Which file of tensors has a header that the format does not allow."""
    for name in ("model.safetensors", "optim.safetensors"):
        try:
            with safe_open(path / name, framework="pt"):
                pass
        except (SafetensorError, OSError, ValueError) as e:
            return f"{name} cannot be read as safetensors ({e})"
    return ""


def write(
    run: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],  # file -> name -> tensor, on any device
    texts: Mapping[str, str],  # file -> content
    *,
    keep_last: int,
) -> Path:
    """Writes one save and removes all but the newest `keep_last`; OSError leaves the older ones as they were.

    One pass: what is written is hashed on its way, and a tensor on a device is copied when its turn comes.
    """
    final = folder(run, step)
    tmp = final.with_name(final.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    contents = {name: safetensors(some) for name, some in tensors.items()}
    contents |= {name: iter([memoryview(text.encode())]) for name, text in texts.items()}
    files = {name: write_file(tmp / name, content) for name, content in contents.items()}
    write_file(tmp / MANIFEST, iter([memoryview(json.dumps({"files": files}, indent=1).encode())]))
    sync(tmp)
    before = final.with_name(final.name + OLD)
    if final.exists():  # the same step saved again: until the new one has its name the old one can be had
        shutil.rmtree(before, ignore_errors=True)
        os.rename(final, before)
    os.rename(tmp, final)
    sync(final.parent)
    shutil.rmtree(before, ignore_errors=True)
    # Newer ones than this were refused, or the run would not be here: they do not count.
    for old in [path for path in complete(run) if path <= final][keep_last:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def tidy(run: Path) -> None:
    """What a killed process left: unfinished saves go, and between two renames the old save gets its name
    back. Only who holds the run's lock may do that."""
    for left in run.glob("checkpoints/step_*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    for before in run.glob(f"checkpoints/step_*{OLD}"):
        final = before.with_name(before.name.removesuffix(OLD))
        shutil.rmtree(before) if final.exists() else os.rename(before, final)


def write_file(path: Path, content: Iterator[memoryview]) -> dict[str, Any]:
    """On disk when this returns: {"bytes": its size, "sha256": of what was meant to be written}."""
    size, digest = 0, hashlib.sha256()
    with open(path, "wb", buffering=0) as f:
        for part in content:
            for at in range(0, len(part), CHUNK):
                piece = part[at : at + CHUNK]
                digest.update(piece)
                size += len(piece)
                while len(piece):
                    piece = piece[f.write(piece) :]
        os.fsync(f.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def safetensors(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The format's bytes, tensor by tensor: the library's own writer first makes a copy of all of them.

    8 bytes: length of the header; the header, JSON padded with spaces to 8; the data without gaps, wide
    dtypes first so that each tensor is aligned.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        t = tensors[name]
        size = t.numel() * t.itemsize
        header[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in order:
        yield raw(tensors[name].detach().cpu())


def raw(t: Tensor) -> memoryview:
    """The bytes of a CPU tensor, without a copy if it is contiguous."""
    return memoryview(t.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def weights(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Its state_dict(). What is made for it, weights put together from parts, goes to host memory a few
    layers at a time: a card that holds the parts need not have room for all of them."""
    found = dict[str, Tensor]()
    if any(True for child in module.children() for _ in child.children()):
        module._save_to_state_dict(found, prefix, keep_vars=False)
        for name, child in module.named_children():
            found |= weights(child, f"{prefix}{name}.")
        return found
    own = {p.data_ptr() for p in module.parameters()}
    state = module.state_dict(prefix=prefix)
    return {name: t if t.data_ptr() in own else t.cpu() for name, t in state.items()}


def size_of(tensors: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Bytes of all of them."""
    return sum(t.numel() * t.itemsize for some in tensors.values() for t in some.values())


def free(path: Path) -> float:
    """Bytes that may be written where `path` will be; inf where nobody can tell."""
    for place in (path, *path.parents):
        try:
            return shutil.disk_usage(place).free
        except FileNotFoundError:
            continue
        except OSError:
            break
    return math.inf


def read_state(path: Path) -> dict[str, Any]:
    return json.loads((path / STATE).read_text())


def load_optim(path: Path) -> dict[str, dict[str, Tensor]]:
    """{parameter name: {state name: tensor}} of a save, on the CPU: a device holds no second copy."""
    state: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(path / "optim.safetensors").items():
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
