"""The work itself: adopt what is committed already, have the rest solved, keep what fails."""

from collections.abc import Iterator
from contextlib import contextmanager

from limbeck.pipeline.config import GenerateConfig
from limbeck.pipeline.job.announce import announce, is_early, new_job
from limbeck.pipeline.job.heartbeat import Pulse
from limbeck.pipeline.job.kept import adoptable
from limbeck.pipeline.job.prepare import Run
from limbeck.pipeline.job.progress import Progress
from limbeck.pipeline.job.targets import Place
from limbeck.pipeline.producer import WorkOrder
from limbeck.pipeline.windows import Goal
from limbeck.pipeline.workers.deadlines import Patience
from limbeck.pipeline.workers.dispatch import dispatch
from limbeck.pipeline.workers.fleet import Fleet
from limbeck.pipeline.workers.local import local_fleet
from limbeck.pipeline.workers.signals import Drain
from limbeck.storage_schemas import paths
from limbeck.storage_schemas.commit import Commit, Task, is_sick
from limbeck.storage_schemas.job import Failure
from limbeck.storage_schemas.log import log
from limbeck.storage_schemas.record import SPLITS
from limbeck.storage_schemas.shards import Shard


def aim_at(run: Run, goal: Goal, needed: list[Task], pulse: Pulse) -> None:
    """Announce the run's next job. What the job before it holds goes on with it, unless that was taken for dead."""
    total = sum(len(goal.window.task_range(split, goal.layout.samples_per_shard)) for split in SPLITS)
    runner, workers = run.config.runner, run.config.num_workers
    job = goal.job(new_job(), total=total, missing=len(needed), runner=runner, workers=workers)
    run.job, run.began = job.job, job.started_at
    if not announce(run.store, run.recipe, job, pulse):
        run.shards.clear()


def adopt(run: Run, needed: list[Task]) -> None:
    """Take what is committed already, by an earlier run that died or by a job beside this one.

    Nobody takes what a sick worker committed; a recheck takes no task whose samples were quarantined. Both are solved
    again.
    """
    tasks = {task.name: task for task in needed if task.name not in run.shards}
    if not tasks:
        return
    found = adoptable(run.store, run.job, Place(run.recipe.id, run.layout.id), list(tasks))
    for name, shard in found.items():
        sick = is_sick(tasks[name], shard.quarantined, run.recipe.micro_batch)
        if sick or (run.config.recheck and shard.quarantined):
            run.again.add(name)
        else:
            run.shards[name] = shard


def solve_missing(run: Run, tasks: list[Task]) -> None:
    """Run the tasks; what fails for good is recorded in the store and in `run.failures`."""
    config = run.config
    workers = min(config.num_workers, len(tasks))
    with Drain(config.drain_seconds) as drain, _fleet(run, workers) as fleet, Progress(len(tasks)) as progress:
        ends = dispatch(
            fleet,
            tasks,
            workers=workers,
            max_attempts=config.max_attempts,
            patience=_patience(config),
            drain=drain,
            tell=log.info,
        )
        for outcome in ends:
            progress.count(outcome)
            _record(run, outcome)
    drain.raise_if_asked(f"{progress.tasks} of {len(tasks)} missing tasks are committed")


def _patience(config: GenerateConfig) -> Patience:
    if config.runner == "local":  # a process of this machine has no room to wait for
        return Patience(straggler_seconds=config.straggler_seconds)
    return Patience(config.ray.min_workers, config.ray.startup_timeout, config.straggler_seconds)


def _record(run: Run, outcome: Commit | Failure) -> None:
    if isinstance(outcome, Commit):
        run.shards[outcome.task.name] = Shard.of(outcome)
        if is_early(outcome, run.began):
            run.early[outcome.task.name] = outcome.committed_at
    else:
        run.failures[outcome.task] = outcome
        run.store.put_if_absent(paths.failure_path(run.job, outcome.task), outcome.to_bytes())


@contextmanager
def _fleet(run: Run, workers: int) -> Iterator[Fleet]:
    again = frozenset(run.again)
    order = WorkOrder(run.store, run.recipe, run.layout, run.config.device, run.config.threads, again)
    fleet = _ray_fleet(order, run.config, workers) if run.config.runner == "ray" else local_fleet(order, workers)
    try:
        yield fleet
    finally:
        fleet.close()


def _ray_fleet(order: WorkOrder, config: GenerateConfig, workers: int) -> Fleet:
    from limbeck.pipeline.workers.ray_runner import RayFleet  # only a job with something to do pays for Ray

    return RayFleet(order, config.ray, workers=workers)
