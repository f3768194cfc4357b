"""The processes against their own derivatives, inverses and ends, and the one door to a batch."""

import math

import pytest
import torch

from limbeck.diffusion.process import VE, CosineVP, DiscreteVP, LinearVP, RectifiedFlow, expand, scales

TABLE = tuple(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).tolist())
ZERO_TERMINAL = (*TABLE[:-1], 1.0)
PROCESSES = [LinearVP(), CosineVP(), VE(), RectifiedFlow(), DiscreteVP(TABLE), DiscreteVP(ZERO_TERMINAL)]
PRESERVING = [process for process in PROCESSES if isinstance(process, (LinearVP, CosineVP, DiscreteVP))]
NAMES = ["linear", "cosine", "ve", "flow", "discrete", "zero_terminal"]
every_process = pytest.mark.parametrize("process", PROCESSES, ids=NAMES)


def inner_times(process, count=200):
    """Times inside (0, T), off the knots of a table."""
    return (torch.arange(count, dtype=torch.float64) + 0.317) / count * process.T


@every_process
def test_f_is_the_slope_of_log_alpha(process):
    t = inner_times(process).requires_grad_()
    (slope,) = torch.autograd.grad((process.alpha(t).log() + 0 * t).sum(), t)
    torch.testing.assert_close(process.f(t).detach(), slope, rtol=1e-9, atol=1e-14)


@every_process
def test_g2_is_what_the_drift_leaves_of_the_growth_of_sigma_squared(process):
    t = inner_times(process).requires_grad_()
    sigma = process.sigma(t)
    (growth,) = torch.autograd.grad((sigma**2).sum(), t)
    torch.testing.assert_close(
        process.g2(t).detach(), (growth - 2 * process.f(t) * sigma**2).detach(), rtol=1e-9, atol=0
    )


@every_process
def test_derivatives_by_central_differences(process):
    t, h = inner_times(process, 50), 1e-6 * process.T
    log_alpha = (process.alpha(t + h).log() - process.alpha(t - h).log()) / (2 * h)
    torch.testing.assert_close(process.f(t), log_alpha, rtol=1e-5, atol=1e-9)


@every_process
def test_time_at_inverts_the_ratio_to_the_last_digits(process):
    u = torch.logspace(-6, -0.01, 300, dtype=torch.float64)
    t = torch.cat([u, 1 - torch.logspace(-6, -1, 50, dtype=torch.float64)]) * process.T
    torch.testing.assert_close(process.time_at(process.sigma(t) / process.alpha(t)), t, rtol=4e-15, atol=0)


@every_process
def test_ends_are_exact(process):
    start = torch.zeros((), dtype=torch.float64)
    T = torch.tensor(process.T, dtype=torch.float64)
    assert process.alpha(start) == 1
    assert process.sigma(start) == 0
    assert math.copysign(1, process.sigma(start).item()) == 1
    assert process.time_at(start) == 0
    if process.alpha(T) == 0:
        assert process.time_at(torch.tensor(math.inf)) == process.T
        assert process.sigma(T) == 1


def test_which_processes_end_in_pure_noise():
    ends = [process.alpha(torch.tensor(process.T, dtype=torch.float64)).item() for process in PROCESSES]
    assert [end == 0 for end in ends] == [False, True, False, True, False, True]
    assert ends[0] == pytest.approx(math.exp(-(19.9 / 4 + 0.05)), rel=1e-14)


@pytest.mark.parametrize("process", PRESERVING, ids=["linear", "cosine", "discrete", "zero_terminal"])
def test_variance_is_preserved(process):
    t = inner_times(process)
    one = torch.ones_like(t)
    torch.testing.assert_close(process.alpha(t) ** 2 + process.sigma(t) ** 2, one, rtol=1e-14, atol=0)
    torch.testing.assert_close(process.g2(t), -2 * process.f(t), rtol=1e-14, atol=0)


@every_process
def test_scales_are_float64_whatever_the_time_is(process):
    t = torch.tensor([0.25, 0.75]) * process.T
    for scale in (process.alpha, process.sigma, process.f, process.g2):
        assert scale(t).dtype == torch.float64
        assert scale(t.reshape(2, 1)).shape == (2, 1)


def test_scales_meet_a_square_batch_along_its_first_axis():
    x = torch.ones(3, 3)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    alpha, sigma = scales(RectifiedFlow(), t, like=x)
    assert alpha.dtype == x.dtype
    assert torch.equal(alpha * x, torch.tensor([[0.9] * 3, [0.5] * 3, [0.1] * 3]))
    assert torch.equal(sigma * x, torch.tensor([[0.1] * 3, [0.5] * 3, [0.9] * 3]))


def test_scales_of_one_time_serve_any_batch():
    alpha, sigma = scales(VE(), torch.tensor(7.0), like=torch.ones(2, 3, 4))
    assert alpha.shape == sigma.shape == ()
    assert alpha == 1
    assert sigma == 7
    assert expand(torch.ones(2), like=torch.ones(2, 3, 4)).shape == (2, 1, 1)


@pytest.mark.parametrize("shape", [(2,), (3, 1), (1,)])
def test_scalars_that_fit_no_batch_are_refused(shape):
    with pytest.raises(ValueError, match="for a batch of 3"):
        expand(torch.ones(shape), like=torch.ones(3, 3))


def test_a_table_is_diffusers_table():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    process = DiscreteVP(tuple(scheduler.betas.tolist()))
    t = torch.arange(1, 1001)  # t = n + 1 is timestep n
    # diffusers multiplies 1000 factors in float32, each rounded by up to 2^-24: 6e-5 in the worst case.
    torch.testing.assert_close(process.alpha(t) ** 2, scheduler.alphas_cumprod.double(), rtol=6e-5, atol=0)
    assert torch.equal(process.network_time(t), torch.arange(1000))


def test_a_last_beta_of_one_leaves_no_data_at_T():
    process = DiscreteVP((0.1, 0.2, 1.0))
    t = torch.tensor([0, 1, 2, 2.25, 3], dtype=torch.float64)
    left = math.sqrt(0.9 * 0.8)
    expected = torch.tensor([1, math.sqrt(0.9), left, 0.75 * left, 0], dtype=torch.float64)
    torch.testing.assert_close(process.alpha(t), expected, rtol=1e-15, atol=0)
