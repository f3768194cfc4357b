"""Reflow: a rectified flow along the straight lines from the teacher's outputs to their noises."""

from dataclasses import dataclass

from torch import Tensor

from diffusion.process import expand
from trainer.cast import Cast
from trainer.objectives import told
from trainer.objectives.distances import Distance
from trainer.objectives.weights import Weighting
from trainer.stream import Batch


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

    def __call__(self, cast: Cast, batch: Batch) -> Tensor:
        # In float64, where a small tau takes no digits from the difference; the network runs in its own dtype.
        output, z = batch.states["output"].double(), batch.states["noise"].double() / self.noise_scale
        tau = batch.uniforms[:, 0]
        share = expand(tau, like=output)
        x_tau = (1 - share) * output + share * z
        labels, guidance = told(cast.student, batch)
        u = (x_tau - cast.student(x_tau, tau, labels, guidance=guidance)) / share
        return self.weighting(cast, self.distance(u, z - output), tau).mean()
