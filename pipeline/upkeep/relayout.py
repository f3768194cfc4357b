"""The shards of another layout from those of one: which tasks there are, and the rows of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from limbeck.pipeline.producer import WorkOrder, publish
from limbeck.pipeline.solve import Solved
from limbeck.storage_schemas.commit import Commit, Task
from limbeck.storage_schemas.dataset import Dataset
from limbeck.storage_schemas.errors import UsageError
from limbeck.storage_schemas.layout import Layout
from limbeck.storage_schemas.record import Columns
from limbeck.storage_schemas.shards import Shard

SUGGESTED = 8


def new_tasks(source: Dataset, layout: Layout) -> tuple[list[Task], tuple[str, ...]]:
    """The new layout's tasks of the window, and the names of those whose ids inside it are all missing now.

    Raises UsageError if a new shard would need ids, inside the window or past its ends, that no old shard holds beside
    ids that one does.
    """
    tasks, missing = [], []
    for task in source.manifest.window.tasks(layout.samples_per_shard):
        if not _unsolved(source, task):
            tasks.append(task)
        elif _all_missing(source, task):
            missing.append(task.name)
        else:
            raise _misfit(source, layout, task)
    return tasks, tuple(missing)


def _old_tasks(source: Dataset, task: Task, start: int, stop: int) -> list[Task]:
    size = source.layout.samples_per_shard
    return [Task(task.split, index, size) for index in range(start // size, -(-stop // size))]


def _unsolved(source: Dataset, task: Task) -> list[Task]:
    """Old tasks that hold ids of the new one, but have no shard."""
    return [old for old in _old_tasks(source, task, task.start, task.stop) if old.name not in source.table.tasks]


def _all_missing(source: Dataset, task: Task) -> bool:
    """Whether no id of the task that is inside the window has a shard."""
    start, stop = source.manifest.window.bounds(task.split)
    inside = _old_tasks(source, task, max(start, task.start), min(stop, task.stop))
    return all(old.name not in source.table.tasks for old in inside)


def _misfit(source: Dataset, layout: Layout, task: Task) -> UsageError:
    lost, held, micro = _unsolved(source, task)[0], source.layout.samples_per_shard, source.recipe.micro_batch
    fitting = [size for size in range(micro, held + 1, micro) if held % size == 0]
    return UsageError(
        f"{layout.samples_per_shard} samples per shard: {task.name} would need ids [{lost.start}, {lost.stop}), which "
        f"no shard of {source.manifest.dataset} holds; choose a divisor of {held}, such as "
        f"{', '.join(map(str, fitting[-SUGGESTED:]))}"
    )


def grouped(source: Dataset, tasks: Sequence[Task]) -> list[list[Task]]:
    """Tasks that begin in one old shard go together: it is then read once for all of them."""
    size = source.layout.samples_per_shard
    return [list(group) for _, group in groupby(tasks, key=lambda task: (task.split, task.start // size))]


@dataclass(frozen=True)
class _Part:
    """An old shard, read and checked."""

    commit: Commit
    columns: Columns

    def rows(self, task: Task) -> Columns:
        """Those of the task, in order."""
        low, high = np.searchsorted(self.columns["sample_id"], [task.start, task.stop])
        return {name: column[low:high] for name, column in self.columns.items()}

    def share(self, task: Task) -> float:
        """How much of this shard's ids are the task's."""
        mine = self.commit.task
        return (min(mine.stop, task.stop) - max(mine.start, task.start)) / mine.samples_per_shard


def convert_tasks(source: Dataset, layout: Layout, tasks: Sequence[Task]) -> list[Commit]:
    """Write and commit new shards one by one; in memory are one of them and the old ones that it is made of."""
    order, parts, commits = WorkOrder(source.store, source.recipe, layout, "cpu", 1), dict[str, _Part](), []
    for task in tasks:
        old = _old_shards(source, task)
        parts = {shard.task: parts.get(shard.task) or _read(source, shard) for shard in old}
        commits.append(_write(order, task, list(parts.values())))
    return commits


def _old_shards(source: Dataset, task: Task) -> list[Shard]:
    """The shards that hold the task's ids."""
    shards = source.shards(task.split)
    first, past = np.searchsorted(shards.stops, task.start, side="right"), np.searchsorted(shards.starts, task.stop)
    return [shards[place] for place in range(int(first), int(past))]


def _read(source: Dataset, shard: Shard) -> _Part:
    return _Part(source.commit(shard), source.read(shard))


def _write(order: WorkOrder, task: Task, parts: Sequence[_Part]) -> Commit:
    rows = [part.rows(task) for part in parts]
    columns = {field.name: np.concatenate([row[field.name] for row in rows]) for field in order.recipe.fields}
    lost = sorted(i for part in parts for i in part.commit.quarantined if task.start <= i < task.stop)
    return publish(
        order,
        task,
        Solved(columns, tuple(lost), max(part.commit.nfe for part in parts)),
        seconds=sum(part.commit.seconds * part.share(task) for part in parts),
        machine=_machines([part.commit.machine for part in parts]),
    )


def _machines(machines: Sequence[dict[str, str]]) -> dict[str, str]:
    """Where the samples were solved; values that differ stand side by side."""
    names = dict.fromkeys(name for machine in machines for name in machine)
    return {name: " / ".join(dict.fromkeys(machine.get(name, "") for machine in machines)) for name in names}
