"""Consistency distillation against the exact flow of Gaussian data."""

import copy
from dataclasses import replace

import pytest
import torch

from limbeck.diffusion.flow_map import FlowMap, jump_coefficients
from limbeck.diffusion.process import VE, CosineVP, LinearVP, RectifiedFlow
from limbeck.trainer.networks.networks import Networks
from limbeck.trainer.objectives.consistency import Consistency
from limbeck.trainer.objectives.distances import PseudoHuber, l2
from limbeck.trainer.objectives.weights import Weighting
from tests.trainer.flows import minimise, names, perfect_student, shuffled, table_student, trajectories

GRIDS = {
    VE(): (80.0, 8.0, 1.0, 0.0),
    LinearVP(): (1.0, 0.6, 0.25, 0.0),
    CosineVP(): (1.0, 0.7, 0.4, 0.0),
    RectifiedFlow(): (1.0, 0.7, 0.3, 0.0),
}

every_process = pytest.mark.parametrize("process", GRIDS, ids=lambda process: type(process).__name__)


def consistency(process, distance=l2, weighting="uniform") -> Consistency:
    return Consistency(GRIDS[process], names(GRIDS[process]), distance, Weighting(weighting))


@torch.no_grad()
def errors_to_data(student: FlowMap, process) -> list[float]:
    """Largest error of f(x_n, t_n) at each stored n but the last, on unseen trajectories."""
    batch, times = trajectories(process, GRIDS[process], rows=32, seed=9), torch.tensor(GRIDS[process]).double()
    reached = [student.jump(batch.states[f"state_{n}"], times[n], times[3]) for n in range(3)]
    return [(x_0 - batch.states["state_3"]).abs().max().item() for x_0 in reached]


@every_process
def test_the_exact_flow_is_a_fixed_point(process):
    student, target = perfect_student(process), perfect_student(process)
    batch = trajectories(process, GRIDS[process], rows=60)
    for distance in (l2, PseudoHuber(0.3)):
        loss = consistency(process, distance)(Networks(student, target), batch)
        (gradient,) = torch.autograd.grad(loss, student.denoiser.off)
        assert loss.item() < 1e-20
        assert abs(gradient.item()) < 1e-9


@every_process
def test_each_round_of_targets_makes_one_more_interval_exact(process):
    """The student before is the target: what is known of data travels up by one stored state a round."""
    student = shuffled(table_student(process, GRIDS[process], second=False))
    batch = trajectories(process, GRIDS[process], rows=60)
    for exact in (1, 2, 3):
        target = copy.deepcopy(student).requires_grad_(False)
        minimise(consistency(process), Networks(student, target), batch)
        errors = errors_to_data(student, process)
        assert max(errors[3 - exact :]) < 1e-3
        assert min(errors[: 3 - exact], default=1.0) > 0.02


@pytest.mark.parametrize("weighting", ["uniform", "snr"])
def test_loss_and_gradient_at_a_point_are_their_closed_forms_and_stop_at_the_target(weighting):
    process = RectifiedFlow()
    times = torch.tensor(GRIDS[process], dtype=torch.float64)
    student = shuffled(table_student(process, GRIDS[process], second=False), 1)
    target = shuffled(table_student(process, GRIDS[process], second=False), 2)
    batch = trajectories(process, GRIDS[process], rows=12)
    loss = consistency(process, weighting=weighting)(Networks(student, target), batch)
    loss.backward()
    expected, w_grad = 0.0, torch.zeros(4, 1, dtype=torch.float64)
    for row in range(12):
        n = row // 4  # even uniforms
        x, x_next = batch.states[f"state_{n}"][row], batch.states[f"state_{n + 1}"][row]
        error = (to_data(student, x, times, n) - to_data(target, x_next, times, n + 1)).detach()
        weight = 1 / 12 if weighting == "uniform" else ((1 - times[n]) / times[n]).square() / 12
        expected += (weight * error.square().mean()).item()
        w_grad[n] += weight * (2 * error * jump_coefficients(process, times[n], times[3])[1] * x).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(student.denoiser.network.w.grad, w_grad, rtol=1e-9, atol=1e-12)
    assert target.denoiser.network.w.grad is None


def to_data(student: FlowMap, x: torch.Tensor, times: torch.Tensor, n: int) -> torch.Tensor:
    """f(x, t_n) by hand."""
    if n == 3:
        return x
    keep, pull = jump_coefficients(student.process, times[n], times[3])
    network = student.denoiser.network
    return keep * x + pull * (network.w[n] * x + network.b[n])


@every_process
def test_the_last_target_is_the_stored_output_itself(process):
    """Whatever the target's network says."""
    student, target = shuffled(table_student(process, GRIDS[process], second=False)), perfect_student(process)
    batch = trajectories(process, GRIDS[process], rows=8)
    last = replace(batch, uniforms=torch.full((8, 1), 0.99, dtype=torch.float64))
    target.denoiser.off.data.fill_(1e6)
    times = torch.tensor(GRIDS[process], dtype=torch.float64)
    expected = l2(student.jump(batch.states["state_2"], times[2], times[3]), batch.states["state_3"]).mean()
    assert consistency(process)(Networks(student, target), last).item() == pytest.approx(expected.item(), rel=1e-14)


class Zero(torch.nn.Module):
    """mu = 0, whatever it is asked."""

    process, num_classes = RectifiedFlow(), None

    def forward(self, x_t, t, condition=None):
        return torch.zeros_like(x_t)


def test_a_grid_that_ends_above_0_has_its_boundary_there():
    """The exact flow is a fixed point, and a constant is none: the last pair's target is the stored output."""
    times, process = (1.0, 0.7, 0.3, 0.1), RectifiedFlow()
    objective = Consistency(times, names(times), l2, Weighting("uniform"))
    batch = trajectories(process, times, rows=60)
    assert objective(Networks(perfect_student(process), perfect_student(process)), batch).item() < 1e-20
    assert objective(Networks(FlowMap(Zero()), FlowMap(Zero())), batch).item() > 0.01
