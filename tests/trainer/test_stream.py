import itertools
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from limbeck.storage_schemas.dataset import open_dataset
from limbeck.storage_schemas.errors import CorruptShard, ManifestMismatch
from limbeck.storage_schemas.record import Field
from limbeck.trainer.reading import filler
from limbeck.trainer.reading.batch import Batch, BatchShape
from limbeck.trainer.reading.order import Lanes, default_block
from limbeck.trainer.reading.rows import Rows, copy_rows
from limbeck.trainer.reading.shards import ShardSource
from limbeck.trainer.stream import ArraySource, Stream, objective_uniforms

CPU = torch.device("cpu")


class Numbered(ArraySource):
    """n samples: `output` [2, 3] in float16 of 6 * id + place, `noise` [5] in float32 of -id, the label id % 10."""

    def __init__(self, count: int, digest: str = "numbered") -> None:
        ids = torch.arange(count)
        self._columns = {
            "output": (6 * ids[:, None] + torch.arange(6)).half().reshape(-1, 2, 3),
            "noise": (-ids[:, None]).float().repeat(1, 5),
        }
        super().__init__(self._columns["output"], ids % 10, digest)
        self.fields = (Field("output", (2, 3), "float16"), Field("noise", (5,), "float32"))
        self.place = {"dataset": "main", "manifest": count}
        self.loads: list[int] = []
        self.excluded: list[list[int]] = []

    def load(self, ids) -> Rows:
        self.loads.append(len(ids))
        rows = super().load(ids)
        addresses = {
            field.name: self._columns[field.name].data_ptr() + ids * field.nbytes for field in self.fields
        }  # fmt: skip
        return Rows(rows.ids, rows.condition, 1.0 + ids, addresses, self._columns, rows.substituted)

    def exclude(self, ranges) -> None:
        self.excluded = [list(part) for part in ranges]


def take(source, number: int, *, batch_size=16, seed=0, num_uniforms=1, **options) -> tuple[list[Batch], dict]:
    """Copies of the next batches, and the state after them."""
    with Stream(source, batch_size=batch_size, seed=seed, num_uniforms=num_uniforms, **options) as stream:
        return [batch.each(torch.clone) for batch in itertools.islice(stream, number)], stream.state_dict()


def take_on_ranks(source, number: int, ranks: int, **options) -> tuple[list[Batch], dict]:
    """The global batches put together from every rank's, and the state, which is the same on each."""
    parts = [take(source, number, rank=rank, world_size=ranks, **options) for rank in range(ranks)]
    assert all(state == parts[0][1] for _, state in parts)
    return [joined(batches) for batches in zip(*(batches for batches, _ in parts), strict=True)], parts[0][1]


def joined(parts: tuple[Batch, ...]) -> Batch:
    return Batch(
        positions=torch.cat([part.positions for part in parts]),
        ids=torch.cat([part.ids for part in parts]),
        condition=torch.cat([part.condition for part in parts]),
        states={name: torch.cat([part.states[name] for part in parts]) for name in parts[0].states},
        uniforms=torch.cat([part.uniforms for part in parts]),
        guidance=torch.cat([part.guidance for part in parts]),
    )


def tensors(batch: Batch) -> list[torch.Tensor]:
    return [batch.positions, batch.ids, batch.condition, batch.guidance, batch.uniforms, *batch.states.values()]


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.states.keys() == b.states.keys()
        for x, y in zip(tensors(a), tensors(b), strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)


def ids_of(batches: list[Batch]) -> np.ndarray:
    return torch.stack([batch.ids for batch in batches]).numpy()


def lanes_of(source, seed=0, lanes=8, first_epoch=0) -> Lanes:
    block = default_block(source.ids.count, lanes)
    return Lanes(source.ids, source.digest, seed, lanes, block, first_epoch)


