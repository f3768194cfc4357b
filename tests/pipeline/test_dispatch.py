"""The dispatcher against a fleet that is a script: which worker dies when."""

from collections import defaultdict

import pytest

from pipeline.dispatch import DEAD_ON_ARRIVAL, Died, Finished, Ready, WorkerError, dispatch
from pipeline.produce import Problem
from storage_schemas.commit import Commit, Task
from storage_schemas.job import Failure

PROBLEM = Problem("ValueError: no", "Traceback ...", "somewhere")


def tasks(n):
    return [Task("train", index, 64) for index in range(n)]


def commit(task):
    return Commit.model_construct(split=task.split, index=task.index, samples_per_shard=64)


class Script:
    """Ends one task a call of wait. `deadly` tasks kill their worker that many times, `bad` ones raise."""

    def __init__(self, *, deadly=None, bad=None, stillborn=0, broken=False):
        self.deadly, self.bad = dict(deadly or {}), dict(bad or {})
        self.stillborn, self.broken = stillborn, broken
        self.events, self.loads, self.most = [], defaultdict(list), 0
        self.numbers = self.closed = 0
        self.companions = defaultdict(list)

    def start(self):
        self.numbers += 1
        if self.numbers <= self.stillborn:
            self.events.append(Died(self.numbers, "out of memory"))
        else:
            self.events.append(Ready(self.numbers, PROBLEM if self.broken else None))
            self.loads[self.numbers] = []
        return self.numbers

    def submit(self, worker, task):
        self.loads[worker].append(task)
        self.most = max(self.most, len(self.loads[worker]))

    def wait(self):
        if self.events:
            return [self.events.pop(0)]
        worker = max(self.loads, key=lambda number: len(self.loads[number]))
        index = self.loads[worker][0].index
        if self.deadly.get(index, 0):
            self.deadly[index] -= 1
            self.companions[index].append([task.index for task in self.loads[worker][1:]])
            del self.loads[worker]
            return [Died(worker, "killed")]
        task = self.loads[worker].pop(0)
        if self.bad.get(index, 0):
            self.bad[index] -= 1
            return [Finished(worker, task, PROBLEM)]
        return [Finished(worker, task, commit(task))]

    def close(self):
        self.closed += 1


def ends(fleet, n, *, workers=2, max_attempts=3):
    done, failed = [], {}
    for outcome in dispatch(fleet, tasks(n), workers=workers, max_attempts=max_attempts):
        if isinstance(outcome, Failure):
            failed[outcome.task] = outcome
        else:
            done.append(outcome.task.index)
    return sorted(done), failed


def test_every_task_ends_once_and_no_worker_has_more_than_two():
    fleet = Script()
    assert ends(fleet, 9) == (list(range(9)), {})
    assert (fleet.most, fleet.numbers) == (2, 2)


def test_no_more_workers_are_started_than_there_are_tasks():
    fleet = Script()
    ends(fleet, 1, workers=8)
    assert fleet.numbers == 1


def test_tasks_of_a_dead_worker_run_again_on_another():
    fleet = Script(deadly={2: 1})
    assert ends(fleet, 6) == (list(range(6)), {})
    assert fleet.numbers == 3


def test_a_task_that_raises_is_tried_again_and_then_set_aside_with_its_error():
    done, failed = ends(Script(bad={1: 2, 4: 9}), 6)
    assert done == [0, 1, 2, 3, 5]
    assert list(failed) == ["train-00000004"]
    assert (failed["train-00000004"].attempts, failed["train-00000004"].error) == (3, PROBLEM.error)


def test_a_task_that_kills_its_workers_takes_a_companion_along_once_at_most():
    fleet = Script(deadly={0: 99})
    done, failed = ends(fleet, 8, max_attempts=3)
    assert done == list(range(1, 8))
    assert failed["train-00000000"].error == "its worker died: killed"
    assert [bool(others) for others in fleet.companions[0]] == [True, False, False]


def test_a_teacher_that_can_not_be_loaded_ends_the_job_in_one_line():
    with pytest.raises(WorkerError, match=r"somewhere can't start: ValueError: no"):
        ends(Script(broken=True), 3)


def test_workers_that_die_while_they_load_are_replaced_only_so_often():
    assert ends(Script(stillborn=DEAD_ON_ARRIVAL - 1), 3, workers=1) == ([0, 1, 2], {})
    with pytest.raises(WorkerError, match="out of memory"):
        ends(Script(stillborn=99), 3, workers=1)


def test_no_worker_gets_a_second_task_before_each_has_a_first():
    fleet = Script()
    assert ends(fleet, 2, workers=2) == ([0, 1], {})
    assert fleet.most == 1
