"""Students of which everything is known, and the Gaussian trajectories that they are fitted to."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from limbeck.diffusion.denoiser import Denoiser, second_time
from limbeck.diffusion.flow_map import FlowMap, jump_coefficients
from limbeck.diffusion.gaussian import GaussianTeacher
from limbeck.diffusion.prediction import Sample
from limbeck.diffusion.process import Process, expand
from limbeck.trainer.networks.networks import Networks
from limbeck.trainer.objectives.kind import Objective
from limbeck.trainer.stream import Batch

MEAN, VARIANCE = 0.5, 0.25


class Perfect(GaussianTeacher):
    """The mu whose jumps are the Gaussian's own flow, plus `off`, which is 0: what a loss's gradient says of it.

    Told where it jumps to. Elsewhere (until = t) it is the plain denoiser.
    """

    has_second_time, told_guidance, num_classes = True, False, None

    def __init__(self, process: Process) -> None:
        super().__init__(process, mean=MEAN, variance=VARIANCE)
        self.off = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x_t, t, condition=None, *, until=None, guidance=None):
        plain = super().forward(x_t, t) + self.off
        if until is None:
            return plain
        keep, pull = jump_coefficients(self.process, t, until)
        pull = torch.where(pull == 0, 1.0, pull)
        exact = (self.flow_map(x_t, t, until) - expand(keep, like=x_t) * x_t) / expand(pull, like=x_t)
        return torch.where(expand(t == until, like=x_t).bool(), plain, exact + self.off)


class Table(nn.Module):
    """w x + b, one of each for every pair of times that it is asked about, so that each optimum is reachable.

    With `second` false, one for every time. Parameters [n, n] or [n, 1]; it starts at 0.
    """

    def __init__(self, process: Process, times: Sequence[float], *, second: bool) -> None:
        super().__init__()
        self.times = torch.tensor(times, dtype=torch.float64)
        self.until = second_time(process, self.times)
        self.has_second_time = second
        shape = len(times), len(times) if second else 1
        self.w = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        self.b = nn.Parameter(torch.zeros(shape, dtype=torch.float64))

    def forward(self, x, time, condition, until=None, guidance=None):
        i = (time[:, None] - self.times).abs().argmin(1)
        j = torch.zeros_like(i) if until is None else (until[:, None] - self.until).abs().argmin(1)
        return self.w[i, j][:, None] * x + self.b[i, j][:, None]


def table_student(process: Process, times: Sequence[float], *, second: bool = True) -> FlowMap:
    """It predicts x_0 in float64."""
    return FlowMap(Denoiser(Table(process, times, second=second), process, Sample(), None))


def perfect_student(process: Process) -> FlowMap:
    return FlowMap(Perfect(process))  # type: ignore[arg-type]


def shuffled(student: FlowMap, seed: int = 0) -> FlowMap:
    """The same, with random parameters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return student


def even_uniforms(rows: int, count: int) -> Tensor:
    """float64 [rows, count], each column evenly spread over (0, 1), so that every choice is made as often."""
    even = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    return torch.stack([even.roll(7 * column) for column in range(count)], dim=1)


def names(times: Sequence[float]) -> tuple[str, ...]:
    """Columns of the states at these times."""
    return tuple(f"state_{index}" for index in range(len(times)))


def trajectories(process: Process, times: Sequence[float], *, rows: int, uniforms: int = 1, seed: int = 0) -> Batch:
    """Exact trajectories at each of `times`, [rows, 3] in float64, the first of them the noise."""
    teacher, at = GaussianTeacher(process, mean=MEAN, variance=VARIANCE), torch.tensor(times, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    x_T = process.sigma(at[0]) * torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    states = {name: teacher.flow_map(x_T, at[0], t) for name, t in zip(names(times), at, strict=True)}
    return batch_of(states, even_uniforms(rows, uniforms))


def batch_of(states: dict[str, Tensor], uniforms: Tensor) -> Batch:
    """Rows without labels."""
    rows = len(uniforms)
    row = torch.arange(rows)
    return Batch(row, row, torch.full((rows,), -1), states, uniforms, torch.ones(rows).double())


def minimise(
    objective: Objective, networks: Networks, batch: Batch, *, fitted: nn.Module | None = None, steps: int = 300
) -> float:
    """The least loss (or that after so many steps), to which the student (or what is `fitted`) is brought."""
    optimizer = torch.optim.LBFGS(
        (fitted or networks.student).parameters(), max_iter=steps // 3, history_size=50, tolerance_grad=1e-14,
        tolerance_change=0, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(networks, batch)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)  # type: ignore[arg-type]
    return objective(networks, batch).item()
