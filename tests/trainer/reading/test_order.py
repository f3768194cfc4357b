import hashlib
import itertools
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from limbeck.storage_schemas.ids import IdSet, id_set
from limbeck.trainer.reading.order import (
    BLOCK,
    START,
    WINDOW,
    WINDOW_BYTES,
    Lanes,
    Window,
    default_block,
    default_lanes,
    default_window,
)
from limbeck.trainer.reading.permutation import Permutation

HUGE = id_set(0, 10**10, [(5, 7), (10**9, 10**9 + 10**6)])
GAPPY = id_set(700, 20000, [(1000, 1003), (5000, 9000)])


@st.composite
def id_sets(draw, longest: int = 4000) -> IdSet:
    start = draw(st.integers(0, 700))
    stop = start + draw(st.integers(1, longest))
    gaps = draw(st.lists(st.tuples(st.integers(0, start + longest), st.integers(1, 1200)), max_size=6))
    ids = id_set(start, stop, [(first, first + length) for first, length in gaps])
    return ids if ids.count else id_set(start, stop, [])


@st.composite
def orders(draw, longest: int = 4000) -> Lanes:
    return Lanes(
        draw(id_sets(longest)),
        "content",
        draw(st.integers(0, 2**63 - 1)),
        lanes=draw(st.integers(1, 12)),
        block=draw(st.sampled_from([1, 3, 8, 64, 512])),
        first_epoch=draw(st.integers(0, 10**12)),
        window=draw(st.sampled_from([1, 3, WINDOW])),
    )


def order_of(ids: IdSet, *, seed: int = 7, digest: str = "content", lanes: int = 8, block: int = BLOCK) -> Lanes:
    return Lanes(ids, digest, seed, lanes, block)


def ids_of(ids: IdSet) -> np.ndarray:
    return ids.at(np.arange(ids.count))


def whole(order: Lanes, epochs: int) -> np.ndarray:
    """All rows before the epoch's number `first_epoch + epochs`."""
    return order.rows(0, order.epoch_start(order.first_epoch + epochs), range(order.lanes))


def batches(order: Lanes, size: int, count: int, ranks: int = 1) -> np.ndarray:
    """The first global batches as `ranks` ranks make them up, each from rows of its own lanes: [count, size]."""
    rows, lanes = size // order.lanes, order.lanes // ranks
    mine = [range(rank * lanes, (rank + 1) * lanes) for rank in range(ranks)]
    return np.stack(
        [np.concatenate([order.rows(k * rows, (k + 1) * rows, lanes).ravel() for lanes in mine]) for k in range(count)]
    )


@settings(max_examples=80, deadline=None)
@given(order=orders(), epochs=st.integers(1, 12))
def test_every_id_comes_once_an_epoch_apart_from_the_rows_carried(order, epochs):
    seen = Counter(whole(order, epochs).ravel().tolist())
    missing = {id: epochs - seen.pop(id, 0) for id in ids_of(order.ids).tolist()}
    assert not seen
    assert min(missing.values()) >= 0
    assert sum(missing.values()) == epochs * order.ids.count % order.lanes


def laid_out(order: Lanes, epoch: int) -> np.ndarray:
    """E_e by its definition: the blocks that have ids, listed, in the order of the permutation."""
    blocks = [list(ids) for _, ids in itertools.groupby(ids_of(order.ids).tolist(), lambda id: id // order.block)]
    places = Permutation(len(blocks), order._key(epoch))(np.arange(len(blocks)))
    return np.concatenate([blocks[place] for place in places])


@settings(max_examples=40, deadline=None)
@given(order=orders(longest=1500), epochs=st.integers(1, 4))
def test_lanes_are_the_runs_of_each_epochs_stretch_cut_into_windows(order, epochs):
    every, n, first = np.arange(epochs), order.ids.count, order.first_epoch
    laid = np.concatenate([laid_out(order, first + epoch) for epoch in every])
    rows = whole(order, epochs)
    for epoch in every:
        start, stop = epoch * n // order.lanes, (epoch + 1) * n // order.lanes
        runs = laid[start * order.lanes : stop * order.lanes].reshape(order.lanes, -1)
        small = [blocks for blocks in START if blocks < order.window] if epoch == 0 else []
        begun = [order.block * sum(small[:i]) for i in range(len(small) + 1)]
        cuts = [cut for cut in begun if cut < stop - start]
        rest = stop - start - begun[-1]
        windows = -(-rest // (order.window * order.block))
        cuts += [begun[-1] + i * rest // windows for i in range(1, windows + 1)] if rest > 0 else [stop - start]
        for low, high in itertools.pairwise(cuts):
            found = rows[:, start + low : start + high]
            np.testing.assert_array_equal(np.sort(found, axis=1), np.sort(runs[:, low:high], axis=1))
            assert order.window_at(start + low) == order.window_at(start + high - 1)
            assert order.window_at(start + low).start == start + low


@settings(max_examples=60, deadline=None)
@given(order=orders(), data=st.data())
def test_any_slice_of_any_lanes_is_a_part_of_the_whole(order, data):
    rows = whole(order, 3)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, rows.shape[1])] * 2)))
    first = data.draw(st.integers(0, order.lanes - 1))
    past = data.draw(st.integers(first + 1, order.lanes))
    np.testing.assert_array_equal(order.rows(start, stop, range(first, past)), rows[first:past, start:stop])


