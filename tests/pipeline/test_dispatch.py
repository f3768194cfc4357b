"""The dispatcher against a fleet that is a script: which worker dies when."""

import signal
import time
from collections import defaultdict

import pytest

from limbeck.pipeline.producer import Problem
from limbeck.pipeline.workers.backlog import NODE_LOSSES
from limbeck.pipeline.workers.deadlines import STRAGGLER_SECONDS, Patience
from limbeck.pipeline.workers.dispatch import DEAD_ON_ARRIVAL, SICK, dispatch
from limbeck.pipeline.workers.fleet import Died, Finished, Leaving, Ready, WorkerError
from limbeck.pipeline.workers.signals import Drain
from limbeck.storage_schemas.commit import Commit, Task
from limbeck.storage_schemas.job import Failure

PROBLEM = Problem("ValueError: no", "Traceback ...", "somewhere")


def tasks(n):
    return [Task("train", index, 64) for index in range(n)]


def commit(task):
    return Commit.model_construct(split=task.split, index=task.index, samples_per_shard=64)


class Script:
    """Ends one task a call of wait. `deadly` tasks kill their worker that many times, `bad` ones raise."""

    def __init__(self, *, deadly=None, bad=None, stillborn=0, broken=False, cause="process"):
        self.deadly, self.bad, self.cause = dict(deadly or {}), dict(bad or {}), cause
        self.stillborn, self.broken = stillborn, broken
        self.events, self.loads, self.most = [], defaultdict(list), 0
        self.numbers = self.closed = 0
        self.companions = defaultdict(list)
        self.ran, self.ended, self.asked = defaultdict(list), [], []

    def start(self):
        self.numbers += 1
        self.asked.append(self.numbers)
        if self.numbers <= self.stillborn:
            self.events.append(Died(self.numbers, "out of memory", cause=self.cause))
        else:
            self.events.append(Ready(self.numbers, PROBLEM if self.broken else None))
            self.loads[self.numbers] = []
        return self.numbers

    def submit(self, worker, task):
        self.loads[worker].append(task)
        self.ran[task.index].append(worker)
        self.most = max(self.most, len(self.loads[worker]))

    def end(self, worker):
        self.ended.append(worker)
        self.events = [event for event in self.events if event.worker != worker]
        self.loads.pop(worker, None)

    def wait(self):
        if self.events:
            return [self.events.pop(0)]
        worker = max(self.loads, key=lambda number: len(self.loads[number]))
        return self.end_one(worker, self.loads[worker][0])

    def end_one(self, worker, task):
        index = task.index
        if self.deadly.get(index, 0):
            self.deadly[index] -= 1
            self.companions[index].append([other.index for other in self.loads[worker] if other != task])
            del self.loads[worker]
            return [Died(worker, "killed", "all of it", self.cause)]
        self.loads[worker].remove(task)
        if self.bad.get(index, 0):
            self.bad[index] -= 1
            return [Finished(worker, task, PROBLEM)]
        return [Finished(worker, task, commit(task))]

    def room(self):
        return "each takes 1 CPU"

    def close(self):
        self.closed += 1


def ends(fleet, n, *, workers=2, max_attempts=3, **given):
    done, failed = [], {}
    for outcome in dispatch(fleet, tasks(n), workers=workers, max_attempts=max_attempts, **given):
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
    failure = failed["train-00000000"]
    assert (failure.error, failure.traceback, failure.attempts) == ("its worker died: killed", "all of it", 3)
    assert [bool(others) for others in fleet.companions[0]] == [True, False, False]


def test_a_teacher_that_can_not_be_loaded_ends_the_job_in_one_line():
    with pytest.raises(WorkerError, match=r"somewhere can't start: ValueError: no"):
        ends(Script(broken=True), 3)


class Sick(Script):
    """A start on machine 0 fails, and fails fast; the scheduler goes round."""

    def __init__(self, machines, sick):
        super().__init__()
        self.machines, self.sick = machines, sick

    def start(self):
        number = super().start()
        machine = f"machine-{number % self.machines}"
        if number % self.machines in self.sick:
            self.events[-1] = Ready(number, Problem("RuntimeError: no such accelerator", "", machine))
            self.events.sort(key=lambda event: event.problem is None)
        return number


def test_a_sick_machine_among_others_does_not_end_a_job_that_begins():
    lines = []
    fleet = Sick(machines=4, sick=[1])
    assert ends(fleet, 20, workers=8, tell=lines.append) == (list(range(20)), {})
    assert "a worker on machine-1 can't start: RuntimeError: no such accelerator" in lines
    fleet = Sick(machines=4, sick=[0, 1, 2, 3])
    with pytest.raises(WorkerError, match=r"machine-2 can't start: RuntimeError: no such accelerator"):
        ends(fleet, 20, workers=8)
    assert fleet.numbers < 12, "two machines are enough"


def test_workers_that_die_while_they_load_are_replaced_only_so_often():
    assert ends(Script(stillborn=DEAD_ON_ARRIVAL - 1), 3, workers=1) == ([0, 1, 2], {})
    with pytest.raises(WorkerError, match="out of memory"):
        ends(Script(stillborn=99), 3, workers=1)


