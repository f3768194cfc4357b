"""Trees on disk, to the last bit; and checkpoints that are there whole or not at all."""

import errno
import json
import math
import struct

import pytest
import torch

from limbeck.storage_schemas.errors import StoreError
from limbeck.storage_schemas.store import Store
from limbeck.trainer.ranks import alone
from limbeck.trainer.runs.checkpoints import FOLDER, Checkpoints
from limbeck.trainer.runs.place import Place
from limbeck.trainer.runs.trees import TENSORS, read_tree, write_tree
from tests.servers import moto, seaweed

ALONE = alone(torch.device("cpu"))


def checkpoints(place, **options) -> Checkpoints:
    return Checkpoints(Store(str(place)), ALONE, **options)


def last(place):
    """(step, tree, lines on refused ones) of the newest whole checkpoint."""
    with checkpoints(place).newest() as found:
        return found and (found.marker.step, found.read(), found.refused)


def tree(step: int) -> dict:
    return {"step": step, "weights": torch.full((100,), float(step))}


def saved(place, *steps: int, **options) -> None:
    for step in steps:
        checkpoints(place, **options).save(step, tree(step))


def markers(place) -> list[int]:
    return sorted(int(path.stem[5:]) for path in (place / FOLDER).glob("step-*.json"))


def folders(place) -> list[int]:
    return sorted(int(path.name[5:13]) for path in (place / FOLDER).iterdir() if path.is_dir())


