"""Anything in a manifest, its table, a commit or a shard's bytes is changed, and whoever reads shards is asked.

Each has the right rows, or refuses in one line; and what `verify` passes, all of them read, and read alike.
"""

import copy
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from limbeck.pipeline.after.verify import check_dataset
from limbeck.pipeline.config import ConvertConfig
from limbeck.pipeline.inspection import describe
from limbeck.pipeline.upkeep.convert import run_convert
from limbeck.storage_schemas import parquet, paths, webdataset
from limbeck.storage_schemas.arrow import arrow_tables
from limbeck.storage_schemas.dataset import Dataset, find_dataset, open_dataset
from limbeck.storage_schemas.errors import UserError
from limbeck.storage_schemas.ranges import checksum
from limbeck.storage_schemas.record import SPLITS
from limbeck.storage_schemas.shards import Shard
from limbeck.storage_schemas.store import Store
from limbeck.trainer.reading.chunks import Reading
from limbeck.trainer.reading.rows import gathered
from limbeck.trainer.reading.shards import ShardSource
from limbeck.trainer.stream import TrajectoryStream
from tests.forged import relist
from tests.trainer.conftest import write_store

LAYOUTS = {"parquet": {}, "zstd": {"compression": "zstd"}, "webdataset": {"format": "webdataset"}}
TASK = "train-00000001"
PART = 8
LOST = tuple(range(20, 28))
"""So many that a stream of 8 lanes gives every row in one epoch."""

Rows = dict[str, bytes]
"""Column -> its bytes, of all samples of both splits in the order of ids."""


