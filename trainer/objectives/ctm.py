"""Consistency trajectory models: the student's jump against the teacher's stored step and a jump from there."""

from dataclasses import dataclass
from functools import cached_property

import torch
from pydantic import Field
from torch import Tensor

from limbeck.diffusion.process import scales
from limbeck.trainer.networks.networks import Networks
from limbeck.trainer.objectives.conditioning import conditioning
from limbeck.trainer.objectives.distances import Distance, DistanceOptions, files_read, l2
from limbeck.trainer.objectives.kind import Given, Kind, Stage
from limbeck.trainer.objectives.randomness import normal
from limbeck.trainer.objectives.stored import ScheduleOptions, all_states, drawn, ends, served_grids, times_on
from limbeck.trainer.objectives.weights import Weighting, WeightingOptions
from limbeck.trainer.stream import Batch


@dataclass(frozen=True)
class ConsistencyTrajectory:
    """E w(t, s) d( G_(G(x_t, t, s), s, 0), sg G_(G_(x_u, u, s), s, 0) ) + denoising_weight * denoising, s <= u < t.

    G_ is the target, an average of the student whose weights take no gradients: the student's own comes through
    the outer map's input. One triple (t, u, s) of stored states for each sample, all equally likely; at s = 0 the outer
    map is the identity, at u = s the inner one. times, columns: all stored states'. Kim et al. 2024, section 3.
    """

    times: tuple[float, ...]
    columns: tuple[str, ...]
    distance: Distance
    weighting: Weighting
    denoising_weight: float
    seed: int
    num_uniforms: int = 2

    @cached_property
    def _triples(self) -> Tensor:
        """All (i, k, j), i < k <= j."""
        return torch.combinations(torch.arange(len(self.times) + 1), 3) - torch.tensor([0, 0, 1])

    def __call__(self, networks: Networks, batch: Batch) -> Tensor:
        trajectory = self.trajectory(networks, batch)
        if not self.denoising_weight:
            return trajectory
        return trajectory + self.denoising_weight * self.denoising(networks, batch)

    def trajectory(self, networks: Networks, batch: Batch) -> Tensor:
        """Soft consistency, compared at the last time."""
        target = networks.target
        assert target is not None
        (x_t, x_u, _), (t, u, s) = drawn(batch, self.columns, self.times, self._triples, batch.uniforms[:, 0])
        labels, guidance = conditioning(networks.student, batch)
        end = torch.full_like(s, self.times[-1])
        guess = networks.student.jump(x_t, t, s, labels, guidance=guidance)
        guess = target.jump(guess, s, end, labels, guidance=guidance)
        with torch.no_grad():
            goal = target.jump(x_u, u, s, labels, guidance=guidance)
            goal = target.jump(goal, s, end, labels, guidance=guidance)
        return self.weighting(networks, self.distance(guess, goal), t, s).mean()

    def denoising(self, networks: Networks, batch: Batch) -> Tensor:
        """E w(t, t) || mu(alpha x_0 + sigma eps, t, t) - x_0 ||^2, x_0 the stored output, eps fresh.

        All stored t but the last are equally likely. It teaches mu what short jumps need, which the other term hardly
        weighs.
        """
        times = times_on(batch.positions.device, self.times[:-1])
        t = times[(batch.uniforms[:, 1] * len(times)).long()]
        x_0 = batch.states[self.columns[-1]]
        alpha_t, sigma_t = scales(networks.student.process, t, like=x_0)
        eps = normal(self.seed, "ctm", batch.positions, x_0.shape[1:]).to(x_0)
        labels, guidance = conditioning(networks.student, batch)
        guess = networks.student(alpha_t * x_0 + sigma_t * eps, t, labels, guidance=guidance)
        return self.weighting(networks, l2(guess, x_0), t).mean()


class CtmOptions(DistanceOptions, WeightingOptions, ScheduleOptions):
    """Options of ctm."""

    target_ema: float = Field(0.999, ge=0, lt=1, description="Decay of the average that makes targets.")
    denoising_weight: float = Field(1.0, ge=0, description="Weight of the denoising term.")

    @property
    def target_decay(self) -> float:
        return self.target_ema


def _stages(options: CtmOptions, given: Given) -> tuple[Stage, ...]:
    times, columns = all_states(given.stored, objective="ctm")
    d, weighting = options.make_distance(given.sample_shape), Weighting(options.weighting)
    objective = ConsistencyTrajectory(times, columns, d, weighting, options.denoising_weight, given.seed)
    grids = served_grids(given.stored, options.schedule)
    return (Stage("ctm", objective, ends(given.stored.recipe), grids, reads=files_read(d)),)


KIND = Kind(
    options=CtmOptions,
    stages=_stages,
    makes="students of each number of steps in its schedule",
    learns="that jumps from two states meet at time 0, and to denoise (Kim et al. 2024)",
    reads="all states",
    samples="any grid of jumps",
    takes_target_time=True,
)
