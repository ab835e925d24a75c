"""LLaMA: model, loss, folders, evaluation, generation. Never imports `optim`."""

from importlib import import_module
from typing import TYPE_CHECKING

if (
    TYPE_CHECKING or "." not in __name__
):  # a clone; once installed it is subspan.kernels (see optim/__init__.py)
    import kernels
else:
    kernels = import_module("..kernels", __name__)

__all__ = ["kernels"]
