"""dmd, vsd and sid against closed forms: x = s z + b, whose own score and that of the data are known exactly."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from limbeck.diffusion.flow_map import FlowMap
from limbeck.diffusion.gaussian import GaussianTeacher
from limbeck.diffusion.process import VE, CosineVP, LinearVP, RectifiedFlow
from limbeck.trainer.networks.networks import Networks
from limbeck.trainer.objectives.dmd import DistributionMatching, RealImages
from limbeck.trainer.objectives.matching import noise_level
from limbeck.trainer.objectives.randomness import normal
from limbeck.trainer.objectives.sid import ScoreIdentity
from limbeck.trainer.objectives.vsd import VariationalScore
from limbeck.trainer.stream import Batch, objective_uniforms

MEAN, VARIANCE = 0.5, 0.25
PROCESSES = [VE(), LinearVP(), RectifiedFlow()]
NUMBERS = 1024  # of a sample: so many that the size of its error is the expected one


class Line(nn.Module):
    """The denoiser of a student whose samples are N(b, s^2): s x_T/sigma_T + b."""

    num_classes, has_second_time, told_guidance = None, False, False

    def __init__(self, process, *, s: float = 0.8, b: float = -0.3) -> None:
        super().__init__()
        self.process = process
        self.s, self.b = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (s, b))

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.s * x_t / self.process.sigma(torch.tensor(self.process.T)) + self.b


class Exact:
    """The score of N(mean, variance), as a teacher's or a critic's answer."""

    def __init__(self, process, mean: float, variance: float) -> None:
        self.gaussian = GaussianTeacher(process, mean=mean, variance=variance)

    def __call__(self, x_t: Tensor, t: Tensor, stored: Tensor, guidance: Tensor) -> Tensor:
        return self.gaussian(x_t, t)


def exact_networks(process, *, mean: float = MEAN, variance: float = VARIANCE, **line: float) -> Networks:
    """A student with its own exact score, and the exact score of the data."""
    student = Line(process, **line)
    critic = Exact(process, student.b.item(), student.s.item() ** 2)
    return Networks(FlowMap(student), teacher=Exact(process, mean, variance), critic=critic)


def batch(process, *, rows: int = 1024, numbers: int = NUMBERS, first: int = 0) -> Batch:
    positions = first + torch.arange(rows)
    z = normal(0, "x_T", positions, (numbers,)).double()
    noise = process.sigma(torch.tensor(process.T, dtype=torch.float64)) * z
    uniforms = objective_uniforms(0, positions.numpy(), 3)
    condition = torch.full((rows,), -1)
    return Batch(positions, positions, condition, {"noise": noise}, uniforms, torch.ones(rows).double())


def options(process, **more) -> dict:
    return {"times": (process.T, 0.0), "critic_steps": 1, "t_range": (0.02, 0.98), "seed": 0, **more}


def gradient(objective, networks: Networks, part: Batch) -> Tensor:
    """Of (s, b)."""
    line = networks.student.denoiser
    return torch.stack(torch.autograd.grad(objective(networks, part), [line.s, line.b]))


class Theory:
    """What is expected of x = s z + b at the drawn t, given in closed form: [B]."""

    def __init__(self, networks: Networks, t: Tensor) -> None:
        line, self.process, real = networks.student.denoiser, networks.student.process, networks.teacher.gaussian
        self.line, (self.m, self.v) = line, (real.mean, real.variance)
        self.alpha, self.sigma = self.process.alpha(t), self.process.sigma(t)

    def gain(self, variance) -> Tensor:
        return self.alpha * variance / (self.alpha**2 * variance + self.sigma**2)

    def size(self) -> Tensor:
        """E|x - f| of a folded normal: x - f = (1 - K alpha)(x - m) - K sigma eps."""
        gain, s, b = self.gain(self.v), self.line.s.detach(), self.line.b.detach()
        center = (1 - gain * self.alpha) * (b - self.m)
        spread = torch.sqrt(((1 - gain * self.alpha) * s) ** 2 + (gain * self.sigma) ** 2)
        ratio = center / spread
        return spread * math.sqrt(2 / math.pi) * torch.exp(-(ratio**2) / 2) + center * torch.erf(ratio / math.sqrt(2))

    def kl(self) -> Tensor:
        """KL( N(alpha b, alpha^2 s^2 + sigma^2) || N(alpha m, alpha^2 v + sigma^2) ), by torch."""
        ours = Normal(self.alpha * self.line.b, torch.sqrt((self.alpha * self.line.s) ** 2 + self.sigma**2))
        return kl_divergence(ours, Normal(self.alpha * self.m, torch.sqrt(self.alpha**2 * self.v + self.sigma**2)))

    def fisher(self) -> Tensor:
        """E|score_fake - score_real|^2 over N(alpha b, S): scores are lines."""
        ours, theirs = (self.alpha * self.line.s) ** 2 + self.sigma**2, self.alpha**2 * self.v + self.sigma**2
        at_mean = self.alpha * (self.line.b - self.m) / theirs
        return at_mean**2 + (1 / theirs - 1 / ours) ** 2 * ours

    def sid(self, a: float) -> Tensor:
        """E (f - g) (f - x) - a (f - g)^2 with g's own parameters held: f - g and f are lines in x_t."""
        s, b = self.line.s, self.line.b
        f_1, g_1 = self.gain(self.v), self.gain(s.detach() ** 2)
        f_0, g_0 = self.m * (1 - f_1 * self.alpha), b.detach() * (1 - g_1 * self.alpha)
        c_0, c_1 = f_0 - g_0, f_1 - g_1
        first, second, mixed = self.alpha * b, self.alpha**2 * (s**2 + b**2) + self.sigma**2, self.alpha * (s**2 + b**2)
        projected = c_0 * (f_0 + f_1 * first - b) + c_1 * (f_0 * first + f_1 * second - mixed)
        return projected - a * (c_0**2 + 2 * c_0 * c_1 * first + c_1**2 * second)


