"""Consistency distillation: adjacent stored states have the same x_0."""

from dataclasses import dataclass
from functools import cached_property

import torch
from pydantic import Field
from torch import Tensor

from limbeck.trainer.networks.networks import Networks
from limbeck.trainer.objectives.conditioning import conditioning
from limbeck.trainer.objectives.distances import Distance, DistanceOptions, files_read
from limbeck.trainer.objectives.kind import Given, Kind, Stage
from limbeck.trainer.objectives.stored import ScheduleOptions, all_states, drawn, ends, served_grids
from limbeck.trainer.objectives.weights import Weighting, WeightingOptions
from limbeck.trainer.stream import Batch


@dataclass(frozen=True)
class Consistency:
    """E w(t_n) d( f(x_n, t_n), sg f_target(x_n+1, t_n+1) ), f(x, t) = G(x, t, t_N), state n+1 one step nearer to data.

    One pair of neighbours of each sample, all equally likely; f is the identity at the last time t_N, so that the last
    pair's target is the stored output. times, columns: all stored states'. Song et al. 2023, algorithm 2, with the
    solver's step stored.
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

    def __call__(self, networks: Networks, batch: Batch) -> Tensor:
        assert networks.target is not None
        (x_t, x_s), (t, s) = drawn(batch, self.columns, self.times, self._neighbours, batch.uniforms[:, 0])
        labels, guidance = conditioning(networks.student, batch)
        end = torch.full_like(t, self.times[-1])
        guess = networks.student.jump(x_t, t, end, labels, guidance=guidance)
        with torch.no_grad():
            goal = networks.target.jump(x_s, s, end, labels, guidance=guidance)
        return self.weighting(networks, self.distance(guess, goal), t).mean()


class ConsistencyOptions(DistanceOptions, WeightingOptions, ScheduleOptions):
    """Options of consistency."""

    target_ema: float = Field(0.95, ge=0, lt=1, description="Decay of the average that makes targets.")

    @property
    def target_decay(self) -> float:
        return self.target_ema


def _stages(options: ConsistencyOptions, given: Given) -> tuple[Stage, ...]:
    times, columns = all_states(given.stored, objective="consistency")
    d = options.make_distance(given.sample_shape)
    objective = Consistency(times, columns, d, Weighting(options.weighting))
    grids = served_grids(given.stored, options.schedule)
    reads, times = files_read(d), ends(given.stored.recipe)
    return (Stage("consistency", objective, times, grids, sampling="renoise", reads=reads),)


KIND = Kind(
    options=ConsistencyOptions,
    stages=_stages,
    makes="students of each number of steps in its schedule",
    learns="the same end from neighbouring states (Song et al. 2023)",
    reads="all states",
    samples="jumps to the end, fresh noise between",
)
