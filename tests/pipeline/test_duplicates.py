"""Equal noises are found exactly, whatever file they fall into, and honest collisions are as many as they should be."""

import numpy as np
import pytest

from limbeck.pipeline.after import duplicates
from limbeck.pipeline.after.duplicates import Fingerprints, Sample, collision_tail, expected_pairs, fingerprints
from limbeck.storage_schemas.record import to_storage


def repeats(folder, *columns, samples=None):
    folder.mkdir(exist_ok=True)
    with Fingerprints(folder, samples or sum(len(ids) for _, ids, _ in columns)) as prints:
        for split, ids, noise in columns:
            prints.add(fingerprints(split, ids, noise))
        return prints.repeats()


@pytest.mark.parametrize("files", [1, 7])
@pytest.mark.parametrize("d", [2, 300])
def test_every_repeat_is_found_across_splits_and_shards(tmp_path, monkeypatch, files, d):
    monkeypatch.setattr(duplicates, "FILE_BYTES", -(-1100 * duplicates.RECORD.itemsize // files))
    noise = np.random.default_rng(0).permutation(2200 * d).reshape(2200, d).astype(np.float32)[:1100]
    noise[700] = noise[3]
    noise[[20, 1050]] = noise[1099]
    found = repeats(
        tmp_path / "scratch",
        ("train", np.arange(500), noise[:500]),
        ("train", np.arange(500, 1000), noise[500:1000]),
        ("holdout", np.arange(100), noise[1000:]),
    )
    groups = {frozenset(map(str, group)) for group in found.groups}
    assert groups == {
        frozenset({"train 3", "train 700"}),
        frozenset({"train 20", "holdout 50", "holdout 99"}),
    }
    assert (found.pairs, found.complete) == (1 + 3, True)
    assert len(list((tmp_path / "scratch").iterdir())) == files


def test_memory_stays_bounded_where_all_are_alike(tmp_path, monkeypatch):
    """A file that is far too large is not read whole: what was read says enough."""
    monkeypatch.setattr(duplicates, "FILE_BYTES", 2400)
    found = repeats(tmp_path, ("train", np.arange(5000), np.ones((5000, 32), np.float16)))
    assert not found.complete
    assert found.pairs == 400 * 399 // 2
    assert found.groups[0][:2] == (Sample("train", 0), Sample("train", 1))


@pytest.mark.parametrize(
    ("dtype", "sigma", "d", "samples"),
    [("float16", 80.0, 2, 40_000), ("bfloat16", 1.0, 2, 3000), ("float32", 80.0, 1, 30_000)],
)
def test_honest_collisions_are_as_many_as_expected(tmp_path, dtype, sigma, d, samples):
    """The sum over 30 draws lies within four standard deviations of 30 times the mean."""
    generator, seen = np.random.default_rng(0), 0
    for draw in range(30):
        noise = to_storage(sigma * generator.standard_normal((samples, d)), dtype)
        seen += repeats(tmp_path / str(draw), ("train", np.arange(samples), noise)).pairs
    mean, variance = expected_pairs(samples, sigma, dtype, d)
    assert mean > 3
    assert seen == pytest.approx(30 * mean, abs=4 * (30 * variance) ** 0.5)


def test_a_repeat_of_something_large_is_never_honest():
    mean, variance = expected_pairs(10**9, 80.0, "float16", 64)
    assert mean < 1e-100
    assert collision_tail(0, mean, variance) == 1.0
    assert collision_tail(1, mean, variance) < 1e-100
    assert collision_tail(13, 13.0, 13.0) == pytest.approx(0.5369, abs=1e-3)  # P(Poisson(13) >= 13)
