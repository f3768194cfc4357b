"""Sampling by a student in few steps: its grid, and jumps or fresh noise between them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limbeck.diffusion import noise
from limbeck.diffusion.flow_map import FlowMap
from limbeck.diffusion.models.checkpoint import Checkpoint

Way = Literal["jump", "renoise"]
"""A chain of jumps along the grid, or jumps to data with fresh noise between them (consistency models)."""

Noises = Callable[[int], Tensor]
"""Grid index -> fresh eps [B, ...]."""


@dataclass(frozen=True)
class FewSteps:
    """A student on one of its grids; times: float64 [N + 1]."""

    flow_map: FlowMap
    times: Tensor
    way: Way
    device: torch.device

    @property
    def noise_scale(self) -> float:
        """Sigma at the first time: x_T is this times N(0, I)."""
        return float(self.flow_map.process.sigma(self.times[0]))

    @torch.no_grad()
    def __call__(self, x_T: Tensor, condition: Tensor | None, guidance: Tensor, noises: Noises) -> Tensor:
        """x_0 [B, ...]; guidance: float64 [] or [B], given only to a student that takes it."""
        scales = guidance if self.flow_map.told_guidance else None
        if self.way == "jump":
            return self.flow_map.sample(x_T, self.times, condition, guidance=scales)
        return self.flow_map.renoise(x_T, self.times, condition, noises=noises, guidance=scales)


def few_steps(saved: Checkpoint, steps: int, *, way: Way | None, device: torch.device) -> FewSteps:
    """The student in `steps` steps. way: default: the one that it was fitted for."""
    flow_map = FlowMap(saved.build(device=device))  # type: ignore[arg-type]
    times = torch.tensor(saved.grids[steps], dtype=torch.float64)
    return FewSteps(flow_map, times, way or saved.about.get("sampling", "jump"), device)


def noises_of(seed: int, split: str, ids: NDArray[np.int64], *, like: Tensor) -> Noises:
    """Fresh noise for samples with these ids, a pure function of (seed, split, id, grid index), as `like` [B, ...]."""

    def drawn(index: int) -> Tensor:
        return torch.from_numpy(noise.standard_normal(seed, split, ids, tuple(like.shape[1:]), index=index)).to(like)

    return drawn
