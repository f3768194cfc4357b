"""What is to be done, as pure functions: the window that a job aims at, its tasks, and which of them are missing."""

from collections.abc import Collection
from dataclasses import dataclass

from storage_schemas.commit import Task
from storage_schemas.layout import Layout
from storage_schemas.manifest import Bounds, Manifest, Window


@dataclass(frozen=True)
class Goal:
    """What a dataset's next manifest should show: a window of one recipe in one layout, planned from `parent`."""

    dataset: str
    parent: Manifest | None
    recipe_id: str
    layout: Layout
    window: Window

    @property
    def continues(self) -> bool:
        """Whether what the parent lists is of the same recipe and layout, so that it counts."""
        return self.parent is not None and (self.parent.recipe_id, self.parent.layout) == (self.recipe_id, self.layout)

    @property
    def reached(self) -> bool:
        """Whether the parent shows all of it already, which needs no look at its shards."""
        shown = self.parent and (self.parent.window, self.parent.missing)
        return self.continues and shown == (self.window, ())


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


def missing_tasks(goal: Goal, listed: Collection[str]) -> list[Task]:
    """Tasks of the goal's window that are not among the names that the parent lists, train first, ids ascending."""
    tasks = goal.window.tasks(goal.layout.samples_per_shard)
    return [task for task in tasks if task.name not in listed]


def _at_least(bounds: Bounds, count: int) -> Bounds:
    start, stop = bounds
    return start, max(stop, start + count)
