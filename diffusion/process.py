"""Forward processes x_t = alpha_t * x_0 + sigma_t * eps, and the one door through which their scalars meet a batch.

Time runs down from T (noise) to 0 (data). Every process answers in float64, for times of any shape:

    alpha(t), sigma(t)      the two scales
    f(t), g2(t)             drift and squared diffusion of the PF-ODE dx/dt = f x - g^2/2 * score,
                            f = d log alpha/dt, g^2 = d sigma^2/dt - 2 f sigma^2
    time_at(ratio)          the t at which sigma_t/alpha_t equals ratio

A variance-preserving process has alpha^2 + sigma^2 = 1, hence g^2 = -2 f.
"""

import functools
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Process(Protocol):
    """What solvers and objectives ask of a forward process."""

    @property
    def T(self) -> float:
        """The time of pure noise, where trajectories start."""

    def alpha(self, t: Tensor) -> Tensor:
        """Scale of x_0 in x_t."""

    def sigma(self, t: Tensor) -> Tensor:
        """Scale of eps in x_t."""

    def f(self, t: Tensor) -> Tensor:
        """d log alpha/dt, the linear drift."""

    def g2(self, t: Tensor) -> Tensor:
        """d sigma^2/dt - 2 f sigma^2, the squared diffusion."""

    def time_at(self, ratio: Tensor) -> Tensor:
        """The t at which sigma_t/alpha_t = ratio >= 0; T for an infinite ratio where alpha_T = 0."""

    def network_time(self, t: Tensor) -> Tensor:
        """The time that a network trained on this process takes instead of t."""


class _OwnTime:
    """Networks of a continuous process take t itself."""

    def network_time(self, t: Tensor) -> Tensor:
        return t