def check_gradient(objective, networks: Networks, expected) -> None:
    """The gradient is the expected one within 4 standard errors, which are at most 3 % of it."""
    process, found, theory = networks.student.process, [], []
    for part in batch(process).split(32):
        found.append(gradient(objective, networks, part))
        known = Theory(networks, noise_level(process, part.uniforms[:, 1], objective.t_range))
        weight, value = expected(known)
        loss = (weight.detach() * value).mean()
        theory.append(
            torch.stack(torch.autograd.grad(loss, [networks.student.denoiser.s, networks.student.denoiser.b]))
        )
    wanted, off = torch.stack(theory).mean(0), torch.stack(found) - torch.stack(theory)
    error = off.std(0) / math.sqrt(len(off))
    assert (error < 0.03 * wanted.abs()).all(), (wanted, error)
    assert (off.mean(0).abs() < 4 * error).all(), (wanted, off.mean(0), error)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_dmd_gradient_is_that_of_the_kl_divergence(process):
    # alpha (mu_fake - mu_real) = sigma^2/alpha times the difference of scores times alpha, which is dKL/dx.
    objective = DistributionMatching(**options(process))
    check_gradient(
        objective, exact_networks(process), lambda known: (known.sigma**2 / known.alpha / known.size(), known.kl())
    )


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_vsd_gradient_is_that_of_the_weighted_kl_divergence(process):
    # Wang et al. 2023: the gradient of (sigma/alpha) w KL, and w is sigma^2 for alpha^2 + sigma^2 = 1.
    def expected(known: Theory):
        weight = known.sigma**2 / (known.alpha**2 + known.sigma**2)
        return known.sigma / known.alpha * weight, known.kl()

    check_gradient(VariationalScore(**options(process)), exact_networks(process), expected)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_sid_gradient_is_half_that_of_the_fisher_divergence_at_a_half(process):
    def expected(known: Theory):
        return known.sigma**4 / known.alpha**2 / known.size() / 2, known.fisher()

    check_gradient(ScoreIdentity(**options(process, a=0.5)), exact_networks(process), expected)


@pytest.mark.parametrize("a", [1.0, 1.2])
def test_sid_gradient_at_the_papers_a(a):
    process = LinearVP()
    check_gradient(
        ScoreIdentity(**options(process, a=a)), exact_networks(process), lambda known: (1 / known.size(), known.sid(a))
    )