def test_no_worker_gets_a_second_task_before_each_has_a_first():
    fleet = Script()
    assert ends(fleet, 2, workers=2) == ([0, 1], {})
    assert fleet.most == 1


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Slow(Script):
    """Every call of wait takes a second. Workers after `room` wait for ever; `stuck` tasks do so that many times."""

    def __init__(self, *, room=99, stuck=None, **given):
        super().__init__(**given)
        self.clock, self.places, self.stuck = Clock(), room, dict(stuck or {})

    def start(self):
        number = super().start()
        if number > self.places:
            self.events.pop()
            del self.loads[number]
        return number

    def wait(self):
        self.clock.now += 1
        if self.events:
            return super().wait()
        free = [(worker, load[0]) for worker, load in self.loads.items() if load and not self.is_stuck(load[0])]
        return self.end_one(*free[0]) if free else []

    def is_stuck(self, task):
        return self.stuck.get(task.index, 0) >= len(self.ran[task.index])


def test_a_task_that_raised_on_a_worker_is_tried_again_on_another():
    fleet = Script(bad={0: 2, 3: 2})
    assert ends(fleet, 8, workers=3) == (list(range(8)), {})
    for index in (0, 3):
        assert all(one != next_one for one, next_one in zip(fleet.ran[index], fleet.ran[index][1:], strict=False))


def test_a_sole_worker_tries_again_what_it_failed():
    fleet = Script(bad={0: 2})
    assert ends(fleet, 2, workers=1) == ([0, 1], {})
    assert set(fleet.ran[0]) == {1}


class BlackHole(Script):
    """Worker 1 fails whatever it gets. Workers end tasks in turn."""

    turn = 0

    def wait(self):
        if self.events:
            return [self.events.pop(0)]
        busy = [worker for worker, load in self.loads.items() if load]
        self.turn += 1
        worker = busy[self.turn % len(busy)]
        return self.end_one(worker, self.loads[worker][0])

    def end_one(self, worker, task):
        if worker == 1:
            self.loads[1].remove(task)
            return [Finished(1, task, PROBLEM)]
        return super().end_one(worker, task)


def test_a_worker_that_fails_one_task_after_the_other_is_replaced_and_burns_none():
    fleet, lines = BlackHole(), []
    assert ends(fleet, 60, workers=2, tell=lines.append) == (list(range(60)), {})
    assert sum(workers.count(1) for workers in fleet.ran.values()) <= SICK + 2
    assert lines == [f"a worker on somewhere failed {SICK} tasks in a row and is replaced: {PROBLEM.error}"]


def test_when_all_workers_fail_none_is_called_sick():
    fleet = Script(bad=dict.fromkeys(range(6), 99))
    done, failed = ends(fleet, 6, workers=2)
    assert (done, len(failed)) == ([], 6)


def test_one_bad_node_of_many_does_not_end_a_job_that_begins():
    assert ends(Script(stillborn=9), 30, workers=20)[1] == {}
    with pytest.raises(WorkerError, match="10 workers in a row died while they loaded"):
        ends(Script(stillborn=10), 30, workers=20)


def test_workers_that_go_with_their_node_while_they_load_are_replaced_as_often_as_that_happens():
    fleet = Script(stillborn=20, cause="node")
    assert ends(fleet, 3, workers=1) == ([0, 1, 2], {})
    assert fleet.numbers == 21


def test_dead_arrivals_beside_workers_that_work_only_pause_the_starting():
    class Late(Slow):
        """Only the first worker ever gets ready."""

        def start(self):
            number = Script.start(self)
            if number > 1:
                self.events[-1] = Died(number, "out of memory")
                del self.loads[number]
            return number

    fleet = Late()
    assert ends(fleet, 90, workers=2, clock=fleet.clock) == (list(range(90)), {})
    assert DEAD_ON_ARRIVAL < fleet.numbers < 10


def test_tasks_lost_with_a_node_that_had_notice_are_no_attempts():
    fleet = Script(deadly={0: 50}, cause="notice")
    assert ends(fleet, 4) == (list(range(4)), {})


def test_tasks_lost_with_nodes_that_died_count_apart():
    fleet = Script(deadly={0: NODE_LOSSES - 1}, cause="node")
    assert ends(fleet, 4, max_attempts=2) == (list(range(4)), {})
    _, failed = ends(Script(deadly={0: 99}, cause="node"), 4)
    assert failed["train-00000000"].attempts == NODE_LOSSES


def test_a_worker_whose_node_had_notice_ends_what_it_has_and_is_replaced():
    class Noticed(Script):
        """Worker 1 hears that it must leave once it has two tasks."""

        heard = False

        def wait(self):
            if not self.events and not self.heard and len(self.loads.get(1, ())) == 2:
                self.heard = True
                self.before = list(self.loads[1])
                return [Leaving(1)]
            return super().wait()

    fleet = Noticed()
    assert ends(fleet, 20, workers=1) == (list(range(20)), {})
    assert (fleet.ended[0], fleet.numbers) == (1, 2)
    on_first = [index for index, workers in fleet.ran.items() if 1 in workers]
    assert on_first == [0, 1]
    assert all(len(workers) == 1 for workers in fleet.ran.values())


