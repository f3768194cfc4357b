"""Embeddings of per-sample scalars: time, target time, guidance scale."""

import math

import torch
from torch import Tensor, nn


class FourierTime(nn.Module):
    """Random Fourier features of the network's time, [B] -> [B, size]. Tancik et al. 2020; frequencies are saved."""

    frequencies: Tensor

    def __init__(self, size: int, bandwidth: float) -> None:
        super().__init__()
        self.register_buffer("frequencies", _drawn(size // 2, scale=bandwidth))

    def forward(self, time: Tensor) -> Tensor:
        return _waves(2 * math.pi * time[:, None] * self.frequencies).to(self.frequencies)


class JointCoefficients(nn.Module):
    """Coefficients that are linear in random Fourier features of several numbers at once, [B, numbers] -> [B, count].

    They start at 0.
    """

    frequencies: Tensor

    def __init__(self, numbers: int, count: int, *, size: int = 256, bandwidth: float) -> None:
        super().__init__()
        self.register_buffer("frequencies", _drawn(numbers, size // 2, scale=bandwidth))
        self.coefficients = zeroed(nn.Linear(size, count))

    def forward(self, numbers: Tensor) -> Tensor:
        # No matrix product: autocast would take the angles at its precision.
        angle = 2 * math.pi * (numbers[:, :, None] * self.frequencies).sum(1)
        return self.coefficients(_waves(angle).to(self.frequencies))


def scalar_embedding(width: int, *, bandwidth: float = 1.0) -> nn.Sequential:
    """An embedding of one more number, [B] -> [B, width], to be added to the time's.

    It starts at 0, so that a network with an extra input answers as it did before.
    """
    last = zeroed(nn.Linear(width, width))
    return nn.Sequential(FourierTime(64, bandwidth), nn.Linear(64, width), nn.SiLU(), last)


def zeroed(layer: nn.Module) -> nn.Module:
    """The same layer, with weights and bias 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _drawn(*shape: int, scale: float) -> Tensor:
    """Normal numbers by torch's seed. None on meta, where any sum imports torch's whole compiler: a second of time."""
    empty = torch.empty(shape)
    return empty if empty.is_meta else empty.normal_() * scale


def _waves(angle: Tensor) -> Tensor:
    return torch.cat([angle.cos(), angle.sin()], dim=1)