@pytest.mark.parametrize("process", [*PROCESSES, CosineVP()], ids=lambda p: type(p).__name__)
def test_nothing_pulls_a_student_whose_samples_are_the_data(process):
    networks = exact_networks(process, s=math.sqrt(VARIANCE), b=MEAN)
    networks.critic = networks.teacher
    for objective in (DistributionMatching, VariationalScore, ScoreIdentity):
        assert torch.equal(
            gradient(objective(**options(process)), networks, batch(process, rows=8)), torch.zeros(2).double()
        )


@pytest.mark.parametrize("process", [LinearVP(), VE()], ids=lambda p: type(p).__name__)
def test_noise_levels_are_even_in_time_and_for_ve_in_karras_warp(process):
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    t = noise_level(process, u, (0.02, 0.98))
    if isinstance(process, VE):
        # Halfway of the whole range: ((0.002^(1/7) + 80^(1/7))/2)^7 = 2.5152 with log10 = -2.69897 and 1.90309.
        assert t[50].item() == pytest.approx(((10 ** (-2.69897 / 7) + 10 ** (1.90309 / 7)) / 2) ** 7, rel=1e-4)
        torch.testing.assert_close(noise_level(process, u[[0, -1]], (0.0, 1.0)), torch.tensor([0.002, 80.0]).double())
        t = (t ** (1 / 7) - 0.002 ** (1 / 7)) / (80 ** (1 / 7) - 0.002 ** (1 / 7))
    torch.testing.assert_close(t, 0.02 + 0.96 * u)


def test_the_regression_is_the_distance_to_stored_outputs():
    process = VE()
    networks, stored = exact_networks(process, s=math.sqrt(VARIANCE), b=MEAN), batch(process, rows=8, numbers=4)
    networks.critic = networks.teacher  # no other pull
    x = MEAN + math.sqrt(VARIANCE) * stored.states["noise"] / process.T
    stored.states["output"] = x + torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    objective = DistributionMatching(**options(process, regression=0.25))
    assert objective.columns == ("noise", "output")
    assert objective(networks, stored).item() == pytest.approx(0.25 * (0.01 + 0.04 + 0.09 + 0.16) / 4)
    assert DistributionMatching(**options(process)).columns == ("noise",)


class Odds(Exact):
    """An exact score with the best discriminator there is: the log of how much likelier a sample is for real."""

    def __init__(self, networks: Networks) -> None:
        line = networks.student.denoiser
        super().__init__(line.process, line.b.item(), line.s.item() ** 2)
        self.real = networks.teacher.gaussian

    def logit(self, x_t: Tensor, t: Tensor, stored: Tensor, guidance: Tensor) -> Tensor:
        alpha, sigma = (scale[:, None] for scale in (self.real.process.alpha(t), self.real.process.sigma(t)))
        logs = [
            Normal(alpha * one.mean, torch.sqrt(alpha**2 * one.variance + sigma**2)).log_prob(x_t).sum(1)
            for one in (self.real, self.gaussian)
        ]
        return logs[0] - logs[1]