class Target:
    """A store of 64 + 16 samples in shards of 16, and what its files and rows are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.rows = by_read(open_dataset(self.store))

    @property
    def store(self) -> Store:
        return Store.open(str(self.folder))

    def restore(self) -> None:
        for path in [*self.folder.rglob("*")]:
            if path.is_file() and path not in self.files:
                path.unlink()
        for path, data in self.files.items():
            if path.read_bytes() != data:
                path.write_bytes(data)


@pytest.fixture(params=LAYOUTS)
def target(request, tmp_path, monkeypatch) -> Target:
    monkeypatch.setattr(parquet, "ROWS_PER_GROUP", PART)
    monkeypatch.setattr(webdataset, "ROWS_PER_BLOCK", PART)
    options = {"count": 64, "holdout": 16, "samples_per_shard": 16, "dtype": "float16", "quarantined": LOST}
    write_store(tmp_path / "store", **options, **LAYOUTS[request.param])
    return Target(tmp_path / "store")


# Who reads


def by_read(dataset: Dataset) -> Rows:
    found = [
        {name: values[dataset.rows_inside(shard)] for name, values in dataset.read(shard).items()}
        for split in SPLITS
        for shard in dataset.shards(split)
    ]
    names = [field.name for field in dataset.recipe.fields]
    return {name: b"".join(np.ascontiguousarray(it[name]).tobytes() for it in found) for name in names}


def by_arrow(dataset: Dataset) -> Rows:
    tables = [table for split in SPLITS for table in arrow_tables(dataset, split)]
    return {name: b"".join(_plain(table[name]) for table in tables) for name in tables[0].column_names}


def _plain(column: pa.ChunkedArray) -> bytes:
    return b"".join(
        np.ascontiguousarray(
            it.to_numpy_ndarray() if isinstance(it, pa.ExtensionArray) else it.to_numpy(zero_copy_only=False)
        ).tobytes()
        for it in column.chunks
    )


def by_source(verify: str) -> Callable[[Dataset], Rows]:
    def read(dataset: Dataset) -> Rows:
        states = [field.name for field in dataset.recipe.fields if not field.is_scalar]
        reading = Reading(verify=verify, cache_folder=Path(dataset.store.uri).parent / "cache")
        found: dict[str, list[np.ndarray]] = {}
        for split in SPLITS:
            source = ShardSource(dataset, split, states, reading=reading)
            rows = source.load(source.ids.at(np.arange(source.ids.count)))
            condition, columns = gathered(rows, source.fields)
            given = {"condition": condition, **columns}
            for name, values in {"sample_id": rows.ids, **{name: it.numpy() for name, it in given.items()}}.items():
                found.setdefault(name, []).append(values)
        return {name: b"".join(values.tobytes() for values in each) for name, each in found.items()}

    return read


def by_loader(workers: int) -> Callable[[Dataset], Rows]:
    def read(dataset: Dataset) -> Rows:
        states = [field.name for field in dataset.recipe.fields if not field.is_scalar]
        reading, found = Reading(cache_folder=Path(dataset.store.uri).parent / "cache"), {}
        for split in SPLITS:
            stream = TrajectoryStream(
                dataset, states, batch_size=8, epochs=1, split=split, reading=reading, lanes=8, rank=0, world_size=1
            )
            try:
                for batch in DataLoader(stream, batch_size=None, num_workers=workers):
                    for row, sample in enumerate(batch["ids"].tolist()):
                        each = {name: batch[name][row].numpy().tobytes() for name in ("condition", *states)}
                        found[split, sample] = each
            except UserError as error:  # torch puts the traceback of its worker before what the error says
                raise type(error)(str(error).strip().splitlines()[-1]) from None
        wanted = [(split, i) for split in SPLITS for i in dataset.ids(split).at(np.arange(dataset.ids(split).count))]
        rows = [{"sample_id": np.int64(i).tobytes()} | found[split, int(i)] for split, i in wanted]
        return {name: b"".join(row[name] for row in rows) for name in ("sample_id", "condition", *states)}

    return read


def by_convert(dataset: Dataset) -> Rows:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        to = "webdataset" if dataset.layout.format == "parquet" else "parquet"
        run_convert(ConvertConfig(store=dataset.store.uri, to=to, as_dataset="other"))
    return by_read(open_dataset(dataset.store, "other"))


READERS: dict[str, Callable[[Dataset], Rows]] = {
    "read": by_read,
    "arrow": by_arrow,
    "stream": by_source("always"),
    "unchecked stream": by_source("never"),
    "loader": by_loader(0),
    "convert": by_convert,
}


def outcome(target: Target, read: Callable[[Dataset], Any], opened: Callable[[Store], Dataset] = open_dataset) -> Any:
    """What it says of the store as it is; a refusal is its line."""
    try:
        return read(opened(target.store))
    except UserError as error:
        line = str(error)
        assert len(line.splitlines()) == 1, line
        assert line.isprintable(), line
        return line


def assert_agreed(target: Target, *, forged: bool, readers: dict[str, Callable[[Dataset], Rows]]) -> None:
    """forged: what is above the change was made to agree with it, so other rows may be the right ones."""
    problems = outcome(target, check_dataset, opened=find_dataset)
    assert isinstance(outcome(target, describe), (dict, str))
    passed = problems == []
    found = {name: outcome(target, read) for name, read in readers.items()}
    rows = {name: it for name, it in found.items() if isinstance(it, dict)}
    if passed:
        assert rows.keys() == found.keys(), {name: it for name, it in found.items() if name not in rows}
    right = next(iter(rows.values()), target.rows) if forged and passed else target.rows
    for name, it in rows.items():
        if name != "unchecked stream" or passed:  # without checksums it can't see a bit that flipped in a state
            assert it == right, f"{name} has other rows, verify says {problems}"


# What is changed


VALUES = st.one_of(
    st.sampled_from([None, True, -1, 0, 1, 2, 15, 16, 17, 2**31, 2**63 - 1, 2**63, 10**30, -(10**30), 0.5, 1e308]),
    st.sampled_from(
        ["", "x", "..", "../x", "/etc/passwd", "a\0b", "\x1b[2J", "0" * 32, "0" * 64, [], [0], {}, {"a": 1}]
    ),
)


def places(document: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON document."""
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        yield (*at, key)
        yield from places(value, (*at, key))


