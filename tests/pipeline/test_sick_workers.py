"""What is not finite is a sample's doing only as long as it is rare: a worker whose GPU answers NaN decides nothing."""

import json
import os
from collections import Counter

import numpy as np
import pytest

from limbeck.pipeline.after.verify import check_dataset
from limbeck.pipeline.workers.dispatch import PAUSE_SECONDS, dispatch
from limbeck.pipeline.workers.fleet import Finished, Ready
from limbeck.storage_schemas.commit import Commit, Task, is_sick
from limbeck.storage_schemas.dataset import latest_manifest, open_dataset
from limbeck.storage_schemas.store import Store
from tests.pipeline.test_dispatch import PROBLEM, Slow, commit, tasks
from tests.pipeline.wrong_shards import spoil

FLAKY = "python:strange_teachers:Flaky"


@pytest.fixture
def nan_at(monkeypatch):
    """From now on the teacher is not finite at these train ids."""
    return lambda *ids: monkeypatch.setenv("STRANGE_NAN", " ".join(map(str, ids)))


@pytest.mark.parametrize(
    ("lost", "micro_batch", "sick"),
    [
        (range(6), 16, False),
        (range(7), 16, True),  # more than a tenth of 64
        (range(64, 70), 2, True),  # whole micro-batches
        ([64, 66, 68], 2, False),
        ([65, 66], 2, False),  # of two micro-batches
        ([65], 1, False),  # a micro-batch of one sample tells no more than the sample
        ((), 64, False),
    ],
)
def test_more_than_a_tenth_of_a_task_or_a_whole_micro_batch_is_sick(lost, micro_batch, sick):
    assert is_sick(Task("train", 0, 64), tuple(lost), micro_batch) == sick


def test_a_worker_that_answers_nan_decides_nothing(generate, commits, hashes, monkeypatch, tmp_path):
    monkeypatch.setenv("STRANGE_MARKER", str(tmp_path / "marker"))
    monkeypatch.setenv("STRANGE_PLANNER", str(os.getpid()))
    teacher = "python:strange_teachers:sick_teacher"
    code, out, err = generate(tmp_path / "s", "--workers", 2, teacher=teacher, count=320)
    assert (code, "6 of 6 tasks run here" in out, (tmp_path / "marker").exists()) == (0, True, True), err
    assert all(not found["quarantined"] for found in commits(tmp_path / "s").values())
    generate(tmp_path / "unharmed", teacher=teacher, count=320)
    assert hashes(tmp_path / "s") == hashes(tmp_path / "unharmed")


class SickPlace(Slow):
    """Every second worker is on one GPU that fails whatever it gets, in a second; the others need 30 for a task."""

    def __init__(self):
        super().__init__()
        self.begun, self.failed = {}, Counter()

    def start(self):
        number = super().start()
        place = "sick" if number % 2 else "sound"
        self.events = [Ready(e.worker, None, place) if e.worker == number else e for e in self.events]
        return number

    def wait(self):
        self.clock.now += 1
        if self.events:
            return [self.events.pop(0)]
        for worker, load in self.loads.items():
            if load and self.clock.now - self.begun.setdefault((worker, load[0]), self.clock.now) >= self.needs(worker):
                return self.end_one(worker, load[0])
        return []

    def needs(self, worker):
        return 1 if worker % 2 else 30

    def end_one(self, worker, task):
        self.loads[worker].remove(task)
        self.failed[task] += worker % 2
        return [Finished(worker, task, PROBLEM if worker % 2 else commit(task))]


def test_what_a_sick_gpu_failed_is_tried_on_another_one_however_fast_it_fails():
    fleet = SickPlace()
    given = {"workers": 2, "max_attempts": 3, "clock": fleet.clock}
    ended = list(dispatch(fleet, tasks(20), **given))
    assert all(isinstance(outcome, Commit) for outcome in ended)
    assert len(ended) == 20
    assert max(fleet.failed.values()) == 1, "once there is enough"
    assert fleet.numbers <= 4 + fleet.clock.now / PAUSE_SECONDS, "and no teacher is loaded in vain"


