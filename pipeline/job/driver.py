"""The life of a job, the same for `generate` and `convert`: plan, announce, adopt, make what is missing, check, seal.

The command says what is its own: which goal follows from the latest manifest, which tasks it needs, how they are made.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from limbeck.pipeline.job.amounts import say_amounts
from limbeck.pipeline.job.announce import announce, is_early, new_job
from limbeck.pipeline.job.heartbeat import Pulse
from limbeck.pipeline.job.kept import Lapsed, adoptable, check_held
from limbeck.pipeline.job.outcome import Outcome
from limbeck.pipeline.job.targets import Place
from limbeck.pipeline.windows import Goal, Plans
from limbeck.pipeline.workers.signals import Stopped
from limbeck.storage_schemas.commit import Commit, Task
from limbeck.storage_schemas.dataset import LostRace, Pruned, latest_manifest, seal
from limbeck.storage_schemas.errors import shown
from limbeck.storage_schemas.job import Failure, JobState
from limbeck.storage_schemas.manifest import Manifest
from limbeck.storage_schemas.recipe import Recipe
from limbeck.storage_schemas.shards import Shard, ShardTable
from limbeck.storage_schemas.store import Store

LAST_WORDS: dict[str, JobState] = {"sealed": "sealed", "nothing": "ended", "failed": "failed"}


@dataclass
class Ledger:
    """What a driver knows of its tasks, through all its plans.

    job, began: of its last plan. early: when those of `shards` were committed that may be older than that. again: tasks
    whose commits it doesn't take. tried: tasks that it had made. made: commits that came of it, repeated ones too.
    """

    job: str = ""
    began: str = ""
    shards: dict[str, Shard] = field(default_factory=dict)
    early: dict[str, str] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    again: set[str] = field(default_factory=set)
    tried: set[str] = field(default_factory=set)
    made: int = 0

    def enter(self, end: Commit | Failure) -> None:
        """Note how a task that was made has ended."""
        if isinstance(end, Failure):
            self.failures[end.task] = end
            return
        self.made += 1
        self.shards[end.task.name] = Shard.of(end)
        if is_early(end, self.began):
            self.early[end.task.name] = end.committed_at


@dataclass(frozen=True)
class Plan:
    """The tasks that a goal needs beside what its parent lists, and how they come about.

    make: commits tasks and enters them in the ledger; runner and workers say who does. takes: whether a shard that is
    committed already counts, else its task is made again. keep: puts into the store what belongs to the recipe.
    """

    store: Store
    recipe: Recipe
    goal: Goal
    needed: list[Task]
    ledger: Ledger
    make: Callable[[list[Task]], None]
    runner: str
    workers: int
    takes: Callable[[Task, Shard], bool] = lambda task, shard: True
    keep: Callable[[], None] = lambda: None

    @property
    def place(self) -> Place:
        """Where its shards lie."""
        return Place(self.recipe.id, self.goal.layout.id)


Act = Callable[[Manifest | None, Pulse], Outcome]
"""(the dataset's latest manifest, heartbeat) -> what came of it; called again where others have moved on meanwhile."""


def drive(store: Store, dataset: str, act: Act) -> Outcome:
    """What `act` made of the dataset's latest manifest; the last word of its job goes to the store."""
    pulse = Pulse(store)
    last: JobState = "failed"
    try:
        outcome = _settle(store, dataset, act, pulse)
        last = "failed" if outcome.what == "nothing" and outcome.missing else LAST_WORDS[outcome.what]
        return outcome
    except (Stopped, KeyboardInterrupt):
        last = "stopped"
        raise
    finally:
        pulse.end(last)


def _settle(store: Store, dataset: str, act: Act, pulse: Pulse) -> Outcome:
    plans = Plans(store)
    while True:
        latest = latest_manifest(store, dataset)
        plans.begin(latest)
        try:
            return act(latest, pulse)
        except LostRace as lost:
            why = f"another job sealed manifest {lost.winner.number} of {dataset}"
        except (Pruned, Lapsed) as gone:
            why = str(gone)
        print(shown(f"{why}: planning again"), file=sys.stderr, flush=True)


def fulfil(plan: Plan, pulse: Pulse) -> None:
    """Have a shard of each needed task in the ledger, but for those that failed. Lapsed where a prune took some."""
    if plan.needed:
        _aim(plan, pulse)
    plan.keep()
    if plan.needed:
        _gather(plan, pulse)


def _aim(plan: Plan, pulse: Pulse) -> None:
    """Announce the next job. What the job before it holds goes on with it, unless that was taken for dead."""
    job = plan.goal.job(new_job(), missing=len(plan.needed), runner=plan.runner, workers=plan.workers)
    plan.ledger.job, plan.ledger.began = job.job, job.started_at
    if not announce(plan.store, plan.recipe, job, pulse):
        plan.ledger.shards.clear()


def _gather(plan: Plan, pulse: Pulse) -> None:
    ledger = plan.ledger
    adopt(plan)
    todo = [task for task in plan.needed if task.name not in ledger.shards and task.name not in ledger.failures]
    pulse.say("running", found=len(plan.needed) - len(todo))
    if todo:
        say_amounts(plan.store, plan.recipe, plan.goal.layout, todo, runner=plan.runner, workers=plan.workers)
        ledger.tried |= {task.name for task in todo}
        plan.make(todo)
    check_held(plan.store, ledger.job, plan.place, ledger.shards, ledger.early)


def adopt(plan: Plan) -> None:
    """Take what is committed already, by an earlier run that died or by a job beside this one."""
    ledger = plan.ledger
    tasks = {task.name: task for task in plan.needed if task.name not in ledger.shards}
    found = adoptable(plan.store, ledger.job, plan.place, list(tasks)) if tasks else {}
    for name, shard in found.items():
        if plan.takes(tasks[name], shard):
            ledger.shards[name] = shard
        else:
            ledger.again.add(name)


def seal_goal(plan: Plan, pulse: Pulse, table: ShardTable, missing: tuple[str, ...]) -> Manifest:
    """The sealed manifest, which shows the goal but for the missing tasks. LostRace if another job sealed first."""
    if not plan.needed:  # announced only now, so that no prune takes the table away before the manifest names it
        _aim(plan, pulse)
    return seal(plan.store, plan.goal.draft(plan.ledger.job, missing), table)