def change_json(draw: st.DrawFn, document: dict[str, Any]) -> dict[str, Any]:
    document = copy.deepcopy(document)
    every = list(places(document))
    for _ in range(draw(st.integers(1, 2))):
        *path, last = draw(st.sampled_from(every))
        inner: Any = document
        try:
            for key in path:
                inner = inner[key]
            value = inner[last]
        except (KeyError, IndexError, TypeError):
            continue
        how = draw(st.sampled_from(["set", "near", "delete", "other", "twice"]))
        if how == "delete":
            del inner[last]
        elif how == "twice" and isinstance(inner, list):
            inner.insert(last, copy.deepcopy(value))
        elif how == "near" and isinstance(value, int):
            inner[last] = value + draw(st.sampled_from([-8, -1, 1, 8]))
        elif how == "other" and isinstance(inner, list):
            other = draw(st.integers(0, len(inner) - 1))
            inner[last], inner[other] = inner[other], inner[last]
        elif how == "other" and path and isinstance(path[-1], int):
            beside: Any = document
            for key in path[:-1]:
                beside = beside[key]
            other = beside[draw(st.integers(0, len(beside) - 1))]
            inner[last], other[last] = other.get(last), value
        else:
            inner[last] = draw(VALUES)
    return document


def change_bytes(draw: st.DrawFn, data: bytes, edges: list[int]) -> bytes:
    """Bytes near a chunk's edge, or anywhere."""
    edge = draw(st.sampled_from(edges)) + draw(st.integers(-40, 600))
    at = min(max(0, draw(st.sampled_from([edge, draw(st.integers(0, len(data) - 1))]))), len(data) - 1)
    length = draw(st.sampled_from([1, 1, 2, 8, 512, 4096]))
    piece, how = data[at : at + length], draw(st.sampled_from(["flip", "set", "zero", "cut", "add", "end", "swap"]))
    if how == "flip":
        return data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
    if how == "set":
        return data[:at] + draw(st.binary(min_size=1, max_size=8)) + data[at + 8 :]
    if how == "swap":
        other = draw(st.sampled_from(edges))
        low, high = sorted((at, min(other, len(data))))
        size = min(length, high - low)
        moved = bytearray(data)
        moved[low : low + size], moved[high : high + size] = data[high : high + size], data[low : low + size]
        return bytes(moved)
    new = {"zero": bytes(len(piece)), "cut": b"", "add": piece * 2, "end": piece}[how]
    return data[:at] + new if how == "end" else data[:at] + new + data[at + length :]


def retold(commit: dict[str, Any], data: bytes) -> dict[str, Any]:
    """The commit with the sums of this file, its chunks where they were, but for a last one that ends the file."""
    commit = copy.deepcopy(commit)
    commit |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    if isinstance(commit.get("chunks"), list) and commit["chunks"]:
        last = commit["chunks"][-1]
        last["length"] = max(0, len(data) - last["offset"])
        for chunk in commit["chunks"]:
            chunk["xxh3"] = checksum(data[chunk["offset"] : chunk["offset"] + chunk["length"]])
    return commit


def attest(target: Target, commit: dict[str, Any], data: bytes) -> None:
    """Writes the commit as `data`, and lets the table list what it says, as far as a table can."""
    path = next(path for path in target.files if path.parent.name == "records" and path.name.startswith(TASK))
    path.write_bytes(data)
    known = {"sha256": str, "path": str, "bytes": int, "rows": int}
    said = {name: commit[name] for name, kind in known.items() if type(commit.get(name)) is kind}
    said = {name: value for name, value in said.items() if type(value) is str or abs(value) < 2**63}
    said["commit_sha256"] = hashlib.sha256(data).hexdigest()
    lost = commit.get("quarantined", ())
    if isinstance(lost, list) and all(type(i) is int and abs(i) < 2**63 for i in lost):
        said["quarantined"] = tuple(sorted(lost))
    relist(target.store, lambda shard: replace(shard, **said) if shard.task == TASK else shard)


