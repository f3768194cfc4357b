"""Low-rank changes of a network's weights, W + B A: few numbers to fit, and the weights themselves are shared.

Hu et al. 2022 (LoRA), with alpha/r = 1: B starts at 0, so that the network starts as it was.
"""

import copy
import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

M = TypeVar("M", bound=nn.Module)


class LowRank(nn.Module):
    """W -> W + B A for a weight [out, ...]: A [rank, numbers of an output], B [out, rank]."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        outputs, inputs = weight.flatten(1).shape
        rank = min(rank, outputs, inputs)
        self.a = nn.Parameter(torch.randn(rank, inputs).to(weight) / math.sqrt(inputs))
        self.b = nn.Parameter(torch.zeros(outputs, rank).to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.b @ self.a).view_as(weight)


def with_low_rank(module: M, rank: int) -> M:
    """A module that shares the parameters of this one, which take no gradients there, with low-rank changes to fit.

    It changes all weights of Linear and Conv2d layers. A is drawn from torch's seed.
    """
    changed = sharing(module).requires_grad_(False)
    for layer in list(changed.modules()):
        if isinstance(layer, nn.Linear | nn.Conv2d):
            register_parametrization(layer, "weight", LowRank(layer.weight, rank))
    return changed


def sharing(module: M) -> M:
    """A copy of a module whose parameters and buffers are the same tensors."""
    same = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in same})
