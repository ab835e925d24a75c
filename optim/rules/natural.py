"""Natural GaLore (Das 2024, arXiv 2410.16029): inverse empirical Fisher of the last s gradients, then Adam.

With h_1 ... h_c the last c <= s gradients in coordinates, as vectors, the newest one g = h_n among them:

    F = lambda I + H H^T,  K = H^T H        g~ = lambda F^-1 g = lambda H w,  (lambda I + K) w = e_n

The paper's Woodbury step g / lambda - H (I + K / lambda)^-1 H^T g / lambda^2 is g~ / lambda, as g is a
column of H, but a difference of large ones: in fp32, at lambda = 1e-5, it is 1.8e-3 off, this form 1e-7.
<g~, g> > 0 for g != 0.

lambda = damping tr(K) / c, where tr(K) / c is the mean square of the norms: an absolute one, 1e-3 in
published code, makes the method GaLore wherever gradients are small. Adam does not see a factor that stays,
as the paper's 1 / lambda would; this lambda follows the norms, and without it in front Adam would be given
gradients of one length: at 60M, lr 0.01 and a damping of 1 perplexity 72.1 instead of 67.5. With large
damping g~ is g: there 0.1 gives 69.9, 1 66.2, 10 63.9, 30 63.8, 100 64.8, GaLore 65.4.
Published code keeps old vectors when the basis is replaced; here they are cleared, or rotated and K computed
anew.

H is stored as the moments are; K is the Gram matrix of what is stored, and positive semidefinite therefore.
This update's g enters its own system before it is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels, moments, subspace
from .adam import Adam
from .rule import Rule, Total, alone


@dataclass(frozen=True)
class Natural(Adam):
    history: int = 4  # vectors kept, s; at least 1
    damping: float = 10.0  # over the mean square of their norms

    label = "nat."

    @property
    def dense(self) -> Rule:
        return Adam(self.beta1, self.beta2, self.eps)

    def begin(
        self, store: str, shape: Sequence[int], device: torch.device, wide: torch.dtype
    ) -> dict[str, Tensor]:
        return {
            **super().begin(store, shape, device, wide),
            **moments.init(store, (self.history, *shape), device, wide, ("history",)),
            "gram": torch.zeros(self.history, self.history, dtype=wide, device=device),  # K
            "slot": torch.zeros(1, dtype=torch.int64, device=device),  # where the next vector goes
            "filled": torch.zeros((), dtype=torch.int64, device=device),  # c
        }

    @subspace.ieee()
    def steps_(
        self,
        gs: list[Tensor],
        states: list[dict[str, Tensor]],
        hs: list[Tensor],
        dtype: torch.dtype,
        totals: list[Total],
    ) -> Iterator[Tensor]:
        """Each clipped g is pushed and its g~ goes through Adam; where g is not finite the state stays."""
        dots = kernels.natural_dots_(gs, states, hs)
        if any(total is not alone for total in totals):
            dots = torch.stack([total(d) for total, d in zip(totals, dots.sum(1), strict=True)])[:, None]
        weights = kernels.natural_weights_(dots, states, hs, self.damping)
        adam = (self.beta1, self.beta2, self.eps, dtype)
        each = zip(gs, states, *weights, hs, strict=True)
        direction = subspace.ieee()(kernels.natural_direction_)  # when it is asked for, too
        return (direction(*x, *adam) for x in each)

    def step_(self, g: Tensor, state: dict[str, Tensor], h: Tensor, dtype: torch.dtype) -> Tensor:
        return next(self.steps_([g], [state], [h], dtype, [alone]))

    @subspace.ieee()
    def moved_(self, state: dict[str, Tensor], rotated: bool, total: Total = alone) -> None:
        gram = state["gram"]
        if rotated:
            past = moments.load(state, "history", gram.dtype).flatten(1)
            gram.copy_(total(past @ past.t()))
        else:
            for name in ("history", "gram", "slot", "filled"):
                state[name].zero_()
