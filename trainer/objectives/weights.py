"""Weights of each time: fixed ones of a loss, and one that is learned with the student."""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from limbeck.diffusion.process import Process
from limbeck.trainer.networks.networks import Networks
from limbeck.trainer.objectives.kind import Options

WeightingName = Literal["uniform", "snr", "truncated_snr", "learned"]


def time_weight(name: str, process: Process, t: Tensor) -> Tensor:
    """float64 of t's shape: uniform 1, snr alpha^2/sigma^2, truncated_snr its maximum with 1; t > 0.

    Weights of a squared error of x_0: snr makes it one of eps. Salimans & Ho 2022, section 4. Of one of a velocity,
    which is of order 1 at small t, their mean over t would not be finite: reflow is refused snr and truncated_snr.
    """
    if name == "uniform":
        return torch.ones_like(t, dtype=torch.float64)
    snr = (process.alpha(t) / process.sigma(t)).square()
    return snr.clamp(min=1) if name == "truncated_snr" else snr


class WeightingOptions(Options):
    """An objective that weighs times."""

    weighting: WeightingName = Field(
        "uniform",
        description="Weight of each time. Reflow takes uniform or learned: the others are weights of errors of x_0.",
    )

    @property
    def learns_weighting(self) -> bool:
        return self.weighting == "learned"


@dataclass(frozen=True)
class Weighting:
    """A loss of each sample [B], weighed by the time t > 0 that its student started from, float64 [B].

    learned: loss/exp(u) + u with u(t), or u(t, until), of the weighting network: at its optimum exp(u) is the expected
    loss there, so that every time counts alike. Karras et al. 2024 (EDM2), eq. 21; Kendall et al. 2018.
    """

    name: str = "uniform"

    def __call__(self, networks: Networks, loss: Tensor, t: Tensor, until: Tensor | None = None) -> Tensor:
        if self.name != "learned":
            return loss * time_weight(self.name, networks.student.process, t).to(loss)
        assert networks.weighting is not None
        u = networks.weighting(networks.student.process, t, t if until is None else until).to(loss)
        return loss / u.exp() + u
