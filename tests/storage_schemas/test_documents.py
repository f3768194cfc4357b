"""Every field of every document as somebody else may have written it, refused in one line that names the document."""

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from limbeck.storage_schemas import documents as documents_module
from limbeck.storage_schemas import paths
from limbeck.storage_schemas.canonical import digest
from limbeck.storage_schemas.commit import Commit, Task, read_commit, read_commits
from limbeck.storage_schemas.dataset import read_manifest, read_recipe
from limbeck.storage_schemas.documents import Document
from limbeck.storage_schemas.errors import CONTROLS, StoreError, shown
from limbeck.storage_schemas.job import Failure, Heartbeat, Job, Pin, Prune
from limbeck.storage_schemas.layout import Layout
from limbeck.storage_schemas.manifest import Floor, Manifest, ShardTableRecord, Window
from limbeck.storage_schemas.notes import Calibration, CalibrationPoint, Reference
from limbeck.storage_schemas.reading import read_all, read_document
from limbeck.storage_schemas.recipe import Recipe
from limbeck.storage_schemas.store import Store, StoreDocument
from limbeck.trainer.runs.checkpoints import File, Marker
from limbeck.trainer.runs.claim import FitAtWork

AT, SHA = "2026-01-31T23:59:59+00:00", "ab" * 32
LAYOUT = Layout(samples_per_shard=16)
WINDOW = Window(train=(0, 32), holdout=(0, 16))
TABLE = ShardTableRecord(path=paths.shard_table_path("main", SHA), sha256=SHA, count=3)
ESCAPES = "\x1b[2J\x1b]0;owned\x07\r\u202e"
FEW_BYTES = 1 << 20
STATES = ("noise", "state_002", "output")
DIGITS = "9" * 6000

FREE = {
    "Recipe": {"teacher.uri", "solver.name", "start.images", "noise.algorithm"},
    "Calibration": {"teacher.uri", "reference.solver", "points.0.solver", "solve_dtype", "autocast", "machine.host"},
    "Commit": {"machine.host", "chunks.0.column"},
    "Manifest": {"ticks.grow"},
    "Job": {"runner"},
    "Failure": {"error", "traceback", "machine"},
    "Prune": {"machine"},
    "FitAtWork": {"process"},
}
"""Texts for people, and what is compared before it is used: any string, which is shown without controls."""

NULLS = {
    "Manifest": {"parent_digest", "floor.sealed_at", "floor.sweep_at"},
    "Commit": {f"statistics.{it}.{of}" for it in STATES for of in ("mean", "std", "min", "max")},
    "Recipe": {"teacher.source_sha256"},
    "Calibration": {"teacher.source_sha256", "points.0.error", "points.0.low", "points.0.high", "choice"},
    "Marker": {"holdout_error"},
}
ANYTHING = ("teacher.model", "solver.grid", "grid")
"""What one kind of teacher or grid is made of: whoever builds it checks it."""


def documents(recipe: Recipe, commit: Commit) -> dict[str, Document]:
    manifest = Manifest(
        dataset="main", number=2, parent_digest=SHA, writer="job-1", recipe_id=recipe.id, layout=LAYOUT, window=WINDOW,
        missing=("train-00000001",), rows={"train": 16, "holdout": 16}, shards=TABLE, content_digest=SHA,
        floor=Floor(number=1, sealed_at=AT, sweep_at=AT), ticks={"grow": "7"}, train_changed_at=AT, sealed_at=AT,
    )  # fmt: skip
    job = Job(
        job="job-1", dataset="main", recipe_id=recipe.id, layout=LAYOUT, window=WINDOW, parent=1, tasks_total=3,
        tasks_missing=1, runner="local", workers=1, started_at=AT,
    )  # fmt: skip
    calibration = Calibration(
        teacher=recipe.teacher, guidance=recipe.guidance, condition=recipe.condition, grid={"name": "karras"},
        solve_dtype="float32", autocast="none", tf32=False, seed=0, count=8, tolerance=0.1, scale=1.0,
        reference=Reference(solver="heun", steps=8, nfe=15, error=0.1),
        points=(CalibrationPoint(solver="heun", steps=4, nfe=7, error=0.1, low=0.1, high=0.2),), choice=0,
        machine={"host": "test"}, made_at=AT,
    )  # fmt: skip
    marker = Marker(
        step=3, stage=0, folder="checkpoints/step-00000003-" + "0" * 16, holdout_error=0.5, world_size=1,
        files=(File(name="tree.json", bytes=1, xxh3="0" * 32),),
    )  # fmt: skip
    return {
        paths.STORE: StoreDocument(),
        paths.recipe_path(recipe.id): recipe,
        commit.commit_path: commit,
        paths.manifest_path("main", 2): manifest,
        paths.job_path("job-1"): job,
        paths.heartbeat_path("job-1"): Heartbeat(at=AT, state="running", found=1),
        paths.failure_path("job-1", "train-00000001"): Failure(
            task="train-00000001", error="e", traceback="t", attempts=3, machine="m", failed_at=AT
        ),
        paths.pin_path("run-1"): Pin(run="run-1", dataset="main", number=1, expires_at=AT),
        paths.prune_path(1): Prune(run="prune-1", machine="m", at=AT),
        paths.calibration_path(recipe.id, SHA): calibration,
        "checkpoints/step-00000003.json": marker,
        "fits/000001.json": FitAtWork(attempt="0" * 16, process="p"),
    }


