"""What others do to the model between our hooks: forwards, a trace of it whole, changed gradients."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .engine import Engine
    from .unit import Unit


WHOLE = (
    "the whole model was compiled: its backward hands out all gradients at its end, and each refreshed layer "
    "compiles it anew; compile the blocks one by one instead (for block in model.layers: block.compile())"
)
TOUCHED = (
    "gradients were changed between backward and step(), perhaps by clip_grad_norm_ (transformers.Trainer: "
    "max_grad_norm). That reaches embeddings, head and gains only: projected weights have no .grad. Set "
    "max_grad_norm=0 there and use optim.clip, which clips all of them"
)


class _Nothing:
    def __call__(self, module: nn.Module, args: Any) -> None:
        pass


class Watch:
    """Forward pre-hook of the model: counts forwards, and sees when the whole model is being traced.

    Copies and pickles of the model get one that does nothing.
    """

    def __init__(self, engine: Engine, dense: list[Unit]) -> None:
        """dense: among them is the gradient that is watched."""
        self.engine, self.whole, self.warned = engine, False, False
        # What somebody does to gradients between backward and step() shows in the smallest; with no bases it
        # is their affair.
        any_basis = engine.bases or engine.grouped
        mine = [u for u in dense if any_basis and not u.projected and not u.adapter]
        self.smallest = min(mine, key=lambda u: u.param.numel(), default=None)
        self.copy: tuple[int, Tensor] | None = None  # version and numbers of its gradient

    def seen(self, u: Unit, grad: Tensor) -> None:
        """A gradient is complete."""
        if u is self.smallest:
            self.copy = grad._version, grad.detach().clone()

    def taken(self, u: Unit, grad: Tensor) -> None:
        """It is used now: warns, once, if it is another."""
        if u is self.smallest and self.copy is not None:
            (version, before), self.copy = self.copy, None
            if not self.warned and grad._version != version and not torch.equal(before, grad):
                warnings.warn(TOUCHED, stacklevel=5)
                self.warned = True

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            self.whole = True  # dynamo replays the write
        elif torch.is_grad_enabled():
            self.engine.forward_begins()

    def warn(self) -> None:
        """At the end of a step, if the model was traced whole in it."""
        if self.whole:
            self.whole = False
            warnings.warn(WHOLE, stacklevel=3)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Nothing, ()


def missing(e: Engine) -> str:
    """What is wrong at step(), else empty: not every leaf got a gradient from each of its backwards."""
    wanted = e.accum_steps * e.passes
    fired = [[u.fired[i] for i in u.active()] for u in e.units]
    names = [u.name for u, f in zip(e.units, fired, strict=True) if min(f) != wanted]
    if not names:
        return ""
    seen = max(max(f) for f in fired)
    if seen != wanted:
        twice = ", each in two passes (clip_mode=two_pass)" if e.passes == 2 else ""
        return f"step() after {seen} backward(s): accum_steps={e.accum_steps}{twice}"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (
        f"no gradient in every backward for {', '.join(names[:5])}{more}: a parameter that the loss does not "
        "use must be frozen (requires_grad_(False)) before attach"
    )
