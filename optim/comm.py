"""Who runs beside us: launcher detection, one process group, the few collectives a run needs; which rows of a
weight are here.

Every operation is a no-op when the process is alone, so no caller asks whether it is distributed. Collectives
on gradients are launched by the engine, in one fixed order on all ranks; the ones here carry single numbers.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Elsewhere(RuntimeError):
    """Another rank failed; it prints the reason, this one only ends."""


@dataclass
class Comm:
    """rank and world over all nodes; local_rank within this one; group None when alone."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")
    group: dist.ProcessGroup | None = None  # NCCL on GPUs, gloo on CPUs: tensors
    control: dist.ProcessGroup | None = None  # gloo: numbers that the host reads, so no GPU is waited for

    @classmethod
    def from_env(cls) -> Comm:
        """torchrun first, then SLURM's srun, else alone; ValueError where its variables disagree."""
        rank, world, local_rank = launcher(os.environ)
        cuda = torch.cuda.is_available()
        if cuda and local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {local_rank}: this machine shows {torch.cuda.device_count()} GPU(s); "
                "start one process a GPU"
            )
        device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        if world == 1:
            return cls(device=device)
        limit = timedelta(minutes=30)  # the first rank may train a tokenizer while the others wait
        dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=world, timeout=limit)
        control = dist.new_group(backend="gloo", timeout=limit) if cuda else dist.group.WORLD
        return cls(rank, world, local_rank, device, dist.group.WORLD, control)

    def sums(self, *values: int) -> list[int]:
        """Each host number summed over ranks."""
        if self.group is None:
            return [int(v) for v in values]
        t = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(t, group=self.control)
        return t.tolist()

    def sum_(self, t: torch.Tensor) -> torch.Tensor:
        """Sum of a device tensor over ranks, in place."""
        if self.group is not None:
            dist.all_reduce(t, group=self.group)
        return t

    def first(self, make: Callable[[], Any]) -> Any:
        """make() on rank 0, its (picklable) result everywhere; where it fails the others raise Elsewhere."""
        if self.group is None:
            return make()
        result, error = None, None
        if self.rank == 0:
            try:
                result = make()
            except Exception as e:  # the others are waiting: they must be told first
                error = e
        self.together(error)
        box = [result]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def node_first(self, make: Callable[[], Any]) -> Any:
        """make() on every rank, each node's first rank before the others: caches are filled once a node."""
        if self.group is None:
            return make()
        result, error = None, None
        for turn in (True, False):
            if (self.local_rank == 0) == turn:
                try:
                    result = make()
                except Exception as e:  # as above
                    error = e
            self.together(error)
        return result

    def together(self, error: Exception | None) -> None:
        """Where any rank failed, every rank raises: that one its error, the others Elsewhere."""
        if self.sums(error is not None)[0]:
            raise error or Elsewhere("another rank failed and says why")

    def close(self) -> None:
        if self.group is not None:
            dist.destroy_process_group()


def launcher(env: Any) -> tuple[int, int, int]:
    """(rank, world, local rank) from torchrun's or SLURM's variables.

    Under SLURM sets MASTER_ADDR and MASTER_PORT.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    if int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in env:
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "localhost")
        env.setdefault("MASTER_ADDR", first_host(nodes))
        env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", 0)) % 20000))
        return int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env.get("SLURM_LOCALID", 0))
    return 0, 1, 0


def first_host(nodes: str) -> str:
    """First name of a SLURM node list: "gpu[03-05,9],x1" -> "gpu03"."""
    found = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodes)
    if not found:
        raise ValueError(f"SLURM node list {nodes!r}: cannot read its first host; set MASTER_ADDR")
    return found.group(1) + (found.group(2) or "")


def sharded(w: Tensor) -> TypeGuard[DTensor]:
    """Whether w is a DTensor (FSDP2). They take a second to import: who has not, has none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(w, module.DTensor)


def local(w: Tensor) -> Tensor:
    """The rows of a weight on this rank: all of them unless it is sharded."""
    return w.to_local() if sharded(w) else w
