"""Workers of a fleet: which are starting, idle or busy, since when. Every step costs O(1), whatever their number."""

from collections import Counter, OrderedDict
from collections.abc import Callable

from limbeck.pipeline.workers.fleet import Fleet
from limbeck.storage_schemas.commit import Task


class Pool:
    """The workers of a fleet, by number. The first of an ordered dictionary is found at once, that of a dict is not."""

    def __init__(self, fleet: Fleet, clock: Callable[[], float]) -> None:
        self.fleet = fleet
        self.starting: dict[int, None] = {}
        self.loads: dict[int, list[Task]] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()
        self.open: OrderedDict[int, None] = OrderedDict()  # with one task, free for a second
        self.used: set[int] = set()
        self._places: dict[int, str] = {}  # of all workers that ever were ready
        self._crowds = Counter[str]()  # how many that are ready are in which
        self._leaving: set[int] = set()
        self._heard: OrderedDict[int, float] = OrderedDict()  # busy workers by the time of their last sign of life
        self._clock = clock

    @property
    def ready(self) -> int:
        """Workers that have loaded their teacher and stay."""
        return len(self.loads) - len(self._leaving)

    @property
    def in_flight(self) -> int:
        """Tasks that workers have."""
        return sum(map(len, self.loads.values()))

    @property
    def busy(self) -> bool:
        return bool(self._heard)

    def start(self) -> None:
        """Ask for one more worker."""
        self.starting[self.fleet.start()] = None

    def is_elsewhere(self, worker: int, other: int) -> bool:
        """Whether a worker is another one than `other`, and in another place while any worker is in another place."""
        place = self._places[other]
        alone = self._crowds[place] == len(self.loads)
        return worker != other and (alone or self._places[worker] != place)

    def welcome(self, worker: int, place: str) -> None:
        """A worker that was starting is ready."""
        del self.starting[worker]
        self._places[worker] = place
        self._crowds[place] += 1
        self.loads[worker] = []
        self.idle[worker] = None

    def give(self, worker: int, task: Task, *, alone: bool) -> None:
        """A first task for an idle worker, which may get a second unless it is to run `alone`; or the second."""
        first = not self.loads[worker]
        self.idle.pop(worker, None)
        self.open.pop(worker, None)
        self.loads[worker].append(task)
        self.used.add(worker)
        if first:
            self._heard[worker] = self._clock()
            if not alone:
                self.open[worker] = None
        self.fleet.submit(worker, task)

    def finished(self, worker: int, task: Task) -> float:
        """Seconds since the worker's last sign of life, which is about how long the task took."""
        load = self.loads[worker]
        load.remove(task)
        now = self._clock()
        seconds = now - self._heard.pop(worker)
        if load:
            self._heard[worker] = now
        if worker not in self._leaving:
            (self.open if load else self.idle)[worker] = None
        elif not load:
            self.end(worker)
        return seconds

    def leave(self, worker: int) -> None:
        """No more tasks for this worker; it ends once it has none."""
        self.idle.pop(worker, None)
        self.open.pop(worker, None)
        self._leaving.add(worker)
        if not self.loads[worker]:
            self.end(worker)

    def end(self, worker: int) -> list[Task]:
        """End a worker; what it had in flight."""
        self.fleet.end(worker)
        return self.forget(worker)

    def forget(self, worker: int) -> list[Task]:
        """Strike off a worker that is gone; what it had in flight."""
        self.starting.pop(worker, None)
        self._heard.pop(worker, None)
        for workers in (self.idle, self.open):
            workers.pop(worker, None)
        self._leaving.discard(worker)
        if worker in self.loads:
            self._crowds[self._places[worker]] -= 1
        return self.loads.pop(worker, [])

    def longest_silent(self) -> tuple[int, float] | None:
        """The busy worker that has not been heard of for the longest, and for how many seconds."""
        if not self._heard:
            return None
        worker, heard = next(iter(self._heard.items()))
        return worker, self._clock() - heard
