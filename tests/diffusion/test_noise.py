"""The noise of a sample is a pure function of (seed, split, id), pinned to the last bit."""

import hashlib

import numpy as np
import pytest
from scipy import stats
from scipy.special import ndtri

from limbeck.diffusion.noise import guidance_index, guidance_scales, labels, normal_quantile, standard_normal, uniform
from limbeck.diffusion.philox import philox_words

GOLDEN_FIRST = "-0x1.22cd198aad6f0p+1"
GOLDEN_ANEW = "-0x1.ba5d7666f14ffp+0"
GOLDEN_DIGEST = "ecc4610c86238e9ba28793a0458339f843ac978a9cd563535cd3a03e9340bd19"


def test_golden_normals():
    drawn = standard_normal(0, "train", [0, 1, 2**40], (2, 3))
    assert drawn[0, 0, 0].hex() == GOLDEN_FIRST
    assert hashlib.sha256(drawn.tobytes()).hexdigest() == GOLDEN_DIGEST


def test_noise_drawn_anew_has_a_stream_of_its_own():
    first, second, third = (standard_normal(0, "train", range(500), (8,), index=index) for index in range(3))
    assert len(np.unique([first, second, third])) == 3 * 4000
    assert np.abs(np.corrcoef([first.ravel(), second.ravel(), third.ravel()]) - np.eye(3)).max() < 4 / np.sqrt(4000)
    assert second[0, 0].hex() == GOLDEN_ANEW
    np.testing.assert_array_equal(standard_normal(0, "train", [7], (8,), index=2)[0], third[7])


def test_golden_labels():
    assert labels(0, "train", range(10), 10).tolist() == [8, 9, 9, 3, 3, 0, 3, 0, 5, 2]


def test_golden_guidance_scales():
    assert guidance_index(0, "train", range(12), 3).tolist() == [1, 2, 2, 0, 0, 0, 0, 1, 1, 2, 1, 2]
    assert guidance_index(0, "holdout", range(12), 3).tolist() == [2, 0, 2, 1, 0, 0, 1, 2, 1, 0, 0, 1]
    assert guidance_scales(0, "train", range(4), (1.0, 2.0, 4.0)).tolist() == [2.0, 4.0, 4.0, 1.0]
    assert guidance_scales(0, "train", range(3), (2.0,)).tolist() == [2.0, 2.0, 2.0]


def test_scales_are_uniform_and_independent_of_labels():
    """Pearson's chi-square of all pairs of label and scale; at this seed one fixed number."""
    ids = range(20_000)
    pairs = 4 * labels(3, "train", ids, 10) + guidance_index(3, "train", ids, 4)
    assert stats.chisquare(np.bincount(pairs, minlength=40)).pvalue > 1e-3


def test_a_sample_does_not_depend_on_its_batch():
    whole = standard_normal(7, "train", range(100), (4, 5))
    alone = np.stack([standard_normal(7, "train", [i], (4, 5))[0] for i in range(99, -1, -1)])[::-1]
    np.testing.assert_array_equal(whole, alone)


@pytest.mark.parametrize("other", [(8, "train", "noise"), (7, "holdout", "noise"), (7, "train", "data")])
def test_seeds_splits_and_purposes_are_apart(other):
    seed, split, purpose = other
    first = uniform(7, "train", range(50), purpose="noise", size=8)
    assert not np.intersect1d(first, uniform(seed, split, range(50), purpose=purpose, size=8)).size


def test_no_two_ids_share_a_block():
    drawn = uniform(0, "train", range(2000), purpose="noise", size=64)
    assert len(np.unique(drawn)) == drawn.size


def test_quantile_is_the_normal_one():
    u = np.concatenate([np.logspace(-15, -0.5, 400), 1 - np.logspace(-15, -0.5, 400), [0.075, 0.5, 0.925]])
    np.testing.assert_allclose(normal_quantile(u), ndtri(u), rtol=2e-14, atol=1e-16)


def test_normals_are_standard_normal():
    drawn = standard_normal(1, "train", range(1000), (64,)).ravel()
    # With the fixed seed this is one fixed number, far from the 1e-3 at which one would doubt it.
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    assert abs(drawn.mean()) < 4 / np.sqrt(drawn.size)
    assert abs(drawn.var() - 1) < 4 * np.sqrt(2 / drawn.size)


def test_a_seed_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"seed -1 is not in \[0, 2\^64\)"):
        uniform(-1, "train", [0], purpose="noise", size=1)


@pytest.mark.parametrize("size", [1, 4, 7, 64])
def test_all_samples_at_once_are_the_bits_of_numpys_own_generators(size):
    key, ids = (2**64 - 3, 7 << 32 | 5), np.array([0, 1, 255, 10**10, 2**63 - 1])
    for words, sample_id in zip(philox_words(key, ids, size), ids.tolist(), strict=True):
        counter = np.array([0, sample_id, 0, 0], dtype=np.uint64)
        generator = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=counter)
        np.testing.assert_array_equal(words, generator.random_raw(size))