@pytest.mark.parametrize(
    ("ids", "words", "code"),
    [
        ([70, 3], [], 3),
        ([70, 3, 131], [], 1),
        ([70, 3, 131], ["--max-quarantined", 0.015], 3),
        ([70], ["--max-quarantined", 0], 1),
    ],
)
def test_a_window_seals_only_within_the_limit(generate, nan_at, tmp_path, ids, words, code):
    nan_at(*ids)
    found, out, _ = generate(tmp_path, *words, teacher=FLAKY)
    assert found == code, out
    assert (latest_manifest(Store.open(str(tmp_path)), "main") is None) == (code == 1)
    if code == 1:
        (line,) = out.splitlines()
        assert line.startswith(f"nothing sealed: {len(ids)} of 200 samples are not finite, ")
        assert "train 70" in line
        assert "generate --recheck to solve them again, or raise --max-quarantined" in line


def test_a_task_that_is_sick_everywhere_is_set_aside(generate, commits, nan_at, tmp_path):
    nan_at(*range(70, 77))
    code, out, _ = generate(tmp_path, teacher=FLAKY)
    assert (code, sorted(commits(tmp_path))) == (1, ["holdout-00000000", "train-00000000", "train-00000002"])
    (failure,) = tmp_path.glob("jobs/*/failures/*.json")
    told = json.loads(failure.read_bytes())
    assert (told["task"], told["attempts"]) == ("train-00000001", 3)
    assert told["error"].startswith("7 of its first 32 samples are not finite: its worker's device (cpu) is sick")
    assert told["error"] in out


@pytest.mark.parametrize("words", [[], ["--max-quarantined", 0]])
def test_a_recheck_solves_quarantined_samples_again(generate, pipeline, ids_of, nan_at, tmp_path, words):
    """Of a manifest, and of a window that was never sealed."""
    nan_at(70, 3)
    assert generate(tmp_path, *words, teacher=FLAKY)[0] == (1 if words else 3)
    nan_at()
    code, out, _ = generate(tmp_path, "--recheck", *words, teacher=FLAKY)
    assert (code, "2 of " in out, "tasks run here" in out) == (0, True, True), out
    assert ids_of(tmp_path) == {"train": list(range(160)), "holdout": list(range(40))}
    assert pipeline("verify", tmp_path)[0] == 0
    code, out, _ = generate(tmp_path, "--recheck", *words, teacher=FLAKY)
    assert (code, "every listed shard is there" in out) == (0, True)


def test_a_recheck_that_finds_the_same_samples_changes_nothing(generate, commits, nan_at, tmp_path):
    nan_at(70)
    generate(tmp_path, teacher=FLAKY)
    before = commits(tmp_path)
    code, out, _ = generate(tmp_path, "--recheck", teacher=FLAKY)
    assert (code, out.startswith("nothing new: manifest 1 of main")) == (3, True), out
    assert commits(tmp_path) == before


def test_nobody_adopts_what_a_sick_worker_committed(generate, ids_of, tmp_path):
    """Somebody else's program, or an older one of ours, committed a task without a single row."""
    generate(tmp_path)
    spoil(tmp_path, tasks={"train-00000001"}, lost=lambda task: range(task.start, task.stop))
    assert len(ids_of(tmp_path)["train"]) == 96
    code, out, _ = generate(tmp_path, "--dataset", "second")
    assert (code, "1 of 4 tasks run here" in out) == (0, True), out
    assert ids_of(tmp_path, "second")["train"] == list(range(160))
    dataset = open_dataset(Store.open(str(tmp_path)), "second")
    assert not np.any(dataset.shards("train").quarantined)


def test_what_listed_quarantined_samples_stays_readable_after_a_recheck(generate, ids_of, nan_at, tmp_path):
    """The task's commit is another now, but a manifest that is served lists the record of the first one."""
    nan_at(70)
    generate(tmp_path, teacher=FLAKY)
    nan_at()
    assert generate(tmp_path, "--recheck", teacher=FLAKY)[0] == 0
    store = Store.open(str(tmp_path))
    first, second = (open_dataset(store, number=number) for number in (1, 2))
    assert [len(dataset.shards("train").quarantined) for dataset in (first, second)] == [1, 0]
    for dataset in (first, second):
        assert check_dataset(dataset) == []
