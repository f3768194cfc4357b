"""A student: a denoiser read as a flow map."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from diffusion.denoiser import Denoiser
from diffusion.process import Process, expand, scales


class FlowMap(nn.Module):
    """G(x_s, s, t): one DDIM step from s down to t with the student's own mu, so that G(x, s, s) = x exactly.

        G = (sigma_t/sigma_s) x_s + (alpha_t - alpha_s sigma_t/sigma_s) mu(x_s, s)

    and at sigma_t = 0 it is alpha_t mu. The coefficients are float64. Song et al. 2021 (DDIM), eq. 12.
    A student with a second time has mu(x_s, s, t) there, so that G can be any flow map; one that is told its guidance
    scale w has mu(.., w). To others, and to denoisers in closed form, neither is told.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    @property
    def process(self) -> Process:
        return self.denoiser.process

    @property
    def has_second_time(self) -> bool:
        """Whether mu is told the time that is jumped to."""
        return getattr(self.denoiser, "has_second_time", False)

    @property
    def told_guidance(self) -> bool:
        """Whether mu is told the guidance scale."""
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

        until: the time that a student with a second time jumps to; t unless told, where mu is the plain denoiser.
        """
        if not (self.has_second_time or self.told_guidance):
            return self.denoiser(x_t, t, condition)
        return self.denoiser(x_t, t, condition, until=until, guidance=guidance)

    def jump(
        self, x_s: Tensor, s: Tensor, t: Tensor, condition: Tensor | None = None, *, guidance: Tensor | None = None
    ) -> Tensor:
        """x_t from x_s: [B, ...], t <= s, each [] or [B] float64; where sigma_s = 0, t = s."""
        keep, pull = jump_coefficients(self.process, s, t)
        # At sigma = 0 a network may answer NaN (EDM tells it log 0): it is asked elsewhere, and its answer weighs 0.
        asked = torch.where(self.process.sigma(s) == 0, self.process.T / 2, s)
        mu = self(x_s, asked, condition, until=t, guidance=guidance)
        return expand(keep, like=x_s) * x_s + expand(pull, like=x_s) * mu

    def sample(
        self, x_T: Tensor, times: Tensor, condition: Tensor | None = None, *, guidance: Tensor | None = None
    ) -> Tensor:
        """x at the last of `times` (float64 [N+1], descending) by N jumps from x_T at the first."""
        x = x_T
        for s, t in pairwise(times):
            x = self.jump(x, s, t, condition, guidance=guidance)
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
        """x_0 by N jumps all the way to data, with noise anew between them. Song et al. 2023, algorithm 1.

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


def jump_coefficients(process: Process, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(keep, pull) with x_t = keep x_s + pull mu, float64: sigma_t/sigma_s and alpha_t - alpha_s sigma_t/sigma_s."""
    keep = process.sigma(t) / process.sigma(s)
    keep = torch.where(s == t, torch.ones_like(keep), keep)
    return keep, process.alpha(t) - process.alpha(s) * keep
