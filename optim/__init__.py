"""Optimizers. `attach` is the whole interface; `Comm` and `factor` serve the training loop."""

from importlib import import_module
from typing import TYPE_CHECKING

# The kernels are a top-level package in a clone and `subspan.kernels` once installed. Modules here import
# them as `from . import kernels`, which works in both. Hugging Face has a package `kernels` too, hence no try
# and except.
if TYPE_CHECKING or "." not in __name__:
    import kernels
else:
    kernels = import_module("..kernels", __name__)

from .attach import attach
from .comm import Comm, Elsewhere, launcher
from .config import Velora
from .graph import Steps, use_own_stream
from .schedule import factor

__all__ = [
    "Comm", "Elsewhere", "Steps", "Velora", "attach", "factor", "kernels", "launcher", "use_own_stream"
]  # fmt: skip
