"""`verify` names what is wrong, `inspect` and `status` tell what is there."""

import json
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from limbeck.diffusion import noise
from limbeck.pipeline.job.kept import Target
from limbeck.pipeline.status import find_job, job_status
from limbeck.storage_schemas import paths
from limbeck.storage_schemas.dataset import open_dataset
from limbeck.storage_schemas.job import Failure, Heartbeat
from limbeck.storage_schemas.store import Store
from tests.forged import forget_digests
from tests.pipeline.wrong_shards import spoil


@pytest.fixture
def store(generate, tmp_path):
    code, _, err = generate(tmp_path / "store")
    assert code == 0, err
    return tmp_path / "store"


def shard(store, task):
    (path,) = Path(store).glob(f"recipes/*/*/shards/{task}-*")
    return path


@pytest.mark.parametrize("words", [(), ("--format", "webdataset")])
def test_a_flipped_bit_a_cut_file_and_a_missing_one_are_each_named(generate, pipeline, tmp_path, words):
    generate(tmp_path, *words)
    assert pipeline("verify", tmp_path)[0] == 0
    flipped, cut, gone = (shard(tmp_path, f"train-0000000{index}") for index in range(3))
    data = bytearray(flipped.read_bytes())
    data[len(data) // 3] ^= 4
    flipped.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:-100])
    gone.unlink()
    code, out, _ = pipeline("verify", tmp_path)
    lines = out.splitlines()
    assert (code, len(lines)) == (1, 4)
    assert lines[0].startswith("train-00000000: ")
    assert "does not match its checksum" in lines[0]
    assert f"has {cut.stat().st_size} bytes" in lines[1]
    assert lines[2] == f"train-00000002: {gone} is missing"
    assert lines[3].endswith("3 problems")
    code, out, _ = pipeline("verify", tmp_path, "--json")
    assert (code, len(json.loads(out)["problems"])) == (1, 3)


def test_a_missing_commit_is_named(store, pipeline):
    (commit,) = store.glob("recipes/*/*/records/train-00000001-*.json")
    commit.unlink()
    code, out, _ = pipeline("verify", store)
    assert (code, out.startswith("train-00000001: "), "is missing" in out) == (1, True, True)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("rows", {"train": 159, "holdout": 40}, "counts other rows than its shards have"),
        ("missing", ["train-00000002"], "does not name all its missing tasks"),
        ("content_digest", "0" * 64, "has another content than its digest"),
    ],
)
def test_a_manifest_that_lies_is_caught(store, pipeline, field, value, told):
    path = store / "datasets/main/manifests/000001.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {field: value}))
    code, out, _ = pipeline("verify", store)
    assert (code, f"manifest 1 {told}" in out) == (1, True)


@pytest.mark.parametrize("stop", [300, 10**12, 2**63 - 1, 2**63, 10**30])
def test_a_window_that_nothing_accounts_for_is_refused_at_once(store, pipeline, stop):
    path = store / "datasets/main/manifests/000001.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"window": {"train": [0, stop], "holdout": [0, 40]}}))
    code, _, err = pipeline("verify", store)
    told = "tasks, it lists and misses 4" if stop < 2**63 else "window.train.1: "
    assert (code, f"{path} is not a valid Manifest" in err, told in err) == (1, True, True)


def test_a_manifest_with_another_parent_is_caught(generate, pipeline, tmp_path):
    generate(tmp_path)
    generate(tmp_path, count=300)
    assert pipeline("verify", tmp_path)[0] == 0
    first = tmp_path / "datasets/main/manifests/000001.json"
    first.write_text(json.dumps(json.loads(first.read_bytes()) | {"writer": "somebody"}))
    code, out, _ = pipeline("verify", tmp_path)
    assert (code, "manifest 2 does not follow from its parent" in out) == (1, True)


def test_inspect_tells_counts_sizes_and_statistics(store, pipeline, hashes):
    code, out, _ = pipeline("inspect", store, "--json")
    found = json.loads(out)
    assert (code, found["samples"], found["shards"], found["nfe"]) == (0, {"train": 160, "holdout": 40}, 4, 7)
    assert found["bytes"] == sum(path.stat().st_size for path in store.glob("recipes/*/*/shards/*"))
    ids = {"train": range(192), "holdout": range(64)}
    eps = np.concatenate([noise.standard_normal(0, split, ids[split], (2,)) for split in ids])
    stored = (80.0 * eps).astype(np.float16).astype(np.float64)
    told = found["statistics"]["noise"]
    expected = {"mean": stored.mean(), "std": stored.std(), "min": stored.min(), "max": stored.max()}
    assert told == pytest.approx(expected, rel=1e-12)
    assert list(found["statistics"]) == ["noise", "state_002", "output"]
    code, out, _ = pipeline("inspect", store)
    assert (code, "heun, 4 steps, 7 calls a sample, sigma frame" in out) == (0, True)


def test_inspect_draws(store, pipeline, tmp_path):
    assert pipeline("inspect", store, "--picture", tmp_path / "p.png")[0] == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_status_of_a_sealed_job(store, pipeline):
    code, out, _ = pipeline("status", store, "--json")
    found = json.loads(out)
    assert (code, found["state"], found["tasks_done"], found["tasks"]) == (0, "sealed as manifest 1", 4, 4)
    assert (found["samples_done"], found["failures"], found["manifest"]) == (256, [], 1)


