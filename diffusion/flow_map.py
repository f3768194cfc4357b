"""A student: a denoiser read as a flow map."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from limbeck.diffusion.denoiser import Denoiser
from limbeck.diffusion.process import Process, expand, scales


class FlowMap(nn.Module):
    """G(x_t, t, s): one DDIM step from t down to s with the student's own mu, so that G(x, t, t) = x exactly.

        G = (sigma_s/sigma_t) x_t + (alpha_s - alpha_t sigma_s/sigma_t) mu(x_t, t)

    and at sigma_s = 0 it is alpha_s mu. The coefficients are float64. Song et al. 2021 (DDIM), eq. 12.
    A student that takes its target time has mu(x_t, t, s) there, so that G can be any flow map; one that takes its
    guidance scale w has mu(.., w). Others, and denoisers in closed form, take neither.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    @property
    def process(self) -> Process:
        return self.denoiser.process

    @property
    def has_second_time(self) -> bool:
        """Whether mu takes the time that is jumped to."""
        return getattr(self.denoiser, "has_second_time", False)

    @property
    def told_guidance(self) -> bool:
        """Whether mu takes the guidance scale."""
        return getattr(self.denoiser, "told_guidance", False)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Tensor | None = None,
        *,
        until: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """mu, the student's estimate of x_0; x_t: [B, ...], t, until, guidance: [] or [B] float64.

        until: the time that a student with a second time jumps to; default t, where mu is the plain denoiser.
        """
        if not (self.has_second_time or self.told_guidance):
            return self.denoiser(x_t, t, condition)
        return self.denoiser(x_t, t, condition, until=until, guidance=guidance)

    def jump(
        self, x_t: Tensor, t: Tensor, s: Tensor, condition: Tensor | None = None, *, guidance: Tensor | None = None
    ) -> Tensor:
        """x_s from x_t: [B, ...], s <= t, each [] or [B] float64; where sigma_t = 0, s = t."""
        keep, pull = jump_coefficients(self.process, t, s)
        # At sigma = 0 a network may answer NaN (EDM gives it log 0): it is asked elsewhere, and its answer weighs 0.
        asked = torch.where(self.process.sigma(t) == 0, self.process.T / 2, t)
        mu = self(x_t, asked, condition, until=s, guidance=guidance)
        return expand(keep, like=x_t) * x_t + expand(pull, like=x_t) * mu

    def sample(
        self, x_T: Tensor, times: Tensor, condition: Tensor | None = None, *, guidance: Tensor | None = None
    ) -> Tensor:
        """x at the last of `times` (float64 [N+1], descending) by N jumps from x_T at the first."""
        x = x_T
        for t, s in pairwise(times):
            x = self.jump(x, t, s, condition, guidance=guidance)
        return x

    def renoise(
        self,
        x_T: Tensor,
        times: Tensor,
        condition: Tensor | None = None,
        *,
        noises: Callable[[int], Tensor],
        guidance: Tensor | None = None,
    ) -> Tensor:
        """x_0 by N jumps all the way to data, with fresh noise between them. Song et al. 2023, algorithm 1.

            x_0 = G(x, t_i, 0),   x = alpha x_0 + sigma eps_i+1   at t_i+1

        times: float64 [N+1], descending to 0. noises(i): eps [B, ...] ~ N(0, I) for grid index i, 0 < i < N.
        The student need only be good at jumps to data.
        """
        x_0 = self.jump(x_T, times[0], times[-1], condition, guidance=guidance)
        for index, t in enumerate(times[1:-1], start=1):
            alpha_t, sigma_t = scales(self.process, t, like=x_0)
            x_t = alpha_t * x_0 + sigma_t * noises(index)
            x_0 = self.jump(x_t, t, times[-1], condition, guidance=guidance)
        return x_0


def jump_coefficients(process: Process, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """(keep, pull) with x_s = keep x_t + pull mu, float64: sigma_s/sigma_t and alpha_s - alpha_t sigma_s/sigma_t."""
    keep = process.sigma(s) / process.sigma(t)
    keep = torch.where(s == t, torch.ones_like(keep), keep)
    return keep, process.alpha(s) - process.alpha(t) * keep
