"""A denoiser hides what its network predicts; guidance and flow maps are built on it."""

import pytest
import torch

from limbeck.diffusion.denoiser import Denoiser, Guided
from limbeck.diffusion.flow_map import FlowMap
from limbeck.diffusion.models.networks import ResidualMLP
from limbeck.diffusion.prediction import EDM, PREDICTIONS, VPrediction
from limbeck.diffusion.process import VE, CosineVP, LinearVP, RectifiedFlow


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_scale_for_each_sample_gives_the_bits_of_that_scale_for_all(dtype, batch):
    x_t, condition = batch[0].to(dtype), batch[1]
    denoiser, t = make_denoiser(VE(), EDM()), torch.tensor(2.0, dtype=torch.float64)
    # 1.7 has no exact float32; a batch of 8 of samples of 8 numbers: a wrong broadcast would be silent.
    scales = torch.tensor([0.0, 1.0, 1.7, 4.0], dtype=torch.float64).repeat(2)
    each = Guided(denoiser, scales)(x_t, t, condition)
    for row, scale in enumerate(scales.tolist()):
        assert torch.equal(each[row], Guided(denoiser, scale)(x_t, t, condition)[row])
    times = torch.linspace(0.5, 4.0, 8, dtype=torch.float64)
    own = [Guided(denoiser, scales[row].item())(x_t, times, condition)[row] for row in range(8)]
    assert torch.equal(Guided(denoiser, scales)(x_t, times, condition), torch.stack(own))


def test_a_denoiser_that_is_told_its_guidance_is_told_the_scale_in_one_call(batch):
    x_t, condition = batch
    torch.manual_seed(0)
    network = ResidualMLP(sample_shape=(2, 4), num_classes=3, width=16, depth=2, told_guidance=True)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    denoiser, t = Denoiser(network, VE(), EDM(), 3).eval(), torch.tensor(2.0, dtype=torch.float64)
    scales = torch.tensor([1.0, 3.0], dtype=torch.float64).repeat(4)
    told = denoiser(x_t, t, condition, guidance=scales)
    guided = Guided(denoiser, scales)
    assert torch.equal(guided(x_t, t, condition), told)
    assert guided.nfe_per_call == 1
    assert torch.equal(Guided(denoiser, 3.0)(x_t, t, condition)[1::2], told[1::2])
    assert not torch.equal(denoiser(x_t, t, condition)[1::2], told[1::2])


@pytest.mark.parametrize(("scale", "told"), [(2.0, "2.0"), (torch.ones(8).double(), "of each sample")])
def test_guidance_without_classes_or_labels_is_refused(scale, told, batch):
    with pytest.raises(ValueError, match=f"guidance scale {told} needs a class-conditional teacher"):
        Guided(make_denoiser(VE(), EDM(), num_classes=None), scale)
    with pytest.raises(ValueError, match=f"guidance scale {told} needs class labels; give a condition"):
        Guided(make_denoiser(VE(), EDM()), scale)(batch[0], torch.tensor(2.0, dtype=torch.float64))


def test_scales_of_another_batch_are_refused(batch):
    scales, t = torch.ones(4, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"scalars of shape \(4,\) for a batch of 8"):
        Guided(make_denoiser(VE(), EDM()), scales)(batch[0], t, batch[1])


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
