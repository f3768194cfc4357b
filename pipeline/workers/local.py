"""Workers without Ray: threads of this process for one, processes for more."""

import faulthandler
import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from multiprocessing.context import SpawnProcess

from limbeck.pipeline.producer import Problem, Producer, WorkOrder, attempt_task, describe
from limbeck.pipeline.workers.fleet import IN_FLIGHT, Died, Event, Finished, Fleet, Ready, WorkerError
from limbeck.pipeline.workers.signals import SOLVING, ignore_signals
from limbeck.pipeline.workers.worker_death import exit_reason
from limbeck.storage_schemas.commit import Commit, Task

WAIT_SECONDS = 1.0
"""So that the driver sees a signal and a straggler while nothing else happens."""

CRASH_BYTES = 1 << 16


def local_fleet(order: WorkOrder, workers: int) -> Fleet:
    """One worker is this process itself; several are processes of their own, each with its own copy of the teacher."""
    return ThreadFleet(order) if workers == 1 else ProcessFleet(order)


class ThreadFleet:
    """One worker, in this process. A thread can't be ended: what it runs is left to itself."""

    def __init__(self, order: WorkOrder) -> None:
        self.order = order
        self._threads = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix=SOLVING)
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

    def end(self, worker: int) -> None:
        """WorkerError unless it is idle."""
        names = " and ".join(task.name for task in self._running.values())
        if names:
            raise WorkerError(
                f"{names} takes too long, and the only worker is this process, which can't end itself: "
                "use --workers 2 or --runner ray, whose workers can be replaced, or a longer --straggler-seconds"
            )

    def wait(self) -> Sequence[Event]:
        """Tasks that ended."""
        started, self._started = self._started, []
        if started:
            return started
        done = wait_for(self._running, timeout=WAIT_SECONDS, return_when=FIRST_COMPLETED).done
        return [Finished(0, self._running.pop(future), future.result()) for future in done]

    def room(self) -> str:
        """Never asked: this process is there."""
        return "one worker, in this process"

    def close(self) -> None:
        """Drop what has not begun; nobody waits for what runs."""
        self._threads.shutdown(wait=not self._running, cancel_futures=True)


@dataclass(frozen=True)
class _Process:
    """A worker process, the pipe to it, and the one that it writes a crash's traceback to."""

    process: SpawnProcess
    pipe: Connection
    crash: Connection

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()
        self.crash.close()

    def last_words(self) -> str:
        """What a process said that died of a signal it could see; nothing of SIGKILL."""
        os.set_blocking(self.crash.fileno(), False)
        with suppress(OSError):
            return os.read(self.crash.fileno(), CRASH_BYTES).decode(errors="replace")
        return ""


class ProcessFleet:
    """Processes of this machine, each behind a pipe. A process whose pipe closes ends itself."""

    def __init__(self, order: WorkOrder) -> None:
        self.order = order
        self._numbers = itertools.count()
        self._processes: dict[int, _Process] = {}

    def start(self) -> int:
        """Spawn a process that loads the teacher."""
        number = next(self._numbers)
        spawn = multiprocessing.get_context("spawn")
        (here, there), (crash_here, crash_there) = spawn.Pipe(), spawn.Pipe(duplex=False)
        process = spawn.Process(target=_serve, args=(there, crash_there, self.order), daemon=True)
        process.start()
        there.close()
        crash_there.close()
        self._processes[number] = _Process(process, here, crash_here)
        return number

    def submit(self, worker: int, task: Task) -> None:
        """Send the task; a process that is gone shows in `wait`."""
        try:
            self._processes[worker].pipe.send(task)
        except OSError:
            return

    def end(self, worker: int) -> None:
        """SIGKILL: workers leave the other signals to the driver."""
        self._processes.pop(worker).end()

    def wait(self) -> Sequence[Event]:
        """Answers of the processes, and which of them died."""
        workers = {process.pipe: number for number, process in self._processes.items()}
        heard = wait_for_any(list(workers), timeout=WAIT_SECONDS)
        return [self._hear(workers[pipe], pipe) for pipe in heard if isinstance(pipe, Connection)]

    def room(self) -> str:
        """Processes need no leave to start."""
        return f"each is a process of this machine, which has {os.cpu_count()} CPUs"

    def close(self) -> None:
        """End every process."""
        for worker in list(self._processes):
            self.end(worker)

    def _hear(self, worker: int, pipe: Connection) -> Event:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            gone = self._processes.pop(worker)
            gone.process.join()
            words = gone.last_words()
            gone.end()
            return Died(worker, exit_reason(gone.process.exitcode), words)
        return Ready(worker, message) if not isinstance(message, tuple) else Finished(worker, *message)


def load_producer(order: WorkOrder) -> tuple[Producer | None, Problem | None]:
    """A producer, or why there can't be one."""
    try:
        return Producer(order), None
    except Exception as error:
        return None, describe(error)


def _serve(pipe: Connection, crash: Connection, order: WorkOrder) -> None:
    """A worker process: says None or its problem, then answers each task with (task, outcome), two at a time."""
    ignore_signals()
    faulthandler.enable(file=crash.fileno())
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
