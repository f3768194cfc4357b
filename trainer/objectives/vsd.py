"""Variational score distillation of a student of one step, also known as SwiftBrush and Diff-Instruct."""

from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.trainer.networks.networks import Networks
from limbeck.trainer.objectives.kind import Given, Kind, Stage
from limbeck.trainer.objectives.matching import (
    FIT,
    Diffused,
    Matching,
    MatchingOptions,
    answers,
    matching_stage,
    pulled,
)
from limbeck.trainer.stream import Batch


@dataclass(frozen=True, kw_only=True)
class VariationalScore(Matching):
    """1/2 || x - sg(x - w (eps_real - eps_fake)) ||^2, w = sigma_t^2/(alpha_t^2 + sigma_t^2).

    Its gradient in x is w (eps_real - eps_fake) over how many numbers there are: that of (sigma_t/alpha_t) w
    KL(student || data) at t. For a variance-preserving process w is sigma_t^2, as in the papers; for others it is that
    of x_t scaled to preserve variance, so that it stays bounded. Wang et al. 2023; Nguyen & Tran 2024; Luo et
    al. 2023.
    """

    def __call__(self, networks: Networks, batch: Batch) -> Tensor:
        x = self.sample(networks, batch)
        return pulled(x, variational_direction(networks, batch, self.asked(networks, batch, x)))


@torch.no_grad()
def variational_direction(networks: Networks, batch: Batch, asked: Diffused) -> Tensor:
    """w (eps_real - eps_fake) = w alpha_t/sigma_t (mu_fake - mu_real), [B, ...]."""
    real, fake = answers(networks, batch, asked)
    weight = asked.alpha_t * asked.sigma_t / (asked.alpha_t**2 + asked.sigma_t**2)
    return weight * (fake - real)


def _stages(options: MatchingOptions, given: Given) -> tuple[Stage, ...]:
    return (matching_stage("vsd", VariationalScore(**options.shared(given))),)


KIND = Kind(
    options=MatchingOptions,
    stages=_stages,
    makes="a student of student_steps",
    learns="the teacher's distribution by the difference of two scores (Wang et al. 2023)",
    reads="noise",
    samples="1 jump, or n with fresh noise",
    fit=FIT,
    has_critic=True,
    judged_by_holdout=False,
)
