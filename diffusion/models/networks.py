"""Networks F(x, time, condition) of our own, for small images and vectors. diffusers' are in unet.py and families.py.

Each can take two extra inputs per sample: `second_time`, the time that a flow map jumps to, and its guidance scale,
if built with second_time or told_guidance. Their weights start at 0.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.diffusion.models.embeddings import FourierTime, JointCoefficients, scalar_embedding, zeroed
from limbeck.diffusion.models.families import DiffusersModel
from limbeck.diffusion.models.unet import DiffusersUNet2D


class ResidualBlock(nn.Module):
    """h + W_2 dropout(silu(W_1 norm(h) + embedding)), [B, width]; W_2 starts at 0, so the block starts as identity."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.enter = nn.Linear(width, width)
        self.modulate = nn.Linear(width, 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.leave = zeroed(nn.Linear(width, width))

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulate(embedding).chunk(2, dim=1)
        inner = nn.functional.silu(self.enter(self.norm(h)) * (1 + scale) + shift)
        return h + self.leave(self.dropout(inner))


class ResidualMLP(nn.Module):
    """A residual MLP over the flattened sample, with Fourier features of time and an embedding of the class.

    x: [B, *sample_shape], time: [B], condition: int64 [B] in [0, num_classes], where num_classes is the null label;
    second_time, guidance: [B], where the network takes them. features: [B, num_features], after the last block.
    """

    def __init__(
        self,
        *,
        sample_shape: tuple[int, ...],
        num_classes: int | None,
        width: int = 256,
        depth: int = 4,
        dropout: float = 0.0,
        bandwidth: float = 1.0,
        second_time: bool = False,
        told_guidance: bool = False,
    ) -> None:
        super().__init__()
        size = math.prod(sample_shape)
        self.num_features = width
        self.time = nn.Sequential(FourierTime(64, bandwidth), nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = None if num_classes is None else nn.Embedding(num_classes + 1, width)
        self.enter = nn.Linear(size, width)
        self.blocks = nn.ModuleList(ResidualBlock(width, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.leave = zeroed(nn.Linear(width, size))
        self.has_second_time, self.told_guidance = second_time, told_guidance
        self.second_time = scalar_embedding(width) if second_time else None
        self.guidance = scalar_embedding(width) if told_guidance else None

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        condition: Tensor | None,
        second_time: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        h = self.features(x, time, condition, second_time, guidance)
        return self.leave(self.norm(h)).view_as(x)

    def features(
        self,
        x: Tensor,
        time: Tensor,
        condition: Tensor | None,
        second_time: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        embedding = self.time(time)
        if self.classes is not None:
            embedding = embedding + self.classes(condition)
        if self.second_time is not None:
            embedding = embedding + self.second_time(second_time)
        if self.guidance is not None:
            embedding = embedding + self.guidance(guidance)
        embedding = nn.functional.silu(embedding)
        h = self.enter(x.flatten(1))
        for block in self.blocks:
            h = block(h, embedding)
        return h


# Indices into (time, second time, guidance scale) that each of an affine network's terms takes together.
_JOINT = {"second_time": (0, 1), "guidance": (0, 2), "both": (0, 1, 2)}


class Affine(nn.Module):
    """F = a * x + b, coordinate by coordinate, with a and b linear in Fourier features of time.

    With extra inputs, a and b get terms that are linear in Fourier features of time and that number together, and
    of all three. Its least-squares fit is convex, so the best error that it can reach is known in closed form: the
    student of the oracle tests. No classes.
    """

    def __init__(
        self,
        *,
        sample_shape: tuple[int, ...],
        num_classes: int | None,
        bandwidth: float = 1.0,
        second_time: bool = False,
        told_guidance: bool = False,
    ) -> None:
        super().__init__()
        if num_classes is not None:
            raise ValueError(f"network affine knows no classes, this model has {num_classes}; use residual_mlp")
        size = self.num_features = math.prod(sample_shape)
        self.time = FourierTime(64, bandwidth)
        self.coefficients = zeroed(nn.Linear(64, 2 * size))
        self.has_second_time, self.told_guidance = second_time, told_guidance
        asked = {"second_time": second_time, "guidance": told_guidance, "both": second_time and told_guidance}
        joint = {name: numbers for name, numbers in _JOINT.items() if asked[name]}
        self.joint = nn.ModuleDict(
            {name: JointCoefficients(len(joint[name]), 2 * size, bandwidth=bandwidth) for name in joint}
        )

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        condition: Tensor | None,
        second_time: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        coefficients = self.coefficients(self.time(time))
        numbers: tuple[Any, ...] = time, second_time, guidance
        for name, terms in self.joint.items():
            coefficients = coefficients + terms(torch.stack([numbers[index] for index in _JOINT[name]], dim=1))
        gain, shift = coefficients.chunk(2, dim=1)
        return (gain * x.flatten(1) + shift).view_as(x)

    def features(self, *inputs: Tensor | None) -> Tensor:
        return self(*inputs).flatten(1)


NETWORKS: dict[str, type[ResidualMLP | Affine | DiffusersUNet2D | DiffusersModel]] = {
    "residual_mlp": ResidualMLP,
    "affine": Affine,
    "diffusers_unet2d": DiffusersUNet2D,
    "diffusers": DiffusersModel,
}
