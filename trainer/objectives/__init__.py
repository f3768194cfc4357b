"""What a student is fitted to: each objective is the paper's equation on one screen.

An objective says which stored columns it reads and how many uniform numbers of each sample it uses, and maps
(cast, batch) to the mean loss of the batch. Batch states are float32 [B, ...]; times and coefficients float64.
"""

import functools
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from diffusion.flow_map import FlowMap
from trainer.cast import Cast
from trainer.stream import Batch


class Objective(Protocol):
    """(cast, batch) -> scalar loss of the student."""

    @property
    def columns(self) -> tuple[str, ...]:
        """State columns that it reads."""

    @property
    def num_uniforms(self) -> int:
        """Numbers in (0, 1) that it uses of each sample."""

    def __call__(self, cast: Cast, batch: Batch) -> Tensor:
        """The mean over the batch."""


@runtime_checkable
class AlternatingObjective(Objective, Protocol):
    """One whose student learns from a critic, which itself learns from the student's samples."""

    @property
    def critic_steps(self) -> int:
        """Updates of the critic before each of the student's."""

    def critic_loss(self, cast: Cast, batch: Batch) -> Tensor:
        """The mean over the batch of the critic's own loss."""


@functools.lru_cache(maxsize=64)
def times_on(device: torch.device, times: tuple[float, ...]) -> Tensor:
    """Times as float64 on a device, where they stay: to copy them there at each step would be to wait for it."""
    return torch.tensor(times, dtype=torch.float64, device=device)


def told(student: FlowMap, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
    """(labels, guidance scales) of a batch as the student is told them: None for what it isn't."""
    guidance = batch.guidance if student.told_guidance else None
    return student_condition(student, batch.condition), guidance


def student_condition(student: FlowMap, stored: Tensor) -> Tensor | None:
    """Stored labels as the student is told them."""
    return null_labelled(stored, student.denoiser.num_classes)


def null_labelled(stored: Tensor, num_classes: int | None) -> Tensor | None:
    """Stored labels as a network is told them: -1 is its null label; None for one without classes."""
    return None if num_classes is None else torch.where(stored < 0, num_classes, stored)