@pytest.fixture(scope="module")
def made(make_recipe, commit_task, tmp_path_factory) -> dict[str, Document]:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("made")
    recipe = make_recipe()
    commit = commit_task(Store.create(str(folder / "store")), recipe, LAYOUT, Task("train", 0, 16), folder, (3,))
    return documents(recipe, commit)


def places(plain: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every value of a document is; of lists the first one's, as the others are alike."""
    if at:
        yield at
    inner = plain.items() if isinstance(plain, dict) else enumerate(plain[:1]) if isinstance(plain, list) else ()
    for key, value in inner:
        yield from places(value, (*at, key))


def value_at(plain: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        plain = plain[key]
    return plain


def changed(plain: dict[str, Any], place: tuple[Any, ...], value: Any) -> bytes:
    other = copy.deepcopy(plain)
    value_at(other, place[:-1])[place[-1]] = value
    return json.dumps(other).encode()


def refused(kind: type[Document], data: bytes, path: str) -> bool:
    """Whether it is, in one line of a readable length that names the document."""
    try:
        kind.from_bytes(data, f"memory://x/{path}")
    except StoreError as error:
        told = str(error)
        assert told.startswith(f"memory://x/{path} "), told
        assert len(told) < 900
        assert CONTROLS.search(told) is None, told
        return True
    return False


def others(value: Any) -> list[Any]:
    """Values of other types than this one's."""
    every: list[Any] = ["text", 7, 7.5, True, [], {}, [[]], ESCAPES]
    kinds = (int, float) if isinstance(value, float) else (type(value),)
    alike = (list, tuple) if isinstance(value, list) else kinds
    return [other for other in every if type(other) not in alike]


def test_what_is_written_is_read_again(made: dict[str, Document]) -> None:
    for path, document in made.items():
        assert type(document).from_bytes(document.to_bytes(), path) == document


def test_every_value_of_another_type_is_refused(made: dict[str, Document]) -> None:
    tried = 0
    for path, document in made.items():
        plain, name = json.loads(document.to_bytes()), type(document).__name__
        for place in places(plain):
            dotted = ".".join(map(str, place))
            if dotted.startswith(ANYTHING):
                continue
            nulls = [] if dotted in NULLS.get(name, ()) or value_at(plain, place) is None else [None]
            for other in [*others(value_at(plain, place)), *nulls]:
                if (dotted, other) in (("guidance.scale", 7), ("guidance.scale", 7.5), ("format", True)):
                    continue  # numbers of either kind; a literal 1, which True is equal to
                if value_at(plain, place) is None and isinstance(other, int | float) and not isinstance(other, bool):
                    continue
                tried += 1
                assert refused(type(document), changed(plain, place, other), path), (path, dotted, other)
    assert tried > 1000


def test_every_count_and_every_name_is_held_to_its_own(made: dict[str, Document]) -> None:
    tried = 0
    for path, document in made.items():
        plain, name = json.loads(document.to_bytes()), type(document).__name__
        for place in places(plain):
            value, dotted = value_at(plain, place), ".".join(map(str, place))
            if dotted.startswith(ANYTHING) or isinstance(value, bool):
                continue
            bad: list[Any] = []
            if isinstance(value, int):
                bad = [-1, 2**63, 10**30, -(10**30)]
            elif isinstance(value, str) and dotted not in FREE.get(name, ()):
                bad = [
                    "",
                    "../../x",
                    "/etc/passwd",
                    "a/../../b",
                    "s3://b/k",
                    "a\0b",
                    ESCAPES,
                    "x" * 2000,
                    value + "\n",
                ]
            for other in bad:
                tried += 1
                assert refused(type(document), changed(plain, place, other), path), (path, dotted, other)
    assert tried > 500


@pytest.mark.parametrize("kind", ["Heartbeat", "Pin", "Prune", "Failure", "Job", "Manifest", "Commit", "Calibration"])
@pytest.mark.parametrize(
    "time",
    [
        *("2026-01-01T00:00:00", "2026-01-01", "yesterday", "", "2026-13-01T00:00:00+00:00", "2026-01-01T00:00:00Z"),
        *("9999-12-31T23:59:59+00:00", "0001-01-01T00:00:00+00:00", "2026-01-01T00:00:00+02:00", 1767225600),
        "2026-02-30T00:00:00+00:00",
    ],
)
def test_a_time_without_its_zone_or_out_of_all_time_is_refused(
    made: dict[str, Document], kind: str, time: object
) -> None:
    (path, document), *_ = [(path, it) for path, it in made.items() if type(it).__name__ == kind]
    plain = json.loads(document.to_bytes())
    found = [place for place in places(plain) if value_at(plain, place) == AT or place[-1] == "committed_at"]
    assert found
    for place in found:
        assert refused(type(document), changed(plain, place, time), path), place


def test_what_is_lacking_or_too_much_is_refused(made: dict[str, Document]) -> None:
    for path, document in made.items():
        plain = json.loads(document.to_bytes())
        assert refused(type(document), json.dumps(plain | {"more": 1}).encode(), path)
        assert refused(type(document), json.dumps(plain | {ESCAPES + "x" * 10**4: 1}).encode(), path)
        needed = [name for name, field in type(document).model_fields.items() if field.is_required()]
        for name in needed:
            assert refused(type(document), json.dumps({k: v for k, v in plain.items() if k != name}).encode(), path)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:-3],
    "utf16": lambda data: data.decode().encode("utf-16"),
    "no utf8": lambda data: b"\xff\xfe" + data,
    "null": lambda data: b"null",
    "list": lambda data: b"[" + data + b"]",
    "levels": lambda data: b"[" * 200_000 + b"]" * 200_000,
    "levels inside": lambda data: data.rstrip()[:-1] + b',"deep":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "digits": lambda data: data.rstrip()[:-1] + f',"long":{DIGITS}}}'.encode(),
    "surrogate": lambda data: data.rstrip()[:-1] + b',"half":"\\ud800"}',
    "nan": lambda data: data.rstrip()[:-1] + b',"nan":NaN}',
    "huge": lambda data: data + b" " * FEW_BYTES,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_no_document_is_refused(
    made: dict[str, Document], damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents_module, "MOST_BYTES", FEW_BYTES)
    for path, document in made.items():
        assert refused(type(document), DAMAGE[damage](document.to_bytes()), path)


