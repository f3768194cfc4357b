"""Objectives against closed forms: on Gaussian data the flow and the best network are known exactly."""

import math

import pytest
import torch
from torch import nn

from limbeck.diffusion.denoiser import Denoiser
from limbeck.diffusion.flow_map import FlowMap
from limbeck.diffusion.gaussian import GaussianTeacher
from limbeck.diffusion.grids import karras, uniform_time
from limbeck.diffusion.models.networks import ResidualMLP
from limbeck.diffusion.prediction import EDM, Sample
from limbeck.diffusion.process import VE, CosineVP, LinearVP, RectifiedFlow
from limbeck.trainer.networks.networks import Networks
from limbeck.trainer.objectives.denoising import Denoising
from limbeck.trainer.objectives.distances import PseudoHuber, l2
from limbeck.trainer.objectives.knowledge import Knowledge
from limbeck.trainer.objectives.progressive import Progressive, progressive_target, rounding_error
from limbeck.trainer.stream import Batch, objective_uniforms

MEAN, VARIANCE = 0.5, 0.25
PROCESSES = [VE(), LinearVP(), CosineVP(), RectifiedFlow()]


class Affine(nn.Module):
    """w x + b, one of each for every time it is asked about, so that each optimum is reachable."""

    def __init__(self, times: list[float]) -> None:
        super().__init__()
        self.times = torch.tensor(times, dtype=torch.float64)
        self.w = nn.Parameter(torch.zeros(len(times), dtype=torch.float64))
        self.b = nn.Parameter(torch.zeros(len(times), dtype=torch.float64))

    def forward(self, x, time, condition):
        index = (time[:, None] - self.times).abs().argmin(1)
        return self.w[index][:, None] * x + self.b[index][:, None]


def affine_student(process, times: list[float]) -> FlowMap:
    return FlowMap(Denoiser(Affine(times), process, Sample(), None))


def exact_batch(process, times: torch.Tensor, columns: tuple[str, ...], rows: int = 64) -> Batch:
    """States of exact trajectories at each of `times`, [rows, 3] in float64."""
    teacher = GaussianTeacher(process, mean=MEAN, variance=VARIANCE)
    generator = torch.Generator().manual_seed(0)
    x_T = process.sigma(times[0]) * torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    states = {name: teacher.flow_map(x_T, times[0], t) for name, t in zip(columns, times, strict=True)}
    uniforms = torch.rand(rows, 1, generator=generator, dtype=torch.float64)
    return Batch(
        torch.arange(rows), torch.arange(rows), torch.full((rows,), -1), states, uniforms, torch.ones(rows).double()
    )


