"""What is to be done, as pure functions: the window that a job aims at, its tasks, and which of them are missing."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal

from limbeck.storage_schemas.clock import utc_now
from limbeck.storage_schemas.commit import Task
from limbeck.storage_schemas.errors import StoreError, UsageError
from limbeck.storage_schemas.job import Job
from limbeck.storage_schemas.layout import Layout
from limbeck.storage_schemas.manifest import Bounds, Manifest, ManifestDraft, Window
from limbeck.storage_schemas.record import SPLITS
from limbeck.storage_schemas.store import Store

Policy = Literal["grow", "refresh", "recipe"]


@dataclass(frozen=True)
class Nothing:
    """A run that leaves the dataset as it is, and why."""

    why: str


@dataclass(frozen=True)
class Wanted:
    """A window to bring about, and the ticks that it serves."""

    window: Window
    ticks: dict[str, str] = field(default_factory=dict)


Aim = Callable[[Manifest | None, str], Wanted | Nothing]
"""(latest manifest, recipe id) -> what to bring about; asked again after a lost race."""


class Plans:
    """The plans of one run. Another manifest each time is progress; plans from the same one again and again are not."""

    MOST = 8

    def __init__(self, store: Store) -> None:
        self._store, self._number, self._made = store, -1, 0

    def begin(self, latest: Manifest | None) -> None:
        """Count a plan from `latest`. StoreError where the store keeps showing what others have moved on from."""
        number = latest.number if latest else 0
        self._made = self._made + 1 if number == self._number else 1
        self._number = number
        if self._made > self.MOST:
            raise StoreError(
                f"planned {self.MOST} times from manifest {number}, the latest that {self._store.uri} shows: "
                "another job keeps it from being sealed, or the storage hides new files; wait, or use another storage"
            )


@dataclass(frozen=True)
class Goal:
    """What a dataset's next manifest should show: a window of one recipe in one layout, planned from `parent`."""

    dataset: str
    parent: Manifest | None
    recipe_id: str
    layout: Layout
    window: Window
    ticks: dict[str, str] = field(default_factory=dict)

    @property
    def continues(self) -> bool:
        """Whether what the parent lists is of the same recipe and layout, so that it counts."""
        return self.parent is not None and (self.parent.recipe_id, self.parent.layout) == (self.recipe_id, self.layout)

    @property
    def reached(self) -> bool:
        """Whether the parent shows all of it already, which needs no look at its shards."""
        shown = self.parent and (self.parent.window, self.parent.missing)
        return self.continues and shown == (self.window, ())

    def job(self, job: str, *, missing: int, runner: str, workers: int) -> Job:
        """What a job that is after this tells the store before it begins."""
        size = self.layout.samples_per_shard
        return Job(
            job=job,
            dataset=self.dataset,
            recipe_id=self.recipe_id,
            layout=self.layout,
            window=self.window,
            parent=self.parent.number if self.parent else 0,
            tasks_total=sum(len(self.window.task_range(split, size)) for split in SPLITS),
            tasks_missing=missing,
            runner=runner,
            workers=workers,
            started_at=utc_now(),
        )

    def draft(self, writer: str, missing: tuple[str, ...]) -> ManifestDraft:
        """The manifest that `writer` seals once all but `missing` is there."""
        return ManifestDraft(
            dataset=self.dataset,
            parent=self.parent,
            writer=writer,
            recipe_id=self.recipe_id,
            layout=self.layout,
            window=self.window,
            missing=missing,
            ticks=self.ticks,
        )


def grow(parent: Manifest | None, recipe_id: str, *, count: int, holdout: int) -> Window:
    """The parent's window, with stops later where it holds fewer than `count` and `holdout` samples.

    Exact as asked: tasks are whole shards, and readers mask what is past the stop. Starts never move back, stops never
    either. Another recipe begins a window of its own at 0.
    """
    if parent is None or parent.recipe_id != recipe_id:
        return Window(train=(0, count), holdout=(0, holdout))
    return Window(train=_at_least(parent.window.train, count), holdout=_at_least(parent.window.holdout, holdout))


def slide(window: Window, fraction: float) -> Window:
    """The same number of train ids, `fraction` of them new: the oldest are dropped. Holdout never slides."""
    start, stop = window.train
    fresh = max(1, round(fraction * (stop - start)))
    return Window(train=(start + fresh, stop + fresh), holdout=window.holdout)


def lengthen(window: Window, fresh: int) -> Window:
    """`fresh` more train ids at the end."""
    start, stop = window.train
    return Window(train=(start, stop + fresh), holdout=window.holdout)


def served_tick(parent: Manifest | None, policy: Policy, tick: str | None) -> Nothing | None:
    """Why a tick needs no work: the policy has served it or a later one. UsageError if the two can't be compared."""
    last = parent.ticks.get(policy) if parent else None
    if tick is None or last is None or parent is None:
        return None
    if _shape(tick) != _shape(last):
        raise UsageError(
            f"tick {tick} is not written like the last one, {last}: ticks are compared as text, keep one form"
        )
    return Nothing(f"tick {tick} is served: {policy} has served {last} by now") if tick <= last else None


def too_young(parent: Manifest | None, max_age: timedelta | None, now: datetime) -> Nothing | None:
    """Why a train window needs no work: it changed less than `max_age` ago."""
    if parent is None or max_age is None:
        return None
    changed = datetime.fromisoformat(parent.train_changed_at)
    young = now - changed < max_age
    return (
        Nothing(f"the train window changed at {parent.train_changed_at}, due at {_format_time(changed + max_age)}")
        if young
        else None
    )


def missing_tasks(goal: Goal, listed: Collection[str]) -> list[Task]:
    """Tasks of the goal's window that are not among the names that the parent lists, train first, ids ascending."""
    tasks = goal.window.tasks(goal.layout.samples_per_shard)
    return [task for task in tasks if task.name not in listed]


def _format_time(time: datetime) -> str:
    return time.isoformat(timespec="seconds")


def _shape(tick: str) -> str:
    """2026-11-22T03 -> 0000-00-00T00."""
    return re.sub(r"\d", "0", tick)


def _at_least(bounds: Bounds, count: int) -> Bounds:
    start, stop = bounds
    return start, max(stop, start + count)
