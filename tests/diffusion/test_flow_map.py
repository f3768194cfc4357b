"""A student with a second time, or told its guidance: what it starts as, and how it is sampled in few steps."""

import math

import pytest
import torch

from limbeck.diffusion.denoiser import Denoiser
from limbeck.diffusion.flow_map import FlowMap, jump_coefficients
from limbeck.diffusion.gaussian import GaussianTeacher
from limbeck.diffusion.models.checkpoint import Checkpoint, pack, widened
from limbeck.diffusion.models.spec import model_from_spec, process_spec
from limbeck.diffusion.models.teachers import builtin_checkpoint
from limbeck.diffusion.prediction import PREDICTIONS
from limbeck.diffusion.process import VE, CosineVP, LinearVP, RectifiedFlow, expand, scales

PROCESSES = [VE(), LinearVP(), CosineVP(), RectifiedFlow()]
MEAN, VARIANCE = 0.5, 0.25

every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)


def teacher_of(process, prediction="v_prediction", network="residual_mlp") -> Checkpoint:
    """A network with random weights, so that time, class and sample all matter."""
    torch.manual_seed(0)
    mlp = network == "residual_mlp"
    spec = {
        "kind": "network",
        "sample_shape": [2, 4],
        "num_classes": 3 if mlp else None,
        "process": process_spec(process),
        "prediction": {"name": prediction},
        "network": {"name": network} | ({"width": 16, "depth": 2} if mlp else {}),
    }
    module = model_from_spec(spec)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return Checkpoint(spec, pack(module), {1: (process.T, 0.0)}, {"note": "random"})


def batch(rows=8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 2, 4, generator=generator)
    times = torch.rand(rows, 2, generator=generator, dtype=torch.float64).sort(1, descending=True).values
    return x, times[:, 0], times[:, 1], torch.arange(rows) % 3


class Exact(GaussianTeacher):
    """The mu whose DDIM step from s to t is the Gaussian's own flow: a perfect student with a second time."""

    has_second_time = True

    def forward(self, x_t, t, condition=None, *, until=None, guidance=None):
        if until is None:
            return super().forward(x_t, t)
        keep, pull = jump_coefficients(self.process, t, until)
        exact = (self.flow_map(x_t, t, until) - expand(keep, like=x_t) * x_t) / expand(pull, like=x_t)
        return torch.where(expand(t == until, like=x_t).bool(), super().forward(x_t, t), exact)


@every_process
@pytest.mark.parametrize("prediction", [name for name in PREDICTIONS if name != "epsilon"])
@pytest.mark.parametrize("network", ["residual_mlp", "affine"])
def test_a_widened_student_is_its_teachers_ddim_step_bit_for_bit(process, prediction, network):
    saved = teacher_of(process, prediction, network)
    teacher = FlowMap(saved.build())
    both = widened(saved, second_time=True, told_guidance=True)
    student = FlowMap(both.build())
    x_s, s, t, condition = batch()
    s, t = 0.9 * process.T * s, 0.9 * process.T * t
    condition = None if network == "affine" else condition
    expected = teacher.jump(x_s, s, t, condition)
    with torch.no_grad():
        assert student.has_second_time
        assert student.told_guidance
        for guidance in (None, torch.tensor(0.0), torch.linspace(0, 15, 8, dtype=torch.float64)):
            assert torch.equal(student.jump(x_s, s, t, condition, guidance=guidance), expected)
        assert torch.equal(student.jump(x_s, s, s, condition), x_s)
        assert torch.equal(student(x_s, s, condition), teacher(x_s, s, condition))


@pytest.mark.parametrize("network", ["residual_mlp", "affine"])
def test_what_a_trained_student_is_not_told_is_its_own_time_and_scale_one(network):
    torch.manual_seed(1)
    denoiser = widened(teacher_of(VE(), "edm", network), second_time=True, told_guidance=True).build()
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    student, (x_s, _, _, condition) = FlowMap(denoiser), batch()
    condition = None if network == "affine" else condition
    s, t, w = (torch.tensor(value, dtype=torch.float64) for value in (80.0, 2.0, 4.0))
    plain = student(x_s, s, condition, until=t, guidance=w)
    assert torch.equal(plain, student(x_s, s, condition, until=t.expand(8), guidance=w.expand(8)))
    untold = student(x_s, s, condition)
    assert torch.equal(untold, student(x_s, s, condition, until=s, guidance=torch.ones_like(w)))
    assert (untold - plain).abs().mean() > 1e-3


def test_widening_keeps_what_is_there_and_follows_from_the_seed():
    saved = teacher_of(VE())
    torch.manual_seed(5)
    first = widened(saved, second_time=True)
    torch.manual_seed(5)
    assert widened(saved, second_time=True) == first
    assert widened(first, second_time=True) == first
    assert widened(saved) is saved
    assert (first.grids, first.about) == (saved.grids, saved.about)
    both, weights = widened(first, told_guidance=True), first.build().state_dict()
    assert both.model["network"] == {**saved.model["network"], "second_time": True, "told_guidance": True}
    assert all(torch.equal(both.build().state_dict()[name], value) for name, value in weights.items())
    with pytest.raises(ValueError, match="a gaussian model can't take second_time; start from a network"):
        widened(builtin_checkpoint("gaussian"), second_time=True)