def wait_until(condition, seconds=10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def stream_threads() -> int:
    return sum(thread.name.startswith("stream ") for thread in threading.enumerate())


@pytest.mark.parametrize("count", [1, 3, 7, 100, 1000])
def test_a_global_batch_is_the_next_rows_of_each_lane_lane_by_lane(count):
    source = Numbered(count)
    batches, _ = take(source, 12, batch_size=24)
    expected = lanes_of(source).rows(0, 36, range(8))
    for number, batch in enumerate(batches):
        np.testing.assert_array_equal(batch.ids.numpy(), expected[:, 3 * number : 3 * number + 3].ravel())
        assert torch.equal(batch.positions, 24 * number + torch.arange(24))
        assert torch.equal(batch.uniforms, objective_uniforms(0, batch.positions.numpy(), 1))


def test_rows_are_the_bits_of_their_ids():
    batches, _ = take(Numbered(300), 40)
    for batch in batches:
        ids = batch.ids
        assert torch.equal(batch.condition, ids % 10)
        assert torch.equal(batch.guidance, 1.0 + ids)
        assert torch.equal(batch.states["output"], (6 * ids[:, None] + torch.arange(6)).half().reshape(-1, 2, 3))
        assert torch.equal(batch.states["noise"], (-ids[:, None]).float().expand(-1, 5))


def test_a_run_of_before_windows_were_bounded_goes_on_in_its_order():
    source = Numbered(3000)
    whole, _ = take(source, 40)
    _, state = take(source, 10)
    del state["window"]
    source.row_bytes = 1 << 30  # a new run's windows would have one block
    assert_same(take(source, 30, state=state)[0], whole[10:])
    anew, after = take(source, 40)
    assert after["window"] == 1
    assert not np.array_equal(ids_of(anew), ids_of(whole))


def test_every_sample_comes_once_an_epoch_and_the_remainder_is_carried_over():
    batches, state = take(Numbered(250), 100, batch_size=24)
    by_lane = np.concatenate([batch.ids.numpy().reshape(8, 3) for batch in batches], axis=1)
    for epoch in range(1, 9):
        seen = np.bincount(by_lane[:, : epoch * 250 // 8].ravel(), minlength=250)
        left = epoch * 250 % 8  # for the epoch after
        assert ((seen == epoch - 1).sum(), (seen == epoch).sum()) == (left, 250 - left)
    assert (state["epoch"], state["position"], state["consumed"]) == (9, 8 * (300 - 9 * 250 // 8), 2400)


def test_resume_at_every_position_on_any_number_of_ranks_gives_the_same_global_batches():
    source, whole, states = Numbered(100), [], []
    options = {"batch_size": 8, "num_uniforms": 2}  # one row of each lane at a time: every position that there is
    with Stream(source, seed=0, **options) as stream:
        for batch in itertools.islice(stream, 29):
            whole.append(batch.each(torch.clone))
            states.append(stream.state_dict())
    for done, ranks in itertools.product(range(1, 26), (1, 2, 4, 8)):
        ours, after = take_on_ranks(source, 3, ranks, state=states[done - 1], ahead_bytes=1 << (4 * ranks), **options)
        assert_same(ours, whole[done : done + 3])
        assert after == states[done + 2]


def test_a_run_may_change_ranks_again_and_again():
    source = Numbered(61)
    whole, _ = take(source, 24)
    state, done = None, 0
    for ranks, number in ((2, 1), (8, 4), (1, 3), (4, 9), (8, 2), (2, 5)):
        ours, state = take_on_ranks(source, number, ranks, state=state)
        assert_same(ours, whole[done : done + number])
        done += number


def test_a_run_may_change_its_batch_size():
    source = Numbered(61)
    _, state = take(source, 3, batch_size=16)
    batches, after = take(source, 2, batch_size=40, state=state)
    np.testing.assert_array_equal(batches[1].ids.numpy(), lanes_of(source).rows(11, 16, range(8)).ravel())
    assert batches[1].positions[0] == after["consumed"] - 40 == 3 * 16 + 40


def test_a_rank_loads_its_own_lanes_only():
    source = Numbered(1600)
    with Stream(source, batch_size=16, seed=0, rank=1, world_size=4, ahead_bytes=1) as stream:
        batch = next(stream)
        assert len(batch) == 4
        wait_until(lambda: len(source.loads) == 2)
    windows = [lanes_of(source).window_at(0), lanes_of(source).window_at(lanes_of(source).window_at(0).stop)]
    assert source.loads == [2 * (window.stop - window.start) for window in windows]


def test_the_order_does_not_depend_on_format_shards_read_ahead_or_whose_memory_it_is(make_store):
    def source(name, **options) -> ShardSource:
        return ShardSource(open_dataset(make_store(name, count=256, **options)), "train", ("noise", "output"))

    plain, state = take(source("a"), 20)
    assert (plain[0].states["output"].dtype, plain[0].states["output"].shape) == (torch.float32, (16, 2))
    others = [
        take(source("b", format="webdataset", samples_per_shard=16), 20, fresh=True),
        take(source("c", samples_per_shard=128), 20, ahead_bytes=1),
    ]
    for other, other_state in others:
        assert_same(other, plain)
        assert other_state == state


def test_bfloat16_stays_what_it_is(make_store):
    dataset = open_dataset(make_store(dtype="bfloat16"))
    (batch, *_), _ = take(ShardSource(dataset, "train", ("output",)), 1)
    stored = dataset.read(dataset.shards("train")[0], ["sample_id", "output"])
    bits = dict(zip(stored["sample_id"].tolist(), stored["output"].view(np.int16), strict=True))
    found = [place for place, sample_id in enumerate(batch.ids.tolist()) if sample_id in bits]
    assert batch.states["output"].dtype == torch.bfloat16
    assert found
    for place in found:
        assert batch.states["output"][place].view(torch.int16).tolist() == bits[int(batch.ids[place])].tolist()


def test_the_state_is_that_of_the_last_batch_given_not_of_those_made_ahead():
    source = Numbered(100)
    with Stream(source, batch_size=16, seed=3, ahead_bytes=1 << 24) as stream:
        next(stream)
        next(stream)
        wait_until(lambda: len(source.loads) > 3)
        assert stream.state_dict() == {
            "content_digest": "numbered", "seed": 3, "lanes": 8, "block": 1, "window": 16, "first_epoch": 0, "epoch": 0,
            "position": 32, "consumed": 32, "left_out": 0, "place": {"dataset": "main", "manifest": 100},
            "substituted": 0, "unreadable": [],
        }  # fmt: skip
        assert stream.epochs == 0.32


def test_a_batch_keeps_its_content_until_the_next_is_asked_for():
    with Stream(Numbered(1000), batch_size=16, seed=0, ahead_bytes=4096) as stream:
        for batch in itertools.islice(stream, 30):
            before = batch.each(torch.clone)
            time.sleep(0.003)
            assert_same([batch], [before])


def test_memory_is_the_read_ahead_and_two_batches(monkeypatch):
    made, empty = [], BatchShape.empty
    monkeypatch.setattr(BatchShape, "empty", lambda shape, **options: made.append(1) or empty(shape, **options))
    one = BatchShape(16, Numbered(1).fields, 0).nbytes
    assert one == 16 * (4 * 8 + 12 + 20)
    places = set()
    with Stream(Numbered(1000), batch_size=16, seed=0, ahead_bytes=3 * one) as stream:
        for batch in itertools.islice(stream, 40):
            places.add(batch.states["output"].data_ptr())
            time.sleep(0.002)
    assert 3 <= len(made) <= 3 + 2
    assert len(places) <= len(made)


@pytest.mark.parametrize("num_uniforms", [0, 3])
@pytest.mark.parametrize("rows", [1, 7])
def test_the_tensors_of_a_batch_lie_aligned_and_apart_in_its_memory(rows, num_uniforms):
    kinds = {
        "a": ((3,), "float16"),
        "b": ((), "int32"),
        "c": ((5,), "bfloat16"),
        "d": ((), "int64"),
        "e": ((1, 9), "float32"),
    }
    shape = BatchShape(rows, tuple(Field(name, *kind) for name, kind in kinds.items()), num_uniforms)
    packed = shape.empty()
    for number, tensor in enumerate(tensors(packed.batch)):
        assert not tensor.numel() or tensor.data_ptr() % 64 == packed.memory.data_ptr() % 64 == 0
        tensor.fill_(number)
    copied = shape.over(packed.memory.clone()).batch
    for number, tensor in enumerate(tensors(copied)):
        assert torch.equal(tensor, torch.full_like(tensor, number))
    assert (copied.uniforms.shape, copied.states["c"].shape, copied.states["d"].shape) == (
        (rows, num_uniforms),
        (rows, 5),
        (rows,),
    )
    assert len(shape.over(packed.memory).batch) == rows


def test_fresh_batches_are_the_callers():
    with Stream(Numbered(1000), batch_size=16, seed=0, num_uniforms=1, fresh=True) as stream:
        kept = list(itertools.islice(stream, 40))
    assert len({batch.states["noise"].data_ptr() for batch in kept}) == 40
    assert_same(kept, take(Numbered(1000), 40)[0])


def test_one_window_is_loaded_ahead():
    source = Numbered(100_000)
    with Stream(source, batch_size=16, seed=0, ahead_bytes=1) as stream:
        next(stream)
        wait_until(lambda: len(source.loads) == 2)
        time.sleep(0.05)
        assert len(source.loads) == 2


def test_the_first_batch_does_not_wait_for_the_second_window():
    class Stuck(Numbered):
        def load(self, ids) -> Rows:
            if self.loads:
                released.wait(20)
            return super().load(ids)

    released = threading.Event()
    with Stream(Stuck(1000), batch_size=16, seed=0) as stream:
        next(stream)
        released.set()


def test_a_window_is_let_go_before_the_next_is_waited_for():
    class Slow(Numbered):
        def load(self, ids) -> Rows:
            if self.loads:
                released.wait(20)
            rows = replace(super().load(ids), keep=np.empty(0))
            held.append(weakref.ref(rows.keep))
            return rows

    source, released, held = Slow(1000), threading.Event(), []
    with Stream(source, batch_size=8, seed=0) as stream:
        for _ in range(lanes_of(source).window_at(0).stop):
            next(stream)
        wait_until(lambda: held[0]() is None)
        released.set()


def test_close_ends_the_threads_and_later_calls_are_told():
    assert stream_threads() == 0
    stream = Stream(Numbered(100), batch_size=16, seed=0)
    assert stream_threads() == 2
    next(stream)
    stream.close()
    assert stream_threads() == 0
    with pytest.raises(ValueError, match="closed"):
        next(stream)
    assert stream.state_dict()["consumed"] == 16


def test_a_stream_that_is_dropped_ends_its_threads():
    before = stream_threads()
    stream = Stream(Numbered(640), batch_size=16, seed=0)
    next(stream)
    assert stream_threads() == before + 2
    del stream
    assert stream_threads() == before


LEFT_OPEN = """
import torch
from limbeck.trainer.stream import ArraySource, Stream

def batches():
    images = ArraySource(torch.zeros(4096, 1024), torch.arange(4096), "images")
    with Stream(images, batch_size=4096, seed=0, ahead_bytes=1 << 30) as stream:
        yield from stream

left = batches()
next(left)
"""


def test_a_stream_may_be_left_open_at_the_end_of_a_program():
    """Its threads, busy here, end before the interpreter does, which would abort in the middle of a copy."""
    done = subprocess.run([sys.executable, "-c", LEFT_OPEN], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_copies_of_a_stream_start_no_threads_of_torchs(monkeypatch):
    seen, before = [], torch.get_num_threads()

    def note(addresses, out):
        seen.append(torch.get_num_threads())
        copy_rows(addresses, out)

    monkeypatch.setattr(filler, "copy_rows", note)
    torch.set_num_threads(3)
    try:
        take(Numbered(640), 4)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert {*seen} == {1}


def test_close_does_not_wait_for_a_read_that_hangs():
    class Hanging(Numbered):
        def load(self, ids) -> Rows:
            released.wait(60)
            return super().load(ids)

    released = threading.Event()
    stream = Stream(Hanging(100), batch_size=16, seed=0)
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 10
    released.set()
    wait_until(lambda: stream_threads() == 0)


def test_an_error_comes_after_the_batches_before_it_and_again_on_every_call():
    class Failing(Numbered):
        def load(self, ids) -> Rows:
            if len(self.loads) == 2:
                raise error
            return super().load(ids)

    error, source = CorruptShard("flipped"), Failing(100)
    windows_end = lanes_of(source).window_at(lanes_of(source).window_at(0).stop).stop
    with Stream(source, batch_size=8, seed=0) as stream:
        assert len(list(itertools.islice(stream, windows_end))) == windows_end
        for _ in range(3):
            with pytest.raises(CorruptShard) as raised:
                next(stream)
            assert raised.value is error
        assert stream.state_dict()["consumed"] == 8 * windows_end
    assert stream_threads() == 0


def test_waiting_is_counted_and_the_first_wait_apart():
    class Slow(Numbered):
        def load(self, ids) -> Rows:
            time.sleep(0.2)
            return super().load(ids)

    with Stream(Slow(16), batch_size=16, seed=0, ahead_bytes=1) as stream:
        next(stream)
        assert stream.first_wait >= 0.05
        assert stream.waited == 0
        for _ in range(3):
            next(stream)
        assert 0.05 <= stream.waited < 5


def test_only_every_other_batch_of_two_turns():
    whole, _ = take(Numbered(61), 12)
    for turn in (0, 1):
        ours, _ = take(Numbered(61), 6, turn=(turn, 2))
        assert_same(ours, whole[turn::2])


class TestFollow:
    """Contents of 61 and 90 samples, 8 lanes, 3 rows of each a batch; the second from the third epoch on."""

    old, new = Numbered(61), Numbered(90, "newer")
    moved_at = 2 * 61 // 8  # rows of a lane in two epochs: 15 and 1/4

    def follow(self, epoch: int):
        self.asked.append(epoch)
        return self.new if epoch >= 2 else None

    def setup_method(self):
        self.asked = []

    def take(self, source, number, **options):
        return take(source, number, batch_size=24, **options)

    def expected(self) -> np.ndarray:
        before = lanes_of(self.old).rows(0, self.moved_at, range(8))
        return np.concatenate([before, lanes_of(self.new, first_epoch=2).rows(0, 60, range(8))], axis=1)

    def test_the_newer_content_begins_with_the_epoch_within_a_batch_if_need_be(self):
        assert self.moved_at % 3 == 0
        for shift in (0, 1, 2):  # one or two rows of each lane first, so that a batch straddles the change
            _, state = take(self.old, shift, batch_size=8) if shift else ([], None)
            batches, after = self.take(self.old, 9, state=state, follow=self.follow)
            expected = self.expected()[:, shift:]
            for number, batch in enumerate(batches):
                np.testing.assert_array_equal(batch.ids.numpy(), expected[:, 3 * number : 3 * number + 3].ravel())
                first = 8 * shift + 24 * number
                assert torch.equal(batch.uniforms, objective_uniforms(0, np.arange(first, first + 24), 1))
            rows = shift + 27 - self.moved_at
            assert after == after | {
                "content_digest": "newer", "first_epoch": 2, "epoch": 3 if rows >= 11 else 2,
                "consumed": 8 * (shift + 27), "left_out": 2 * 61 - 8 * self.moved_at,
                "place": {"dataset": "main", "manifest": 90},
            }  # fmt: skip

    def test_it_is_asked_once_at_each_later_epochs_start_also_by_a_run_that_goes_on_there(self):
        whole, _ = self.take(self.old, 12, follow=self.follow)
        assert self.asked == list(range(1, len(self.asked) + 1))
        _, state = self.take(self.old, 5)
        assert (state["epoch"], state["position"]) == (2, 0)
        self.asked.clear()
        rest, after = self.take(self.old, 2, state=state, follow=self.follow)
        assert self.asked[0] == 2
        assert_same(rest, whole[5:7])
        assert after["first_epoch"] == 2
        self.asked.clear()
        rest, _ = self.take(self.new, 5, state=after, follow=self.follow)
        assert_same(rest, whole[7:])
        assert self.asked[0] == 3

    def test_the_same_content_stored_anew_is_read_from_there_in_the_same_order(self):
        again = Numbered(61)
        batches, state = self.take(self.old, 9, follow=lambda epoch: again)
        assert_same(batches, self.take(self.old, 9)[0])
        assert (state["first_epoch"], state["left_out"]) == (0, 0)
        assert again.loads

    def test_samples_of_another_shape_end_the_run(self):
        other = ArraySource(torch.zeros(90, 4), torch.zeros(90, dtype=torch.int64), "other")
        with pytest.raises(ManifestMismatch, match=r"output float32\[4\].*start another run"):
            self.take(self.old, 9, follow=lambda epoch: other)


def test_other_content_seed_or_order_is_refused():
    _, state = take(Numbered(100), 2)
    for source, options, told in (
        (Numbered(100, "another"), {}, "content_digest numbered, .* --manifest"),
        (Numbered(100), {"seed": 1}, "seed 0, this stream has 1.*--seed"),
        (Numbered(100), {"lanes": 4}, "lanes 8, this stream has 4.*--lanes"),
        (Numbered(100), {"block": 2}, "block 1, this stream has 2"),
    ):
        with pytest.raises(ManifestMismatch, match=told):
            take(source, 1, state=state, **options)


def test_what_does_not_divide_is_refused_with_what_would():
    with pytest.raises(ValueError, match=r"lanes 6 do not divide a global batch of 16; choose from \[1, 2, 4, 8, 16\]"):
        Stream(Numbered(100), batch_size=16, seed=0, lanes=6)
    with pytest.raises(ValueError, match=r"3 ranks do not divide 8 lanes.*choose from \[1, 2, 4, 8\] ranks"):
        Stream(Numbered(100), batch_size=24, seed=0, rank=1, world_size=3)
    assert stream_threads() == 0


def test_no_samples_are_refused():
    with pytest.raises(ManifestMismatch, match="holds no samples"):
        Stream(Numbered(0), batch_size=16, seed=0)


class Substituting(Numbered):
    """Ids below 10 give way to id + 10; they are found as they are loaded."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self._lost: set[int] = set()

    @property
    def unreadable(self) -> list[list[int]]:
        return [[sample_id, sample_id + 1] for sample_id in self._lost]

    def load(self, ids) -> Rows:
        lost = ids < 10
        self._lost |= set(ids[lost].tolist())
        return replace(super().load(np.where(lost, ids + 10, ids)), substituted=lost)


def test_substitutes_are_counted_as_they_are_given_and_the_unreadable_united_over_ranks():
    lost = (lanes_of(Substituting(100)).rows(0, 25, range(8)) < 10).sum(axis=0).cumsum()
    for done in range(1, 24):
        batches, state = take(Substituting(100), done, batch_size=8)
        assert state["substituted"] == lost[done - 1]
        assert all((batch.ids >= 10).all() for batch in batches)
    goes_on = Substituting(100)
    _, after = take(goes_on, 2, batch_size=8, state=state)
    assert after["substituted"] == lost[24]
    assert goes_on.excluded == state["unreadable"] != []


def test_a_state_is_that_of_all_ranks():
    streams = [Stream(Substituting(100), batch_size=8, seed=0, rank=rank, world_size=2) for rank in range(2)]
    mine = []
    for stream in streams:
        for _ in range(25):  # two epochs
            next(stream)
        stream.state_dict(lambda part: mine.append(part) or [part])
        stream.close()
    states = [stream.state_dict(lambda part: mine) for stream in streams]
    assert states[0] == states[1]
    assert states[0]["substituted"] == 20
    assert states[0]["unreadable"] == [[0, 10]]


def test_uniforms_belong_to_seed_and_position():
    positions = np.arange(20)
    whole = objective_uniforms(5, positions, 3)
    assert torch.equal(objective_uniforms(5, positions[7:9], 3), whole[7:9])
    assert not torch.equal(objective_uniforms(6, positions, 3), whole)
    assert whole[3, 0].item() == 0.8995823936930146


def test_split_and_move_keep_the_rows():
    states = {"output": torch.arange(6, dtype=torch.float16)[:, None]}
    scales = torch.arange(6).double()
    batch = Batch(10 + torch.arange(6), torch.arange(6), torch.arange(6), states, torch.rand(6, 2), scales)
    parts = list(batch.split(4))
    assert [part.positions.tolist() for part in parts] == [[10, 11, 12, 13], [14, 15]]
    assert [len(part) for part in parts] == [4, 2]
    assert parts[1].to(CPU).guidance.tolist() == [4.0, 5.0]
    assert parts[1].to(CPU).states["output"].tolist() == [[4.0], [5.0]]
    assert parts[1].to(CPU).states["output"].dtype == torch.float32


@pytest.mark.gpu
class TestGpu:
    @pytest.mark.parametrize("pause", [0.0, 0.005], ids=["fast", "slow"])
    def test_batches_are_those_of_the_cpu(self, pause):
        expected, state = take(Numbered(1000), 50)
        kept = []
        with Stream(Numbered(1000), batch_size=16, seed=0, num_uniforms=1, device=torch.device("cuda")) as stream:
            for batch in itertools.islice(stream, 50):
                assert {tensor.device.type for tensor in tensors(batch)} == {"cuda"}
                assert batch.states["output"].dtype == torch.float16
                kept.append(batch.each(lambda tensor: tensor.cpu()))
                time.sleep(pause)
            assert stream.state_dict() == state
        assert_same(kept, expected)

    def test_a_long_step_on_the_gpu_still_reads_its_own_batch(self):
        """Steps are queued far faster than they run, so that their batches' memory must not be used again early."""
        sums, work = [], torch.zeros(4096, 4096, device="cuda")
        with Stream(Numbered(1000), batch_size=16, seed=0, device=torch.device("cuda"), ahead_bytes=1) as stream:
            for batch in itertools.islice(stream, 50):
                work = work @ work
                sums.append((batch.states["noise"].sum() + work.sum(), batch.ids.sum()))
        for value, ids in sums:
            assert value.item() == -5 * ids.item()
        assert [ids.item() for _, ids in sums] == [batch.ids.sum().item() for batch in take(Numbered(1000), 50)[0]]

    def test_asking_for_a_batch_synchronises_nothing(self):
        with Stream(Numbered(1000), batch_size=16, seed=0, device=torch.device("cuda")) as stream:
            next(stream)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                batches = list(itertools.islice(stream, 20))
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert batches[-1].positions[0].item() == 20 * 16

    def test_buffers_are_pinned_and_two(self, monkeypatch):
        made, empty = [], BatchShape.empty
        monkeypatch.setattr(
            BatchShape, "empty", lambda shape, **options: made.append(empty(shape, **options)) or made[-1]
        )
        with Stream(Numbered(1000), batch_size=16, seed=0, device=torch.device("cuda")) as stream:
            list(itertools.islice(stream, 30))
        assert len(made) == 2
        assert all(packed.memory.is_pinned() for packed in made)


def test_a_cpu_stream_never_touches_cuda(monkeypatch):
    def refuse(*given, **named):
        raise AssertionError("a CPU stream asked for CUDA")

    for name in ("Stream", "Event", "current_stream", "stream", "is_available", "init", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    assert len(take(Numbered(100), 5)[0]) == 5