def test_an_older_manifest_can_be_asked_for(generate, pipeline, tmp_path):
    generate(tmp_path)
    generate(tmp_path, count=300)
    _, out, _ = pipeline("inspect", tmp_path, "--manifest", 1, "--json")
    assert json.loads(out)["samples"]["train"] == 160
    assert open_dataset(Store.open(str(tmp_path))).manifest.number == 2


def test_a_commit_with_a_damaged_checksum_is_named(store, pipeline):
    (path,) = store.glob("recipes/*/*/records/train-00000001-*.json")
    commit = json.loads(path.read_bytes())
    next(chunk for chunk in commit["chunks"] if chunk["column"] == "noise")["xxh3"] = "0" * 32
    path.write_text(json.dumps(commit))
    code, out, _ = pipeline("verify", store)
    assert (code, f"{path.name} is not what the manifest lists" in out) == (1, True)
    forget_digests(Store.open(str(store)))
    code, out, _ = pipeline("verify", store)
    assert (code, out.count("train-00000001: ")) == (1, 1)
    assert "column noise, rows 0 to 63" in out


def test_json_stays_json_beside_a_picture(store, pipeline, tmp_path):
    code, out, err = pipeline("inspect", store, "--json", "--picture", tmp_path / "p.png")
    assert (code, json.loads(out)["manifest"]) == (0, 1)
    assert "drew" in err


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_a_dataset_name_that_points_elsewhere_is_refused(store, pipeline, command):
    code, _, err = pipeline(command, store, "--dataset", "../up")
    assert (code, err.count("\n"), "dataset" in err) == (2, 1, True)


@pytest.fixture
def unsealed(store):
    """The store of a job that died before it sealed, and its document and last heartbeat."""
    for manifest in store.glob("datasets/main/manifests/*.json"):
        manifest.unlink()
    opened = Store.open(str(store))
    job = find_job(opened, None).job
    beat = Heartbeat(at=job.started_at, state="running")
    opened.write(paths.heartbeat_path(job.job), beat.to_bytes())
    return store, opened, find_job(opened, None)


def test_a_job_that_says_nothing_is_stalled(unsealed):
    store, opened, target = unsealed
    for commit in store.glob("recipes/*/*/commits/*.json"):
        commit.unlink()
    said = datetime.fromisoformat(target.beat.at)
    assert job_status(opened, target, now=said + timedelta(seconds=299)).state == "running"
    state = job_status(opened, target, now=said + timedelta(seconds=301)).state
    assert state == f"stalled since {target.beat.at}: it may be dead, generate again goes on from here"
    (store / paths.heartbeat_path(target.job.job)).unlink()
    assert job_status(opened, find_job(opened, None), now=said + timedelta(seconds=299)).state == "running"


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ("failed", "ended with 1 tasks missing, nothing sealed"),
        ("stopped", "stopped with 1 tasks missing"),
        ("ended", "another job made what it asked for"),
        ("refused", "refused at"),
        ("sealed", "a manifest that was pruned since"),
    ],
)
def test_a_job_that_ended_says_how(unsealed, state, told):
    store, opened, target = unsealed
    next(iter(store.glob("recipes/*/*/commits/train-00000001.json"))).unlink()
    ended = Target(target.job, target.beat.model_copy(update={"state": state}))
    later = datetime.fromisoformat(target.beat.at) + timedelta(days=9)
    assert told in job_status(opened, ended, now=later).state


def test_status_counts_what_was_found_apart_from_what_was_made(unsealed):
    _, opened, target = unsealed
    found = Target(target.job, target.beat.model_copy(update={"found": 3}))
    status = job_status(opened, found, now=datetime.fromisoformat(target.beat.at))
    assert (status.tasks_done, status.tasks, status.samples_done) == (4, 4, 64)


def test_a_failed_task_that_another_job_committed_is_not_missing(unsealed):
    _, opened, target = unsealed
    job, at = target.job.job, target.beat.at
    failure = Failure(task="train-00000001", error="e", traceback="", attempts=3, machine="m", failed_at=at)
    opened.put_if_absent(paths.failure_path(job, failure.task), failure.to_bytes())
    status = job_status(opened, target, now=datetime.fromisoformat(at))
    assert status.state == "all tasks committed, not sealed"


@pytest.mark.parametrize("words", [(), ("--audit", 4)])
def test_a_dataset_without_a_row_is_wrong(store, pipeline, words):
    """However well its checksums agree: the rest of an audit has nothing that it could find wrong."""
    spoil(store, lost=lambda task: range(task.start, task.stop))
    code, out, _ = pipeline("verify", store, *words)
    assert (code, out.splitlines()[0]) == (1, "manifest 1 has no row of any id")
    assert ("FAILED    audit: there are no rows to look at" in out) == bool(words)
    assert "0 of 200 ids have rows: 1 problems" in out


def test_verify_says_how_many_ids_have_rows(store, pipeline):
    assert (
        "200 of 200 ids have rows: every byte matches its checksum, every id is there once"
        in pipeline("verify", store)[1]
    )
    lost = {"train": (70, 150, 190), "holdout": ()}
    spoil(store, lost=lambda task: [i for i in lost[task.split] if task.start <= i < task.stop])
    code, out, _ = pipeline("verify", store)
    assert code == 0
    assert "198 of 200 ids have rows: every byte matches its checksum, no id is there twice" in out
    found = json.loads(pipeline("verify", store, "--json")[1])
    assert (found["rows"], found["ids"]) == (198, 200)
