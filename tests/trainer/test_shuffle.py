import json

import numpy as np
import pytest

from limbeck.storage_schemas.command_line import main
from limbeck.storage_schemas.program import COMMANDS
from limbeck.trainer.shuffle import (
    ShuffleConfig,
    adjacent_pairs,
    displacement,
    distinct,
    expected_distinct,
    expected_pairs,
    measure,
    rank_correlation,
)

N, BATCH = 2**18, 256
EQUAL = np.full(128, N // 128)
UNEQUAL = np.array([N // 2, N // 4, *[N // 128] * 32])


def shuffled(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(N)


def shards_of(ids: np.ndarray, samples: np.ndarray) -> np.ndarray:
    return np.repeat(np.arange(len(samples)), samples)[ids].reshape(-1, BATCH)


def figures(**options) -> dict[str, dict]:
    measured = measure(ShuffleConfig(**options))
    return {figure["name"]: figure for figure in measured["figures"]} | {"window": measured["window"]}


def test_a_full_shuffle_has_the_figures_that_are_expected_of_it():
    # |i - j| / n has variance 1/18, nearly independent over N places.
    assert displacement(np.arange(N), shuffled(), N) == pytest.approx(1 / 3, abs=4.5 / np.sqrt(18 * N))
    assert rank_correlation(shuffled(1), shuffled(2)) == pytest.approx(0, abs=4.5 / np.sqrt(N))
    for samples in (EQUAL, UNEQUAL):
        shards, pairs = shards_of(shuffled(), samples), expected_pairs(samples)
        assert adjacent_pairs(shards) == pytest.approx(pairs, abs=4.5 * np.sqrt(2 * pairs / N))
        # At most one shard a place: the number of distinct ones in a batch has a deviation below sqrt(B) / 2.
        error = 4.5 * np.sqrt(BATCH) / 2 / np.sqrt(N / BATCH)
        assert distinct(shards) == pytest.approx(expected_distinct(samples, BATCH), abs=error)


def test_the_order_of_ids_has_the_other_extremes():
    ids = np.arange(N)
    assert displacement(ids, ids, N) == 0
    assert rank_correlation(ids, ids) == pytest.approx(1)
    assert rank_correlation(ids, ids[::-1]) == pytest.approx(-1)
    assert adjacent_pairs(shards_of(ids, EQUAL)) == 1
    assert distinct(shards_of(ids, EQUAL)) == 1


def test_expectations_in_closed_form():
    # Shards of 2 and 2: of 3 others, 1 is from the same one; 2 of 4 are from both shards in 4 cases of 6.
    assert expected_pairs(np.array([2, 2])) == pytest.approx(1 / 3)
    assert expected_distinct(np.array([2, 2]), 2) == pytest.approx(1 + 4 / 6)
    assert expected_distinct(np.array([2, 2]), 3) == 2
    # Small shards of a very large set: every row is from one of its own.
    assert expected_distinct(np.full(10**6, 10**4), 256) == pytest.approx(256, rel=2e-4)


def test_a_large_set_is_near_a_full_shuffle_and_reads_few_shards():
    found = figures(rows=2**20, batch_size=256)
    # 2048 blocks move at random: the deviation of the mean displacement is that of so many draws.
    assert found["mean displacement / n"]["found"] == pytest.approx(1 / 3, abs=4.5 / np.sqrt(18 * 2048))
    assert found["rank correlation of epochs"]["found"] == pytest.approx(0, abs=4.5 / np.sqrt(2048))
    # Neighbours in a lane's window are from one of its 16 blocks (17 where they are cut), or from another by chance.
    assert 1 / 17 < found["adjacent pairs from one shard"]["found"] < 1 / 16 + 2 / 512 + 0.005
    # 32 rows of each of 8 lanes from 16 blocks: 8 * 16 * (1 - (15/16)^32) blocks, some of one shard.
    assert 90 < found["distinct shards in a batch"]["found"] <= 8 * 17 * (1 - (16 / 17) ** 32)
    assert found["window"]["rows"] == 8 * 8192
    assert 100 < found["window"]["shards_mean"] <= found["window"]["shards_most"] <= 8 * 17
    assert found["window"]["shards_least"] == 32


def test_a_set_of_one_window_to_a_lane_is_read_from_everywhere():
    found = figures(rows=16384, batch_size=256)
    assert found["distinct shards in a batch"]["found"] == pytest.approx(8, abs=0.05)
    assert found["window"]["shards_mean"] == 8


def test_stretches_of_a_long_epoch_tell_what_all_of_it_does():
    whole, some = figures(rows=2**21, count=2**21), figures(rows=2**21, count=2**19)
    assert some["rank correlation of epochs"]["found"] is None
    for name in ("adjacent pairs from one shard", "distinct shards in a batch"):
        assert some[name]["found"] == pytest.approx(whole[name]["found"], rel=0.02)


def test_ten_billion_rows_are_measured_from_a_few():
    measured = measure(ShuffleConfig(rows=10**10, samples_per_shard=10**6, count=300_000))
    assert measured["looked_at"] <= 300_000
    assert measured["window"]["shards_least"] == 1


def test_a_store_is_measured_by_its_manifest(make_store, capsys):
    store = make_store(count=300, quarantined=(3, 200), missing=("train-00000001",), window_start=10)
    arguments = ["shuffle", "--data", store.uri, "--batch-size", "16", "--json"]
    assert main(COMMANDS, arguments) == 0
    measured = json.loads(capsys.readouterr().out)
    assert (measured["samples"], measured["shards"], measured["lanes"]) == (300 - 10 - 64 - 1, 4, 8)
    assert measured["looked_at"] == 225 // 16 * 16
    assert measured["window"]["bytes_mean"] > 0


def test_the_table_tells_each_figure_beside_its_expectation(capsys):
    assert main(COMMANDS, ["shuffle", "--rows", "4096", "--samples-per-shard", "512"]) == 0
    told = capsys.readouterr().out
    for words in ("4,096 samples in 8 shards", "mean displacement / n", "0.3333", "shards read for a window"):
        assert words in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "one of them"),
        (["--rows", "9", "--data", "store"], "one of them"),
        (["--rows", "1000", "--lanes", "3", "--batch-size", "256"], "3 lanes do not divide batch_size 256"),
        (["--rows", "100", "--batch-size", "256"], "100 samples fill no batch of 256"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, told, capsys):
    assert main(COMMANDS, ["shuffle", *options]) == 2
    assert told in capsys.readouterr().err