@dataclass(frozen=True)
class LinearVP(_OwnTime):
    """VP with beta(t) = beta_min + t (beta_max - beta_min), t in [0, 1]. Song et al. 2021 (SDE), eq. 32-33."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    @property
    def T(self) -> float:
        return 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(self._log_alpha(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(2 * self._log_alpha(t)))

    def f(self, t: Tensor) -> Tensor:
        return -self._beta(t) / 2

    def g2(self, t: Tensor) -> Tensor:
        return self._beta(t)

    def time_at(self, ratio: Tensor) -> Tensor:
        # log(1 + r^2) = -2 log alpha = beta_min t + (beta_max - beta_min) t^2/2, solved without cancellation.
        integral = torch.log1p(ratio.double() ** 2)
        slope = self.beta_max - self.beta_min
        return 2 * integral / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * slope * integral))

    def _beta(self, t: Tensor) -> Tensor:
        return self.beta_min + t.double() * (self.beta_max - self.beta_min)

    def _log_alpha(self, t: Tensor) -> Tensor:
        t = t.double()
        return -(self.beta_max - self.beta_min) * t**2 / 4 - self.beta_min * t / 2


@dataclass(frozen=True)
class CosineVP(_OwnTime):
    """VP with alpha(t) = cos(a(t))/cos(a(0)), a(t) = (t + s)/(1 + s) pi/2. Nichol & Dhariwal 2021, eq. 17.

    alpha_T = 0 exactly: cosines are taken as sines of the complement, which is exactly 0 at t = 1.
    """

    s: float = 0.008

    @property
    def T(self) -> float:
        return 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(self._complement(t)) / self._cos_start

    def sigma(self, t: Tensor) -> Tensor:
        # sigma^2 = 1 - cos^2 a/cos^2 a_0 = sin(a - a_0) sin(a + a_0)/cos^2 a_0, which keeps its digits near t = 0.
        travelled = self._rate * t.double()
        return torch.sqrt(torch.sin(travelled) * torch.sin(travelled + 2 * self._rate * self.s)) / self._cos_start

    def f(self, t: Tensor) -> Tensor:
        return -self._rate / torch.tan(self._complement(t))

    def g2(self, t: Tensor) -> Tensor:
        return -2 * self.f(t)

    def time_at(self, ratio: Tensor) -> Tensor:
        # a - a_0 keeps its digits near t = 0, pi/2 - a near T, where r is infinite and t exactly 1.
        alpha = torch.rsqrt(1 + ratio.double() ** 2)
        sigma = torch.rsqrt(1 + ratio.double() ** -2)
        a_0, gained = self._rate * self.s, (sigma * self._cos_start) ** 2
        a = torch.asin(torch.sqrt(math.sin(a_0) ** 2 + gained))
        travelled = torch.asin(gained / torch.sin(a + a_0))
        return torch.where(ratio < 1, travelled, self._rate - torch.asin(alpha * self._cos_start)) / self._rate

    @property
    def _rate(self) -> float:
        return math.pi / 2 / (1 + self.s)

    @property
    def _cos_start(self) -> float:
        return math.cos(self._rate * self.s)

    def _complement(self, t: Tensor) -> Tensor:
        return self._rate * (1 - t.double())


@dataclass(frozen=True)
class VE(_OwnTime):
    """Variance exploding, alpha = 1 and sigma = t up to sigma_max. Karras et al. 2022 (EDM)."""

    sigma_max: float = 80.0

    @property
    def T(self) -> float:
        return self.sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)

    def sigma(self, t: Tensor) -> Tensor:
        return t.double()

    def f(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t, dtype=torch.float64)

    def g2(self, t: Tensor) -> Tensor:
        return 2 * t.double()

    def time_at(self, ratio: Tensor) -> Tensor:
        return ratio.double()


@dataclass(frozen=True)
class RectifiedFlow(_OwnTime):
    """The straight line alpha = 1 - t, sigma = t, t in [0, 1]. Liu et al. 2023; Lipman et al. 2023."""

    @property
    def T(self) -> float:
        return 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t.double()

    def sigma(self, t: Tensor) -> Tensor:
        return t.double()

    def f(self, t: Tensor) -> Tensor:
        return -1 / (1 - t.double())

    def g2(self, t: Tensor) -> Tensor:
        return 2 * t.double() / (1 - t.double())

    def time_at(self, ratio: Tensor) -> Tensor:
        return 1 / (1 + 1 / ratio.double())


@dataclass(frozen=True)
class DiscreteVP:
    """VP through a table of betas, as diffusers stores it: log alpha is linear between the table's points.

    t = 0 is data and t = n + 1 is the table's timestep n, so T = len(betas) and a network takes t - 1.
    Where the last beta is 1 (zero terminal SNR) alpha itself is linear over the last interval, down to 0.
    """

    betas: tuple[float, ...]

    @property
    def T(self) -> float:
        return float(len(self.betas))

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(self._log_alpha(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(0 - torch.expm1(2 * self._log_alpha(t)))  # 0 - x: sigma is +0.0 at t = 0, never -0.0

    def f(self, t: Tensor) -> Tensor:
        n = self._interval(t)
        step = _betas_table(self.betas, t.device)[0].take(n)
        return torch.where(torch.isinf(step), -1 / (n + 1 - t.double()), step)

    def g2(self, t: Tensor) -> Tensor:
        return -2 * self.f(t)

    def time_at(self, ratio: Tensor) -> Tensor:
        log_alpha = -torch.log1p(ratio.double() ** 2) / 2
        steps, knots = _betas_table(self.betas, ratio.device)
        n = (torch.searchsorted(-knots, -log_alpha) - 1).clamp(0, len(self.betas) - 1)
        step, fallen = steps.take(n), log_alpha - knots.take(n)
        return n + torch.where(torch.isinf(step), -torch.expm1(fallen), fallen / step)

    def network_time(self, t: Tensor) -> Tensor:
        return t - 1

    def _interval(self, t: Tensor) -> Tensor:
        return (torch.ceil(t.double()).long() - 1).clamp(0, len(self.betas) - 1)

    def _log_alpha(self, t: Tensor) -> Tensor:
        n = self._interval(t)
        steps, knots = _betas_table(self.betas, t.device)
        step, part = steps.take(n), t.double() - n
        return knots.take(n) + torch.where(torch.isinf(step), torch.log1p(-part), part * step)


def _betas_table(betas: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """log alpha's step over each interval, and its value at each point; copied to a device once, not at every call.

    Read by take(n): an index [n] of no axes would be fetched from the device. A compiled network holds the tables
    themselves: to make them again in it would keep it from being a CUDA graph.
    """
    return _betas_table_on(betas, device)


# All that torch.compiler.assume_constant_result does, without its import of the whole compiler at every start.
_betas_table.__dict__["_dynamo_marked_constant"] = True


@functools.lru_cache(maxsize=16)
def _betas_table_on(betas: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    steps = torch.log1p(-torch.tensor(betas, dtype=torch.float64, device=device)) / 2
    return steps, torch.cat([steps.new_zeros(1), steps.cumsum(0)])


def expand(values: Tensor, *, like: Tensor) -> Tensor:
    """Scalars [] or one a sample [B], ready to multiply like [B, ...]: its dtype and device, trailing axes of 1."""
    if values.ndim > 1 or (values.ndim == 1 and len(values) != len(like)):
        raise ValueError(f"scalars of shape {tuple(values.shape)} for a batch of {len(like)}: give [] or [{len(like)}]")
    shaped = values if values.ndim == 0 else values.reshape(-1, *(1,) * (like.ndim - 1))
    return shaped.to(like)


def scales(process: Process, t: Tensor, *, like: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha_t, sigma_t) for times [] or [B], computed in float64, shaped and cast to multiply like [B, ...]."""
    return expand(process.alpha(t), like=like), expand(process.sigma(t), like=like)
