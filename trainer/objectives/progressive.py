"""Direct progressive distillation: each stage halves the steps, on the first teacher's stored states.

The paper's progressive distillation has each stage learn from the student before it; here every stage's targets are the
first teacher's own states, so that no error piles up and nothing is generated between stages.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.flow_map import FlowMap, jump_coefficients
from diffusion.process import Process, expand, scales
from trainer.objectives import student_condition
from trainer.stream import Batch


@dataclass(frozen=True)
class Progressive:
    """E max(alpha_t^2/sigma_t^2, 1) || x~ - mu_student(x_t, t) ||^2, x~ the x_0 whose DDIM step from x_t is x_s.

    One random segment t -> s of each sample. times: the stage's grid [n + 1]; columns: its states.
    Salimans & Ho 2022, algorithm 2 and eq. 9 (truncated SNR).
    """

    times: tuple[float, ...]
    columns: tuple[str, ...]
    num_uniforms: int = 1

    def __call__(self, student: FlowMap, batch: Batch) -> Tensor:
        segment = (batch.uniforms[:, 0] * (len(self.times) - 1)).long()
        states = torch.stack([batch.states[name] for name in self.columns])
        rows = torch.arange(len(batch), device=segment.device)
        x_t, x_s = states[segment, rows], states[segment + 1, rows]
        times = torch.tensor(self.times, dtype=torch.float64, device=segment.device)
        t, s = times[segment], times[segment + 1]
        target = progressive_target(student.process, x_t, x_s, t, s)
        alpha_t, sigma_t = scales(student.process, t, like=x_t)
        weight = (alpha_t / sigma_t).square().clamp(min=1)
        guess = student(x_t, t, student_condition(student, batch.condition))
        return (weight * (guess - target).square()).mean()


def progressive_target(process: Process, x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """x~ = (x_s - (sigma_s/sigma_t) x_t) / (alpha_s - (sigma_s/sigma_t) alpha_t); at sigma_s = 0 it is x_s/alpha_s.

    t, s: [] or [B], s < t. Salimans & Ho 2022, appendix G; float64 coefficients.
    """
    keep, pull = jump_coefficients(process, t, s)
    return expand(1 / pull, like=x_s) * x_s - expand(keep / pull, like=x_t) * x_t


# Least spacing of numbers in [1, 2).
_SPACING = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23}
# A rounding error is uniform over one spacing, whose mean square over log-uniform mantissas is 3/(8 log 2) spacing^2.
_RELATIVE_RMS = math.sqrt(3 / (8 * math.log(2)) / 12)


def rounding_error(process: Process, times: Sequence[float], *, storage_dtype: str, data_rms: float) -> list[float]:
    """Rms of what storage rounding puts into x~ on each segment of a grid: [n].

    The noise is exact: it was rounded before it was solved from.
    """
    t = torch.tensor(times, dtype=torch.float64)
    size = torch.sqrt((process.alpha(t) * data_rms) ** 2 + process.sigma(t) ** 2)
    error = _SPACING[storage_dtype] * _RELATIVE_RMS * size
    error[0] = 0.0
    keep, pull = jump_coefficients(process, t[:-1], t[1:])
    return (torch.hypot(error[1:], keep * error[:-1]) / pull.abs()).tolist()