@pytest.mark.parametrize("value", ["NaN", "Infinity", DIGITS, '"\\ud800"', "[" * 100_000 + "]" * 100_000])
@pytest.mark.parametrize("where", ['"model":{', '"grid":{'])
def test_a_recipe_is_held_to_its_digest_whatever_its_teacher_is_made_of(
    made: dict[str, Document], where: str, value: str
) -> None:
    (path, recipe), *_ = [(path, it) for path, it in made.items() if isinstance(it, Recipe)]
    data = recipe.to_bytes().decode().replace(where, f'{where}"x":{value},')
    assert refused(Recipe, data.encode(), path)


def test_a_document_is_read_only_where_it_says_that_it_lies(made: dict[str, Document]) -> None:
    for path, document in made.items():
        if document.own_paths:
            elsewhere = path.replace(".json", "0.json")
            assert refused(type(document), document.to_bytes(), elsewhere), path
    (commit,) = [it for it in made.values() if isinstance(it, Commit)]
    record = paths.record_path(commit.recipe_id, commit.layout_id, commit.task.name, commit.attempt)
    assert commit.own_paths == (commit.commit_path, record)
    assert Commit.from_bytes(commit.to_bytes(), f"s3://b/{record}") == commit
    assert refused(Commit, commit.to_bytes(), record.replace(commit.attempt, "f" * 16))


