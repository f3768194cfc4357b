"""A student: a denoiser read as a flow map."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from diffusion.denoiser import Denoiser
from diffusion.process import Process, expand


class FlowMap(nn.Module):
    """G(x_s, s, t): one DDIM step from s down to t with the student's own mu, so that G(x, s, s) = x exactly.

        G = (sigma_t/sigma_s) x_s + (alpha_t - alpha_s sigma_t/sigma_s) mu(x_s, s)

    and at sigma_t = 0 it is alpha_t mu. The coefficients are float64. Song et al. 2021 (DDIM), eq. 12.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    @property
    def process(self) -> Process:
        return self.denoiser.process

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """mu(x_t, t), the student's estimate of x_0; x_t: [B, ...], t: [] or [B]."""
        return self.denoiser(x_t, t, condition)

    def jump(self, x_s: Tensor, s: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """x_t from x_s: [B, ...], t <= s, each [] or [B] float64; where sigma_s = 0, t = s."""
        keep, pull = jump_coefficients(self.process, s, t)
        # At sigma = 0 a network may answer NaN (EDM tells it log 0): it is asked elsewhere, and its answer weighs 0.
        asked = torch.where(self.process.sigma(s) == 0, self.process.T / 2, s)
        return expand(keep, like=x_s) * x_s + expand(pull, like=x_s) * self.denoiser(x_s, asked, condition)

    def sample(self, x_T: Tensor, times: Tensor, condition: Tensor | None = None) -> Tensor:
        """x at the last of `times` (float64 [N+1], descending) by N jumps from x_T at the first."""
        x = x_T
        for s, t in pairwise(times):
            x = self.jump(x, s, t, condition)
        return x


def jump_coefficients(process: Process, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(keep, pull) with x_t = keep x_s + pull mu, float64: sigma_t/sigma_s and alpha_t - alpha_s sigma_t/sigma_s."""
    keep = process.sigma(t) / process.sigma(s)
    keep = torch.where(s == t, torch.ones_like(keep), keep)
    return keep, process.alpha(t) - process.alpha(s) * keep
