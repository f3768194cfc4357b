"""Consistency distillation: adjacent stored states have the same x_0."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from trainer.cast import Cast
from trainer.objectives import told
from trainer.objectives.distances import Distance
from trainer.objectives.stored import drawn
from trainer.objectives.weights import Weighting
from trainer.stream import Batch


@dataclass(frozen=True)
class Consistency:
    """E w(t_n) d( f(x_n, t_n), sg f_target(x_n+1, t_n+1) ), f(x, t) = G(x, t, 0), state n+1 one step nearer to data.

    Of each sample one pair of neighbours, all equally likely; f is the identity at t = 0, so that the last pair's
    target is the stored output. times, columns: of all stored states. Song et al. 2023, algorithm 2, with the solver's
    step stored.
    """

    times: tuple[float, ...]
    columns: tuple[str, ...]
    distance: Distance
    weighting: Weighting
    num_uniforms: int = 1

    @cached_property
    def _neighbours(self) -> Tensor:
        """All (n, n + 1)."""
        return torch.arange(len(self.times)).unfold(0, 2, 1)

    def __call__(self, cast: Cast, batch: Batch) -> Tensor:
        assert cast.target is not None
        (x_t, x_s), (t, s) = drawn(batch, self.columns, self.times, self._neighbours, batch.uniforms[:, 0])
        labels, guidance = told(cast.student, batch)
        zero = torch.zeros_like(t)
        guess = cast.student.jump(x_t, t, zero, labels, guidance=guidance)
        with torch.no_grad():
            goal = cast.target.jump(x_s, s, zero, labels, guidance=guidance)
        return self.weighting(cast, self.distance(guess, goal), t).mean()
