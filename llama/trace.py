"""profile=true: three steps under torch's profiler, once caches are warm and blocks compiled."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

log = logging.getLogger("subspan")
WARM, STEPS = 10, 3  # steps before the ones that are recorded; how many


class Trace:
    """Call `begin` before and `end` after each step; a run without profile has folder None."""

    def __init__(self, folder: Path | None, start: int, steps: int) -> None:
        """Of a run that goes from step start + 1 to step `steps`."""
        self.folder = folder
        self.first = start + min(WARM, max(0, steps - start - STEPS)) + 1
        self.last = min(self.first + STEPS - 1, steps)
        self._profile: profile | None = None

    def begin(self, step: int) -> None:
        if self.folder is not None and step == self.first:
            kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profile = profile(activities=kinds)
            self._profile.start()

    def end(self, step: int) -> None:
        if self._profile is None or step != self.last or self.folder is None:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._profile.stop()
        self._profile.export_chrome_trace(str(self.folder / "trace.json.gz"))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = self._profile.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=60)
        (self.folder / "profile.txt").write_text(table + "\n", encoding="utf-8")
        self._profile = None
        log.info(
            "profile   steps %d to %d in %s: trace.json.gz (for ui.perfetto.dev), profile.txt",
            *(self.first, self.last, self.folder),
        )
