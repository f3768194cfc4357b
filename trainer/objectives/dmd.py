"""Distribution matching distillation: the student's samples are moved from their own score towards the data's."""

from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import softplus

from limbeck.storage_schemas.images import images_digest, summary
from limbeck.trainer.networks.networks import Networks
from limbeck.trainer.objectives.conditioning import conditioning
from limbeck.trainer.objectives.distances import Distance, DistanceOptions, files_read, l2
from limbeck.trainer.objectives.kind import Given, Kind, Stage
from limbeck.trainer.objectives.matching import (
    FIT,
    Diffused,
    Matching,
    MatchingOptions,
    answers,
    denoising_error,
    matching_stage,
    pulled,
    size,
)
from limbeck.trainer.objectives.randomness import uniform
from limbeck.trainer.objectives.stored import times_on
from limbeck.trainer.reading.images import load_images
from limbeck.trainer.stream import Batch


class RealImages:
    """Images for the discriminator, with each sample's label, or any where that has none.

    They are kept on the device that first asked for them. digest: of them as they are given, on the CPU. said: what
    they are, in a line for the user.
    """

    def __init__(self, images: Tensor, labels: Tensor, *, said: str = "") -> None:
        self.said = said
        self.digest = images_digest(images.numpy(), labels.numpy())
        self._images, self._counts = (
            images[torch.argsort(labels, stable=True)],
            torch.bincount(labels[labels >= 0], minlength=1),
        )

    def pick(self, stored: Tensor, u: Tensor) -> Tensor:
        """Float32 [B, ...] for stored labels [B] and u in (0, 1), float64 [B]."""
        self._images, self._counts = self._images.to(u.device), self._counts.to(u.device)
        label = stored.clamp(0, len(self._counts) - 1)
        count, first = self._counts.take(label), (self._counts.cumsum(0) - self._counts).take(label)
        known = (label == stored) & (count > 0)
        chosen = torch.where(known, first, 0) + (u * torch.where(known, count, len(self._images))).long()
        return self._images[chosen]


@dataclass(frozen=True, kw_only=True)
class DistributionMatching(Matching):
    """1/2 || x - sg(x - alpha_t (mu_fake - mu_real)/mean|mu_real - x|) ||^2 + regression d(G(noise, T, 0), output).

    The first term's gradient in x is that of KL(student || data) at t, times sigma_t^2/alpha_t over the size of the
    teacher's own error; a mean over numbers. Yin et al. 2024, eq. 7-9.

    DMD2 (Yin et al. 2024b): no regression, several critic steps, and gan > 0: the critic's head tells diffused samples
    from diffused real ones, those of `real`, or the stored outputs, at the critic's noise levels and by softplus
    losses; the student is to be taken for real at its own. Both terms are weighed by gan.
    """

    distance: Distance = l2
    regression: float = 0.0
    gan: float = 0.0
    real: RealImages | None = field(default=None, compare=False)  # named by the user, the same on all data

    @property
    def columns(self) -> tuple[str, ...]:
        asks_outputs = self.regression or (self.gan and self.real is None)
        return ("noise", "output") if asks_outputs else ("noise",)

    def __call__(self, networks: Networks, batch: Batch) -> Tensor:
        x = self.sample(networks, batch)
        asked = self.asked(networks, batch, x)
        loss = pulled(x, matching_direction(networks, batch, x, asked))
        if self.gan:
            loss = loss + self.gan * softplus(-_logit(networks, batch, asked)).mean()
        if self.regression:
            jumped = self._first_jump(networks, batch, x)
            loss = loss + self.regression * self.distance(jumped, batch.states["output"]).mean()
        return loss

    def critic_loss(self, networks: Networks, batch: Batch) -> Tensor:
        """The denoising loss of the samples, and the discriminator's."""
        x, fake = self.shown_to_critic(networks, batch)
        loss = denoising_error(networks, batch, x, fake)
        if not self.gan:
            return loss
        real = self.diffused(networks, batch, self._real(batch), noise="of real samples", u=batch.uniforms[:, 0])
        discrimination = softplus(_logit(networks, batch, fake)) + softplus(-_logit(networks, batch, real))
        return loss + self.gan * discrimination.mean()

    def _first_jump(self, networks: Networks, batch: Batch, x: Tensor) -> Tensor:
        """G(noise, T, 0), which x is already where the student has one step."""
        if len(self.times) == 2:
            return x
        first, *_, last = times_on(batch.positions.device, self.times)
        labels, guidance = conditioning(networks.student, batch)
        return networks.student.jump(batch.states["noise"], first, last, labels, guidance=guidance)

    def _real(self, batch: Batch) -> Tensor:
        if self.real is None:
            return batch.states["output"]
        return self.real.pick(batch.condition, uniform(self.seed, "real image", batch.positions))


@torch.no_grad()
def matching_direction(networks: Networks, batch: Batch, x: Tensor, asked: Diffused) -> Tensor:
    """alpha_t (mu_fake - mu_real)/mean|mu_real - x|, [B, ...]. Yin et al. 2024, eq. 7-8 in terms of x_0."""
    real, fake = answers(networks, batch, asked)
    return asked.alpha_t * (fake - real) / size(real - x)


def _logit(networks: Networks, batch: Batch, asked: Diffused) -> Tensor:
    assert networks.critic is not None
    return networks.critic.logit(asked.x_t, asked.t, batch.condition, batch.guidance)


class DmdOptions(MatchingOptions, DistanceOptions):
    """Options of dmd."""

    regression: float = Field(0.25, ge=0, description="Weight of the distance to the stored outputs; DMD2 has 0.")
    gan: float = Field(0.0, ge=0, description="Weight of DMD2's discriminator on the critic's features; 0 for none.")

    @property
    def has_discriminator(self) -> bool:
        return self.gan > 0


def _stages(options: DmdOptions, given: Given) -> tuple[Stage, ...]:
    if options.gan:
        _check_features(given.stored.recipe.teacher.model)
    real = _real_images(given.images, given.sample_shape) if given.images else None
    d = options.make_distance(given.sample_shape)
    objective = DistributionMatching(
        **options.shared(given), distance=d, regression=options.regression, gan=options.gan, real=real
    )
    reads = files_read(d) | ({"images_digest": real.digest} if real else {})
    return (matching_stage("dmd", objective, reads=reads, notes=(real.said,) if real else ()),)


def _check_features(model: dict[str, Any]) -> None:
    """Refuse a network whose inner features a discriminator can't have."""
    blocks = model.get("network", {}).get("config", {}).get("down_block_types", ())
    if skips := [name for name in blocks if "Skip" in name]:
        has = f"objective.gan: the teacher's UNet has {skips[0]}, whose inner features can't be had"
        raise ValueError(f"{has}; leave it out, or distil a teacher of other blocks")


def _real_images(uri: str, sample_shape: tuple[int, ...]) -> RealImages:
    images, labels = load_images(uri, "train")
    if images.shape[1:] != sample_shape:
        differ = f"images {uri} are {list(images.shape[1:])}, the samples are {list(sample_shape)}"
        raise ValueError(f"{differ}; name images of theirs, or leave --images out to take stored outputs for real")
    return RealImages(images, labels, said=summary(uri, "train", images.numpy(), labels.numpy()))


KIND = Kind(
    options=DmdOptions,
    stages=_stages,
    makes="a student of student_steps",
    learns="the teacher's distribution by two scores, with a regression on pairs (Yin et al. 2024); DMD2's switches",
    reads="noise, output",
    samples="1 jump, or n with fresh noise",
    fit=FIT,
    has_critic=True,
    judged_by_holdout=False,
)
