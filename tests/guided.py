"""Guidance in closed form: Gaussian classes of one variance, whose guided flow is a Gaussian's again."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from limbeck.diffusion.gaussian import GaussianTeacher
from limbeck.diffusion.models.checkpoint import Checkpoint, pack, widened
from limbeck.diffusion.models.teachers import builtin_checkpoint
from limbeck.diffusion.process import VE

MEANS = (-1.0, 0.5, 2.0)
"""Of the classes; of the null label 0."""
VARIANCE = 0.25
ZERO = torch.tensor(0.0, dtype=torch.float64)


class GaussianClasses(nn.Module):
    """Coordinates N(mean of the label, VARIANCE). `python:tests.guided:GaussianClasses` is a teacher."""

    process, num_classes, sample_shape = VE(), len(MEANS), (2,)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("means", torch.tensor([*MEANS, 0.0], dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        labels = torch.full((len(x_t),), self.num_classes) if condition is None else condition
        means = self.means[labels][:, None]
        centred = GaussianTeacher(self.process, mean=0.0, variance=VARIANCE)
        return (means + centred(x_t.double() - self.process.alpha(t).reshape(-1, 1) * means, t)).to(x_t.dtype)


def guided_flow(labels: Tensor, scales: Tensor, x_s: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """The guided flow: mu_w is the denoiser of N(w m, VARIANCE), m the class's mean. x_s: float64 [B, 2]."""
    means = (scales * torch.tensor(MEANS, dtype=torch.float64)[labels])[:, None]
    return means + GaussianTeacher(VE(), mean=0.0, variance=VARIANCE).flow_map(x_s - means, s, t)


def exact_output(x_T: Tensor, labels: Tensor, scales: Tensor) -> Tensor:
    """x_0 of the guided flow from noise [B, 2]."""
    return guided_flow(labels, scales, x_T.double(), torch.tensor(80.0, dtype=torch.float64), ZERO)


def told_digits() -> Checkpoint:
    """The digits teacher told its guidance scale, in a way that changes what it answers."""
    torch.manual_seed(0)
    saved = widened(builtin_checkpoint("digits"), told_guidance=True)
    module = saved.build()
    for name, parameter in module.named_parameters():
        if "guidance" in name:
            nn.init.normal_(parameter, std=0.5)
    return replace(saved, weights=pack(module))
