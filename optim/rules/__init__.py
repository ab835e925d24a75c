"""Update rules: a gradient, or its coordinates in a basis, in; a direction out. No names, hooks or ranks.

A rule is a class with the names of its moments and `direction`; it holds hyper-parameters only. What it
remembers lives in named tensors that the engine keeps, in whatever store was asked for (fp32, bf16, 8-bit).
"""

from .rule import Rule

__all__ = ["Rule"]