def test_the_discriminator_pulls_as_quadrature_says():
    # One number a sample: E softplus(-D(x_t)) over x_t ~ N(alpha b, alpha^2 s^2 + sigma^2), D held, is an integral.
    process, rows = LinearVP(), 200_000
    networks = exact_networks(process)
    networks.critic, networks.teacher = Odds(networks), networks.teacher
    line, odds = networks.student.denoiser, networks.critic
    objective = DistributionMatching(**options(process, gan=1.0, t_range=(0.3, 0.3 + 1e-9)))
    t = torch.tensor([0.3], dtype=torch.float64)
    alpha, sigma = process.alpha(t), process.sigma(t)
    grid = torch.linspace(-9, 9, 20001, dtype=torch.float64)
    x_t = alpha * line.b + torch.sqrt((alpha * line.s) ** 2 + sigma**2) * grid
    risk = nn.functional.softplus(-odds.logit(x_t[:, None], t.expand(len(grid)), t, t))
    density = torch.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi)
    wanted = torch.stack(torch.autograd.grad(torch.trapezoid(density * risk, grid), [line.s, line.b]))
    assert wanted[1] < 0  # towards the data's mean, which is higher
    plain = DistributionMatching(**options(process, t_range=objective.t_range))
    parts = list(batch(process, rows=rows, numbers=1).split(rows // 50))
    found = torch.stack([gradient(objective, networks, part) - gradient(plain, networks, part) for part in parts])
    error = found.std(0) / math.sqrt(len(parts))
    assert (error < 0.05 * wanted.abs()).all()
    assert ((found.mean(0) - wanted).abs() < 4 * error).all()


def test_real_images_are_of_the_samples_label_where_there_are_some():
    labels = torch.tensor([3, 0, 3, 1, 0, 3])
    images = RealImages(torch.arange(6.0)[:, None], labels)
    stored = torch.tensor([3] * 300 + [0] * 300 + [2] * 300 + [7] * 300 + [-1] * 300)
    u = objective_uniforms(0, torch.arange(1500).numpy(), 1)[:, 0]
    picked = images.pick(stored, u).squeeze(1).view(5, 300).long()
    assert [sorted(set(row.tolist())) for row in picked] == [[0, 2, 5], [1, 4]] + [[0, 1, 2, 3, 4, 5]] * 3
    plain = RealImages(torch.arange(6.0)[:, None], torch.full((6,), -1))
    assert sorted(set(plain.pick(stored, u).flatten().tolist())) == [0, 1, 2, 3, 4, 5]
    # A run that follows its dataset finds the objective unchanged, with images read anew.
    options = {"times": (80.0, 0.0), "critic_steps": 1, "t_range": (0.0, 1.0), "seed": 0}
    anew = RealImages(torch.arange(6.0)[:, None], labels)
    assert DistributionMatching(**options, real=images) == DistributionMatching(**options, real=anew)
    assert picked[0].bincount()[0] == pytest.approx(100, abs=4 * math.sqrt(300 * 2 / 9))


def test_a_student_of_several_steps_makes_its_own_inputs():
    process, times = LinearVP(), (1.0, 0.6, 0.3, 0.0)
    networks, rows = exact_networks(process), batch(LinearVP(), rows=600, numbers=2)
    objective = VariationalScore(**options(process, times=times))
    x, t = objective.simulated(networks, rows)
    steps = (rows.uniforms[:, 2] * 3).long()
    assert steps.bincount().tolist() == pytest.approx([200] * 3, abs=4 * math.sqrt(600 * 2 / 9))
    line = networks.student.denoiser
    by_hand, clean = [rows.states["noise"]], []
    for index in (1, 2):
        clean.append(line.s * by_hand[-1] / process.sigma(torch.tensor(1.0)) + line.b)
        alpha, sigma = (scale(torch.tensor(times[index])) for scale in (process.alpha, process.sigma))
        eps = normal(0, f"step {index}", rows.positions, (2,))
        by_hand.append(alpha * clean[-1] + sigma * eps)
    torch.testing.assert_close(x, torch.stack(by_hand)[steps, torch.arange(600)].detach(), rtol=1e-6, atol=1e-6)
    assert t.tolist() == [times[step] for step in steps]
    assert not x.requires_grad
    # The same chain as that which samples it.
    noises = {index: normal(0, f"step {index}", rows.positions, (2,)) for index in (1, 2)}
    sampled = networks.student.renoise(by_hand[0], torch.tensor(times).double(), noises=lambda index: noises[index])
    at_last = steps == 2
    torch.testing.assert_close(objective.sample(networks, rows)[at_last], sampled[at_last], rtol=1e-6, atol=1e-6)


def test_a_loss_does_not_depend_on_how_the_batch_is_cut():
    process = VE()
    networks, whole = exact_networks(process), batch(process, rows=12, numbers=4)
    networks.critic = Odds(networks)
    whole.states["output"] = whole.states["noise"] / 160
    for objective in (
        DistributionMatching(**options(process, times=(80.0, 2.0, 0.0), regression=0.25, gan=0.1)),
        VariationalScore(**options(process, times=(80.0, 5.0, 1.0, 0.0))),
        ScoreIdentity(**options(process)),
    ):
        parts = [objective(networks, part) for part in whole.split(4)]
        torch.testing.assert_close(torch.stack(parts).mean(), objective(networks, whole))
