"""Reflow against couplings whose best velocity is known."""

import pytest
import torch
from torch import nn

from limbeck.diffusion.denoiser import Denoiser
from limbeck.diffusion.flow_map import FlowMap
from limbeck.diffusion.prediction import EDM, Sample, Velocity, VPrediction
from limbeck.diffusion.process import RectifiedFlow
from limbeck.trainer.networks.networks import Networks
from limbeck.trainer.networks.uncertainty import Uncertainty
from limbeck.trainer.objectives.distances import l1, l2
from limbeck.trainer.objectives.options import ObjectiveConfig
from limbeck.trainer.objectives.reflow import Reflow
from limbeck.trainer.objectives.weights import Weighting
from tests.trainer.flows import MEAN, VARIANCE, batch_of, minimise, perfect_student, shuffled, table_student

SCALE, C = 80.0, 0.4
TAUS = (1.0, 0.5, 0.25)


def reflow(distance=l2, weighting="uniform") -> Reflow:
    return Reflow(SCALE, distance, Weighting(weighting))


def coupled(rows: int, taus: torch.Tensor, *, independent: bool = False):
    """output = m + c z, as the flow of Gaussian data couples them; or an output that has nothing of the noise."""
    generator = torch.Generator().manual_seed(0)
    z, other = torch.randn(2, rows, 3, generator=generator, dtype=torch.float64)
    output = MEAN + (VARIANCE**0.5 * other if independent else C * z)
    return batch_of({"noise": SCALE * z, "output": output}, taus[:, None])


class Straight(nn.Module):
    """The best denoiser of the coupling output = m + c z, by whose velocity no two lines cross, plus `off` = 0.

    x_tau = (1 - tau)(m + c z) + tau z says z exactly.
    """

    num_classes, told_guidance, process = None, False, RectifiedFlow()

    def __init__(self) -> None:
        super().__init__()
        self.off = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, t, condition=None):
        tau = t if t.ndim == 0 else t[:, None]
        z = (x - (1 - tau) * MEAN) / ((1 - tau) * C + tau)
        return MEAN + C * z + tau * self.off


