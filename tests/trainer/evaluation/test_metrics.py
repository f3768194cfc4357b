import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from torch import nn

from limbeck.trainer.classifier import shipped_classifier
from limbeck.trainer.evaluation.metrics import (
    Frechet,
    Neighbours,
    holdout_error,
    sliced_wasserstein,
    variance,
    wasserstein_squared,
)
from limbeck.trainer.reading.images import load_images


class Pixels(nn.Module):
    """A classifier whose features are the pixels themselves."""

    num_features = 3

    def features(self, images):
        return images.flatten(1)


def normal(n, mean, scale, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, 3, generator=generator, dtype=torch.float64) * torch.tensor(scale) + torch.tensor(mean)
    ).reshape(n, 3, 1, 1)


def test_frechet_of_gaussians_is_the_closed_form():
    # Diagonal covariances: |m_a - m_b|^2 + sum (s_a - s_b)^2, to sampling error.
    a, b = normal(40_000, [0.0, 0, 0], [1.0, 2, 3], 1), normal(40_000, [1.0, 0, -2], [1.5, 2, 1], 2)
    assert Frechet(Pixels(), a)(b) == pytest.approx(5 + 0.25 + 4, rel=0.02)


def test_frechet_is_the_formula_on_the_samples_own_moments():
    a, b = normal(50, [0.0, 0, 0], [1.0, 2, 3], 1), normal(70, [1.0, 0, -2], [1.5, 2, 1], 2)
    flat = [x.flatten(1).float().double().numpy() for x in (a, b)]
    covariances = [np.cov(x.T) for x in flat]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((flat[0].mean(0) - flat[1].mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    distance = Frechet(Pixels(), a)
    assert distance(b) == pytest.approx(expected, rel=1e-9)
    assert distance(b) == distance(b)
    assert abs(distance(a)) < 1e-9


def test_frechet_of_digits_knows_digits_from_damaged_ones():
    classifier, _ = shipped_classifier("sklearn:digits", (1, 8, 8))
    train, reference = (load_images("sklearn:digits", split)[0] for split in ("train", "reference"))
    distance = Frechet(classifier, reference)
    floor = distance(train)
    noise = torch.randn(train.shape, generator=torch.Generator().manual_seed(0))
    assert 0 < floor < distance(train + 0.5 * noise) / 4
    assert distance(train.flip(3)) > 4 * floor


def line(*points):
    """Points on a line as images, whose features are (x, 0, 0)."""
    return torch.tensor([[x, 0.0, 0.0] for x in points]).reshape(-1, 3, 1, 1)


@pytest.mark.parametrize(
    ("samples", "density", "coverage"),
    [
        # Around 0, 1 and 3 the open balls to the nearest other point: (-1, 1), (0, 2) and (1, 5).
        ((0.5, 2.0, 4.0), 4 / 3, 1.0),
        ((0.5, 0.5, 0.5), 2.0, 2 / 3),
        ((10.0, 20.0), 0.0, 0.0),
        ((4.0,), 1.0, 1 / 3),
    ],
)
def test_density_and_coverage_count_samples_in_the_balls_of_the_reference(samples, density, coverage):
    found = Neighbours(Pixels(), line(0.0, 1.0, 3.0), k=1)(line(*samples))
    assert found == (pytest.approx(density), pytest.approx(coverage))


def test_a_set_has_a_density_and_coverage_of_one_in_itself():
    points = normal(2500, [0.0, 0, 0], [1.0, 2, 3])
    assert Neighbours(Pixels(), points)(points) == (1.0, 1.0)


def test_coverage_of_another_sample_of_the_same_distribution_is_what_the_paper_expects():
    # 1 - (n-1)...(n-k) / ((2n-1)...(2n-k)), whatever the distribution. Naeem et al. 2020, section 3; density is 1.
    n, k = 1500, 5
    a, b = normal(n, [0.0, 0, 0], [1.0, 2, 3], 1), normal(n, [0.0, 0, 0], [1.0, 2, 3], 2)
    expected = 1 - math.prod((n - i) / (2 * n - i) for i in range(1, k + 1))
    density, coverage = Neighbours(Pixels(), a)(b)
    assert coverage == pytest.approx(expected, abs=0.015)
    assert density == pytest.approx(1, abs=0.06)


def test_a_mode_that_is_missing_costs_coverage_and_one_between_costs_density():
    left, right = normal(300, [-20.0, 0, 0], [1.0, 1, 1], 1), normal(300, [20.0, 0, 0], [1.0, 1, 1], 2)
    both = Neighbours(Pixels(), torch.cat([left, right]))
    density, coverage = both(normal(600, [-20.0, 0, 0], [1.0, 1, 1], 3))
    assert 0.4 < coverage < 0.5
    assert 0.85 < density < 1.15
    density, coverage = both(torch.cat([left, normal(300, [0.0, 0, 0], [1.0, 1, 1], 4)]))
    assert density == pytest.approx(0.5)
    assert coverage == 0.5


def test_too_few_reference_images_for_neighbours():
    with pytest.raises(ValueError, match="5 reference images have no 5 neighbours"):
        Neighbours(Pixels(), line(0, 1, 2, 3, 4))


@pytest.mark.parametrize("shape", [(2,), (1, 8, 8), (3, 5)])
def test_a_translated_set_is_at_the_length_of_the_translation_by_root_dimension(shape):
    generator = torch.Generator().manual_seed(0)
    samples, shift = torch.randn(50, *shape, generator=generator), torch.randn(shape, generator=generator).double()
    expected = shift.norm().item() / math.sqrt(shift.numel())
    assert sliced_wasserstein(samples.double() + shift, samples.double()) == pytest.approx(expected, rel=1e-9)


def test_sliced_wasserstein_of_shifted_gaussians():
    # Every projection of N(0, I) and N(c, 4 I) is at (theta.c)^2 + (2 - 1)^2, and theta.c averages to |c|^2/d.
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 20_000, 4, generator=generator, dtype=torch.float64)
    shift = torch.tensor([1.0, 0, 2, 0], dtype=torch.float64)
    assert sliced_wasserstein(a, 2 * b + shift) == pytest.approx(math.sqrt(5 / 4 + 1), rel=0.01)


def test_sliced_wasserstein_is_a_distance_and_fixed():
    generator = torch.Generator().manual_seed(0)
    samples, order = torch.randn(2, 30, 200, generator=generator), torch.randperm(30, generator=generator)
    # Not exactly: BLAS may sum a row in another order at another place of the matrix.
    assert sliced_wasserstein(samples[0], samples[0][order]) == pytest.approx(0, abs=1e-12)
    there, back = sliced_wasserstein(*samples), sliced_wasserstein(*samples.flip(0))
    assert there == pytest.approx(back, rel=1e-12)
    assert there == sliced_wasserstein(*samples)


@pytest.mark.parametrize(("n", "m"), [(4, 4), (3, 5), (4, 6), (1, 7)])
def test_wasserstein_of_unequal_samples_is_the_cheapest_coupling(n, m):
    generator = np.random.default_rng(n * m)
    a, b = generator.normal(size=n), generator.normal(size=m)
    # Each sample repeated to a common size: equal weights again, and then sorted pairs are optimal.
    common = math.lcm(n, m)
    expected = ((np.sort(a.repeat(common // n)) - np.sort(b.repeat(common // m))) ** 2).mean()
    columns = (torch.from_numpy(x)[:, None] for x in (a, b))
    assert wasserstein_squared(*columns).item() == pytest.approx(expected, rel=1e-12)


def test_holdout_error_and_variance():
    outputs = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert holdout_error(outputs, outputs + torch.tensor([1.0, -3.0])) == 5.0
    assert variance(outputs) == 1.0
