"""The difference of two models' weights as a LoRA adapter (Hu et al. 2021) that PEFT loads.

Command: python -m llama.extract BASE TRAINED RANK OUT

BASE and TRAINED are runs (their newest save), saves or model folders of one shape. For each matrix in a block
the adapter B A, of rank RANK, is the best one in the Frobenius norm, from the SVD of the difference D:

    D = U S V^T;   B = U_r S_r^(1/2) (out, r),   A = S_r^(1/2) V_r^T (r, in),   BASE + B A ~ TRAINED

OUT gets adapter_config.json and adapter_model.safetensors, fp32, and appears complete or not at all. Printed
for each matrix: ||D||, and ||D - B A|| / ||D|| of what was written; embeddings, head and gains that differ
have no adapter, and are said too.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from .pretrained import FolderError, load_config, model_folder, open_file, stored_tensors, weight_files

USAGE = "usage: python -m llama.extract BASE TRAINED RANK OUT"
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Kept(NamedTuple):
    """What an adapter keeps of one weight's difference D."""

    name: str
    size: float  # ||D||
    lost: float  # ||D - B A||; ||D|| of a weight without an adapter

    @property
    def error(self) -> float:
        return self.lost / self.size if self.size else 0.0

    @property
    def matrix(self) -> bool:
        return is_matrix(self.name)


def is_matrix(name: str) -> bool:
    return name.removesuffix(".weight").endswith(MATRICES)


def factors(d: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B (out, rank) and A (rank, in) of d (out, in): B A is the nearest of this rank, the lengths of B's
    columns are those of A's rows."""
    u, s, vt = torch.linalg.svd(d, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def adapter(
    base: Path, trained: Path, rank: int, told: Callable[[Kept], None] = lambda kept: None
) -> tuple[dict[str, Tensor], list[Kept]]:
    """PEFT's names with their tensors, fp32 on the CPU, and what is kept of every weight that differs.

    base, trained: model folders. One pair of weights is read at a time. `told` hears of each."""
    one, two = (stored_tensors(weight_files(folder)) for folder in (base, trained))
    if load_config(base) != load_config(trained) or one.keys() ^ two.keys():
        raise FolderError(f"{trained}: a model of other shapes than {base}; an adapter needs the same")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, Tensor] = {}
    every: list[Kept] = []
    for name in one:
        a, b = (read(stored[name][0], name).to(device, torch.float64) for stored in (one, two))
        if a.shape != b.shape:
            raise FolderError(f"{trained}: {name} is {tuple(b.shape)}, in {base} {tuple(a.shape)}")
        d = b - a
        if not d.isfinite().all():
            raise FolderError(f"{trained}: {name} minus {base}'s is not finite")
        size = lost = torch.linalg.vector_norm(d).item()
        if is_matrix(name):
            path = name.removesuffix(".weight")
            if rank > min(d.shape):
                raise FolderError(f"rank {rank}: above the width of {name}, {min(d.shape)}; give less")
            left, right = (x.float() for x in factors(d.float(), rank))
            found[f"base_model.model.{path}.lora_A.weight"] = right.cpu().contiguous()
            found[f"base_model.model.{path}.lora_B.weight"] = left.cpu().contiguous()
            lost = torch.linalg.vector_norm(d - left.double() @ right.double()).item()
        if size or is_matrix(name):
            every.append(Kept(name, size, lost))
            told(every[-1])
    if not found:
        raise FolderError(f"{base}: no matrix called {', '.join(MATRICES)} there")
    return found, every


def read(file: Path, name: str) -> Tensor:
    with open_file(file) as stored:
        return stored.get_tensor(name)


def config(base: Path, rank: int) -> dict[str, object]:
    """PEFT's LoraConfig: with lora_alpha = r the adapter is B A itself."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": list(MATRICES),
    }


def whole(kept: list[Kept]) -> Kept:
    """All of them as one."""
    size, lost = (sum(x * x for x in xs) ** 0.5 for xs in zip(*((k.size, k.lost) for k in kept), strict=True))
    return Kept("", size, lost)


def line(kept: Kept) -> str:
    return f"{kept.name:<55} {kept.size:>10.4g} {kept.error:>7.1%}"


def write(base: Path, trained: Path, rank: int, out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FolderError(f"{out}: exists and is not empty; give another folder or remove it")
    print(f"{'weight':<55} {'change':>10} {'error':>7}")
    tensors, every = adapter(base, trained, rank, lambda kept: print(line(kept), flush=True))
    aside = out.with_name(out.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        save_file(tensors, aside / "adapter_model.safetensors", metadata={"format": "pt"})
        text = json.dumps(config(base, rank), indent=2) + "\n"
        (aside / "adapter_config.json").write_text(text, encoding="utf-8")
        if out.is_dir():
            out.rmdir()
        aside.rename(out)
    except OSError as e:
        raise FolderError(f"{out}: cannot be written ({e.strerror or e}); give another folder") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    inside = [k for k in every if k.matrix]
    print(line(whole(inside)._replace(name=f"the {len(inside)} matrices together")))
    if len(inside) < len(every):
        print(line(whole(every)._replace(name="and with what has no adapter")))
    print(f"done: {out}")


def main(argv: list[str] | None = None) -> int:
    args = sys.argv[1:] if argv is None else argv
    try:
        if len(args) != 4 or not args[2].isdecimal() or not int(args[2]):
            raise FolderError(USAGE)
        base, trained, rank, out = model_folder(args[0]), model_folder(args[1]), int(args[2]), Path(args[3])
        write(base, trained, rank, out)
    except FolderError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
