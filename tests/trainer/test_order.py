import hashlib
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_schemas.ids import IdSet, id_set
from trainer.order import BLOCK, WINDOW, EpochOrder, Permutation


@st.composite
def id_sets(draw) -> IdSet:
    start = draw(st.integers(0, 3000))
    stop = start + draw(st.integers(1, 20000))
    gaps = draw(st.lists(st.tuples(st.integers(0, 25000), st.integers(1, 3000)), max_size=5))
    return id_set(start, stop, [(first, first + length) for first, length in gaps])


def order_of(ids: IdSet, *, seed: int = 0, epoch: int = 0, digest: str = "content") -> EpochOrder:
    return EpochOrder(ids, digest, seed, epoch)


@settings(max_examples=80, deadline=None)
@given(ids=id_sets(), seed=st.integers(0, 2**63 - 1))
def test_every_id_comes_exactly_once(ids, seed):
    order = order_of(ids, seed=seed)
    np.testing.assert_array_equal(np.sort(order.slice(0, order.count)), ids.at(np.arange(ids.count)))


@settings(max_examples=40, deadline=None)
@given(ids=id_sets(), data=st.data())
def test_any_slice_is_a_part_of_the_whole(ids, data):
    order = order_of(ids)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, ids.count)] * 2)))
    np.testing.assert_array_equal(order.slice(start, stop), order.slice(0, ids.count)[start:stop])


@pytest.mark.parametrize(
    ("ids", "sha256"),
    [
        (id_set(0, 100, []), "64b85c39f7b961c227de2e5ab4a007a9f0e99565f413291747437e8d6e832f5a"),
        (
            id_set(700, 20000, [(1000, 1003), (5000, 9000)]),
            "c5ca4a82887911c4e6e2e31eb44c36ee50328320577fcd6bdc3279c10c44d12a",
        ),
    ],
)
def test_golden(ids, sha256):
    order = order_of(ids, seed=7, epoch=3)
    assert hashlib.sha256(order.slice(0, order.count).astype("<i8").tobytes()).hexdigest() == sha256


def test_golden_far_into_ten_billion():
    order = order_of(id_set(0, 10**10, [(5, 7), (10**9, 10**9 + 10**6)]), seed=7)
    assert order.slice(5 * 10**9, 5 * 10**9 + 4).tolist() == [7227869150, 6973035633, 976740847, 2785706818]


def test_ten_billion_rows_cost_no_more_than_a_window():
    order = order_of(id_set(0, 10**10, []))
    started = time.perf_counter()
    ids = order.slice(9_876_543_210, 9_876_543_210 + 256)
    assert time.perf_counter() - started < 1.0
    assert len(np.unique(ids)) == 256
    blocks = np.unique(ids // BLOCK)
    assert len(blocks) <= 2 * WINDOW
    assert np.ptp(blocks) > 10**6


def test_seed_epoch_and_content_each_give_another_order():
    ids = id_set(0, 1000, [])
    orders = [order_of(ids), order_of(ids, seed=1), order_of(ids, epoch=1), order_of(ids, digest="other")]
    assert len({order.slice(0, 1000).tobytes() for order in orders}) == 4


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 65, 1000])
def test_permutation_and_its_inverse(size):
    permute = Permutation(size, b"key")
    places = np.arange(size)
    np.testing.assert_array_equal(np.sort(permute(places)), places)
    np.testing.assert_array_equal(permute.inverse(permute(places)), places)


def test_small_permutations_are_uniform():
    counts = np.zeros((5, 5))
    for key in range(4000):
        counts[np.arange(5), Permutation(5, key.to_bytes(4))(np.arange(5))] += 1
    # Binomial(4000, 1/5) has standard deviation 25.3: none of 25 cells is 4.5 of them away.
    assert np.abs(counts - 800).max() < 4.5 * 25.3


def test_positions_outside_the_epoch_are_refused():
    with pytest.raises(ValueError, match="not in an epoch of 10"):
        order_of(id_set(0, 10, [])).slice(5, 11)
