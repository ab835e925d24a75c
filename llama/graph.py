"""A training step as one CUDA graph: K micro-batches with their updates, launched at once.

A step of separate launches keeps the host busy for some 15 microseconds each, thousands a step; a graph's
launches cost nothing. What a replay reads stands at fixed addresses: the batch, the number of its targets, lr
and decay, and everything that the optimizer keeps. Steps in which bases are replaced run outside, with their
activations in the graph's memory, which is idle between replays.

A graph ends where the optimizer replaces tensors (Engine.version); the next ordinary step captures another.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from optim import Engine, kernels

log = logging.getLogger("subspan")
EAGER = 2  # steps before a capture: they compile the model, and make what lasts
MOST = 512  # blocks times micro-batches: beyond it capturing takes longer than it saves, and memory


class Steps:
    """Runs steps, as a graph where that is `wanted` and possible, else one operation after the other."""

    def __init__(self, opt: Engine, wanted: bool) -> None:
        self.opt, self.wanted = opt, wanted
        self.graph: torch.cuda.CUDAGraph | None = None
        self.version = 0  # of the optimizer that the graph belongs to
        self.written: dict[str, Tensor] = {}  # by the graph: loss and statistics
        self.kept: list[Tensor] = []  # that it reads, and nobody else holds
        self.pool: Any = None

    def run(self, work: Callable[[], Tensor]) -> dict[str, Tensor | float]:
        """One step: work() goes forward and backward through every micro-batch and returns the loss.

        Returns loss and statistics: numbers, and device scalars that no later step overwrites."""
        if self.graph is not None and self.version != self.opt.version:
            self.drop()
        if not self.wanted or self.opt.updates < EAGER or not self.opt.ordinary:
            return self._outside(work)
        if self.graph is None and not self._capture(work):
            return self._outside(work)
        assert self.graph is not None
        self.opt.load_rates()
        self.graph.replay()
        values = {k: v.clone() for k, v in self.written.items()}
        loss, self.opt.stats = values.pop("loss"), {**values}
        return self._end(loss)

    def drop(self) -> None:
        """Gives the graph and its memory back."""
        self.graph, self.written, self.kept, self.pool = None, {}, [], None

    def _outside(self, work: Callable[[], Tensor]) -> dict[str, Tensor | float]:
        with self.memory():
            loss = work()
        loss = loss.clone()  # out of the graph's memory
        self.opt.finish()
        return self._end(loss)

    def _end(self, loss: Tensor) -> dict[str, Tensor | float]:
        self.opt.advance()
        self.opt.zero_grad()
        return {"loss": loss, **self.opt.stats}

    def _capture(self, work: Callable[[], Tensor]) -> bool:
        """Nothing is computed in it, but the optimizer has counted the step: a replay must follow."""
        graph, self.pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        kernels.kept.clear()
        try:
            # relaxed: other threads load data and write saves meanwhile
            with torch.cuda.graph(
                graph, self.pool, torch.cuda.current_stream(), capture_error_mode="relaxed"
            ):
                loss = work()
                self.opt.finish()
        except (RuntimeError, torch.OutOfMemoryError) as e:
            reason = (str(e).splitlines() or [type(e).__name__])[0]
            log.warning("steps run without a CUDA graph, which cannot be captured: %s", reason)
            self.wanted = False
            self.opt.zero_grad()
            self.drop()
            return False
        stats = {k: v for k, v in self.opt.stats.items() if isinstance(v, Tensor)}
        self.graph, self.version, self.written = graph, self.opt.version, {"loss": loss, **stats}
        self.kept = list(kernels.kept)
        return True

    @contextmanager
    def memory(self) -> Iterator[None]:
        """What is allocated inside lies in the graph's memory, and must not be needed after the next step."""
        if self.graph is None:
            yield
            return
        device = torch.cuda.current_device()

        def begin() -> None:
            torch._C._cuda_beginAllocateCurrentStreamToPool(device, self.pool)

        def end() -> None:
            torch._C._cuda_endAllocateToPool(device, self.pool)
            torch._C._cuda_releasePool(device, self.pool)

        @contextmanager
        def aside() -> Iterator[None]:  # in backward: what the optimizer makes may last
            end()
            try:
                yield
            finally:
                begin()

        begin()
        self.opt.aside = aside
        try:
            yield
        finally:
            self.opt.aside = nullcontext
            end()


def use_own_stream() -> None:
    """The default stream cannot be captured, and backward uses the stream on which a leaf was made."""
    if torch.cuda.current_stream() == torch.cuda.default_stream():
        torch.cuda.set_stream(torch.cuda.Stream())
