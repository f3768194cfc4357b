"""What a network predicts, and what that says of x_0: the one table.

With x_t = alpha x_0 + sigma eps, each kind gives x_0 from the network's output and, for training, the target that a
perfect network would give. The formulas hold for every (alpha, sigma), not only where alpha^2 + sigma^2 = 1.

    epsilon        eps                              Ho et al. 2020
    sample         x_0
    v_prediction   alpha eps - sigma x_0            Salimans & Ho 2022, app. D
    velocity       eps - x_0                        Liu et al. 2023 (dx/dt of a rectified flow)
    score          -eps/sigma                       Song et al. 2021 (SDE)
    edm            (x_0 - c_skip y)/c_out, y = x_t/alpha    Karras et al. 2022, table 1; a unit-variance mix of both
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from limbeck.diffusion.process import Process


class Prediction(Protocol):
    """Conversions between a network's output and x_0. alpha, sigma broadcast against x_t [B, ...]."""

    def network_input(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The input of the network instead of x_t."""

    def network_time(self, process: Process, t: Tensor) -> Tensor:
        """The time as the network takes it; t: [] or [B]."""

    def x_0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The x_0 that `output` says."""

    def target(self, x_0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The output that says `x_0`: x_0(target(x_0, x_t), x_t) = x_0, for sigma > 0."""


class _Plain:
    """The network sees x_t as it is, and the process's own idea of time."""

    def network_input(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x_t

    def network_time(self, process: Process, t: Tensor) -> Tensor:
        return process.network_time(t)


@dataclass(frozen=True)
class Epsilon(_Plain):
    """eps. Says nothing of x_0 where alpha = 0."""

    def x_0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - sigma * output) / alpha

    def target(self, x_0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - alpha * x_0) / sigma


@dataclass(frozen=True)
class Sample(_Plain):
    """x_0 itself."""

    def x_0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return output

    def target(self, x_0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x_0


@dataclass(frozen=True)
class VPrediction(_Plain):
    """v = alpha eps - sigma x_0."""

    def x_0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (alpha * x_t - sigma * output) / (alpha**2 + sigma**2)

    def target(self, x_0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (alpha * x_t - (alpha**2 + sigma**2) * x_0) / sigma


@dataclass(frozen=True)
class Velocity(_Plain):
    """u = eps - x_0."""

    def x_0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - sigma * output) / (alpha + sigma)

    def target(self, x_0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - (alpha + sigma) * x_0) / sigma


@dataclass(frozen=True)
class Score(_Plain):
    """The score of x_t, (alpha x_0 - x_t)/sigma^2. Says nothing of x_0 where alpha = 0."""

    def x_0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t + sigma**2 * output) / alpha

    def target(self, x_0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (alpha * x_0 - x_t) / sigma**2


@dataclass(frozen=True)
class EDM:
    """F, x_0 = c_skip y + c_out F(c_in y, log(r)/4), with y = x_t/alpha, r = sigma/alpha; sigma_data: the data rms."""

    sigma_data: float = 0.5

    def network_input(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        # c_in y = y/sqrt(r^2 + sd^2), written without dividing by alpha.
        return x_t / self._spread(alpha, sigma)

    def network_time(self, process: Process, t: Tensor) -> Tensor:
        return torch.log(process.sigma(t) / process.alpha(t)) / 4

    def x_0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        spread = self._spread(alpha, sigma)
        c_skip_y = alpha * self.sigma_data**2 / spread**2 * x_t
        return c_skip_y + sigma * self.sigma_data / spread * output

    def target(self, x_0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        spread = self._spread(alpha, sigma)
        return (spread**2 * x_0 - alpha * self.sigma_data**2 * x_t) / (sigma * self.sigma_data * spread)

    def _spread(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """sqrt(sigma^2 + alpha^2 sigma_data^2), the rms of x_t."""
        return torch.sqrt(sigma**2 + (alpha * self.sigma_data) ** 2)


PREDICTIONS: dict[str, type[Epsilon | Sample | VPrediction | Velocity | Score | EDM]] = {
    "epsilon": Epsilon,
    "sample": Sample,
    "v_prediction": VPrediction,
    "velocity": Velocity,
    "score": Score,
    "edm": EDM,
}
