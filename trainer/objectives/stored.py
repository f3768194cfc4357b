"""Which stored states of each row an objective compares."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.objectives import times_on
from trainer.stream import Batch


def drawn(
    batch: Batch, columns: Sequence[str], times: tuple[float, ...], choices: Tensor, u: Tensor
) -> tuple[Tensor, Tensor]:
    """(states [n, B, ...], times float64 [n, B]) of one of `choices` for each row, all of them equally likely.

    columns, times: of the stored states. choices: int64 [m, n], indices of states that go together. u: [B] in (0, 1).
    """
    index = _kept_on(u.device, choices)[(u * len(choices)).long()].T
    states = torch.stack([batch.states[name] for name in columns])
    rows = torch.arange(len(batch), device=u.device)
    return states[index, rows], times_on(u.device, times)[index]


@functools.lru_cache(maxsize=64)
def _kept_on(device: torch.device, choices: Tensor) -> Tensor:
    return choices.to(device)
