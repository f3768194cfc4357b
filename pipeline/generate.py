"""`generate`: make a window exist. Resolve, plan, run what is missing, seal; else end quickly."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from limbeck.pipeline.config import GenerateConfig
from limbeck.pipeline.job.continuity import check_continues
from limbeck.pipeline.job.driver import Plan, drive, fulfil, seal_goal
from limbeck.pipeline.job.heartbeat import Pulse
from limbeck.pipeline.job.outcome import Outcome, What, names, tell
from limbeck.pipeline.job.prepare import Run, keep_recipe, prepare
from limbeck.pipeline.job.recheck import still_there, whole
from limbeck.pipeline.job.solving import solve_missing
from limbeck.pipeline.windows import Aim, Goal, Nothing, Policy, Wanted, grow, missing_tasks
from limbeck.pipeline.workers.signals import Stopped, stoppable
from limbeck.storage_schemas.commit import Task, is_sick
from limbeck.storage_schemas.dataset import read_shard_table
from limbeck.storage_schemas.errors import UsageError, UserError, without_credentials
from limbeck.storage_schemas.manifest import Manifest, Window
from limbeck.storage_schemas.record import SPLITS
from limbeck.storage_schemas.shards import ShardTable


def run_generate(config: GenerateConfig) -> int:
    """The exit code."""
    return report(config, lambda: bring_about(config, partial(grown, config)))


def grown(config: GenerateConfig, parent: Manifest | None, recipe_id: str) -> Wanted:
    """A window of as many samples as configured, the parent's if it has more."""
    return Wanted(grow(parent, recipe_id, count=config.count, holdout=config.num_holdout))


def report(config: GenerateConfig, act: Callable[[], Outcome]) -> int:
    """The exit code of what `act` did, printed on stdout; what it raises is printed there too if that is to be JSON."""
    try:
        with stoppable():
            outcome = act()
    except (UserError, ValueError, OSError) as error:
        if config.as_json:
            why, tick = without_credentials(" ".join(str(error).split())), getattr(config, "tick", None)
            tell(Outcome(_what(error), config.dataset, why, tick=tick), "", as_json=True)
        raise
    tell(outcome, without_credentials(config.store), as_json=config.as_json)
    return outcome.exit_code


def _what(error: Exception) -> What:
    if isinstance(error, Stopped):
        return "stopped"
    return "refused" if isinstance(error, UsageError) else "failed"


def bring_about(config: GenerateConfig, aim: Aim, policy: Policy | None = None) -> Outcome:
    """`carry_out` as configured, with the time that also the preparation took."""
    started = time.monotonic()
    outcome = carry_out(prepare(config), aim, policy)
    return replace(outcome, seconds=time.monotonic() - started)


def carry_out(run: Run, aim: Aim, policy: Policy | None = None) -> Outcome:
    """Plan on the latest manifest, solve what is missing, and seal the next one."""
    dataset = run.config.dataset

    def act(parent: Manifest | None, pulse: Pulse) -> Outcome:
        if parent and (parent.recipe_id == run.recipe.id or not (run.config.new_recipe or policy == "recipe")):
            check_continues(run.store, parent, run.recipe, run.layout, policy)
        wanted, nothing = aim(parent, run.recipe.id), Outcome("nothing", dataset, before=parent, manifest=parent)
        if isinstance(wanted, Nothing):
            return replace(nothing, why=wanted.why)
        goal = Goal(dataset, parent, run.recipe.id, run.layout, wanted.window, wanted.ticks)
        if goal.reached and not run.config.recheck:
            keep_recipe(run)
            return nothing
        listed = _listed(run, goal)
        plan = plan_of(run, goal, missing_tasks(goal, listed.tasks))
        fulfil(plan, pulse)
        return _sealed(run, plan, listed, pulse)

    return drive(run.store, dataset, act)


def plan_of(run: Run, goal: Goal, needed: list[Task]) -> Plan:
    """The goal, its needed tasks solved by workers.

    Nobody takes what a sick worker committed; a recheck takes no task whose samples were quarantined. Both are solved
    again.
    """
    again, size = run.config.recheck, run.recipe.micro_batch
    return Plan(
        run.store,
        run.recipe,
        goal,
        needed,
        run.ledger,
        make=lambda tasks: solve_missing(run, tasks),
        runner=run.config.runner,
        workers=run.config.num_workers,
        takes=lambda task, shard: not (is_sick(task, shard.quarantined, size) or (again and shard.quarantined)),
        keep=lambda: keep_recipe(run),
    )


def _listed(run: Run, goal: Goal) -> ShardTable:
    """What the parent lists and counts for the goal; a recheck counts what is still there and lacks no sample."""
    listed = read_shard_table(run.store, goal.parent) if goal.parent and goal.continues else ShardTable.of([])
    return whole(still_there(run.store, listed)) if run.config.recheck else listed


def _sealed(run: Run, plan: Plan, listed: ShardTable, pulse: Pulse) -> Outcome:
    goal, needed, ledger = plan.goal, plan.needed, run.ledger
    missing = tuple(task.name for task in needed if task.name not in ledger.shards)
    done = Outcome(
        "sealed",
        goal.dataset,
        before=goal.parent,
        manifest=goal.parent,
        job=ledger.job if needed else None,
        needed=len(needed),
        run=sum(task.name in ledger.tried for task in needed),
        failed=tuple(ledger.failures),
        missing=missing,
    )
    if len(missing) > run.config.max_missing:
        return replace(done, what="failed", why=_lacking(run, missing))
    new = ShardTable.of([ledger.shards[task.name] for task in needed if task.name in ledger.shards])
    table = listed.plus(new)
    before = goal.parent if goal.continues else None
    same = before and (before.window, before.missing) == (goal.window, missing)
    if before and same and (not len(new) or table.table == read_shard_table(run.store, before).table):
        why = f"still missing {names(missing)}" if missing else "every listed shard is there"
        return replace(done, what="nothing", why=why)
    if too_many := _too_many_quarantined(run, goal, table):
        return replace(done, what="failed", why=too_many)
    manifest = seal_goal(plan, pulse, table, missing)
    return replace(done, manifest=manifest, quarantined=_quarantined(new, goal.window))


def _lacking(run: Run, missing: tuple[str, ...]) -> str:
    first = run.ledger.failures.get(missing[0])
    why = f" ({missing[0]}: {first.error})" if first else ""
    lacking = f"{len(missing)} tasks are missing, {run.config.max_missing} may be: {names(missing)}{why}"
    return f"{lacking}; generate again to retry, or raise --max-missing"


def _too_many_quarantined(run: Run, goal: Goal, table: ShardTable) -> str | None:
    """Why the window of a table that lacks more than --max-quarantined of its samples isn't sealed."""
    lost = _quarantined(table, goal.window)
    ids = sum(stop - start for start, stop in map(goal.window.bounds, SPLITS))
    if len(lost) <= run.config.max_quarantined * ids:
        return None
    return (
        f"{len(lost)} of {ids} samples are not finite, {run.config.max_quarantined:g} of them may be: {names(lost)}; "
        "generate --recheck to solve them again, or raise --max-quarantined"
    )


def _quarantined(table: ShardTable, window: Window) -> tuple[str, ...]:
    """Samples of the window that these shards lack because they were not finite: train 17, holdout 3, ..."""
    bounds = {split: range(*window.bounds(split)) for split in SPLITS}
    return tuple(f"{shard.split} {i}" for shard in table.lacking for i in shard.quarantined if i in bounds[shard.split])