def same(one, other) -> bool:
    """Equal types all the way down, and equal bits."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return struct.pack("d", one) == struct.pack("d", other) if isinstance(one, float) else one == other


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_a_tree_comes_back_bit_by_bit(tmp_path):
    shared = torch.arange(6.0)
    whole = {
        "state": {0: {"step": torch.tensor(3.0)}, 11: {"step": torch.tensor(4.0)}},
        "betas": (0.9, 0.999),
        "numbers": [0.1 + 0.2, 5e-324, -0.0, math.inf, -math.inf, math.nan, 2**63 - 1, True, None, "a/b", []],
        "tied": [shared, shared[2:5], shared.view(2, 3).T],
        "types": [torch.ones(2, dtype=kind) for kind in (torch.bfloat16, torch.float64, torch.int64, torch.bool)],
        "empty": {"dict": {}, "tensor": torch.empty(0, 3), "tuple": ()},
        "scalar": torch.tensor(math.nan),
    }
    write_tree(whole, tmp_path)
    assert same(read_tree(tmp_path), whole)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"tree.json", "tensors.safetensors"}


def test_an_optimizer_comes_back(tmp_path):
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    write_tree(optimizer.state_dict(), tmp_path)
    assert same(read_tree(tmp_path), optimizer.state_dict())


def test_the_last_and_the_best_are_kept(tmp_path):
    errors = {1: 0.5, 2: 0.1, 3: None, 4: 0.3, 5: 0.2, 6: None}
    for step, error in errors.items():
        run = checkpoints(tmp_path, keep_last=2)
        assert error is None or run.would_be_best(0, error) == (step in (1, 2))
        run.save(step, tree(step), holdout_error=error)
    assert markers(tmp_path) == folders(tmp_path) == [2, 5, 6]
    # Another stage's errors are of another sampler.
    assert checkpoints(tmp_path).would_be_best(1, 9.0)
    checkpoints(tmp_path).save(7, tree(7), stage=1, holdout_error=9.0)
    checkpoints(tmp_path).save(8, tree(8), stage=1)
    checkpoints(tmp_path).save(9, tree(9), stage=1)
    assert markers(tmp_path) == [7, 8, 9]
    checkpoints(tmp_path, keep_last=1, keep_best=False).save(10, tree(10), stage=1)
    assert markers(tmp_path) == folders(tmp_path) == [10]


def test_there_is_none_at_first(tmp_path):
    assert last(tmp_path / "nowhere") is None
    assert not checkpoints(tmp_path)


def test_what_a_killed_writer_left_is_no_checkpoint_and_goes(tmp_path):
    saved(tmp_path, 1)
    half = tmp_path / FOLDER / "step-00000002-0123456789abcdef"
    half.mkdir()
    (half / TENSORS).write_bytes(b"half")
    (tmp_path / FOLDER / ".step-00000002.json.0.tmp").write_bytes(b"{")
    (tmp_path / FOLDER / "notes.txt").write_text("mine")
    assert last(tmp_path)[0] == 1
    saved(tmp_path, 2)
    names = sorted(path.name for path in (tmp_path / FOLDER).iterdir() if not path.is_dir())
    assert names == ["notes.txt", "step-00000001.json", "step-00000002.json"]
    assert not half.exists()


def damage(place, step: int, how: str) -> None:
    (folder,) = (place / FOLDER).glob(f"step-{step:08d}-*")
    path = folder / TENSORS
    if how == "gone":
        path.unlink()
    elif how == "short":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "flipped":
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
    else:
        (place / FOLDER / f"step-{step:08d}.json").write_text("{")


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("gone", "tensors.safetensors is missing"),
        ("short", "bytes, its marker says"),
        ("flipped", "does not match its checksum"),
        ("marker", "is not a valid Marker"),
    ],
)
def test_a_damaged_one_gives_way_to_the_one_before(tmp_path, how, told):
    saved(tmp_path, 1, 2, keep_last=3)
    damage(tmp_path, 2, how)
    step, there, (line,) = last(tmp_path)
    assert (step, there["weights"].unique().item()) == (1, 1.0)
    assert told in line
    assert line.endswith("going on from the checkpoint before")
    # The run goes on from 1: what was past it is no part of it.
    saved(tmp_path, 2, keep_last=3)
    assert last(tmp_path)[0::2] == (2, ())
    assert markers(tmp_path) == folders(tmp_path) == [1, 2]


def test_where_all_are_damaged_nothing_is_begun_anew_in_silence(tmp_path):
    saved(tmp_path, 1, 2)
    for step in (1, 2):
        damage(tmp_path, step, "flipped")
    with pytest.raises(StoreError, match=r"step-00000002-.* no other is whole: start again by --no-resume$"):
        last(tmp_path)


def test_a_sharded_one_that_finds_no_room_is_told_in_a_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(tensors, folder, *, rank, world_size):
        (folder / "shard-00001-of-00001.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    saved(tmp_path, 1)
    monkeypatch.setattr("limbeck.trainer.runs.shards.is_sharded", lambda tensors: True)
    monkeypatch.setattr("limbeck.trainer.runs.shards.write", full)
    with pytest.raises(StoreError, match=r"checkpoint can't be written: .*No space left on device$"):
        saved(tmp_path, 2)
    assert markers(tmp_path) == folders(tmp_path) == [1]


def test_those_of_an_earlier_release_are_refused(tmp_path):
    (tmp_path / FOLDER / "step-00000500").mkdir(parents=True)
    with pytest.raises(StoreError, match="was written by an earlier release: go on with that one, or start again"):
        last(tmp_path)


def test_copies_of_models_are_fetched_whole(tmp_path):
    def write(folder, **files):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / f"model.{name}").write_text(text)

    away, here = Place(tmp_path / "first", str(tmp_path / "place")), tmp_path / "second"
    for name in ("best", "stages/2-step", "stages/1-step"):
        write(away.folder / name, safetensors="new", json="new")
        away.put(name)
    write(here / "best", safetensors="old", json="old")  # of a machine that was away for a while
    write(here / "stages/2-step", safetensors="half")  # killed while it was fetching
    Place(here, str(tmp_path / "place")).fetch()
    found = {path.relative_to(here).as_posix(): path.read_text() for path in here.rglob("model.*")}
    files = [
        f"{name}/model.{kind}"
        for name in ("best", "stages/2-step", "stages/1-step")
        for kind in ("json", "safetensors")
    ]
    assert found == dict.fromkeys(files, "new")


@pytest.mark.parametrize("bucket", [moto, pytest.param(seaweed, marks=pytest.mark.faults)], indirect=True)
def test_on_s3_they_are_the_same(bucket):
    place = f"{bucket}/runs/one"
    saved(place, 1, 2)
    store = Store(place)
    store.write(f"{FOLDER}/step-00000003-0123456789abcdef/{TENSORS}", b"half")
    store.write(f"{FOLDER}/step-00000003-0123456789abcdef/.metadata", b"half")
    saved(place, 3)
    step, there, refused = last(place)
    assert (step, there["weights"].unique().item(), refused) == (3, 3.0, ())
    names = [name for name in store.list(FOLDER) if not name.endswith(".json")]
    folders = {name[:13] for name in names if store.list(f"{FOLDER}/{name}")}  # some servers list empty ones too
    assert folders == {"step-00000002", "step-00000003"}
    assert store.list_details(f"{FOLDER}/step-00000003-0123456789abcdef", unfinished=True) == []
    marker = json.loads(store.read(f"{FOLDER}/step-00000003.json"))
    (name,) = (file["name"] for file in marker["files"] if file["name"] == TENSORS)
    store.write(f"{marker['folder']}/{name}", b"other")
    assert last(place)[0] == 2


@pytest.mark.parametrize("look", [1, 2])
def test_one_that_slept_while_it_saved_removes_nothing_of_the_fit_that_goes_on(tmp_path, look):
    looks = iter(range(1, 9))

    def check() -> None:
        if next(looks) == look:
            saved(tmp_path, 20, 30)
            raise StoreError("another fit goes on")

    with pytest.raises(StoreError, match="another fit goes on"):
        saved(tmp_path, 10, check=check)
    assert markers(tmp_path) == [20, 30]
    assert last(tmp_path)[0] == 30