@settings(max_examples=15, deadline=None)
@given(ids=id_sets(), seed=st.integers(0, 2**63 - 1), block=st.sampled_from([1, 16, 512]), rows=st.integers(1, 20))
def test_any_number_of_ranks_makes_up_the_same_batches(ids, seed, block, rows):
    order = order_of(ids, seed=seed, block=block)
    one = batches(order, 8 * rows, 4)
    for ranks in (2, 4, 8):
        np.testing.assert_array_equal(batches(order, 8 * rows, 4, ranks), one)


@pytest.mark.parametrize("row", [0, 4 * 10**9, 12345 * 10**10 + 678])
def test_rows_do_not_hang_on_what_was_asked_before(row):
    def asked(step: int) -> list[int]:
        order = order_of(id_set(0, 10**10, []))
        return [order.rows(at, at + 1, range(8))[5, 0] for at in range(row, row + 60, step)]

    assert asked(1)[::20] == asked(20)


def sha256(ids: np.ndarray) -> str:
    return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("ids", "lanes", "block", "digest"),
    [
        (id_set(0, 100, []), 8, 1, "dac4aa60fb2373cd376bc3584ca3e3c48555d675edaec286a4c399824892b3ef"),
        (id_set(0, 5, []), 8, 1, "3ac2d9b24a544029d0108ef3aed635eabf2832cd51dd3309030b4552e594d86e"),
        (id_set(0, 3000, []), 1, 512, "7d06faef303cda222a26b1b5cd2389b9217f8be89fd3e722c58fe4f1f70f221a"),
        (GAPPY, 8, 64, "b521b009bf0de7f0403de5912a1b406b20cd313bad11f1af884c7c3c4990c6f2"),
        (GAPPY, 6, 7, "c99e676727c622ebb66f0d92e8aeb4a9e623168aa1fe1280a9afffa0f3c14fe9"),
    ],
)
def test_golden(ids, lanes, block, digest):
    assert sha256(whole(Lanes(ids, "content", 7, lanes, block, first_epoch=2), 9)) == digest


@pytest.mark.parametrize(
    ("row", "digest"),
    [
        (0, "1110dd5530bffb3cf1bdeffc2518deb56c40d027372f01c0bf6d7075ea80e9b4"),
        (10**9, "607029507bb292406d033ffc2d4d95031f43717c227bb998603cd01e1c520092"),
        (7 * 10**14 + 5, "a94e45f25fe0b6c439144e14adec81086555f2dfe9db521cfc42d78952dea55b"),
    ],
)
def test_golden_far_into_ten_billion(row, digest):
    assert sha256(order_of(HUGE).rows(row, row + 8192, range(8))) == digest


