"""Workers without Ray: threads of this process for one, processes for more."""

import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from multiprocessing.context import SpawnProcess

from pipeline.dispatch import IN_FLIGHT, Died, Event, Finished, Fleet, Ready
from pipeline.produce import Order, Problem, Producer, attempt_task, describe
from storage_schemas.commit import Commit, Task


def local_fleet(order: Order, workers: int) -> Fleet:
    """One worker is this process itself; several are processes of their own, each with its own copy of the teacher."""
    return ThreadFleet(order) if workers == 1 else ProcessFleet(order)


class ThreadFleet:
    """One worker, in this process."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self._threads = ThreadPoolExecutor(IN_FLIGHT)
        self._running: dict[Future[Commit | Problem], Task] = {}
        self._started: list[Event] = []

    def start(self) -> int:
        """Load the teacher here and now."""
        producer, problem = load_producer(self.order)
        self._producer = producer
        self._started.append(Ready(0, problem))
        return 0

    def submit(self, worker: int, task: Task) -> None:
        """Queue the task behind the one that runs."""
        assert self._producer is not None
        self._running[self._threads.submit(attempt_task, self._producer, task)] = task

    def wait(self) -> Sequence[Event]:
        """Blocks until a task ends."""
        started, self._started = self._started, []
        if started:
            return started
        done = wait_for(self._running, return_when=FIRST_COMPLETED).done
        return [Finished(0, self._running.pop(future), future.result()) for future in done]

    def close(self) -> None:
        """Drop what has not begun; what runs ends first."""
        self._threads.shutdown(cancel_futures=True)


class ProcessFleet:
    """Processes of this machine, each behind a pipe. A process whose pipe closes ends itself."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self._numbers = itertools.count()
        self._processes: dict[int, tuple[SpawnProcess, Connection]] = {}

    def start(self) -> int:
        """Spawn a process that loads the teacher."""
        number = next(self._numbers)
        here, there = multiprocessing.get_context("spawn").Pipe()
        process = multiprocessing.get_context("spawn").Process(target=_serve, args=(there, self.order), daemon=True)
        process.start()
        there.close()
        self._processes[number] = process, here
        return number

    def submit(self, worker: int, task: Task) -> None:
        """Send the task; a process that is gone shows in `wait`."""
        try:
            self._processes[worker][1].send(task)
        except OSError:
            return

    def wait(self) -> Sequence[Event]:
        """Blocks until a process says something or dies."""
        workers = {pipe: number for number, (_, pipe) in self._processes.items()}
        return [self._hear(workers[pipe], pipe) for pipe in wait_for_any(list(workers)) if isinstance(pipe, Connection)]

    def close(self) -> None:
        """End every process."""
        for process, pipe in self._processes.values():
            pipe.close()
            process.terminate()
            process.join()

    def _hear(self, worker: int, pipe: Connection) -> Event:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            process, _ = self._processes.pop(worker)
            process.join()
            return Died(worker, f"exit code {process.exitcode}")
        return Ready(worker, message) if not isinstance(message, tuple) else Finished(worker, *message)


def load_producer(order: Order) -> tuple[Producer | None, Problem | None]:
    """A producer, or why there can't be one."""
    try:
        return Producer(order), None
    except Exception as error:
        return None, describe(error)


def _serve(pipe: Connection, order: Order) -> None:
    """A worker process: says None or its problem, then answers each task with (task, outcome), two at a time."""
    producer, problem = load_producer(order)
    say = _sender(pipe)
    say(problem)
    with ThreadPoolExecutor(IN_FLIGHT) as threads:
        while producer is not None:
            try:
                task = pipe.recv()
            except (EOFError, OSError):
                os._exit(0)  # nobody waits for what still runs
            threads.submit(_answer, say, producer, task)


def _answer(say: Callable[[object], None], producer: Producer, task: Task) -> None:
    say((task, attempt_task(producer, task)))


def _sender(pipe: Connection) -> Callable[[object], None]:
    lock = threading.Lock()

    def say(message: object) -> None:
        with lock:
            pipe.send(message)

    return say