def minimise(objective, student: FlowMap, batch: Batch) -> float:
    optimizer = torch.optim.LBFGS(
        student.parameters(), max_iter=300, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = objective(Networks(student), batch)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    return objective(Networks(student), batch).item()


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("distance", [l2, PseudoHuber(0.3)])
def test_knowledge_is_minimised_by_the_exact_flow(process, distance):
    times = torch.tensor([process.T, 0.0], dtype=torch.float64)
    objective = Knowledge(tuple(times.tolist()), distance)
    student, batch = affine_student(process, [process.T]), exact_batch(process, times, objective.columns)
    assert minimise(objective, student, batch) < 1e-10
    # x_0 = m + stretch (x_T - alpha_T m), stretch^2 = v/(alpha_T^2 v + sigma_T^2): an affine map of x_T.
    alpha, sigma = process.alpha(times[0]), process.sigma(times[0])
    stretch = torch.sqrt(VARIANCE / (alpha**2 * VARIANCE + sigma**2))
    torch.testing.assert_close(student.denoiser.network.w[0], stretch, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(student.denoiser.network.b[0], MEAN * (1 - alpha * stretch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_progressive_target_inverts_a_ddim_step(process):
    generator = torch.Generator().manual_seed(1)
    x_t, x_0 = torch.randn(2, 7, 7, generator=generator, dtype=torch.float64)
    t = torch.linspace(0.2, 0.95, 7, dtype=torch.float64) * process.T
    s = t * 0.6

    student = FlowMap(GivenDenoiser(process, x_0))
    x_s = student.jump(x_t, t, s)
    torch.testing.assert_close(progressive_target(process, x_t, x_s, t, s), x_0, rtol=1e-10, atol=1e-10)


class GivenDenoiser(nn.Module):
    """Says the same x_0 whatever it is asked."""

    num_classes, told_guidance, has_second_time = None, False, False

    def __init__(self, process, x_0) -> None:
        super().__init__()
        self.process, self.x_0 = process, x_0

    def forward(self, x_t, t, condition=None):
        return self.x_0


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_progressive_target_at_sigma_0_is_the_stored_output(process):
    x_t, output = torch.randn(2, 5, 3)
    t, zero = torch.tensor([process.T, 0.0], dtype=torch.float64)
    assert torch.equal(progressive_target(process, x_t, output, t, zero), output)


@pytest.mark.parametrize("process", [VE(), CosineVP(), RectifiedFlow()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_progressive_optimum_samples_the_exact_flow(process, steps):
    times = uniform_time(process, steps) if not isinstance(process, VE) else karras(process, steps, r_min=0.5)
    columns = tuple(f"state_{index}" for index in range(steps + 1))
    objective = Progressive(tuple(times.tolist()), columns)
    student, batch = affine_student(process, times[:-1].tolist()), exact_batch(process, times, columns)
    assert minimise(objective, student, batch) < 1e-9
    sampled = student.sample(batch.states[columns[0]], times)
    torch.testing.assert_close(sampled, batch.states[columns[-1]], rtol=0, atol=1e-3)


def test_progressive_weights_by_truncated_snr():
    process, times = RectifiedFlow(), (1.0, 0.2, 0.0)
    x_0 = torch.zeros(2, 1, dtype=torch.float64)
    student = FlowMap(GivenDenoiser(process, x_0))
    states = {name: torch.ones(2, 1, dtype=torch.float64) for name in ("noise", "state_001", "output")}
    uniforms = torch.tensor([[0.1], [0.9]], dtype=torch.float64)
    batch = Batch(torch.arange(2), torch.arange(2), torch.full((2,), -1), states, uniforms, torch.ones(2).double())
    # 1 -> 0.2: x~ = (1 - 0.2)/(0.8 - 0) = 1, weight max(0, 1); 0.2 -> 0: x~ = 1, weight (0.8/0.2)^2.
    assert Progressive(times, tuple(states))(Networks(student), batch).item() == pytest.approx((1 + 16) / 2)


def test_rounding_error_is_the_measured_one():
    process, times = VE(), karras(VE(), 16)[::2]
    rms, count = 0.7, 200_000
    teacher = GaussianTeacher(process, mean=0.0, variance=rms**2)
    told = {
        dtype: rounding_error(process, times.tolist(), storage_dtype=dtype, data_rms=rms)
        for dtype in ("float16", "bfloat16")
    }
    generator = torch.Generator().manual_seed(0)
    for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        x_T = (process.T * torch.randn(count, generator=generator, dtype=torch.float64)).to(dtype).double()
        exact = [teacher.flow_map(x_T, times[0], t) for t in times]
        stored = [x_T, *(state.to(dtype).double() for state in exact[1:])]
        for k in range(8):
            pair = times[k], times[k + 1]
            error = progressive_target(process, stored[k], stored[k + 1], *pair) - progressive_target(
                process, exact[k], exact[k + 1], *pair
            )
            assert error.square().mean().sqrt().item() == pytest.approx(told[name][k], rel=0.15)
    assert told["float16"][0] == pytest.approx(0.014, abs=0.002)
    assert told["bfloat16"][0] == pytest.approx(0.115, abs=0.01)


def denoising(**options) -> Denoising:
    return Denoising(sample_shape=(4,), **{"label_dropout": 0.1, "p_mean": -1.2, "p_std": 1.2, **options})


def denoising_batch(objective: Denoising, x_0: torch.Tensor, condition: torch.Tensor | None = None) -> Batch:
    rows = len(x_0)
    uniforms = objective_uniforms(0, torch.arange(rows).numpy(), objective.num_uniforms)
    labels = torch.zeros(rows, dtype=torch.int64) if condition is None else condition
    return Batch(torch.arange(rows), torch.arange(rows), labels, {"output": x_0}, uniforms, torch.ones(rows).double())


def test_denoising_loss_and_gradient_at_the_known_optimum():
    # With N(0, sigma_data^2) data the best F is 0 and its target has unit variance: loss 1, gradient 0.
    torch.manual_seed(0)
    network = ResidualMLP(sample_shape=(4,), num_classes=3, width=8, depth=1)
    student = FlowMap(Denoiser(network, VE(), EDM(0.7), 3))
    objective, rows = denoising(), 4000
    loss = objective(Networks(student), denoising_batch(objective, 0.7 * torch.randn(rows, 4)))
    spread = math.sqrt(2 / (4 * rows))
    assert abs(loss.item() - 1) < 4 * spread
    loss.backward()
    assert network.leave.bias.grad.abs().max() < 4 * 2 / 4 / math.sqrt(rows)


def test_denoising_times_have_their_distribution():
    objective = denoising()
    u = objective_uniforms(0, torch.arange(20000).numpy(), 1)[:, 0]
    log_sigma = objective.times(VE(), u).log()
    assert log_sigma.mean().item() == pytest.approx(-1.2, abs=4 * 1.2 / math.sqrt(20000))
    assert log_sigma.std().item() == pytest.approx(1.2, rel=0.03)
    t = objective.times(LinearVP(), u)
    assert t.mean().item() == pytest.approx(0.5, abs=0.01)
    assert t.min() > 0
    assert t.max() < 1


def test_denoising_drops_labels_at_its_rate_and_only_to_the_null_label():
    network = ResidualMLP(sample_shape=(4,), num_classes=3, width=8, depth=1)
    student, objective = FlowMap(Denoiser(network, VE(), EDM(0.7), 3)), denoising(label_dropout=0.25)
    labels = torch.arange(20000) % 3
    u = objective_uniforms(0, torch.arange(20000).numpy(), 2)[:, 1]
    told = objective.dropped(student, labels, u)
    dropped = told == 3
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=4 * 0.433 / math.sqrt(20000))
    assert torch.equal(told[~dropped], labels[~dropped])


def test_a_loss_does_not_depend_on_how_the_batch_is_cut():
    torch.manual_seed(0)
    network = ResidualMLP(sample_shape=(4,), num_classes=3, width=8, depth=1)
    student, objective = FlowMap(Denoiser(network, VE(), EDM(0.7), 3)), denoising()
    batch = denoising_batch(objective, torch.randn(12, 4))
    parts = [objective(Networks(student), part) for part in batch.split(4)]
    torch.testing.assert_close(torch.stack(parts).mean(), objective(Networks(student), batch))
