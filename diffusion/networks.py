"""Networks F(x, time, condition): small ones of our own, for small images and vectors, and diffusers' UNet."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class FourierTime(nn.Module):
    """Random Fourier features of the network's time, [B] -> [B, size]. Tancik et al. 2020; frequencies are saved."""

    frequencies: Tensor

    def __init__(self, size: int, bandwidth: float) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(size // 2) * bandwidth)

    def forward(self, time: Tensor) -> Tensor:
        angle = 2 * math.pi * time[:, None] * self.frequencies
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class ResidualBlock(nn.Module):
    """h + W_2 dropout(silu(W_1 norm(h) + embedding)), [B, width]; W_2 starts at 0, so the block starts as identity."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.enter = nn.Linear(width, width)
        self.modulate = nn.Linear(width, 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.leave = nn.Linear(width, width)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulate(embedding).chunk(2, dim=1)
        inner = nn.functional.silu(self.enter(self.norm(h)) * (1 + scale) + shift)
        return h + self.leave(self.dropout(inner))


class ResidualMLP(nn.Module):
    """A residual MLP over the flattened sample, told time by Fourier features and the class by an embedding.

    x: [B, *sample_shape], time: [B], condition: int64 [B] in [0, num_classes], where num_classes is the null label.
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
    ) -> None:
        super().__init__()
        size = math.prod(sample_shape)
        self.time = nn.Sequential(FourierTime(64, bandwidth), nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = None if num_classes is None else nn.Embedding(num_classes + 1, width)
        self.enter = nn.Linear(size, width)
        self.blocks = nn.ModuleList(ResidualBlock(width, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, size)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor, time: Tensor, condition: Tensor | None) -> Tensor:
        embedding = self.time(time)
        if self.classes is not None:
            embedding = embedding + self.classes(condition)
        embedding = nn.functional.silu(embedding)
        h = self.enter(x.flatten(1))
        for block in self.blocks:
            h = block(h, embedding)
        return self.leave(self.norm(h)).view_as(x)


class Affine(nn.Module):
    """F = a(time) * x + b(time), coordinate by coordinate, with a and b linear in Fourier features of time.

    Its least-squares fit is convex, so the best error that it can reach is known in closed form: the student of the
    oracle tests. No classes.
    """

    def __init__(self, *, sample_shape: tuple[int, ...], num_classes: int | None, bandwidth: float = 1.0) -> None:
        super().__init__()
        if num_classes is not None:
            raise ValueError(f"network affine knows no classes, this model has {num_classes}; use residual_mlp")
        self.time = FourierTime(64, bandwidth)
        self.coefficients = nn.Linear(64, 2 * math.prod(sample_shape))
        nn.init.zeros_(self.coefficients.weight)
        nn.init.zeros_(self.coefficients.bias)

    def forward(self, x: Tensor, time: Tensor, condition: Tensor | None) -> Tensor:
        gain, shift = self.coefficients(self.time(time)).chunk(2, dim=1)
        return (gain * x.flatten(1) + shift).view_as(x)


class DiffusersUNet2D(nn.Module):
    """diffusers' UNet2DModel, x: [B, C, H, W], time: [B] timesteps; no classes. pip install 'limbeck[diffusers]'."""

    def __init__(
        self, *, sample_shape: tuple[int, ...], num_classes: int | None, config: Mapping[str, Any], dropout: float = 0.0
    ) -> None:
        super().__init__()
        if num_classes is not None:
            raise ValueError(f"network diffusers_unet2d knows no classes, this model has {num_classes}")
        self.unet = import_diffusers().UNet2DModel.from_config({**config, "dropout": dropout})

    def forward(self, x: Tensor, time: Tensor, condition: Tensor | None) -> Tensor:
        return self.unet(x, time).sample


def import_diffusers() -> Any:
    """The package, which only those who name such a model need."""
    try:
        import diffusers
    except ImportError as error:
        raise ValueError("a diffusers model needs its package: pip install 'limbeck[diffusers]'") from error
    return diffusers


NETWORKS: dict[str, type[ResidualMLP | Affine | DiffusersUNet2D]] = {
    "residual_mlp": ResidualMLP,
    "affine": Affine,
    "diffusers_unet2d": DiffusersUNet2D,
}
