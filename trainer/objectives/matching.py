"""The common part of dmd, vsd and sid: the student's samples, their diffusion for both scores, the critic's loss."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from pydantic import Field, field_validator
from torch import Tensor

from limbeck.diffusion.grids import near_ratio, subset_indices
from limbeck.diffusion.process import VE, Process, expand, scales
from limbeck.trainer.networks.networks import Networks
from limbeck.trainer.objectives.conditioning import conditioning
from limbeck.trainer.objectives.kind import AlternatingObjective, Given, Options, Stage, Times
from limbeck.trainer.objectives.randomness import normal
from limbeck.trainer.objectives.stored import times_at, times_on
from limbeck.trainer.stream import Batch

_RHO = 7.0


class Diffused(NamedTuple):
    """x_t = alpha_t x + sigma_t eps, with alpha_t and sigma_t to multiply like x_t."""

    x_t: Tensor
    t: Tensor
    alpha_t: Tensor
    sigma_t: Tensor


class MatchingOptions(Options):
    """Options of every objective with a critic."""

    critic_steps: int = Field(1, ge=1, description="Updates of the critic before each of the student's.")
    student_steps: int = Field(1, ge=1, description="Steps of the student, with fresh noise between them.")
    t_range: tuple[float, float] = Field((0.02, 0.98), description="Share of the noise levels that is drawn from.")
    guidance: float | None = Field(None, description="Guidance scale of the real score; default: the recipe's.")

    @field_validator("t_range")
    @classmethod
    def _ascends(cls, t_range: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= t_range[0] < t_range[1] <= 1:
            raise ValueError(f"objective.t_range {list(t_range)}: give two shares in [0, 1] that ascend")
        return t_range

    @property
    def student_every(self) -> int:
        return self.critic_steps

    @property
    def real_guidance(self) -> float | None:
        return self.guidance

    def shared(self, given: Given) -> dict[str, Any]:
        """The fields of Matching. ValueError for a teacher that has no such score.

        The student's grid is nested in the recipe's; its states need not be stored.
        """
        recipe = given.stored.recipe
        model = recipe.teacher.model
        if self.guidance not in (None, 1.0) and model["num_classes"] is None:
            raise ValueError(f"objective.guidance {self.guidance} needs a teacher with classes; leave it out")
        if (self.guidance or 0.0) < 0 and model.get("network", {}).get("told_guidance"):
            raise ValueError(f"objective.guidance {self.guidance}: its teacher takes scales of 0 and more; give one")
        times = times_at(recipe, subset_indices(recipe.num_steps, self.student_steps))
        return {"times": times, "critic_steps": self.critic_steps, "t_range": self.t_range, "seed": given.seed}


FIT = {"lr": 1e-4, "beta1": 0.0}
"""Defaults of a fit on an objective with a critic."""


@dataclass(frozen=True, kw_only=True)
class Matching:
    """A student that is asked only at the times of its grid, T down to 0, always for a jump to data.

    Student and critic are each asked at fresh noise levels from `t_range`, shares of the process's levels. All
    random numbers are functions of the row's position in the run.
    """

    times: tuple[float, ...]
    critic_steps: int
    t_range: tuple[float, float]
    seed: int
    num_uniforms: int = 3

    @property
    def columns(self) -> tuple[str, ...]:
        return ("noise",)

    def critic_loss(self, networks: Networks, batch: Batch) -> Tensor:
        """E || F(x_t, t) - target(x, x_t) ||^2 of the critic on current samples x: denoising score matching."""
        return denoising_error(networks, batch, *self.shown_to_critic(networks, batch))

    def shown_to_critic(self, networks: Networks, batch: Batch) -> tuple[Tensor, Diffused]:
        """The student's samples, without a gradient, and what the critic is to denoise."""
        with torch.no_grad():
            x = self.sample(networks, batch)
        return x, self.diffused(networks, batch, x, noise="of the critic", u=batch.uniforms[:, 0])

    def asked(self, networks: Networks, batch: Batch, x: Tensor) -> Diffused:
        """The student's samples as both scores are asked about them."""
        return self.diffused(networks, batch, x, noise="of the student", u=batch.uniforms[:, 1])

    def diffused(self, networks: Networks, batch: Batch, x: Tensor, *, noise: str, u: Tensor) -> Diffused:
        """x at the noise levels of u in (0, 1), with the noise of this name."""
        t = noise_level(networks.student.process, u, self.t_range)
        alpha_t, sigma_t = scales(networks.student.process, t, like=x)
        eps = normal(self.seed, noise, batch.positions, x.shape[1:]).to(x)
        return Diffused(alpha_t * x + sigma_t * eps, t, alpha_t, sigma_t)

    def sample(self, networks: Networks, batch: Batch) -> Tensor:
        """x = G(x_k, t_k, 0) of a step k of the student's grid, [B, ...]; G(noise, T, 0) where it has one.

        With several steps each row draws its own k, and the student makes the inputs itself, without a gradient:
        x_k = alpha_k G(x_k-1, t_k-1, 0) + sigma_k eps, from x_0 = noise. All rows are taken down the whole grid, so
        that a batch costs as many calls more as it has inner times, whatever was drawn. Yin et al. 2024b, section 4.5.
        """
        student, times = networks.student, times_on(batch.positions.device, self.times)
        labels, guidance = conditioning(student, batch)
        x, t = batch.states["noise"], times[0]
        if len(times) > 2:
            x, t = self.simulated(networks, batch)
        return student.jump(x, t, times[-1], labels, guidance=guidance)

    @torch.no_grad()
    def simulated(self, networks: Networks, batch: Batch) -> tuple[Tensor, Tensor]:
        """(x_k, t_k) of each row's own k: [B, ...] and float64 [B]."""
        student, times = networks.student, times_on(batch.positions.device, self.times)
        labels, guidance = conditioning(student, batch)
        k = (batch.uniforms[:, 2] * (len(times) - 1)).long()
        start = x = batch.states["noise"]
        for index in range(1, len(times) - 1):
            x_0 = student.jump(x, times[index - 1], times[-1], labels, guidance=guidance)
            alpha_t, sigma_t = scales(student.process, times[index], like=x)
            x = alpha_t * x_0 + sigma_t * normal(self.seed, f"step {index}", batch.positions, x.shape[1:]).to(x)
            start = torch.where(expand(k == index, like=x).bool(), x, start)
        return start, times[k]