@st.composite
def changes(draw: st.DrawFn) -> Callable[[Target], bool]:
    """Something to do to a store; it answers whether what is above the change agrees with it."""
    kind = draw(st.sampled_from(["commit", "commit", "file", "file", "file", "table", "manifest"]))
    forged = draw(st.booleans())
    data = draw(st.data())

    def change(target: Target) -> bool:
        commit_path = next(p for p in target.files if p.parent.name == "records" and p.name.startswith(TASK))
        commit = json.loads(target.files[commit_path])
        if kind == "commit":
            document = data.draw(st.composite(lambda pick: change_json(pick, commit))(), "commit")
            raw = json.dumps(document).encode()
            if forged:
                attest(target, document, raw)
            else:
                commit_path.write_bytes(raw)
            return forged
        if kind == "file":
            path = target.folder / commit["path"]
            edges = [chunk["offset"] for chunk in commit["chunks"]]
            new = data.draw(st.composite(lambda pick: change_bytes(pick, target.files[path], edges))(), "file")
            path.write_bytes(new)
            if forged:
                document = retold(commit, new)
                attest(target, document, json.dumps(document).encode())
            return forged
        if kind == "table":
            names = ["start", "stop", "bytes", "rows"]
            name = data.draw(st.sampled_from([*names, "task", "path", "sha256", "commit_path", "quarantined", "split"]))
            row = data.draw(st.sampled_from([TASK, "train-00000003", "holdout-00000000"]))

            def relisted(shard: Shard) -> Shard:
                if shard.task != row:
                    return shard
                value: Any = data.draw(st.sampled_from(["", "x", "../x", "train-00000000", "holdout", "a\x1bb"]))
                if name in names:
                    near = getattr(shard, name) + data.draw(st.sampled_from([-16, -1, 1, 16]))
                    value = data.draw(st.sampled_from([near, 0, -1, 2**62]))
                if name == "quarantined":
                    value = data.draw(st.sampled_from([(), (20,), (21,), (20, 21), (20, 20), (-1,), (2**62,)]))
                return replace(shard, **{name: value})

            relist(target.store, relisted)
            return False
        path = target.folder / paths.manifest_path("main", 1)
        document = data.draw(st.composite(lambda pick: change_json(pick, json.loads(target.files[path])))(), "manifest")
        path.write_bytes(json.dumps(document).encode())
        return False

    return change


def tried(target: Target, change: Callable[[Target], bool], readers: dict[str, Callable[[Dataset], Rows]]) -> None:
    target.restore()
    shutil.rmtree(target.folder.parent / "cache", ignore_errors=True)
    forged = change(target)
    assert_agreed(target, forged=forged, readers=readers)


HURRIED = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


def test_everybody_reads_an_unchanged_store(target):
    readers = READERS | {"loader's workers": by_loader(2)}
    assert_agreed(target, forged=False, readers=readers)
    assert {name: outcome(target, read) == target.rows for name, read in readers.items()} == dict.fromkeys(
        readers, True
    )


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", ["fifo", "folder", "device"])
def test_a_shard_that_is_no_file_is_refused_by_everybody(target, what):
    """Nobody waits for a pipe's other end, or reads a device to its end."""
    shard = target.folder / open_dataset(target.store).shards("train")[1].path
    shard.unlink()
    {"fifo": os.mkfifo, "folder": os.mkdir, "device": lambda it: it.symlink_to("/dev/zero")}[what](shard)
    found = {name: outcome(target, read) for name, read in READERS.items()}
    assert {name for name, it in found.items() if not isinstance(it, str)} == set()
    assert outcome(target, check_dataset, opened=find_dataset) != []


@settings(max_examples=25, phases=[Phase.explicit, Phase.generate], **HURRIED)
@given(change=changes())
def test_everybody_agrees_on_the_right_rows_or_refuses_in_one_line(target, change):
    tried(target, change, READERS)


@pytest.mark.faults
@settings(max_examples=600, **HURRIED)
@given(change=changes())
def test_everybody_agrees_in_many_more_cases(target, change):
    tried(target, change, READERS)


@pytest.mark.faults
@settings(max_examples=15, phases=[Phase.explicit, Phase.generate], **HURRIED)
@given(change=changes())
def test_workers_of_a_loader_agree_too(target, change):
    tried(target, change, {"read": by_read, "workers": by_loader(2)})
