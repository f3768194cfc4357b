"""Reflow: a rectified flow along the straight lines from the teacher's outputs to their noises."""

from dataclasses import dataclass

from pydantic import field_validator
from torch import Tensor

from limbeck.diffusion.grids import uniform_time
from limbeck.diffusion.process import RectifiedFlow, expand
from limbeck.trainer.networks.networks import Networks
from limbeck.trainer.objectives.conditioning import conditioning
from limbeck.trainer.objectives.distances import Distance, DistanceOptions, refuse_lpips
from limbeck.trainer.objectives.kind import Given, Kind, Stage
from limbeck.trainer.objectives.stored import HalvingOptions
from limbeck.trainer.objectives.weights import Weighting, WeightingOptions
from limbeck.trainer.stream import Batch


@dataclass(frozen=True)
class Reflow:
    """E w(tau) d( u(x_tau, tau), z - output ), x_tau = (1 - tau) output + tau z, tau ~ U(0, 1), z = noise/noise_scale.

    u = (x_tau - mu)/tau is the student's velocity, whatever its network predicts; its process is the rectified flow,
    not the teacher's. Its lines cross less than the teacher's, so that few steps follow them. Liu et al. 2023, eq. 1
    on the coupling (noise, output).
    """

    noise_scale: float
    distance: Distance
    weighting: Weighting
    columns: tuple[str, ...] = ("noise", "output")
    num_uniforms: int = 1

    def __call__(self, networks: Networks, batch: Batch) -> Tensor:
        # In float64, where a small tau takes no digits from the difference; the network runs in its own dtype.
        output, z = batch.states["output"].double(), batch.states["noise"].double() / self.noise_scale
        tau = batch.uniforms[:, 0]
        share = expand(tau, like=output)
        x_tau = (1 - share) * output + share * z
        labels, guidance = conditioning(networks.student, batch)
        u = (x_tau - networks.student(x_tau, tau, labels, guidance=guidance)) / share
        return self.weighting(networks, self.distance(u, z - output), tau).mean()


class ReflowOptions(DistanceOptions, WeightingOptions, HalvingOptions):
    """Options of reflow."""

    @field_validator("weighting")
    @classmethod
    def _of_velocities(cls, weighting: str) -> str:
        if weighting in ("snr", "truncated_snr"):
            given = f"objective.weighting {weighting} is one of errors of x_0"
            raise ValueError(f"{given}, reflow's are of velocities; use uniform or learned")
        return weighting


def _stages(options: ReflowOptions, given: Given) -> tuple[Stage, ...]:
    refuse_lpips(options, "reflow", compared="velocities")
    objective = Reflow(
        noise_scale=given.stored.recipe.sigmas[0],
        distance=options.make_distance(given.sample_shape),
        weighting=Weighting(options.weighting),
    )
    grids = {steps: tuple(uniform_time(RectifiedFlow(), steps).tolist()) for steps in options.schedule}
    return (Stage("reflow", objective, (1.0, 0.0), grids),)


KIND = Kind(
    options=ReflowOptions,
    stages=_stages,
    makes="students of each number of steps in its schedule",
    learns="a rectified flow of its own through the pairs (Liu et al. 2023)",
    reads="noise, output",
    samples="n Euler steps",
    fit={"init": "scratch"},
    process={"name": "rectified_flow"},
    judged_by_holdout=False,
)