class MatchingObjective(AlternatingObjective, Protocol):
    """An objective that is a Matching."""

    @property
    def times(self) -> Times: ...


def matching_stage(name: str, objective: MatchingObjective, **more: Any) -> Stage:
    """A stage validated by its first jump straight to the data, which is all that a student of one step does."""
    times = objective.times
    return Stage(name, objective, (times[0], times[-1]), {len(times) - 1: times}, sampling="renoise", **more)


def noise_level(process: Process, u: Tensor, t_range: tuple[float, float]) -> Tensor:
    """t at shares of the noise levels uniform in t_range, from u in (0, 1), float64 [B]. Share 0 is data, 1 is T.

    A share is t/T; but for VE, whose T lies far out, sigma^(1/7) goes evenly from EDM's 0.002 to T, as in Karras et
    al. 2022, eq. 5: SiD and DMD draw so from EDM teachers.
    """
    share = t_range[0] + u.double() * (t_range[1] - t_range[0])
    if not isinstance(process, VE):
        return share * process.T
    near, far = near_ratio(process) ** (1 / _RHO), process.T ** (1 / _RHO)
    return (near + share * (far - near)) ** _RHO


def denoising_error(networks: Networks, batch: Batch, x: Tensor, shown: Diffused) -> Tensor:
    """The critic's error, a mean over the batch and numbers."""
    assert networks.critic is not None
    return networks.critic.error(x, shown.x_t, shown.t, batch.condition, batch.guidance).mean()


def answers(networks: Networks, batch: Batch, asked: Diffused) -> tuple[Tensor, Tensor]:
    """(mu_real, mu_fake) of diffused samples: the teacher's x_0, guided as it is, and the critic's."""
    assert networks.teacher is not None
    assert networks.critic is not None
    question = asked.x_t, asked.t, batch.condition, batch.guidance
    return networks.teacher(*question), networks.critic(*question)


def size(error: Tensor) -> Tensor:
    """mean|error| of each sample, to divide [B, ...] by, without a gradient."""
    return expand(error.detach().abs().flatten(1).mean(1), like=error)


def pulled(x: Tensor, direction: Tensor) -> Tensor:
    """1/2 || x - sg(x - direction) ||^2, a mean over numbers: a loss whose gradient in x is direction/x.numel()."""
    return (x - (x - direction).detach()).square().mean() / 2
