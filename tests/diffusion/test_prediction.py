"""Each prediction kind inverts its own target and says what its definition says."""

import pytest
import torch

from limbeck.diffusion.prediction import EDM, PREDICTIONS, Epsilon, Sample, Velocity, VPrediction
from limbeck.diffusion.process import VE, DiscreteVP, LinearVP


@pytest.fixture
def mixed():
    """A batch of three at three (alpha, sigma), as [3, 1, 1] scales: (x_0, eps, x_t, alpha, sigma)."""
    generator = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    alpha = torch.tensor([0.9, 0.3, 1.0], dtype=torch.float64).reshape(3, 1, 1)
    sigma = torch.tensor([0.4, 0.7, 80.0], dtype=torch.float64).reshape(3, 1, 1)
    return x_0, eps, alpha * x_0 + sigma * eps, alpha, sigma


@pytest.mark.parametrize("name", PREDICTIONS)
def test_target_says_x_0(name, mixed):
    x_0, _, x_t, alpha, sigma = mixed
    prediction = PREDICTIONS[name]()
    output = prediction.target(x_0, x_t, alpha, sigma)
    torch.testing.assert_close(prediction.x_0(output, x_t, alpha, sigma), x_0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("prediction", "definition"),
    [
        (Epsilon(), lambda x_0, eps, alpha, sigma: eps),
        (Sample(), lambda x_0, eps, alpha, sigma: x_0),
        (VPrediction(), lambda x_0, eps, alpha, sigma: alpha * eps - sigma * x_0),
        (Velocity(), lambda x_0, eps, alpha, sigma: eps - x_0),
    ],
)
def test_target_is_the_definition(prediction, definition, mixed):
    x_0, eps, x_t, alpha, sigma = mixed
    torch.testing.assert_close(prediction.target(x_0, x_t, alpha, sigma), definition(x_0, eps, alpha, sigma))


def test_edm_is_the_table_of_karras():
    sigma_data, r = 0.5, torch.tensor(3.0, dtype=torch.float64)
    y, output = torch.randn(2, 8, dtype=torch.float64)
    c_skip = sigma_data**2 / (r**2 + sigma_data**2)
    c_out = r * sigma_data / torch.sqrt(r**2 + sigma_data**2)
    c_in = 1 / torch.sqrt(r**2 + sigma_data**2)
    edm, one = EDM(sigma_data), torch.tensor(1.0, dtype=torch.float64)
    torch.testing.assert_close(edm.x_0(output, y, one, r), c_skip * y + c_out * output)
    torch.testing.assert_close(edm.network_input(y, one, r), c_in * y)
    torch.testing.assert_close(edm.network_time(VE(), r), torch.log(r) / 4)


def test_edm_gives_the_same_x_0_in_every_frame():
    """x_t = alpha y: the EDM estimate depends on y and r alone, whatever alpha is."""
    y, output = torch.randn(2, 8, dtype=torch.float64)
    r, alpha, one = (torch.tensor(value, dtype=torch.float64) for value in (2.0, 0.2, 1.0))
    edm = EDM()
    torch.testing.assert_close(edm.x_0(output, alpha * y, alpha, alpha * r), edm.x_0(output, y, one, r))
    torch.testing.assert_close(edm.network_input(alpha * y, alpha, alpha * r), edm.network_input(y, one, r))


def test_edm_target_has_unit_variance():
    """For data of variance sigma_data^2, at every noise level: that is what the preconditioning is for."""
    generator = torch.Generator().manual_seed(1)
    for r in (0.02, 0.5, 80.0):
        x_0, eps = torch.randn(2, 100_000, generator=generator, dtype=torch.float64)
        alpha, sigma = torch.tensor(1.0), torch.tensor(r, dtype=torch.float64)
        target = EDM(0.5).target(0.5 * x_0, 0.5 * x_0 + r * eps, alpha, sigma)
        assert abs(target.var().item() - 1) < 0.02


def test_networks_are_told_their_own_time():
    t = torch.tensor([1.0, 500.0], dtype=torch.float64)
    assert Epsilon().network_time(DiscreteVP((0.01,) * 1000), t).tolist() == [0.0, 499.0]
    assert Epsilon().network_time(LinearVP(), t).tolist() == t.tolist()