def test_work_begins_with_the_first_worker_and_the_log_says_who_waits_for_room():
    fleet, lines = Slow(room=2), []
    assert ends(fleet, 200, workers=8, clock=fleet.clock, tell=lines.append) == (list(range(200)), {})
    assert lines[0] == "2 of 8 workers ready; the others wait for room: each takes 1 CPU"
    assert len(lines) <= 4


def test_too_few_workers_for_too_long_end_the_job_in_one_line():
    fleet = Slow(room=1)
    with pytest.raises(WorkerError, match=r"1 workers are ready after 30 s, 2 must be: each takes 1 CPU"):
        ends(fleet, 99, workers=4, clock=fleet.clock, patience=Patience(min_workers=2, startup_seconds=30))
    fleet = Slow(room=2)
    assert ends(fleet, 99, workers=4, clock=fleet.clock, patience=Patience(min_workers=2, startup_seconds=30))[1] == {}


def test_workers_without_work_in_the_tail_are_ended_at_once():
    fleet = Slow(stuck={0: 99})
    done, _ = ends(fleet, 3, workers=3, max_attempts=1, clock=fleet.clock, patience=Patience(straggler_seconds=50))
    assert (done, set(fleet.ended[:2]), fleet.ended[2:]) == ([1, 2], {2, 3}, [1])


def test_workers_that_are_not_needed_any_more_need_not_come():
    fleet = Slow(room=1)
    assert ends(fleet, 3, workers=3, clock=fleet.clock) == ([0, 1, 2], {})
    assert {2, 3} <= set(fleet.ended)


def test_a_straggler_is_ended_and_runs_alone_next_time():
    fleet = Slow(stuck={4: 1})
    patience = Patience(straggler_seconds=50)
    assert ends(fleet, 12, clock=fleet.clock, patience=patience) == (list(range(12)), {})
    assert len(fleet.ran[4]) == 2
    assert 50 < fleet.clock.now < 200


def test_a_task_that_never_ends_is_set_aside_after_its_attempts():
    fleet = Slow(stuck={4: 99})
    done, failed = ends(fleet, 12, clock=fleet.clock, patience=Patience(straggler_seconds=50))
    assert done == [i for i in range(12) if i != 4]
    assert failed["train-00000004"].error == "no end after 50 s, the straggler deadline"


def test_the_deadline_is_derived_from_the_tasks_that_have_ended():
    fleet = Slow(stuck={4: 1})
    assert ends(fleet, 12, clock=fleet.clock) == (list(range(12)), {})
    assert STRAGGLER_SECONDS < fleet.clock.now < 2 * STRAGGLER_SECONDS


def test_a_drain_lets_tasks_in_flight_finish_and_hands_out_no_more():
    fleet, drain, lines = Script(), Drain(60.0), []
    outcomes = dispatch(fleet, tasks(50), workers=2, max_attempts=3, drain=drain, tell=lines.append)
    ended = [next(outcomes).task.index for _ in range(5)]
    in_flight = sum(map(len, fleet.loads.values()))
    drain._on_signal(signal.SIGTERM, None)
    ended += [outcome.task.index for outcome in outcomes]
    assert len(ended) == len(set(ended)) == 5 + in_flight
    assert lines == [f"SIGTERM: {in_flight} tasks in flight may finish for 60 s; a second signal ends them at once"]


def test_a_second_signal_abandons_what_is_in_flight():
    fleet, drain = Slow(stuck={0: 99}), Drain(1e9)
    outcomes = dispatch(fleet, tasks(9), workers=2, max_attempts=3, drain=drain, clock=fleet.clock)
    next(outcomes)
    drain._on_signal(signal.SIGTERM, None)
    drain._on_signal(signal.SIGTERM, None)
    assert list(outcomes) == []


class Crowd:
    """Thousands of workers that end their tasks by turns, a thousand events a call of wait."""

    def __init__(self):
        self.number, self.events, self.queue = 0, [], []

    def start(self):
        self.number += 1
        self.events.append(Ready(self.number, None))
        return self.number

    def submit(self, worker, task):
        self.queue.append((worker, task))

    def end(self, worker):
        pass

    def wait(self):
        events, self.events = self.events, []
        if events:
            return events
        batch, self.queue = self.queue[:1000], self.queue[1000:]
        return [Finished(worker, task, commit(task)) for worker, task in batch]


def seconds_a_task(workers, n):
    started = time.perf_counter()
    assert sum(1 for _ in dispatch(Crowd(), tasks(n), workers=workers, max_attempts=1)) == n
    return (time.perf_counter() - started) / n


def test_a_task_costs_the_same_with_ten_workers_and_with_thousands():
    few = min(seconds_a_task(10, 4000) for _ in range(3))
    many = min(seconds_a_task(4000, 12000) for _ in range(3))
    assert many < 10 * few
