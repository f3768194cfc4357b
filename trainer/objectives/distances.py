"""How far a student is from its target: one number a sample."""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from trainer.objectives.options import ObjectiveConfig

Distance = Callable[[Tensor, Tensor], Tensor]
"""(a, b), both [B, ...] -> [B]."""

_LEAST = 64


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Mean of (a - b)^2 over a sample's numbers."""
    return (a - b).square().flatten(1).mean(1)


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean of |a - b| over a sample's numbers."""
    return (a - b).abs().flatten(1).mean(1)


@dataclass(frozen=True)
class PseudoHuber:
    """sqrt(|a - b|^2 + c^2) - c with |.| of the whole sample. Charbonnier et al. 1997; Song & Dhariwal 2024, eq. 8."""

    c: float

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.sqrt((a - b).flatten(1).square().sum(1) + self.c**2) - self.c


class Lpips:
    """Zhang et al. 2018 by a network of the user's: TorchScript, (a, b) in [-1, 1], [B, 3, H, W] -> B numbers.

    One channel is shown as three, and images of fewer than 64 pixels a side are enlarged by a whole number to 64 or
    more: its networks halve an image four times and more. Two are equal if their files hold the same, which `sha256`
    says. Raises ValueError for samples that are no images, or for a file that is no TorchScript.
    """

    def __init__(self, path: Path, sample_shape: tuple[int, ...]) -> None:
        if len(sample_shape) != 3 or sample_shape[0] not in (1, 3):
            raise ValueError(f"lpips compares images [1 or 3, H, W], these samples are {list(sample_shape)}; use l2")
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there; name a TorchScript file of LPIPS, or use l2")
        data = path.read_bytes()
        self.sha256 = hashlib.sha256(data).hexdigest()
        try:
            self._network = torch.jit.load(io.BytesIO(data), map_location="cpu").eval()
        except (RuntimeError, ValueError) as error:
            told = f"{path} is no TorchScript file ({str(error).strip().splitlines()[0]})"
            raise ValueError(f"{told}; save one by torch.jit.trace(LPIPS(), (x, x)).save, or use l2") from error
        for parameter in self._network.parameters():
            parameter.requires_grad_(False)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return self._network.to(a.device)(_shown(a), _shown(b)).reshape(len(a))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Lpips) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)


def _shown(images: Tensor) -> Tensor:
    smallest = min(images.shape[2:])
    if smallest < _LEAST:
        images = interpolate(images, scale_factor=-(-_LEAST // smallest), mode="bicubic", align_corners=False)
    return images.expand(-1, 3, -1, -1)


def distance(options: ObjectiveConfig, sample_shape: tuple[int, ...]) -> Distance:
    """The one that the options name."""
    if options.distance == "lpips":
        assert options.lpips is not None
        return Lpips(options.lpips, sample_shape)
    if options.distance == "pseudo_huber":
        assert options.c is not None
        return PseudoHuber(options.c)
    return l1 if options.distance == "l1" else l2