def test_the_straight_coupling_is_a_fixed_point_that_one_step_samples():
    student, batch = FlowMap(Straight()), coupled(64, torch.linspace(1e-4, 1, 64, dtype=torch.float64))
    for distance in (l2, l1):
        assert reflow(distance)(Networks(student), batch).item() < 1e-12
    loss = reflow()(Networks(student), batch)
    (gradient,) = torch.autograd.grad(loss, student.denoiser.off)
    assert abs(gradient.item()) < 1e-11
    sampled = student.sample(batch.states["noise"] / SCALE, torch.tensor([1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(sampled, batch.states["output"], rtol=0, atol=1e-12)


def test_an_affine_student_reaches_the_known_velocity():
    """(1 - c) z - m at every tau; in x_tau it is a line of slope (1 - c)/((1 - tau) c + tau)."""
    student = table_student(RectifiedFlow(), TAUS, second=False)
    taus = torch.tensor(TAUS, dtype=torch.float64)
    batch = coupled(48, taus.repeat(16))
    assert minimise(reflow(), Networks(student), batch) < 1e-16
    slope = (1 - C) / ((1 - taus) * C + taus)
    torch.testing.assert_close(student.denoiser.network.w[:, 0], 1 - taus * slope, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        student.denoiser.network.b[:, 0], taus * MEAN * (1 + (1 - taus) * slope), rtol=0, atol=1e-6
    )


def test_what_an_independent_coupling_leaves_is_its_posterior_variance():
    """Var(z - output | x_tau) = v/((1 - tau)^2 v + tau^2), and the gradient there is 0."""
    rows = 20_000
    for nearest in (1e-6, 0.2):
        tau = torch.linspace(nearest, 1, rows, dtype=torch.float64)
        batch = coupled(rows, tau, independent=True)
        student = perfect_student(RectifiedFlow())
        left = VARIANCE / ((1 - tau) ** 2 * VARIANCE + tau**2)
        loss = reflow()(Networks(student), batch)
        assert loss.item() == pytest.approx(
            left.mean().item(), abs=4 * (2 * left.square().mean().item() / (3 * rows)) ** 0.5
        )
    (gradient,) = torch.autograd.grad(loss, student.denoiser.off)  # which is 1/tau there, so from tau = 0.2 on
    assert abs(gradient.item()) < 4 * 2 * (left / tau**2).mean().sqrt() / (3 * rows) ** 0.5


@pytest.mark.parametrize("tau", [1e-2, 1e-4, 1e-6])
def test_weights_that_would_outgrow_all_others_at_small_times_are_refused(tau):
    """Var(z - output | x_tau) goes to 1 with tau, and so does the learned weight's loss where u = 0; snr to 1/tau^2."""
    networks = Networks(perfect_student(RectifiedFlow()), weighting=Uncertainty(0))
    batch = coupled(4000, torch.full((4000,), tau, dtype=torch.float64), independent=True)
    for weighting in ("uniform", "learned"):
        assert ObjectiveConfig(name="reflow", weighting=weighting)
        assert reflow(weighting=weighting)(networks, batch).item() == pytest.approx(1, rel=0.1)
    for weighting in ("snr", "truncated_snr"):
        assert reflow(weighting=weighting)(networks, batch) > 0.8 / tau**2
        with pytest.raises(ValueError, match=f"{weighting} is one of errors of x_0, .*; use uniform or learned"):
            ObjectiveConfig(name="reflow", weighting=weighting)


def test_gradient_at_a_point_is_its_closed_form():
    """mu = w x + b: u = (x - mu)/tau, so d loss/dw = -2 E (u - (z - output)) x/tau."""
    student = shuffled(table_student(RectifiedFlow(), TAUS, second=False))
    taus = torch.tensor(TAUS, dtype=torch.float64).repeat(4)
    batch, network = coupled(12, taus), student.denoiser.network
    reflow()(Networks(student), batch).backward()
    z, output, tau = batch.states["noise"] / SCALE, batch.states["output"], taus[:, None]
    x = (1 - tau) * output + tau * z
    row = torch.arange(12) % 3
    error = ((x - network.w[row] * x - network.b[row]) / tau - (z - output)).detach()
    expected = torch.zeros(3, dtype=torch.float64).index_add(0, row, -(2 * error * x / tau).mean(1) / 12)
    torch.testing.assert_close(network.w.grad[:, 0], expected, rtol=1e-9, atol=1e-12)


class Given(nn.Module):
    """Says the same output whatever it is asked, in float32."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = nn.Parameter(output)

    def forward(self, x, time, condition):
        assert x.dtype == torch.float32
        return self.output


@pytest.mark.parametrize("prediction", [Velocity(), VPrediction(), EDM(0.5), Sample()], ids=lambda p: type(p).__name__)
def test_the_velocity_keeps_its_digits_at_small_times(prediction):
    """What a network predicts becomes u without loss: float32 states, tau down to 1e-6."""
    generator = torch.Generator().manual_seed(2)
    z, x_0, said = torch.randn(3, 5, 3, generator=generator)
    tau = torch.tensor([1e-6, 1e-4, 1e-2, 0.5, 1.0], dtype=torch.float64)
    student = FlowMap(Denoiser(Given(said), RectifiedFlow(), prediction, None))
    found = []
    asked = Reflow(1.0, lambda a, b: (found.append(a), l2(a, b))[1], Weighting("uniform"))
    asked(Networks(student), batch_of({"noise": z, "output": x_0}, tau[:, None]))
    share, said = tau[:, None], said.double()
    x = (1 - share) * x_0 + share * z
    spread = (share**2 + ((1 - share) / 2) ** 2).sqrt()
    expected = {
        Velocity: said,
        VPrediction: ((2 * share - 1) * x + said) / (share**2 + (1 - share) ** 2),
        EDM: (share - (1 - share) / 4) * x / spread**2 - said / 2 / spread,
        Sample: (x - said) / share,
    }[type(prediction)]
    torch.testing.assert_close(found[0], expected, rtol=1e-8, atol=1e-8)
