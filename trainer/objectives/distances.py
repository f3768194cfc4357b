"""Distances of a student from its target: one number a sample."""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import interpolate

from limbeck.storage_schemas.places import LocalPath
from limbeck.trainer.objectives.kind import Options

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
            problem = f"{path} is no TorchScript file ({str(error).strip().splitlines()[0]})"
            raise ValueError(f"{problem}; save one by torch.jit.trace(LPIPS(), (x, x)).save, or use l2") from error
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


class DistanceOptions(Options):
    """An objective that compares x_0, or a state, with its target."""

    distance: Literal["l2", "l1", "pseudo_huber", "lpips"] = Field("l2", description="Distance to the target.")
    c: float | None = Field(None, gt=0, description="Width c of pseudo_huber, sqrt(norm(u)^2 + c^2) - c.")
    lpips: LocalPath | None = Field(
        None,
        description="TorchScript file, which is code that runs, of LPIPS, (a, b) in [-1, 1], [B, 3, H, W] -> one "
        "number a sample, such as torch.jit.trace(lpips.LPIPS(), (a, b)).save(FILE) writes.",
    )

    @property
    def distance_file(self) -> str | None:
        return str(self.lpips) if self.lpips else None

    @model_validator(mode="after")
    def _check_distance(self) -> Self:
        self._check_own("pseudo_huber", "c", needed="its width: --objective.c 0.1")
        self._check_own("lpips", "lpips", needed="its TorchScript file: --objective.lpips FILE (see --help)")
        return self

    def _check_own(self, distance: str, option: str, *, needed: str) -> None:
        """Refuse a distance without the option that belongs to it, and the option without the distance."""
        value = getattr(self, option)
        if self.distance == distance and value is None:
            raise ValueError(f"objective.distance {distance} needs {needed}, or choose l2")
        if self.distance != distance and value is not None:
            way = f"add --objective.distance {distance}, or leave it out"
            raise ValueError(f"objective.{option} {value} belongs to distance {distance}; {way}")

    def make_distance(self, sample_shape: tuple[int, ...]) -> Distance:
        """The distance. ValueError for LPIPS of samples that are no images, or from a file that is no TorchScript."""
        if self.distance == "lpips":
            assert self.lpips is not None
            return Lpips(self.lpips, sample_shape)
        if self.distance == "pseudo_huber":
            assert self.c is not None
            return PseudoHuber(self.c)
        return l1 if self.distance == "l1" else l2


def files_read(distance: Distance) -> dict[str, str]:
    """Digests of the files that a distance was read from."""
    return {"lpips_sha256": distance.sha256} if isinstance(distance, Lpips) else {}


def refuse_lpips(options: DistanceOptions, name: str, *, compared: str) -> None:
    """Refuse LPIPS, which compares images."""
    if options.distance == "lpips":
        raise ValueError(f"distance lpips compares images, {name} compares {compared}; choose another")
