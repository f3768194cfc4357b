"""The stream as other training loops see it: a DataLoader, Lightning, accelerate."""

import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from limbeck.storage_schemas.dataset import open_dataset
from limbeck.storage_schemas.errors import ManifestMismatch
from limbeck.trainer import stream as stream_module
from limbeck.trainer.reading.shards import ShardSource
from limbeck.trainer.stream import Stream, TrajectoryStream
from tests.trainer import on_lightning
from tests.trainer.conftest import write_store

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store"), count=100, holdout=0, dtype="float16")


@pytest.fixture
def make(store):
    return lambda **options: TrajectoryStream(store.uri, **{"batch_size": 16} | options)


@pytest.fixture(scope="module")
def order(store) -> list[list[int]]:
    """Ids of the first 40 global batches, by the trainer's own stream."""
    with Stream(ShardSource(open_dataset(store), "train", ("output",)), batch_size=16, seed=0) as stream:
        return [batch.ids.tolist() for batch in itertools.islice(stream, 40)]


def seen(batches, number=None) -> list[list[int]]:
    return [batch["ids"].tolist() for batch in itertools.islice(batches, number)]


def test_batches_are_those_of_the_trainer_in_new_memory(store, make):
    kept = list(itertools.islice(make(), 12))
    source = ShardSource(open_dataset(store), "train", ("noise", "output"))
    with Stream(source, batch_size=16, seed=0) as stream:
        for ours, batch in zip(kept, stream, strict=False):
            assert list(ours) == ["ids", "condition", "guidance", "noise", "output"]
            assert ours["output"].dtype == torch.float16
            theirs = {"ids": batch.ids, "condition": batch.condition, "guidance": batch.guidance, **batch.states}
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_dataloader_gives_the_same_order_with_and_without_workers(make, order, workers):
    loader = DataLoader(make(), batch_size=None, num_workers=workers)
    assert seen(loader, 14) == order[:14]


def test_a_pickled_stream_goes_on_where_it_was(make, order):
    stream = make()
    seen(stream, 5)
    assert seen(pickle.loads(pickle.dumps(stream)), 5) == order[5:10]


def test_the_state_resumes_after_the_last_batch_given_or_after_any_number(make, order):
    stream = make()
    for done in range(12):
        assert stream.state_dict()["consumed"] == 16 * done
        assert stream.state_dict() == make().state_dict(batches=done)
        resumed = make()
        resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        assert seen(resumed, 3) == order[done : done + 3]
        assert resumed.state_dict(batches=done) == stream.state_dict()
        seen(stream, 1)


def test_the_trainer_goes_on_from_its_state_and_it_from_the_trainers(store, make, order):
    source = ShardSource(open_dataset(store), "train", ("output",))
    with Stream(source, batch_size=16, seed=0, state=make().state_dict(batches=7)) as stream:
        assert next(stream).ids.tolist() == order[7]
        theirs = make()
        theirs.load_state_dict(stream.state_dict())
    assert seen(theirs, 2) == order[8:10]


def test_each_rank_has_its_part_of_the_global_batch(make, order, monkeypatch):
    parts = [seen(make(rank=rank, world_size=4), 9) for rank in range(4)]
    assert [list(itertools.chain(*of_ranks)) for of_ranks in zip(*parts, strict=True)] == order[:9]
    together = SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, get_rank=lambda: 2, get_world_size=lambda: 4
    )
    monkeypatch.setattr(stream_module, "dist", together)
    assert seen(make(), 9) == parts[2]


def test_an_iteration_of_epochs_ends_with_the_batch_that_completes_them(make, order):
    stream = make(epochs=2)
    # 100 samples an epoch, 12 or 13 rows of each of 8 lanes, 2 of them a batch: epochs 2 and 4 end with rows 25 and 50.
    passes = [seen(stream), seen(stream), seen(stream, 5), seen(stream)]
    assert [len(batches) for batches in passes] == [13, 12, 5, 8]
    assert list(itertools.chain(*passes)) == order[:38]


def test_workers_end_an_iteration_of_epochs_together(make, order):
    assert seen(DataLoader(make(epochs=1), batch_size=None, num_workers=3)) == order[:6]
    loader = DataLoader(make(epochs=1), batch_size=None, num_workers=3, persistent_workers=True)
    assert seen(loader) + seen(loader) + seen(loader) == order[:19]


def test_workers_that_go_on_from_their_own_states_give_the_batches_that_follow(make, order, monkeypatch):
    """As torchdata's StatefulDataLoader has them do, which remembers whose turn it is."""
    turns = []

    def works(worker: int):
        monkeypatch.setattr(stream_module, "get_worker_info", lambda: SimpleNamespace(id=worker, num_workers=3))

    def begin(states):
        streams = [make() for _ in range(3)]
        for stream, state in zip(streams, states, strict=True):
            if state:
                stream.load_state_dict(state)
        return streams, [iter(stream) for stream in streams]

    streams, iterators = begin([None] * 3)
    for number in range(10):
        works(number % 3)
        turns.append(next(iterators[number % 3])["ids"].tolist())
        if number in (3, 7):
            streams, iterators = begin([stream.state_dict() for stream in streams])
    assert turns == order[:10]


def test_another_seed_or_number_of_ranks_is_refused(make):
    state = make().state_dict(batches=3)
    with pytest.raises(ManifestMismatch, match="seed"):
        make(seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match=r"choose from \[1, 2, 4, 8\] ranks"):
        make(rank=0, world_size=3)
    with pytest.raises(ValueError, match=r"8 ranks do not divide 4 lanes"):
        make(rank=0, world_size=8).load_state_dict(make(lanes=4).state_dict())


def test_lightning_fits_on_it_and_resumes_to_the_batch(order, store, tmp_path):
    for steps in (5, 9, 11):
        on_lightning.main(store.uri, tmp_path, steps)
    assert json.loads((tmp_path / "0_of_1.json").read_text()) == [order[:5], order[5:9], order[9:11]]


@pytest.mark.faults
def test_lightning_fits_on_two_processes_and_resumes_on_one(order, store, tmp_path):
    in_processes(2, "on_lightning", store.uri, tmp_path, 5)
    in_processes(1, "on_lightning", store.uri, tmp_path, 9)
    ours, theirs, alone = (told(tmp_path, name)[0] for name in ("0_of_2", "1_of_2", "0_of_1"))
    assert [a + b for a, b in zip(ours, theirs, strict=True)] == order[:5]
    assert alone == order[5:9]


@pytest.mark.faults
def test_accelerate_fits_on_two_processes_and_resumes_on_one(order, store, tmp_path):
    """Its loader is not to be prepared: accelerate would hand rank 0's part of the batch to every rank."""
    in_processes(2, "on_accelerate", store.uri, tmp_path, 5)
    in_processes(1, "on_accelerate", store.uri, tmp_path, 4)
    ours, theirs, alone = (told(tmp_path, name) for name in ("0_of_2", "1_of_2", "0_of_1"))
    assert [a + b for a, b in zip(ours, theirs, strict=True)] == order[:5]
    assert alone == order[5:9]


def told(folder: Path, name: str) -> list:
    return json.loads((folder / f"{name}.json").read_text())


def in_processes(number: int, module: str, *given: object) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)] if number > 1 else []
    command = [sys.executable, *torchrun, "-m", f"tests.trainer.{module}", *map(str, given)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, timeout=120)
