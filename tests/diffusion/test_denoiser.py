"""A denoiser hides what its network predicts; guidance and flow maps are built on it."""

import pytest
import torch

from diffusion.denoiser import Denoiser, Guided
from diffusion.flow_map import FlowMap
from diffusion.networks import ResidualMLP
from diffusion.prediction import EDM, PREDICTIONS, VPrediction
from diffusion.process import VE, CosineVP, LinearVP, RectifiedFlow


def make_denoiser(process, prediction, num_classes=3):
    torch.manual_seed(0)
    network = ResidualMLP(sample_shape=(2, 4), num_classes=num_classes, width=16, depth=2)
    torch.nn.init.normal_(network.leave.weight, std=0.2)
    return Denoiser(network, process, prediction, num_classes).eval()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 2, 4, generator=generator), torch.arange(8) % 3


def test_one_time_for_all_is_a_time_for_each(batch):
    x_t, condition = batch
    denoiser = make_denoiser(LinearVP(), VPrediction())
    t = torch.tensor(0.7, dtype=torch.float64)
    # A batch of 8 of samples of 8 numbers: a wrong broadcast over the square would be silent.
    torch.testing.assert_close(denoiser(x_t, t, condition), denoiser(x_t, t.expand(8), condition))


def test_no_condition_is_the_null_label(batch):
    x_t, _ = batch
    denoiser = make_denoiser(VE(), EDM())
    t = torch.tensor(2.0, dtype=torch.float64)
    torch.testing.assert_close(denoiser(x_t, t), denoiser(x_t, t, torch.full((8,), 3)), rtol=0, atol=0)


def test_the_network_runs_in_its_dtype_and_the_answer_has_the_states(batch):
    x_t, condition = batch
    denoiser = make_denoiser(VE(), EDM())
    assert denoiser(x_t.double(), torch.tensor(2.0, dtype=torch.float64), condition).dtype == torch.float64


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_is_a_line_through_both(scale, batch):
    x_t, condition = batch
    denoiser = make_denoiser(VE(), EDM())
    t = torch.tensor(2.0, dtype=torch.float64)
    uncond, cond = denoiser(x_t, t), denoiser(x_t, t, condition)
    torch.testing.assert_close(
        Guided(denoiser, scale)(x_t, t, condition), uncond + scale * (cond - uncond), rtol=1e-4, atol=1e-5
    )


def test_guidance_without_classes_is_refused():
    with pytest.raises(ValueError, match="needs a class-conditional teacher"):
        Guided(make_denoiser(VE(), EDM(), num_classes=None), 2.0)


@pytest.mark.parametrize("process", [LinearVP(), CosineVP(), VE(), RectifiedFlow()])
@pytest.mark.parametrize("name", [name for name in PREDICTIONS if name != "epsilon"])
def test_a_jump_to_its_own_time_is_the_identity(process, name, batch):
    x_s, condition = batch
    student = FlowMap(make_denoiser(process, PREDICTIONS[name]()))
    # At 0 there is nothing to divide by, and EDM would be told log 0.
    for s in (0.0, 0.3 * process.T, 0.9 * process.T):
        time = torch.full((8,), s, dtype=torch.float64)
        assert torch.equal(student.jump(x_s, time, time, condition), x_s)
    mixed = torch.tensor([0.0, 0.3 * process.T], dtype=torch.float64).repeat(4)
    moved = student.jump(x_s, mixed, torch.zeros_like(mixed), condition)
    assert torch.equal(moved[::2], x_s[::2])
    moved.sum().backward()
    assert all(value.grad.isfinite().all() for value in student.parameters() if value.grad is not None)


def test_a_jump_to_data_is_the_denoiser(batch):
    x_s, condition = batch
    student = FlowMap(make_denoiser(VE(), EDM()))
    s, zero = torch.tensor(80.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    torch.testing.assert_close(student.jump(x_s, s, zero, condition), student(x_s, s, condition), rtol=0, atol=0)


def test_jumps_from_pure_noise_where_alpha_is_zero(batch):
    x_s, condition = batch
    student = FlowMap(make_denoiser(CosineVP(), VPrediction()))
    times = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    assert student.sample(x_s, times, condition).isfinite().all()