def peak_bytes(ids: IdSet, row: int) -> int:
    """Most memory that a cold window needs."""
    tracemalloc.start()
    order_of(ids).rows(row, row + 1, range(8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("ids", [HUGE, id_set(3, 10**10, [(10**6, 10**10 - 10**6)])])
def test_a_window_of_ten_billion_costs_no_more_than_one_of_a_million(ids):
    assert peak_bytes(ids, 10**12) < 1.2 * peak_bytes(id_set(0, 10**6, []), 10**5)
    order, started = order_of(ids), time.perf_counter()
    for row in range(10**12, 10**12 + 10 * 8192, 8192):
        order.rows(row, row + 1, range(8))
    assert time.perf_counter() - started < 5.0


def test_a_lanes_window_is_read_from_few_blocks_far_apart():
    order = order_of(HUGE)
    blocks = np.unique(order.window_ids(order.window_at(10**8), range(3, 4)) // BLOCK)
    assert len(blocks) <= WINDOW + 1
    assert np.ptp(blocks) > 10**6


def test_many_gaps_are_no_slower_to_find_a_way_through():
    starts = np.arange(1, 10**8, 300)
    ids = id_set(0, 10**8, np.stack([starts, starts + 2], axis=1))
    rows = order_of(ids).rows(10**7, 10**7 + 8192, range(8))
    assert ids.contains(rows).all()
    assert len(np.unique(rows)) == rows.size


def test_seed_epoch_content_lanes_and_block_each_give_another_order():
    ids = id_set(0, 4096, [])
    changed = [{}, {"seed": 1}, {"digest": "other"}, {"lanes": 4}, {"block": 256}]
    seen = [whole(order_of(ids, **options), 1).tobytes() for options in changed]
    seen.append(whole(Lanes(ids, "content", 7, 8, BLOCK, first_epoch=1), 1).tobytes())
    assert len(set(seen)) == 6


def test_shuffles_of_a_window_are_uniform():
    # One block, one window: only the shuffle moves anything. 4,800 epochs of 4 ids: 200 of each of 24 orders.
    epochs = order_of(id_set(0, 4, []), lanes=1).rows(0, 4 * 4800, range(1)).reshape(-1, 4)
    counts = np.unique(epochs @ np.array([64, 16, 4, 1]), return_counts=True)[1]
    assert len(counts) == 24
    assert ((counts - 200) ** 2 / 200).sum() < chi2.isf(1e-4, df=23)


def test_lanes_windows_and_epochs_are_shuffled_independently():
    # Blocks of one id, so that a window is 16 rows; ids are told apart by where they are in an unshuffled window.
    order = order_of(id_set(0, 2 * 4 * 16, []), lanes=2, block=1)
    firsts = []
    for epoch in range(1, 801):
        laid = laid_out(order, epoch).reshape(2 * 4, 16)
        rows = order.rows(epoch * 64, epoch * 64 + 64, range(2)).reshape(2 * 4, 16)
        firsts.append([laid[i].tolist().index(rows[i][0]) for i in range(8)])
    ways = np.array(firsts)
    pairs = [(ways[:, 0], ways[:, 1]), (ways[:, 0], ways[:, 4]), (ways[1:, 0], ways[:-1, 0])]
    for one, other in pairs:
        counts = np.histogram2d(one // 4, other // 4, bins=4, range=[(0, 4)] * 2)[0]
        expected = len(one) / 16
        assert ((counts - expected) ** 2 / expected).sum() < chi2.isf(1e-4, df=15)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 65, 1000])
def test_permutation_and_its_inverse(size):
    permute = Permutation(size, b"key")
    places = np.arange(size)
    np.testing.assert_array_equal(np.sort(permute(places)), places)
    np.testing.assert_array_equal(permute.inverse(permute(places)), places)


def test_small_permutations_are_uniform():
    counts = np.zeros((5, 5))
    for key in range(2000):
        counts[np.arange(5), Permutation(5, key.to_bytes(4))(np.arange(5))] += 1
    # Binomial(2000, 1/5) has standard deviation 17.9: none of 25 cells is 4.5 of them away.
    assert np.abs(counts - 400).max() < 4.5 * 17.9


@pytest.mark.parametrize(("batch_size", "lanes"), [(256, 8), (100, 4), (30, 2), (7, 1), (8, 8)])
def test_lanes_divide_the_batch(batch_size, lanes):
    assert default_lanes(batch_size) == lanes


@pytest.mark.parametrize(
    ("count", "lanes", "block"),
    [(1, 8, 1), (127, 8, 1), (128, 8, 1), (256, 8, 2), (16384, 8, 128), (65536, 8, 512), (10**10, 8, 512), (100, 1, 4)],
)
def test_a_lane_has_a_window_of_blocks(count, lanes, block):
    assert default_block(count, lanes) == block


@pytest.mark.parametrize(
    ("row_bytes", "blocks"), [(1, WINDOW), (1 << 13, 16), (1 << 14, 8), (100_000, 1), (1 << 30, 1)]
)
def test_a_window_of_heavy_rows_has_fewer_blocks(row_bytes, blocks):
    assert default_window(8, 512, row_bytes) == blocks
    assert blocks == 1 or 8 * 512 * row_bytes * blocks <= WINDOW_BYTES


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (lambda order: order.rows(5, 3, range(8)), "rows 5 to 3"),
        (lambda order: order.rows(-1, 3, range(8)), "rows -1 to 3"),
        (lambda order: order.rows(0, 3, range(4, 9)), "no range of lanes below 8"),
        (lambda order: order.window_ids(Window(0, 0, 0, 1), range(0)), "no range of lanes below 8"),
        (lambda order: order.window_at(-1), "row -1 is before"),
        (lambda order: Lanes(order.ids, "content", 7, 8, 1, first_epoch=4).epoch_start(3), "epoch 3 is before"),
        (lambda order: order_of(id_set(0, 3, [(0, 3)])), "no order of 0 samples"),
        (lambda order: order_of(order.ids, lanes=0), "in 0 lanes"),
    ],
)
def test_what_is_not_there_is_refused(ask, told):
    with pytest.raises(ValueError, match=told):
        ask(order_of(id_set(0, 10, [])))
