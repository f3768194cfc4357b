"""The work itself of `generate`: have tasks solved by workers, keep what fails."""

from collections.abc import Iterator
from contextlib import contextmanager

from limbeck.pipeline.config import GenerateConfig
from limbeck.pipeline.job.prepare import Run
from limbeck.pipeline.job.progress import Progress
from limbeck.pipeline.producer import WorkOrder
from limbeck.pipeline.workers.deadlines import Patience
from limbeck.pipeline.workers.dispatch import dispatch
from limbeck.pipeline.workers.fleet import Fleet
from limbeck.pipeline.workers.local import local_fleet
from limbeck.pipeline.workers.signals import Drain
from limbeck.storage_schemas import paths
from limbeck.storage_schemas.commit import Task
from limbeck.storage_schemas.job import Failure
from limbeck.storage_schemas.log import log


def solve_missing(run: Run, tasks: list[Task]) -> None:
    """Run the tasks; what fails for good is recorded in the store and in the ledger."""
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
            run.ledger.enter(outcome)
            if isinstance(outcome, Failure):
                run.store.put_if_absent(paths.failure_path(run.ledger.job, outcome.task), outcome.to_bytes())
    drain.raise_if_asked(f"{progress.tasks} of {len(tasks)} missing tasks are committed")


def _patience(config: GenerateConfig) -> Patience:
    if config.runner == "local":  # a process of this machine has no room to wait for
        return Patience(straggler_seconds=config.straggler_seconds)
    return Patience(config.ray.min_workers, config.ray.startup_timeout, config.straggler_seconds)


@contextmanager
def _fleet(run: Run, workers: int) -> Iterator[Fleet]:
    again = frozenset(run.ledger.again)
    order = WorkOrder(run.store, run.recipe, run.layout, run.config.device, run.config.threads, again)
    fleet = _ray_fleet(order, run.config, workers) if run.config.runner == "ray" else local_fleet(order, workers)
    try:
        yield fleet
    finally:
        fleet.close()


def _ray_fleet(order: WorkOrder, config: GenerateConfig, workers: int) -> Fleet:
    from limbeck.pipeline.workers.ray_runner import RayFleet  # only a job with something to do pays for Ray

    return RayFleet(order, config.ray, workers=workers)
