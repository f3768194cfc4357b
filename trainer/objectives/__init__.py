"""What a student is fitted to: each objective is the paper's equation on one screen.

An objective says which stored columns it reads and how many uniform numbers of each sample it uses, and maps
(student, batch) to the mean loss of the batch. Batch states are float32 [B, ...]; times and coefficients float64.
"""

from typing import Protocol

import torch
from torch import Tensor

from diffusion.flow_map import FlowMap
from trainer.stream import Batch


class Objective(Protocol):
    """(student, batch) -> scalar loss."""

    @property
    def columns(self) -> tuple[str, ...]:
        """State columns that it reads."""

    @property
    def num_uniforms(self) -> int:
        """Numbers in (0, 1) that it uses of each sample."""

    def __call__(self, student: FlowMap, batch: Batch) -> Tensor:
        """The mean over the batch."""


def student_condition(student: FlowMap, stored: Tensor) -> Tensor | None:
    """Stored labels as the student is told them: -1 is its null label; None for one without classes."""
    num_classes = student.denoiser.num_classes
    return None if num_classes is None else torch.where(stored < 0, num_classes, stored)
