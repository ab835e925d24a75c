"""Optimizers. `attach` is the whole interface; `Comm` and `factor` serve the training loop."""

from .attach import attach
from .comm import Comm
from .schedule import factor

__all__ = ["Comm", "attach", "factor"]
