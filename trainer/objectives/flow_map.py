"""A flow map from stored states alone: both ends of every jump are known."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from limbeck.trainer.networks.networks import Networks
from limbeck.trainer.objectives.conditioning import conditioning
from limbeck.trainer.objectives.distances import Distance, DistanceOptions, refuse_lpips
from limbeck.trainer.objectives.kind import Given, Kind, Stage
from limbeck.trainer.objectives.stored import ScheduleOptions, all_states, drawn, ends, served_grids
from limbeck.trainer.objectives.weights import Weighting, WeightingOptions
from limbeck.trainer.stream import Batch


@dataclass(frozen=True)
class FlowMapOracle:
    """E w(t, s) d( G(x_t, t, s), x_s ), s < t: the student's jump against the teacher's own, both ends stored.

    One pair of each sample, all K(K+1)/2 pairs of its K+1 states equally likely: long jumps as often as short ones.
    times, columns: all stored states'. The oracle loss of Kim et al. 2024 (CTM), section 3, and of Boffi et al. 2024.
    """

    times: tuple[float, ...]
    columns: tuple[str, ...]
    distance: Distance
    weighting: Weighting
    num_uniforms: int = 1

    @cached_property
    def _pairs(self) -> Tensor:
        """All (i, j), i < j."""
        return torch.combinations(torch.arange(len(self.times)), 2)

    def __call__(self, networks: Networks, batch: Batch) -> Tensor:
        (x_t, x_s), (t, s) = drawn(batch, self.columns, self.times, self._pairs, batch.uniforms[:, 0])
        labels, guidance = conditioning(networks.student, batch)
        guess = networks.student.jump(x_t, t, s, labels, guidance=guidance)
        return self.weighting(networks, self.distance(guess, x_s), t, s).mean()


class FlowMapOptions(DistanceOptions, WeightingOptions, ScheduleOptions):
    """Options of flow_map."""


def _stages(options: FlowMapOptions, given: Given) -> tuple[Stage, ...]:
    refuse_lpips(options, "flow_map", compared="states at every noise level")
    times, columns = all_states(given.stored, objective="flow_map")
    d, weighting = options.make_distance(given.sample_shape), Weighting(options.weighting)
    objective = FlowMapOracle(times, columns, d, weighting)
    return (Stage("flow_map", objective, ends(given.stored.recipe), served_grids(given.stored, options.schedule)),)


KIND = Kind(
    options=FlowMapOptions,
    stages=_stages,
    makes="students of each number of steps in its schedule",
    learns="the jump between any two stored states",
    reads="all states",
    samples="any grid of jumps",
    takes_target_time=True,
)
