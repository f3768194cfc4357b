"""Knowledge distillation: one jump from the noise to the teacher's output."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.flow_map import FlowMap
from trainer.objectives import student_condition
from trainer.stream import Batch


@dataclass(frozen=True)
class Knowledge:
    """E d( G(x_T, T, 0), output ). Luhman & Luhman 2021, eq. 6.

    times: (T, 0). d(u): "l2" mean u^2, "l1" mean |u|, "pseudo_huber" sqrt(|u|^2 + c^2) - c with |u| of a whole sample.
    """

    times: tuple[float, ...]
    distance: str = "l2"
    c: float = 1.0
    columns: tuple[str, ...] = ("noise", "output")
    num_uniforms: int = 0

    def __call__(self, student: FlowMap, batch: Batch) -> Tensor:
        T, zero = torch.tensor(self.times, dtype=torch.float64)
        guess = student.jump(batch.states["noise"], T, zero, student_condition(student, batch.condition))
        return self.d(guess - batch.states["output"])

    def d(self, u: Tensor) -> Tensor:
        """Mean over the batch of each sample's distance."""
        if self.distance == "l2":
            return u.square().mean()
        if self.distance == "l1":
            return u.abs().mean()
        return (torch.sqrt(u.flatten(1).square().sum(1) + self.c**2) - self.c).mean()
