"""Losses that are out of line with those before: the batch is skipped, or the run goes back.

A step's loss is high if it is not finite, or above the mean of the last 16 accepted losses by six standard
deviations, and by 0.1 nats at least. The deviation is that of single losses about the curve, from the
differences of neighbours among the last 128 (von Neumann: half their mean square), so that a curve that falls
does not hide a spike. Fewer than 32 losses judge nothing; high ones do not enter.

    skip     a step whose own loss is high changes nothing: its loss is multiplied by nan before the last
             backward, and the optimizer leaves out what is not finite. Nothing waits for the device. Not
             more than three in a row: what lasts is not the batch's.
    rewind   three high losses in a row: back to the newest save from before them, on with the data after
             them. For damage that an update has done already.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

WINDOW, RECENT, LEAST, SIGMAS, MARGIN = 128, 16, 32, 6.0, 0.1
IN_A_ROW = 3  # high losses that make a run go back; batches that are skipped one after the other
CHECK_EVERY = 16  # steps between two looks at the losses, so that a run and its repetition look alike


class Skip:
    """Decides on the device, before a step's last backward."""

    def __init__(self, state: Mapping[str, Any], device: torch.device) -> None:
        """state: of an earlier one, or empty."""
        kept = [math.nan] * WINDOW + [float(x) for x in state.get("losses", [])]
        self.ring = torch.tensor(kept[-WINDOW:], dtype=torch.float64, device=device)  # nan: not filled yet
        self.high = torch.tensor(state.get("high", 0), device=device)  # losses in a row

    def factor(self, loss: Tensor) -> Tensor:
        """1, or nan where the step's loss (0-dim, over all micro-batches and ranks) is high; notes it."""
        loss = loss.detach().double()
        deviation = (self.ring.diff().square().nanmean() / 2).sqrt()
        limit = self.ring[-RECENT:].mean() + (SIGMAS * deviation).clamp(min=MARGIN)
        full = self.ring.isfinite().sum() >= LEAST
        high = ~loss.isfinite() | full & (loss > limit)
        fine = loss.isfinite() & (~high | (self.high >= IN_A_ROW))
        self.high.copy_(torch.where(high, self.high + 1, 0))  # in place: a captured step replays it
        self.ring.copy_(torch.where(fine, torch.cat([self.ring[1:], loss[None]]), self.ring))
        return torch.where(fine, 1.0, math.nan)

    def state(self) -> dict[str, Any]:
        losses = [x for x in self.ring.tolist() if math.isfinite(x)]
        return {"losses": losses, "high": int(self.high)}


class Rewind:
    """Decides on the host, from the rows of metrics.jsonl."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        """state: of an earlier one, or empty."""
        self.losses = deque(state.get("losses", []), WINDOW)
        self.high = state.get("high", 0)  # losses in a row
        self.first = state.get("first", 0)  # step of the first of them

    def note(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Rows of training steps, in order. Once found, it stays found."""
        for row in rows:
            loss = row["loss"]
            stuck = row.get("skipped_in_a_row", 0) >= IN_A_ROW  # a finite loss with gradients that are not
            if not self.found and not stuck and not self._is_high(loss):
                self.losses.append(loss)
                self.high = 0
                continue
            self.first = self.first if self.high else row["step"]
            self.high += 1

    @property
    def found(self) -> bool:
        return self.high >= IN_A_ROW

    def _is_high(self, loss: float | None) -> bool:
        if loss is None:
            return True
        x = list(self.losses)
        if len(x) < LEAST:
            return False
        deviation = math.sqrt(sum((b - a) ** 2 for a, b in itertools.pairwise(x)) / (len(x) - 1) / 2)
        return loss > sum(x[-RECENT:]) / RECENT + max(SIGMAS * deviation, MARGIN)

    def state(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "high": self.high, "first": self.first}
