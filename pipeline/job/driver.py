"""The life of a job, the same for `generate` and `convert`: plan, announce, adopt, make what is missing, check, seal.

The command says what is its own: which goal follows from the latest manifest, which tasks it needs, how they are made.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

from limbeck.pipeline.job.amounts import say_amounts
from limbeck.pipeline.job.heartbeat import Pulse
from limbeck.pipeline.job.kept import Lapsed, adoptable, check_held
from limbeck.pipeline.job.outcome import Outcome
from limbeck.pipeline.job.targets import Place, is_lost
from limbeck.pipeline.windows import Goal, Plans
from limbeck.pipeline.workers.signals import Stopped
from limbeck.storage_schemas import paths
from limbeck.storage_schemas.clock import SKEW, check_clock, utc
from limbeck.storage_schemas.commit import Commit, Task
from limbeck.storage_schemas.dataset import LostRace, Pruned, latest_manifest, put_recipe, seal
from limbeck.storage_schemas.errors import StoreError
from limbeck.storage_schemas.job import Failure, JobState
from limbeck.storage_schemas.log import log
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
        # Whose clock said so may be as far off as may be, and so may ours.
        if datetime.fromisoformat(end.committed_at) < datetime.fromisoformat(self.began) + 2 * SKEW:
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
        log.info(f"{why}: planning again")


def fulfil(plan: Plan, pulse: Pulse) -> None:
    """Have a shard of each needed task in the ledger, but for those that failed. Lapsed where a prune took some."""
    ledger, needed = plan.ledger, plan.needed
    if needed:
        _announce(plan, pulse)
    plan.keep()
    if not needed:
        return
    adopt(plan)
    todo = [task for task in needed if task.name not in ledger.shards and task.name not in ledger.failures]
    pulse.say("running", found=len(needed) - len(todo))
    if todo:
        say_amounts(plan.store, plan.recipe, plan.goal.layout, todo, runner=plan.runner, workers=plan.workers)
        ledger.tried |= {task.name for task in todo}
        plan.make(todo)
    check_held(plan.store, ledger.job, Place.of(plan.goal), ledger.shards, ledger.early)


def _announce(plan: Plan, pulse: Pulse) -> None:
    """Put the next job's document, and its first heartbeat: from then on no prune deletes what it aims at.

    What the job before it held goes on with it, unless a prune took that for dead. StoreError where the clock of this
    machine is not the storage's: what a job holds goes by time.
    """
    store, ledger, before, began = plan.store, plan.ledger, pulse.job, utc()
    name = f"{began:%Y%m%dT%H%M%S%f}-{paths.new_attempt()[:8]}"  # sorts by time
    job = plan.goal.job(name, missing=len(plan.needed), runner=plan.runner, workers=plan.workers)
    path = paths.job_path(name)
    put_recipe(store, plan.recipe)  # which a prune needs that would begin the dataset in place of this job
    store.write(path, job.to_bytes())
    try:
        check_clock(store, path, since=began)
    except StoreError:
        store.remove(path)
        raise
    ledger.job, ledger.began = name, job.started_at
    pulse.begin(name)
    if before and is_lost(store, before):
        ledger.shards.clear()


def adopt(plan: Plan) -> None:
    """Take what is committed already, by an earlier run that died or by a job beside this one."""
    ledger = plan.ledger
    tasks = {task.name: task for task in plan.needed if task.name not in ledger.shards}
    found = adoptable(plan.store, ledger.job, Place.of(plan.goal), list(tasks)) if tasks else {}
    for name, shard in found.items():
        if plan.takes(tasks[name], shard):
            ledger.shards[name] = shard
        else:
            ledger.again.add(name)


def seal_goal(plan: Plan, pulse: Pulse, table: ShardTable, missing: tuple[str, ...]) -> Manifest:
    """The sealed manifest, which shows the goal but for the missing tasks. LostRace if another job sealed first."""
    if not plan.needed:  # announced only now, so that no prune takes the table away before the manifest names it
        _announce(plan, pulse)
    return seal(plan.store, plan.goal.draft(plan.ledger.job, missing), table)
