"""Denoising: what makes a teacher out of images."""

import math
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from limbeck.diffusion.flow_map import FlowMap
from limbeck.diffusion.process import VE, Process, scales
from limbeck.trainer.networks.networks import Networks
from limbeck.trainer.objectives.conditioning import student_labels
from limbeck.trainer.objectives.kind import Given, Kind, Options, Stage
from limbeck.trainer.stream import Batch


@dataclass(frozen=True)
class Denoising:
    """E || F(x_t, t) - target(x_0, x_t) ||^2, the mean square error of what the network itself predicts.

    For EDM's preconditioning that is EDM's loss, lambda(sigma) || mu - x_0 ||^2 with its unit-variance weight. Labels
    are dropped to the null label with probability label_dropout (Ho & Salimans 2022). Karras et al. 2022, section 5.
    """

    sample_shape: tuple[int, ...]
    label_dropout: float
    p_mean: float
    p_std: float
    columns: tuple[str, ...] = ("output",)

    @property
    def num_uniforms(self) -> int:
        return 2 + math.prod(self.sample_shape)

    def __call__(self, networks: Networks, batch: Batch) -> Tensor:
        student = networks.student
        x_0, denoiser = batch.states["output"], student.denoiser
        t = self.times(student.process, batch.uniforms[:, 0])
        condition = self.dropped(student, batch.condition, batch.uniforms[:, 1])
        eps = standard_normal(batch.uniforms[:, 2:]).to(x_0).view_as(x_0)
        alpha_t, sigma_t = scales(student.process, t, like=x_0)
        x_t = alpha_t * x_0 + sigma_t * eps
        target = denoiser.prediction.target(x_0, x_t, alpha_t, sigma_t)
        return (denoiser.output(x_t, t, condition) - target).square().mean()

    def times(self, process: Process, u: Tensor) -> Tensor:
        """t ~ U(0, T), for VE log sigma ~ N(p_mean, p_std^2) up to T, from u in (0, 1): float64 [B]."""
        if isinstance(process, VE):
            return torch.exp(self.p_mean + self.p_std * standard_normal(u)).clamp(max=process.T)
        return u * process.T

    def dropped(self, student: FlowMap, labels: Tensor, u: Tensor) -> Tensor | None:
        """Labels with the null label wherever u < label_dropout."""
        return student_labels(student, torch.where(u < self.label_dropout, -1, labels))


def standard_normal(u: Tensor) -> Tensor:
    """N(0, 1) from uniforms, by its quantile function on their own device."""
    return torch.special.ndtri(u)


class DenoisingOptions(Options):
    """Options of denoising. The distribution of log sigma is that of process ve; others draw t uniformly."""

    label_dropout: float = Field(0.1, ge=0, le=1, description="Share of labels replaced by the null label.")
    p_mean: float = Field(-1.2, description="Mean of log sigma, with process ve.")
    p_std: float = Field(1.2, gt=0, description="Standard deviation of log sigma, with process ve.")


def _stages(options: DenoisingOptions, given: Given) -> tuple[Stage, ...]:
    objective = Denoising(given.sample_shape, options.label_dropout, options.p_mean, options.p_std)
    return (Stage("denoising", objective),)


KIND = Kind(
    options=DenoisingOptions,
    stages=_stages,
    makes="a teacher",
    learns="to denoise images: it is a teacher (Karras et al. 2022)",
    reads="images",
    samples="any solver, as `generate` does",
    fit={"init": "scratch", "process": "ve"},
    reads_images=True,
    judged_by_holdout=False,
)