@pytest.mark.parametrize(
    ("process", "prediction"), [(VE(), "edm"), (LinearVP(), "v_prediction"), (RectifiedFlow(), "velocity")]
)
def test_an_affine_student_of_two_times_can_be_the_exact_flow(process, prediction):
    """Its F is linear in known features: least squares alone finds the Gaussian's flow map, to 1 part in 500."""
    denoiser = widened(teacher_of(process, prediction, "affine"), second_time=True).build().double()
    network, exact = denoiser.network, Exact(process, mean=MEAN, variance=VARIANCE)
    asked = []
    network.register_forward_pre_hook(lambda _, inputs: asked.append(inputs))
    r = torch.exp(torch.rand(3000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 9 - 5)
    s, t = process.time_at(r.sort(1, descending=True).values).T
    t[::5] = 0.0
    wanted = []
    for x_s in (torch.zeros(3000, 2, 4).double(), torch.ones(3000, 2, 4).double()):
        mu = exact(x_s, s, until=t)
        wanted.append(denoiser.prediction.target(mu, x_s, *scales(process, s, like=x_s))[:, 0, 0])
        denoiser(x_s, s, until=t)
    x, time, _, second, _ = asked[1]
    gain = (wanted[1] - wanted[0]) / x[:, 0, 0]
    target = torch.stack([gain, wanted[0]], dim=1)
    waves = network.time(time), _features(network.joint["second_time"], time, second), torch.ones(3000, 1)
    design, fit, unseen = torch.cat(waves, dim=1), slice(None, 2000), slice(2000, None)
    weights = torch.linalg.lstsq(design[fit], target[fit], rcond=1e-7, driver="gelsd").solution
    error = (design[unseen] @ weights - target[unseen]).square().mean().sqrt()
    assert error < 2e-3 * target.square().mean().sqrt()


def _features(joint, *numbers):
    angle = 2 * math.pi * torch.stack(numbers, 1) @ joint.frequencies
    return torch.cat([angle.cos(), angle.sin()], dim=1)


@every_process
def test_a_perfect_student_jumps_along_the_exact_flow(process):
    student = FlowMap(Exact(process, mean=MEAN, variance=VARIANCE))
    x_s, s, t, _ = batch()
    x_s, s, t = x_s.double(), 0.9 * process.T * s, 0.9 * process.T * t
    exact = student.denoiser.flow_map
    torch.testing.assert_close(student.jump(x_s, s, t), exact(x_s, s, t), rtol=1e-9, atol=1e-9)
    grid = process.T * torch.tensor([0.9, 0.5, 0.2, 0.0], dtype=torch.float64)
    torch.testing.assert_close(student.sample(x_s, grid), exact(x_s, grid[0], grid[-1]), rtol=1e-9, atol=1e-9)


@every_process
def test_renoised_samples_of_a_perfect_student_have_the_datas_law(process):
    """Exact jumps to data and fresh noise keep N(m, v) at every step, from whichever x_T: to 4 standard errors."""
    student, rows = FlowMap(Exact(process, mean=MEAN, variance=VARIANCE)), 40_000
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(4, rows, 1, generator=generator, dtype=torch.float64)
    times = process.T * torch.tensor([1.0, 0.6, 0.3, 0.0], dtype=torch.float64)
    asked = []

    def noises(index):
        asked.append(index)
        return eps[index]

    x_0 = student.renoise(
        process.alpha(times[0]) * (MEAN + math.sqrt(VARIANCE) * eps[3]) + process.sigma(times[0]) * eps[0],
        times,
        noises=noises,
    )
    assert asked == [1, 2]
    assert abs(x_0.mean().item() - MEAN) < 4 * math.sqrt(VARIANCE / rows)
    assert abs(x_0.var().item() - VARIANCE) < 4 * VARIANCE * math.sqrt(2 / rows)
    # By hand, from the last noising on: nothing of x_T is left but through x_0.
    alpha, sigma = process.alpha(times[2]), process.sigma(times[2])
    spread = torch.sqrt(alpha**2 * VARIANCE + sigma**2)
    assert torch.corrcoef(torch.stack([x_0[:, 0], eps[2, :, 0]]))[0, 1] == pytest.approx(
        float(sigma / spread), abs=0.02
    )


def test_one_step_is_the_same_jump_in_both_ways_of_sampling():
    student, (x_T, _, _, condition) = FlowMap(widened(teacher_of(VE(), "edm"), second_time=True).build()), batch()
    times = torch.tensor([80.0, 0.0], dtype=torch.float64)
    assert torch.equal(
        student.renoise(x_T, times, condition, noises=lambda _: x_T), student.sample(x_T, times, condition)
    )


def test_a_network_that_is_told_nothing_more_is_asked_as_before():
    """A network of three arguments, such as a user's own, serves a flow map."""

    class Own(torch.nn.Linear):
        def forward(self, x, time, condition):
            return super().forward(x) * time[:, None]

    denoiser = Denoiser(Own(4, 4), RectifiedFlow(), PREDICTIONS["velocity"](), None)
    student, x_s = FlowMap(denoiser), torch.ones(2, 4)
    s, t = torch.tensor([0.8, 0.3], dtype=torch.float64)
    expected = student.jump(x_s, s, t)
    assert not student.has_second_time
    torch.testing.assert_close(student.jump(x_s, s, t, guidance=torch.tensor(3.0)), expected, rtol=0, atol=0)


def test_jumps_between_times_on_a_device_copy_nothing_to_it():
    denoiser = widened(teacher_of(LinearVP()), second_time=True, told_guidance=True).build(device="meta")
    student, times = FlowMap(denoiser), torch.zeros(2, dtype=torch.float64, device="meta")
    x_s, condition = torch.zeros(2, 2, 4, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    # A meta tensor has no values, and a CPU's would not meet it.
    assert student.jump(x_s, times, times, condition, guidance=times).device.type == "meta"
    assert student.jump(x_s, times, times, condition).device.type == "meta"
