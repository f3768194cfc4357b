"""The closed-form teachers against quadrature, the ODE itself and scipy's distribution functions."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats

from limbeck.diffusion.gaussian import GaussianTeacher, MixtureTeacher
from limbeck.diffusion.process import VE, CosineVP, DiscreteVP, LinearVP, RectifiedFlow, scales

PROCESSES = [LinearVP(), CosineVP(), VE(), RectifiedFlow(), DiscreteVP(tuple(torch.linspace(1e-3, 0.2, 50).tolist()))]
MIXTURE = {"weights": (0.2, 0.5, 0.3), "means": (-1.5, 0.1, 2.0), "variances": (0.05, 0.4, 0.02)}
every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)


def teachers(process):
    return [GaussianTeacher(process, mean=0.7, variance=0.3), MixtureTeacher(process, **MIXTURE)]


def points(count=41, width=3.0):
    return torch.linspace(-width, width, count, dtype=torch.float64).reshape(-1, 1)


def as_time(value):
    return torch.tensor(value, dtype=torch.float64)


def alike(x, y, *, rtol=0.0, atol):
    torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


@every_process
def test_the_denoiser_is_the_posterior_mean(process):
    t = as_time(0.4 * process.T)
    alpha, sigma = process.alpha(t).item(), process.sigma(t).item()
    teacher = MixtureTeacher(process, **MIXTURE)
    density = [stats.norm(m, math.sqrt(v)) for m, v in zip(MIXTURE["means"], MIXTURE["variances"], strict=True)]

    def joint(x_0, x_t):
        prior = sum(w * d.pdf(x_0) for w, d in zip(MIXTURE["weights"], density, strict=True))
        return prior * stats.norm.pdf(x_t, alpha * x_0, sigma)

    x_0 = np.linspace(-6, 6, 40001)
    for x_t in (-1.1 * sigma - alpha, 0.3 * sigma, 2.0 * alpha):
        weight = joint(x_0, x_t)
        expected = integrate.simpson(weight * x_0, x=x_0) / integrate.simpson(weight, x=x_0)
        assert teacher(as_time([[x_t]]), t).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@every_process
def test_one_component_is_the_gaussian(process):
    gaussian = GaussianTeacher(process, mean=0.7, variance=0.3)
    mixture = MixtureTeacher(process, weights=(1.0,), means=(0.7,), variances=(0.3,))
    s, t, x = as_time(0.8 * process.T), as_time(0.1 * process.T), points() * process.T
    alike(mixture(x, t), gaussian(x, t), rtol=1e-13, atol=1e-13)
    alike(mixture.flow_map(x, s, t), gaussian.flow_map(x, s, t), rtol=1e-13, atol=1e-13)


@every_process
def test_the_flow_map_solves_the_ode(process):
    """d/dt of the flow map is f x - g^2/2 * score, with score = (alpha x_0 - x)/sigma^2."""
    s, t, h = as_time(0.8 * process.T), as_time(0.317 * process.T), 1e-5 * process.T
    for teacher in teachers(process):
        x_s = points() * process.sigma(s)
        slope = (teacher.flow_map(x_s, s, t + h) - teacher.flow_map(x_s, s, t - h)) / (2 * h)
        x_t = teacher.flow_map(x_s, s, t)
        alpha, sigma = scales(process, t, like=x_t)
        score = (alpha * teacher(x_t, t) - x_t) / sigma**2
        expected = process.f(t) * x_t - process.g2(t) / 2 * score
        # Central differences: h^2/6 of a third derivative, and 1e-13/h of rounding.
        alike(slope * process.T, expected * process.T, rtol=1e-6, atol=1e-6)


@every_process
def test_the_flow_map_composes_and_returns(process):
    T, s, t = as_time(process.T), as_time(0.5 * process.T), as_time(0.0)
    x_T = points() * process.sigma(T)
    for teacher in teachers(process):
        direct = teacher.flow_map(x_T, T, t)
        alike(teacher.flow_map(teacher.flow_map(x_T, T, s), s, t), direct, atol=2e-12)
        alike(teacher.flow_map(direct, t, T), x_T, rtol=2e-11, atol=2e-11)
        alike(teacher.flow_map(x_T, s, s), x_T, rtol=1e-13, atol=1e-12)


def test_the_flow_map_keeps_its_digits_in_the_tails():
    """Both tails as far as 30 standard deviations, where F is 1e-198 and 1 - F rounds to 0 on the other side."""
    process = RectifiedFlow()
    teacher = MixtureTeacher(process, **MIXTURE)
    z = torch.tensor([-30.0, -12, -8, 8, 12, 30], dtype=torch.float64).reshape(-1, 1)
    x_0 = teacher.flow_map(z, as_time(1.0), as_time(0.0)).flatten().tolist()
    pieces = list(zip(*(MIXTURE[name] for name in ("weights", "means", "variances")), strict=True))
    for target, x in zip(z.flatten().tolist(), x_0, strict=True):
        side = -math.copysign(1, target)
        logs = [math.log(w) + special.log_ndtr(side * (x - m) / math.sqrt(v)) for w, m, v in pieces]
        wanted = special.log_ndtr(side * target)
        # One ulp of x moves the log of the tail by about |x - m|/v ulps of x: v = 0.02 and |x - m| up to 6.
        assert special.logsumexp(logs) == pytest.approx(wanted, rel=2e-13)


def test_the_flow_carries_the_prior_to_the_data():
    process = CosineVP()
    teacher = MixtureTeacher(process, **MIXTURE)
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    x_0 = teacher.flow_map(torch.special.ndtri(u).reshape(-1, 1), as_time(1.0), as_time(0.0)).flatten().numpy()
    pieces = zip(*(MIXTURE[name] for name in ("weights", "means", "variances")), strict=True)
    distribution = sum(w * stats.norm.cdf(x_0, m, math.sqrt(v)) for w, m, v in pieces)
    np.testing.assert_allclose(distribution, u.numpy(), atol=1e-12)


@pytest.mark.parametrize("index", [0, 1], ids=["gaussian", "mixture"])
def test_times_a_sample_shapes_and_dtypes(index):
    """A square batch with a time for each sample equals the samples one by one; float32 in, float32 out."""
    teacher = teachers(LinearVP())[index]
    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    s, t = as_time([0.9, 0.8, 0.7]), as_time([0.1, 0.3, 0.6])
    rows = torch.cat([teacher(x[i : i + 1], t[i]) for i in range(3)])
    assert torch.equal(teacher(x, t), rows)
    moved = torch.cat([teacher.flow_map(x[i : i + 1], s[i], t[i]) for i in range(3)])
    assert torch.equal(teacher.flow_map(x, s, t), moved)
    assert torch.equal(teacher(x.float(), t), teacher(x.float().double(), t).float())
    assert teacher(x.reshape(3, 1, 3, 1), t).shape == (3, 1, 3, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": (0.5, 0.5)}, "2 weights, 3 means"),
        ({"weights": (0.5, 0.5, 0.5)}, "sum to 1"),
        ({"weights": (1.2, -0.5, 0.3)}, "positive weights"),
        ({"variances": (0.1, 0.0, 0.1)}, "variance 0.0: give one above 0"),
    ],
)
def test_impossible_mixtures_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MixtureTeacher(VE(), **(MIXTURE | change))


def test_an_impossible_gaussian_is_refused():
    with pytest.raises(ValueError, match="variance -1"):
        GaussianTeacher(VE(), mean=0.0, variance=-1)