WRONG_WHOLES: dict[str, dict[str, Any]] = {
    "the rows of every split": {"rows": {"train": 16}},
    "which is later": {"floor": {"number": 3, "sealed_at": AT, "sweep_at": AT}},
    "or neither": {"floor": {"number": 1, "sealed_at": None, "sweep_at": AT}},
    "it lists and misses 4": {"window": {"train": [0, 10**12], "holdout": [0, 16]}},
    "has ids beyond": {"window": {"train": [2**63 - 2, 2**63 - 1], "holdout": [0, 16]}},
    "is not named by its digest": {"shards": {"path": f"datasets/other/{SHA}.parquet", "sha256": SHA, "count": 3}},
    "less than or equal to 67108864": {"layout": {**LAYOUT.plain(), "samples_per_shard": 10**18}},
}


@pytest.mark.parametrize("told", WRONG_WHOLES)
def test_a_manifest_adds_up(made: dict[str, Document], told: str) -> None:
    path = paths.manifest_path("main", 2)
    data = json.dumps(json.loads(made[path].to_bytes()) | WRONG_WHOLES[told]).encode()
    with pytest.raises(StoreError, match=told):
        Manifest.from_bytes(data, path)


@pytest.mark.parametrize("what", ["fifo", "folder", "device", "sparse"])
def test_what_is_no_regular_file_or_never_ends_is_no_document(tmp_path: Path, what: str) -> None:
    store = Store.create(str(tmp_path / "store"))
    path = "pins/run-1.json"
    full = tmp_path / "store" / path
    full.parent.mkdir()
    if what == "sparse":
        full.touch()
        os.truncate(full, 1 << 40)
    else:
        {"fifo": os.mkfifo, "folder": os.mkdir, "device": lambda it: it.symlink_to("/dev/zero")}[what](full)
    with pytest.raises(StoreError, match=r"is no regular file|is a link out of|has more than 67108864 bytes"):
        store.read(path)
    found, unread = read_all(store, [path, "pins/absent.json"], Pin)
    assert (found, list(unread)) == ({}, [path])
    assert unread[path].endswith("; it is left alone")


def test_one_bad_document_keeps_no_other_from_being_read(store: Store) -> None:
    good = Pin(run="good", dataset="main", number=1, expires_at=AT)
    for name, data in {"good": good.to_bytes(), "bad": b"{", "moved": good.to_bytes()}.items():
        store.write(paths.pin_path(name), data)
    names = [f"{paths.PINS}/{name}" for name in store.list(paths.PINS)]
    found, unread = read_all(store, names, Pin)
    assert found == {"pins/good.json": good}
    assert sorted(unread) == ["pins/bad.json", "pins/moved.json"]
    assert all(len(told.splitlines()) == 1 and path in told for path, told in unread.items())
    assert read_document(store, "pins/good.json", Pin) == good
    assert read_document(store, "pins/none.json", Pin) is None


def test_readers_ask_where_a_document_lies(store: Store, made: dict[str, Document]) -> None:
    for path, document in made.items():
        store.write(path, document.to_bytes())
    (recipe,) = [it for it in made.values() if isinstance(it, Recipe)]
    (commit,) = [it for it in made.values() if isinstance(it, Commit)]
    moved = paths.commit_path(recipe.id, LAYOUT.id, "train-00000007")
    store.write(moved, commit.to_bytes())
    store.write(paths.manifest_path("main", 3), made[paths.manifest_path("main", 2)].to_bytes())
    store.write(paths.recipe_path(digest(7)), recipe.to_bytes())
    assert read_commit(store, recipe.id, LAYOUT.id, "train-00000000") == commit
    for read in (
        lambda: read_commit(store, recipe.id, LAYOUT.id, "train-00000007"),
        lambda: read_commits(store, recipe.id, LAYOUT.id, ["train-00000007"]),
        lambda: read_manifest(store, "main", 3),
        lambda: read_recipe(store, digest(7)),
    ):
        with pytest.raises(StoreError, match="is the document of "):
            read()


def test_controls_are_shown_as_codes() -> None:
    every = "".join(map(chr, np.arange(0x250))) + "\u2028\u202e\u2066\ud800"
    told = shown(every)
    assert not CONTROLS.search(told)
    assert told.isprintable() or all(character.isprintable() or character in "\xa0\xad" for character in told)
    assert shown("é ü 漢字 [red]") == "é ü 漢字 [red]"
    assert shown("a\x1b[2J\n") == "a\\x1b[2J\\n"


def test_a_copy_with_another_field_has_an_id_of_its_own(make_recipe):
    recipe = make_recipe()
    known = recipe.id
    other = recipe.model_copy(update={"numerics_version": recipe.numerics_version + 1})
    assert other.id != known
    assert other.id == type(recipe).from_bytes(other.to_bytes(), "a copy").id
