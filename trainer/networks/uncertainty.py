"""The learned weight of each time, fitted with the student."""

import torch
from torch import Tensor, nn

from limbeck.diffusion.models.embeddings import JointCoefficients
from limbeck.diffusion.process import Process

_BANDWIDTH, _FARTHEST = 1.0, 1e3


class Uncertainty(nn.Module):
    """u(t, until): a line over joint Fourier features of log(r)/4 at both times; it starts at 0 everywhere."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.line = JointCoefficients(2, 1, bandwidth=_BANDWIDTH)

    def forward(self, process: Process, t: Tensor, until: Tensor) -> Tensor:
        """float32 [B], of float64 times [B]."""
        ratios = torch.stack([_log_ratio(process, time).float() for time in (t, until)], dim=1)
        return self.line(ratios).squeeze(1)


def _log_ratio(process: Process, t: Tensor) -> Tensor:
    ratio = process.sigma(t) / process.alpha(t)
    return torch.log(ratio.clamp(1 / _FARTHEST, _FARTHEST)) / 4
