"""x_T is what it should be: honest noise passes as often as the p-values say, and each wrong is seen by its family."""

import numpy as np
import pytest
import scipy.stats
import torch

from limbeck.pipeline.after.checks import ALARM
from limbeck.pipeline.after.normality import NoiseSums, chi_square_tail, judge_noise, noise_sums, stored_moments
from limbeck.storage_schemas.record import from_storage, to_storage

SIGMA = 80.0
SHAPE = (3, 4, 4)


def rounded(eps, dtype="float16"):
    return from_storage(to_storage(SIGMA * eps, dtype), dtype)


def judge(x_T, dtype="float16"):
    return {family: verdict.p for family, verdict in judge_noise(noise_sums(x_T, SIGMA, dtype)).items()}


@pytest.mark.parametrize("shape", [(2,), (1, 4, 4)])
def test_honest_noise_raises_an_alarm_as_often_as_it_says(shape):
    """p-values are uniform: of 400 sets of 128 samples about a tenth are below 0.1, and none is near the alarm."""
    generator = np.random.default_rng(0)
    found = [judge(rounded(generator.standard_normal((128, *shape)))) for _ in range(400)]
    for family in found[0]:
        p = np.array([verdict[family] for verdict in found])
        assert 20 <= (p < 0.1).sum() <= 65, family
        assert p.min() > ALARM, family


def test_the_sums_do_not_depend_on_how_rows_come():
    x_T = rounded(np.random.default_rng(1).standard_normal((300, *SHAPE)))
    parts = [noise_sums(part, SIGMA, "float16") for part in np.split(x_T, [100, 150])]
    joined = parts[0].plus(parts[1]).plus(parts[2])
    whole = noise_sums(x_T, SIGMA, "float16")
    assert joined.count == whole.count == 300
    for name in ("coordinates", "norms", "sums"):
        assert torch.allclose(getattr(joined, name), getattr(whole, name), rtol=1e-10)
    assert joined.neighbours[0][0] == 297  # pairs of samples that lie in one part
    assert NoiseSums(SHAPE).plus(whole).count == 300


def test_single_rows_of_one_coordinate_have_no_neighbours():
    x_T = rounded(np.random.default_rng(3).standard_normal((64, 1)))
    sums = NoiseSums((1,))
    for row in range(64):
        sums = sums.plus(noise_sums(x_T[row : row + 1], SIGMA, "float16"))
    assert judge_noise(sums).keys() == {"coordinates", "norms", "sums"}


WRONGS = {
    "an offset of all": (lambda eps: eps + 0.02, "sums"),
    "an offset of one coordinate": (lambda eps: eps + 0.3 * np.eye(48)[7].reshape(SHAPE), "coordinates"),
    "a wider scale": (lambda eps: 1.03 * eps, "norms"),
    "uniform coordinates": (lambda eps: scipy.stats.norm.cdf(eps) * 12**0.5 - 3**0.5, "coordinates"),
    "heavy tails": (lambda eps: eps * np.where(np.arange(len(eps)) % 9, 0.95, 1.5)[:, None, None, None], "norms"),
    "channels alike": (lambda eps: np.sqrt(0.5) * (eps + eps[:, :1]) / np.sqrt([[[[2]], [[1]], [[1]]]]), "neighbours"),
    "smoothed along a row": (lambda eps: (eps + 0.2 * np.roll(eps, 1, axis=3)) / np.sqrt(1.04), "neighbours"),
    "a shared part": (lambda eps: (eps + 0.3 * eps[:, :1, :1, :1]) / np.sqrt(1.09), "sums"),
    "samples that follow each other": (lambda eps: (eps + 0.2 * np.roll(eps, 1, axis=0)) / np.sqrt(1.04), "neighbours"),
    "one norm for all": (lambda eps: eps * np.sqrt(48 / np.square(eps).sum((1, 2, 3), keepdims=True)), "norms"),
}


@pytest.mark.parametrize("wrong", WRONGS)
def test_a_wrong_noise_is_seen_by_its_family(wrong):
    spoil, family = WRONGS[wrong]
    eps = np.random.default_rng(2).standard_normal((2048, *SHAPE))
    assert min(judge(rounded(eps)).values()) > ALARM
    assert judge(rounded(spoil(eps)))[family] < ALARM


@pytest.mark.parametrize(("dtype", "spacing"), [("float16", 2.0**-24), ("bfloat16", 2.0**-133)])
def test_what_rounding_does_to_the_moments_is_exact(dtype, spacing):
    """Where all values are h apart, at the subnormal ones, Sheppard's corrections say what rounding does."""
    sigma, h = 5 * spacing, spacing
    second, fourth = stored_moments(sigma, dtype)
    assert second == pytest.approx(sigma**2 + h**2 / 12, rel=1e-12)
    assert fourth == pytest.approx(3 * sigma**4 + sigma**2 * h**2 / 2 + h**4 / 80, rel=1e-12)
    second, fourth = stored_moments(SIGMA, dtype)
    roundoff = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    assert second == pytest.approx(SIGMA**2, rel=roundoff**2)
    assert fourth == pytest.approx(3 * SIGMA**4, rel=6 * roundoff**2)
    assert stored_moments(SIGMA, "float32") == (SIGMA**2, 3 * SIGMA**4)


@pytest.mark.parametrize("degrees", [2, 9, 64, 12288])
def test_the_chi_square_tail_is_scipys(degrees):
    at = scipy.stats.chi2.isf([0.9, 0.5, 1e-3, 1e-6], degrees)
    assert chi_square_tail(torch.from_numpy(at), degrees).tolist() == pytest.approx([0.9, 0.5, 1e-3, 1e-6], rel=1e-6)
