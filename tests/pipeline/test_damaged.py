"""Documents beside a dataset that were damaged: each is named on one line and left, and everything else goes on."""

import json
import time

import pytest

from limbeck.pipeline.rounds.record import RECORD, Record
from limbeck.storage_schemas import paths
from limbeck.storage_schemas.commit import list_committed
from limbeck.storage_schemas.dataset import list_numbers
from limbeck.storage_schemas.errors import StoreError
from limbeck.storage_schemas.job import Failure, Heartbeat, Job
from limbeck.storage_schemas.manifest import Window
from limbeck.storage_schemas.store import Store
from tests.pipeline.handmade import LAYOUT, RECIPE, seal_window

AT = "2026-01-31T23:59:59+00:00"
SHA = "ab" * 32


def job_of(name: str, **changes: object) -> bytes:
    job = Job(
        job=name, dataset="main", recipe_id=RECIPE.id, layout=LAYOUT, window=Window(train=(0, 16)), parent=1,
        tasks_total=4, tasks_missing=2, runner="local", workers=1, started_at=AT,
    )  # fmt: skip
    return json.dumps(json.loads(job.to_bytes()) | changes).encode()


@pytest.fixture
def store(tmp_path) -> Store:
    """A dataset of two tasks, and two jobs that aim at four of which one is committed."""
    store = Store.create(str(tmp_path / "store"))
    seal_window(store, (0, 8), at=AT)
    for name in ("job-1", "job-2"):
        store.write(paths.job_path(name), job_of(name))
        store.write(paths.heartbeat_path(name), Heartbeat(at=AT, state="failed").to_bytes())
    return store


DAMAGED = {
    "garbage": b"\xff{",
    "another's": job_of("job-1"),
    "no zone": job_of("job-2", started_at="2026-01-01T00:00:00"),
    "null": job_of("job-2", started_at=None),
    "negative": job_of("job-2", parent=-1),
    "outwards": job_of("job-2", dataset="../../main"),
    "huge": job_of("job-2", window={"train": [0, 10**30], "holdout": [0, 0]}),
}


@pytest.mark.parametrize("beat", [b"{", Heartbeat(at=AT, state="failed").to_bytes().replace(b"+00:00", b"")])
def test_status_names_a_damaged_heartbeat_and_goes_on(store, pipeline, beat):
    store.write(paths.heartbeat_path("job-2"), beat)
    code, out, err = pipeline("status", store.uri)
    assert (code, out.startswith(f"job job-2 of main: stalled since {AT}")) == (0, True), out
    assert (len(err.splitlines()), f"{store.uri}/jobs/job-2/heartbeat.json" in err) == (1, True)


@pytest.mark.parametrize("damage", DAMAGED)
def test_status_names_a_damaged_job_and_tells_of_the_one_before(store, pipeline, damage):
    path = paths.job_path("job-2")
    store.write(path, DAMAGED[damage])
    code, out, err = pipeline("status", store.uri)
    assert (code, out.startswith("job job-1 of main: ended with 2 tasks missing")) == (0, True), out
    (line,) = err.splitlines()
    assert line.startswith(f"{store.uri}/{path} ")
    assert line.endswith("; it is left alone")
    code, out, err = pipeline("status", store.uri, "--job", "job-2")
    assert (code, out, len(err.splitlines()), f"{store.uri}/{path}" in err) == (1, "", 1, True)


def test_status_of_a_window_of_any_length_takes_no_time(store, pipeline):
    store.write(paths.job_path("job-2"), job_of("job-2", window={"train": [0, 2**63 - 1], "holdout": [0, 10**12]}))
    began = time.monotonic()
    code, out, _ = pipeline("status", store.uri, "--json")
    tasks = -(-(2**63 - 1) // LAYOUT.samples_per_shard) + 10**12 // LAYOUT.samples_per_shard
    assert (code, json.loads(out)["tasks"]) == (0, tasks - 2)
    assert time.monotonic() - began < 5


def test_a_damaged_failure_and_a_damaged_note_are_named_and_left(store, pipeline):
    good = Failure(task="train-00000002", error="out of luck", traceback="", attempts=3, machine="m", failed_at=AT)
    store.write(paths.failure_path("job-2", good.task), good.to_bytes())
    store.write(paths.failure_path("job-2", "train-00000003"), good.to_bytes())
    code, out, err = pipeline("status", store.uri)
    assert (code, "set aside train-00000002: out of luck" in out) == (0, True)
    assert err.splitlines() == [
        f"{store.uri}/jobs/job-2/failures/train-00000003.json is the document of failures/train-00000002.json: "
        "restore it; it is left alone"
    ]
    store.write(paths.calibration_path(RECIPE.id, SHA), b"{}")
    code, out, err = pipeline("inspect", store.uri)
    assert (code, len(err.splitlines()), err.endswith("; it is left alone\n")) == (0, 1, True)


def test_names_that_are_not_ours_are_no_manifests_and_no_commits(store):
    names = ("١٢٣٤٥٦.json", "0000002.json", "1.json", f"{'9' * 60}.json", "000001.json.bak", "000003")
    for name in names:
        store.write(f"{paths.manifests_folder('main')}/{name}", b"{}")
    assert list_numbers(store, "main") == [1]
    for name in ("train-000000000001.json", "x.json", "train-٠٠٠٠٠٠٠٠.json"):
        store.write(f"{paths.commits_folder(RECIPE.id, LAYOUT.id)}/{name}", b"{}")
    assert list_committed(store, RECIPE.id, LAYOUT.id) == {"train-00000000", "train-00000001"}


ROUND = {"dataset": "main", "manifest": 1, "recipe": SHA, "teacher": SHA, "calls": 8, "solve_seconds": 0.5}
BAD_ROUNDS = [
    *({"calls": value} for value in (-1, "8", None, 10**30, 0.5)),
    *({"manifest": value} for value in (0, "1", None)),
    *({"dataset": value} for value in ("../x", "", None, "a\x1b[2J")),
    *({"student": value} for value in ("x", 7, SHA.upper())),
    *({"error": value} for value in ("0.1", [])),
    *({"fit_seconds": value} for value in (-1.0, "1", None)),
    {"more": 1},
]


@pytest.mark.parametrize("change", BAD_ROUNDS, ids=str)
def test_a_damaged_record_of_rounds_is_refused_in_a_line(tmp_path, change):
    path = tmp_path / RECORD
    record = {"out": "o", "settings": {}, "reference": {}, "rounds": {"4": ROUND | change}, "direct": {}}
    path.write_text(json.dumps(record))
    with pytest.raises(StoreError) as refused:
        Record(SimpleConfig(tmp_path))
    told = str(refused.value)
    assert told.startswith(f"{path} is not a valid Written (rounds.4.")
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"[" * 200_000, b'{"rounds": {}}', b"\xff"])
def test_what_is_no_record_of_rounds_is_refused_in_a_line(tmp_path, data):
    (tmp_path / RECORD).write_bytes(data)
    with pytest.raises(StoreError, match="is not a valid Written"):
        Record(SimpleConfig(tmp_path))


class SimpleConfig:
    """As much of a ProgressiveConfig as a record asks for before it is read."""

    def __init__(self, out):
        self.out, self.fit_options, self.num_steps, self.store = out, {}, 8, "s"

    def model_dump(self, **options):
        return {}
