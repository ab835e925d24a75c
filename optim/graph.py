"""A training step as one CUDA graph: K micro-batches with their updates, launched at once.

A step of separate launches keeps the host busy for some 15 microseconds each, thousands a step; a graph's
launches cost nothing. What a replay reads stands at fixed addresses: the batch, the number of its targets, lr
and decay, and everything that the optimizer keeps.

A step in which the bases of a block are replaced runs outside, or is three graphs with the host in between:
up to the gradients that bases are found from; the search, one graph for all blocks, as all leave these in one
place; once the host knows that it went well, the rest. Some 1,500 launches are short ones of the last two:
outside they would take 25 ms, at 1b 8 of them computing. All lie in one memory, idle between replays.
Graphs end where the optimizer replaces tensors (Engine.version); the next steps capture others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import kernels, subspace
from .engine import Engine

log = logging.getLogger("subspan")
EAGER = 2  # steps before a capture, of this process and after tensors were replaced: they make what lasts
REST = 4  # passes that have as many launches as what follows a search
PASSES = 30  # blocks times micro-batches in all graphs, a GB: some 100 launches each, 10 kB a launch


def most_passes(device: torch.device) -> float:
    """Blocks times micro-batches that the graphs may hold, so that they take some 3% of the memory that
    this process may use: 720 on a card of 24 GB, 4,500 on an H200. A CPU holds as many as the former."""
    if device.type != "cuda":
        return 24 * PASSES
    share = torch.cuda.get_per_process_memory_fraction(device)
    return PASSES * share * torch.cuda.get_device_properties(device).total_memory / 1e9


@dataclass
class Graph:
    graph: torch.cuda.CUDAGraph
    written: dict[str, Tensor]  # by a replay: loss and statistics
    held: Any = field(default_factory=dict)  # Engine.held after it
    kept: list[Tensor] = field(default_factory=list)  # that it reads, and nobody else holds


@dataclass
class Search:
    graph: torch.cuda.CUDAGraph
    olds: list[Tensor]  # bases to be replaced, that it reads
    made: list[subspace.Attempt]  # by a replay


@dataclass
class Rest:
    graph: torch.cuda.CUDAGraph
    stats: dict[str, Tensor | float]  # by a replay, as are overlaps
    overlaps: list[Tensor]
    kept: list[Tensor]


class Steps:
    """Runs steps, as a graph where that is `wanted` and possible, else one operation after the other."""

    def __init__(self, opt: Engine, wanted: bool, passes: int = 1) -> None:
        """passes: through blocks in a step."""
        most = most_passes(opt.scalars.table.device)
        self.opt, self.wanted = opt, wanted and passes <= most
        self.refreshes = (passes + REST) * (1 + opt.turns) <= most
        self.version = opt.version  # that graphs belong to
        # Kinds of steps since then. A capture takes as long as a step and saves a fifth of it: steps with a
        # refresh are captured when they come again, which they do not where ranks change round by round.
        self.seen: set[int | None] = set()
        self.graphs: dict[int, Graph] = {}  # by Engine.kind
        self.searches: dict[Any, Search] = {}  # by shapes of bases, and where their gradients are
        self.rests: dict[int, Rest] = {}  # by Engine.kind
        self.searched = True  # as far as is known a search can be captured
        self.wait = EAGER  # steps until one may be captured
        self.static: list[Tensor] = []  # where they leave whole gradients
        self.pool: Any = None

    def run(self, work: Callable[[], Tensor]) -> dict[str, Tensor | float]:
        """One step: work() goes forward and backward through every micro-batch and returns the loss.

        Returns loss and statistics: numbers, and device scalars that no later step overwrites."""
        opt = self.opt
        if self.version != opt.version:
            self.drop()
            self.wait = EAGER
        kind = opt.kind
        again = kind in self.seen
        self.seen.add(kind)
        if not self.wanted or self.wait or kind is None or kind >= 0 and not (self.refreshes and again):
            return self._outside(work)
        opt.load_rates()
        fresh = kind not in self.graphs
        if fresh and not self._capture(kind, work):
            return self._outside(work)
        graph = self.graphs[kind]
        graph.graph.replay()
        loss = graph.written["loss"].clone()
        if kind >= 0:
            if not fresh:
                opt.held = graph.held
            if self._search():
                self._rest(kind)
            else:
                opt.conclude()
        else:
            opt.stats = {k: v.clone() for k, v in graph.written.items() if k != "loss"}
        return self._end(loss)

    def drop(self) -> None:
        """Gives the graphs and their memory back."""
        self.graphs, self.searches, self.rests, self.static, self.pool = {}, {}, {}, [], None
        self.version, self.seen = self.opt.version, set()

    def _outside(self, work: Callable[[], Tensor]) -> dict[str, Tensor | float]:
        self.wait = max(0, self.wait - 1)
        with self.memory():
            loss = work()
        loss = loss.clone()  # out of the graphs' memory
        self.opt.collect()
        self.opt.conclude()
        return self._end(loss)

    def _end(self, loss: Tensor) -> dict[str, Tensor | float]:
        self.opt.advance()
        self.opt.zero_grad()
        return {"loss": loss, **self.opt.stats}

    def _capture(self, kind: int, work: Callable[[], Tensor]) -> bool:
        """Nothing is computed in it, but the optimizer has counted the step: a replay must follow."""
        graph, opt = torch.cuda.CUDAGraph(), self.opt
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        kernels.kept.clear()
        try:
            with self._recorded(graph):
                written = {"loss": work()}
                opt.collect()
                if kind >= 0:
                    opt.held = self._left(opt.held)
                else:
                    opt.conclude()
                    written |= {k: v for k, v in opt.stats.items() if isinstance(v, Tensor)}
        except (RuntimeError, torch.OutOfMemoryError) as e:
            reason = (str(e).splitlines() or [type(e).__name__])[0]
            log.warning("steps run without a CUDA graph, which cannot be captured: %s", reason)
            self.wanted = False
            opt.zero_grad()
            self.drop()
            return False
        self.graphs[kind] = Graph(graph, written, dict(opt.held), list(kernels.kept))
        return True

    def _recorded(self, graph: torch.cuda.CUDAGraph) -> AbstractContextManager[None]:
        # relaxed: other threads load data and write saves meanwhile
        return torch.cuda.graph(graph, self.pool, torch.cuda.current_stream(), capture_error_mode="relaxed")

    def _search(self) -> bool:
        """Bases for all that wait, if the host has no part in it; whether all are good."""
        refresher = self.opt.refresher
        waiting = refresher.waiting()
        if not self.searched or not refresher.plain([b for b, _ in waiting]):
            return False
        key = tuple((b.side, b.used.shape, *((g.data_ptr(), g.shape) for g in gs)) for b, gs in waiting)
        if key not in self.searches:
            graph, olds = torch.cuda.CUDAGraph(), [b.used.clone() for b, _ in waiting]
            looks = [partial(refresher.attempt, *x, old) for x, old in zip(waiting, olds, strict=True)]
            try:
                with self._recorded(graph):
                    made = self._at_once(looks)
            except RuntimeError as e:
                log.warning("bases are found without a CUDA graph: %s", str(e).splitlines()[0])
                self.searched = False
                return False
            self.searches[key] = Search(graph, olds, made)
        search = self.searches[key]
        for (b, _), old in zip(waiting, search.olds, strict=True):
            old.copy_(b.used)
        with refresher.timed(self.opt.scalars.table.device):
            search.graph.replay()
        found = {b.index: m for (b, _), m in zip(waiting, search.made, strict=True)}
        if all(subspace.judged(m)[1] for m in found.values()):
            refresher.found = {n: subspace.Found(m.q, m.q.shape[1], subspace.FOUND) for n, m in found.items()}
        return bool(refresher.found)

    def _rest(self, kind: int) -> None:
        """Engine.conclude with bases that were found."""
        opt, refresher = self.opt, self.opt.refresher
        for b, _ in refresher.waiting():
            b.draw_(refresher.seed, b.count + 1)
        fresh = kind not in self.rests
        if fresh:
            graph = torch.cuda.CUDAGraph()
            kernels.kept.clear()
            with self._recorded(graph):
                opt.conclude()
            self.rests[kind] = Rest(graph, opt.stats, refresher.overlaps, list(kernels.kept))
        rest = self.rests[kind]
        rest.graph.replay()
        stats = {k: v.clone() if isinstance(v, Tensor) else v for k, v in rest.stats.items()}
        if fresh:
            opt.stats = stats
        else:
            opt.concluded(stats, rest.overlaps)

    def _at_once(self, works: Sequence[Callable[[], Any]]) -> list[Any]:
        """What each returns, run beside each other on a GPU: short launches fill a small part of it."""
        if self.opt.scalars.table.device.type != "cuda":
            return [work() for work in works]
        main, out = torch.cuda.current_stream(), []
        streams = [torch.cuda.Stream() for _ in works]
        for stream, work in zip(streams, works, strict=True):
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                out.append(work())
        for stream in streams:
            main.wait_stream(stream)
        return out

    def _left(self, held: Any) -> Any:
        """Whole gradients where every graph leaves them: blocks are alike, and theirs are big."""
        at, out = iter(range(len(self.static) + 2 * len(held))), {}

        def leave(t: Tensor) -> Tensor:
            n = next(at)
            if n == len(self.static):
                self.static.append(torch.empty_like(t))
            elif self.static[n].shape != t.shape:
                return t
            return self.static[n].copy_(t)

        for index, (u, g, s) in held.items():
            out[index] = (u, leave(g), None if s is None else leave(s))
        return out

    @contextmanager
    def memory(self) -> Iterator[None]:
        """What is allocated inside lies in the graphs' memory, and must not be needed after the next step."""
        if not self.graphs:
            yield
            return
        device, pool = torch.cuda.current_device(), self.pool

        def begin() -> None:
            torch._C._cuda_beginAllocateCurrentStreamToPool(device, pool)

        def end() -> None:
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)

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
