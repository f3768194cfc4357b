"""Closed-form teachers, whose denoiser and flow map are known exactly: oracles for tests, and builtin teachers.

Both treat every coordinate alike and independently, so they serve samples of any shape.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from limbeck.diffusion.process import Process, scales

_BISECTIONS = 60  # a bracket then holds no more than a float64's last digits


class GaussianTeacher(nn.Module):
    """Coordinates N(mean, variance), each on its own."""

    def __init__(self, process: Process, *, mean: float, variance: float):
        """Variance > 0."""
        super().__init__()
        _check_variances([variance])
        self.process, self.mean, self.variance = process, float(mean), float(variance)

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """E[x_0 | x_t] = m + alpha v/(alpha^2 v + sigma^2) (x_t - alpha m). x_t: [B, ...]; t: [] or [B]."""
        x = x_t.double()
        alpha_t, sigma_t = scales(self.process, t, like=x)
        gain = alpha_t * self.variance / (alpha_t**2 * self.variance + sigma_t**2)
        return (self.mean + gain * (x - alpha_t * self.mean)).to(x_t.dtype)

    def flow_map(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The exact PF-ODE solution at s through x_t at t: the deviation from the mean follows the marginal's."""
        x = x_t.double()
        alpha_t, sigma_t = scales(self.process, t, like=x)
        alpha_s, sigma_s = scales(self.process, s, like=x)
        stretch = torch.sqrt((alpha_s**2 * self.variance + sigma_s**2) / (alpha_t**2 * self.variance + sigma_t**2))
        return (alpha_s * self.mean + stretch * (x - alpha_t * self.mean)).to(x_t.dtype)


class MixtureTeacher(nn.Module):
    """Coordinates sum_k w_k N(m_k, v_k), each on its own."""

    def __init__(
        self,
        process: Process,
        *,
        weights: Sequence[float],
        means: Sequence[float],
        variances: Sequence[float],
    ):
        """One weight, mean and variance a component: weights > 0 that sum to 1, variances > 0."""
        super().__init__()
        if not weights or not len(weights) == len(means) == len(variances):
            raise ValueError(
                f"{len(weights)} weights, {len(means)} means, {len(variances)} variances: give one of each a component"
            )
        if min(weights) <= 0 or abs(math.fsum(weights) - 1) > 1e-9:
            raise ValueError(f"weights {tuple(weights)}: give positive weights that sum to 1")
        _check_variances(variances)
        self.process = process
        self.weights = tuple(float(weight) for weight in weights)
        self.means = tuple(float(mean) for mean in means)
        self.variances = tuple(float(variance) for variance in variances)

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """E[x_0 | x_t]: the components' own estimates, weighed by how likely each is. x_t: [B, ...]; t: [] or [B]."""
        x = x_t.double().unsqueeze(-1)
        alpha_t, center, spread = self._marginal(t, like=x)
        means, variances = _row(self.means, like=x), _row(self.variances, like=x)
        deviation = (x - center) / spread
        posterior = torch.softmax(_row(self.weights, like=x).log() - spread.log() - deviation**2 / 2, dim=-1)
        estimates = means + alpha_t * variances / spread * deviation
        return (posterior * estimates).sum(-1).to(x_t.dtype)

    def flow_map(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The exact PF-ODE solution at s through x_t at t: F_s^-1(F_t(x_t)), F the marginals' distribution functions.

        Solved in the logarithm of whichever tail x_t lies in, so that far tails keep their digits. Always as many
        bisections of a sure bracket, so that no sample depends on its batch mates.
        """
        x = x_t.double().unsqueeze(-1)
        _, center_t, spread_t = self._marginal(t, like=x)
        _, center_s, spread_s = self._marginal(s, like=x)
        deviation = (x - center_t) / spread_t
        side = torch.where(self._log_tail(deviation) < self._log_tail(-deviation), 1.0, -1.0)  # 1 below the median
        target = self._log_tail(side * deviation)
        # F_t(x_t) is a mean of the components' Phi(deviation), so the answer has a deviation between the extremes.
        low = (center_s + spread_s * deviation.amin(-1, keepdim=True)).amin(-1, keepdim=True)
        high = (center_s + spread_s * deviation.amax(-1, keepdim=True)).amax(-1, keepdim=True)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            above = side * (self._log_tail(side * (middle - center_s) / spread_s) - target) > 0
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return ((low + high) / 2).squeeze(-1).to(x_t.dtype)

    def _marginal(self, t: Tensor, *, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha_t and the components' means and standard deviations at t, to broadcast against like [B, ..., 1]."""
        alpha_t, sigma_t = scales(self.process, t, like=like)
        spread = torch.sqrt(alpha_t**2 * _row(self.variances, like=like) + sigma_t**2)
        return alpha_t, alpha_t * _row(self.means, like=like), spread

    def _log_tail(self, deviation: Tensor) -> Tensor:
        """Log of sum_k w_k Phi(deviation_k), over the last axis, which is kept."""
        logs = _row(self.weights, like=deviation).log() + torch.special.log_ndtr(deviation)
        return torch.logsumexp(logs, -1, keepdim=True)


def _row(values: tuple[float, ...], *, like: Tensor) -> Tensor:
    """The components' values [K] as float64 where like is."""
    return _row_on(values, like.device)


@functools.lru_cache(maxsize=64)
def _row_on(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Copied to a device once: a copy at every call would wait for it."""
    return torch.tensor(values, dtype=torch.float64, device=device)


def _check_variances(variances: Sequence[float]) -> None:
    if min(variances) <= 0:
        raise ValueError(f"variance {min(variances)}: give one above 0")
