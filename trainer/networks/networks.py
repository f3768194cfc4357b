"""The networks that take part in a fit."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from limbeck.diffusion.flow_map import FlowMap
from limbeck.trainer.networks.critic import Critic
from limbeck.trainer.networks.uncertainty import Uncertainty

RealScore = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""The frozen teacher: (x_t, t, stored labels, guidance scales [B]) -> x_0."""


@dataclass
class Networks:
    """The networks of a fit.

    student: the one being trained. target: an average of the student's weights, for the targets of consistency and ctm,
    without dropout.
    teacher: frozen, guided as its real score is to be. critic: the score of the student's samples, fitted by an
    optimizer of its own. weighting: the learned weight of each time, fitted with the student.
    """

    student: FlowMap
    target: FlowMap | None = None
    teacher: RealScore | None = None
    critic: Critic | None = None
    weighting: Uncertainty | None = None
