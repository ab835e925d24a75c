"""The one hook on the model itself: it counts forwards, and sees when the whole model is traced."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from .engine import Engine


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

    def __init__(self, engine: Engine) -> None:
        self.engine, self.whole = engine, False

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            self.whole = True  # dynamo replays the write
        elif torch.is_grad_enabled():
            self.engine.forward_begins()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Nothing, ()
