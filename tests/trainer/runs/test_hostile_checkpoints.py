"""Checkpoints that somebody else wrote: nothing runs, nothing outside of the place is read, written or removed."""

import json
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
import xxhash

from limbeck.storage_schemas.errors import StoreError, UserError
from limbeck.storage_schemas.store import Store
from limbeck.trainer.runs.checkpoints import FOLDER, remove_folder
from limbeck.trainer.runs.place import Place
from limbeck.trainer.runs.trees import read_tree
from tests.trainer.runs.test_checkpoints import checkpoints, folders, last, markers, saved

ATTEMPT = "0123456789abcdef"


class Touch:
    """What writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def put(place: Path, files: dict[str, bytes], changes: dict | None = None) -> Path:
    """A checkpoint of step 2 of these files, whose marker is right but for the changes."""
    folder = f"{FOLDER}/step-00000002-{ATTEMPT}"
    (place / folder).mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (place / folder / name).write_bytes(data)
    told = [{"name": name, "bytes": len(it), "xxh3": xxhash.xxh3_128_hexdigest(it)} for name, it in files.items()]
    marker = {"format": 1, "step": 2, "stage": 0, "folder": folder, "files": told, "holdout_error": None}
    document = marker | {"world_size": 1} | (changes or {})
    (place / FOLDER / "step-00000002.json").write_text(json.dumps(document))
    return place / folder


def test_what_is_pickled_is_never_unpickled(tmp_path):
    canary, place = tmp_path / "canary", tmp_path / "place"
    saved(place, 1)
    files = {"tree.json": b'{"dict": []}', ".metadata": pickle.dumps(Touch(canary)), "__0_0.distcp": b"x"}
    folder = put(place, files)
    with pytest.raises(UserError, match=r"holds shards as release 0\.1 wrote them.* or start again by --no-resume$"):
        last(place)
    with pytest.raises(StoreError, match=r"holds neither tensors\.safetensors nor every shard"):
        read_tree(folder)
    (place / FOLDER / "step-00000002.json").unlink()
    put(place, {"tree.json": b'{"dict": []}'})
    with (
        pytest.raises(StoreError, match=r"holds neither tensors\.safetensors nor every shard"),
        checkpoints(place).newest() as found,
    ):
        found.read()
    assert not canary.exists()


FILE = {"name": "tree.json", "bytes": 3, "xxh3": "0" * 32}
MARKERS = {
    "up": {"folder": "../../canary"},
    "up from its own": {"folder": f"{FOLDER}/step-00000002-{ATTEMPT}/../../canary"},
    "absolute": {"folder": "/etc"},
    "elsewhere in it": {"folder": "model"},
    "of another step": {"folder": f"{FOLDER}/step-00000003-{ATTEMPT}"},
    "of no attempt": {"folder": f"{FOLDER}/step-00000002"},
    "empty": {"folder": ""},
    "a nul": {"folder": f"{FOLDER}/step-00000002-\0{ATTEMPT[1:]}"},
    "its own step is another": {"step": 3},
    "a negative step": {"step": -2},
    "a huge step": {"step": 10**40},
    "no ranks": {"world_size": 0},
    "a file up": {"files": [{**FILE, "name": "../../../canary/keep"}]},
    "an absolute file": {"files": [{**FILE, "name": "/etc/passwd"}]},
    "a file below": {"files": [{**FILE, "name": "a/tree.json"}]},
    "a file of no name": {"files": [{**FILE, "name": ""}]},
    "a file of another name": {"files": [{**FILE, "name": "tree.json\n"}]},
    "a file twice": {"files": [FILE, FILE]},
    "negative bytes": {"files": [{**FILE, "bytes": -1}]},
    "more bytes than there are": {"files": [{**FILE, "bytes": 1 << 40}]},
    "most bytes": {"files": [{**FILE, "bytes": 1 << 60}]},
    "no checksum": {"files": [{**FILE, "xxh3": "x"}]},
    "no list": {"files": 5},
    "a null": {"folder": None},
}


@pytest.mark.parametrize("changes", MARKERS.values(), ids=MARKERS)
@pytest.mark.parametrize("remote", [False, True])
def test_a_marker_names_nothing_but_its_own(tmp_path, monkeypatch, changes, remote):
    """It gives way to the one before, and the next checkpoint removes it, but nothing outside."""
    place, canary = tmp_path / "place", tmp_path / "canary"
    canary.mkdir()
    (canary / "keep").write_text("abc")
    (canary / "tree.json").write_text("abc")
    saved(place, 1)
    put(place, {"tree.json": b"{}"}, changes)
    if remote:  # as a bucket: no path of its own to map
        monkeypatch.setattr(Store, "local_path", lambda self, path: None)
    step, _, (line,) = last(place)
    assert step == 1
    assert "\n" not in line
    saved(place, 2)
    assert last(place)[::2] == (2, ())
    assert sorted(path.name for path in canary.iterdir()) == ["keep", "tree.json"]
    assert markers(place) == [1, 2]


def test_links_out_of_the_place_are_neither_read_nor_emptied(tmp_path):
    place, mine = tmp_path / "place", tmp_path / "mine"
    saved(place, 1, 2, keep_last=3)
    (folder,) = (place / FOLDER).glob("step-00000002-*")
    folder.rename(mine)
    folder.symlink_to(mine)
    held = {path.name: path.read_bytes() for path in mine.iterdir()}
    step, _, (line,) = last(place)
    assert (step, "is a link" in line) == (1, True)
    saved(place, 3, 4, 5)
    remove_folder(Store(str(place)), f"{FOLDER}/{folder.name}")
    Place(place, None).clear()
    assert {path.name: path.read_bytes() for path in mine.iterdir()} == held


def test_a_linked_file_is_not_read(tmp_path):
    place = tmp_path / "place"
    saved(place, 1, 2)
    (file,) = (place / FOLDER).glob("step-00000002-*/tree.json")
    file.rename(tmp_path / "mine.json")
    file.symlink_to(tmp_path / "mine.json")
    step, _, (line,) = last(place)
    assert (step, line.endswith("tree.json is missing: going on from the checkpoint before")) == (1, True)


def test_a_linked_folder_of_checkpoints_is_not_written_to(tmp_path):
    place, mine = tmp_path / "place", tmp_path / "mine"
    mine.mkdir()
    (mine / f"step-00000001-{ATTEMPT}").mkdir()
    place.mkdir()
    (place / FOLDER).symlink_to(mine)
    with pytest.raises(StoreError, match="checkpoints is a link"):
        saved(place, 2)
    remove_folder(Store(str(place)), FOLDER)
    assert [path.name for path in mine.iterdir()] == [f"step-00000001-{ATTEMPT}"]


def test_only_names_of_our_own_are_swept(tmp_path):
    place = tmp_path / "place"
    saved(place, 1)
    names = [".step-mine", "step-1", f"step-00000001-{ATTEMPT}x", "step-00000009-notes", "README"]
    for name in names:
        (place / FOLDER / name).write_text("mine")
    os.mkfifo(place / FOLDER / "pipe")
    saved(place, 2, 3)
    assert {*names, "pipe"} <= {path.name for path in (place / FOLDER).iterdir()}
    assert folders(place) == [2, 3]


def test_a_file_that_the_marker_does_not_name_is_not_read(tmp_path):
    place = tmp_path / "place"
    saved(place, 1, 2)
    (folder,) = (place / FOLDER).glob("step-00000002-*")
    (folder / "shard-00001-of-00001.safetensors").write_bytes(b"")
    step, _, (line,) = last(place)
    assert (step, "shard-00001-of-00001.safetensors is not in its marker" in line) == (1, True)


def shard(folder: Path, number: int, of: int, tensor: torch.Tensor, pieces: object) -> None:
    name = f"shard-{number:05d}-of-{of:05d}.safetensors"
    safetensors.torch.save_file({"/w": tensor}, folder / name, metadata={"pieces": json.dumps(pieces)})


def two_shards(folder: Path, *pieces: object, rows: int = 2) -> Path:
    (folder / "tree.json").write_text('{"dict": [["w", {"tensor": "/w"}]]}')
    for number, told in enumerate(pieces, 1):
        shard(folder, number, len(pieces), torch.full((rows, 3), float(number)), told)
    return folder


def test_shards_are_put_together(tmp_path):
    whole = read_tree(two_shards(tmp_path, {"/w": [[4, 3], [2, 0]]}, {"/w": [[4, 3], [0, 0]]}))["w"]
    assert whole.tolist() == [[2.0] * 3] * 2 + [[1.0] * 3] * 2


SHARDS = {
    "twice the same": ({"/w": [[4, 3], [0, 0]]}, {"/w": [[4, 3], [0, 0]]}),
    "in part the same": ({"/w": [[4, 3], [0, 0]]}, {"/w": [[4, 3], [1, 0]]}),
    "a gap": ({"/w": [[6, 3], [0, 0]]}, {"/w": [[6, 3], [4, 0]]}),
    "past the end": ({"/w": [[4, 3], [0, 0]]}, {"/w": [[4, 3], [3, 0]]}),
    "before the start": ({"/w": [[4, 3], [-2, 0]]}, {"/w": [[4, 3], [0, 0]]}),
    "a huge whole": ({"/w": [[10**15, 10**15], [0, 0]]}, {"/w": [[10**15, 10**15], [2, 0]]}),
    "two wholes": ({"/w": [[4, 3], [0, 0]]}, {"/w": [[5, 3], [2, 0]]}),
    "other dimensions": ({"/w": [[12], [0]]}, {"/w": [[12], [6]]}),
    "no name": ({}, {}),
    "no numbers": ({"/w": "abcd"}, {"/w": [["a", "b"], [0, 0]]}),
    "no object": ([], 5),
}


@pytest.mark.parametrize("pieces", SHARDS.values(), ids=SHARDS)
def test_shards_that_are_no_whole_are_refused_in_a_line(tmp_path, pieces):
    with pytest.raises(StoreError, match=r"holds no tree of a fit's \(") as told:
        read_tree(two_shards(tmp_path, *pieces))
    assert "\n" not in str(told.value)


def test_shards_that_are_not_all_there_are_refused(tmp_path):
    two_shards(tmp_path, {"/w": [[4, 3], [0, 0]]}, {"/w": [[4, 3], [2, 0]]})
    (tmp_path / "shard-00002-of-00002.safetensors").unlink()
    with pytest.raises(StoreError, match="nor every shard of a run"):
        read_tree(tmp_path)


@pytest.mark.parametrize("data", [b"", b"x" * 99, (2**40).to_bytes(8, "little") + b"{}"])
@pytest.mark.parametrize("name", ["tensors.safetensors", "shard-00001-of-00001.safetensors"])
def test_what_is_no_safetensors_is_told_in_a_line(tmp_path, name, data):
    (tmp_path / "tree.json").write_text("{}")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(StoreError, match="holds no tree of a fit's") as told:
        read_tree(tmp_path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 200_000, '{"dict": 5}', '{"a": 1, "b": 2}', '{"dict": [1]}', "\udce9", '{"tensor": "/x"}']
)
def test_a_tree_json_that_is_none_is_told_in_a_line(tmp_path, text):
    (tmp_path / "tree.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    safetensors.torch.save_file({"/w": torch.ones(1)}, tmp_path / "tensors.safetensors")
    with pytest.raises(StoreError, match="holds no tree of a fit's"):
        read_tree(tmp_path)
