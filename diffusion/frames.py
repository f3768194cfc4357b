"""The two frames in which the PF-ODE of every process here is one and the same equation.

With z = x/scale and p = sigma/scale the ODE dx/dt = f x - g^2/2 * score becomes

    dz/dp = (z - x_0)/p = (x - scale * x_0)/sigma,        x_0 = denoise(x, t)

    sigma frame: scale = alpha            z = y, p = r      dy/dr = eps_hat          needs alpha_T > 0
    flow frame:  scale = alpha + sigma    z = u, p = tau    du/dtau = eps_hat - x_0  regular at alpha = 0

so a solver needs no derivative of the schedule and only ever meets `scale` and `position` (p). Where the process is
VE (sigma frame) or rectified flow (flow frame), z is x and p is t.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from limbeck.diffusion.process import Process

FrameName = Literal["sigma", "flow"]


@dataclass(frozen=True)
class Point:
    """One time of a solve as plain numbers. time: float64 [] on the CPU, where reading it never waits for a device."""

    time: Tensor
    alpha: float
    sigma: float
    scale: float

    @property
    def position(self) -> float:
        """The point's p = sigma/scale: r in the sigma frame, tau in the flow frame."""
        return self.sigma / self.scale

    @property
    def log_snr(self) -> float:
        """Lambda = log(alpha/sigma), -inf at alpha = 0 and inf at sigma = 0."""
        if self.alpha == 0:
            return -math.inf
        return math.inf if self.sigma == 0 else math.log(self.alpha / self.sigma)


def frame_for(process: Process, times: Tensor) -> FrameName:
    """The frame to solve in: sigma where alpha > 0 at times[0], else flow."""
    return "sigma" if process.alpha(times[0]).item() > 0 else "flow"


def points_at(process: Process, times: Tensor, *, frame: FrameName) -> tuple[Point, ...]:
    """One point for each of times [K]."""
    times = times.detach().to("cpu", torch.float64)
    alphas: list[float] = process.alpha(times).tolist()
    sigmas: list[float] = process.sigma(times).tolist()
    return tuple(
        Point(time, alpha, sigma, alpha if frame == "sigma" else alpha + sigma)
        for time, alpha, sigma in zip(times.unbind(), alphas, sigmas, strict=True)
    )


def points_between(
    process: Process, here: Point, there: Point, fractions: Sequence[float], *, frame: FrameName
) -> tuple[Point, ...]:
    """The points whose positions lie the given fractions of the way from here to there; 0 and 1 are the ends."""
    span = there.position - here.position
    inside = [here.position + fraction * span for fraction in fractions if 0 < fraction < 1]
    positions = torch.tensor(inside, dtype=torch.float64)
    ratios = positions if frame == "sigma" else positions / (1 - positions)
    new = iter(points_at(process, process.time_at(ratios), frame=frame))
    return tuple(here if fraction == 0 else there if fraction == 1 else next(new) for fraction in fractions)
