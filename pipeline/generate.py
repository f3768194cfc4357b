"""`generate`: make a window exist. Resolve, plan, run what is missing, seal; else end quickly."""

import time
from collections.abc import Callable
from dataclasses import replace

from limbeck.pipeline.config import GenerateConfig
from limbeck.pipeline.job.amounts import say_amounts
from limbeck.pipeline.job.continuity import check_continues
from limbeck.pipeline.job.heartbeat import Pulse
from limbeck.pipeline.job.kept import Lapsed, check_held
from limbeck.pipeline.job.outcome import Outcome, What, names, tell
from limbeck.pipeline.job.prepare import Run, keep_recipe, prepare
from limbeck.pipeline.job.recheck import still_there, whole
from limbeck.pipeline.job.solving import adopt, aim_at, solve_missing
from limbeck.pipeline.job.targets import Place
from limbeck.pipeline.windows import Aim, Goal, Nothing, Plans, Policy, Wanted, grow, missing_tasks
from limbeck.pipeline.workers.signals import Stopped, stoppable
from limbeck.storage_schemas.commit import Task
from limbeck.storage_schemas.dataset import LostRace, Pruned, latest_manifest, read_shard_table, seal
from limbeck.storage_schemas.errors import UsageError, UserError, without_credentials
from limbeck.storage_schemas.job import JobState
from limbeck.storage_schemas.log import log
from limbeck.storage_schemas.manifest import Manifest, Window
from limbeck.storage_schemas.record import SPLITS
from limbeck.storage_schemas.shards import ShardTable

LAST_WORDS: dict[str, JobState] = {"sealed": "sealed", "nothing": "ended", "failed": "failed"}


def run_generate(config: GenerateConfig) -> int:
    """The exit code."""
    return report(config, lambda: bring_about(config, lambda parent, recipe_id: _grown(config, parent, recipe_id)))


def _grown(config: GenerateConfig, parent: Manifest | None, recipe_id: str) -> Wanted:
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
    """Plan on the latest manifest and seal the next one; a job that loses that race plans again from the new latest."""
    pulse = Pulse(run.store)
    last: JobState = "failed"
    try:
        outcome = _settle(run, aim, policy, pulse)
        last = "failed" if outcome.what == "nothing" and outcome.missing else LAST_WORDS[outcome.what]
        return outcome
    except (Stopped, KeyboardInterrupt):
        last = "stopped"
        raise
    finally:
        pulse.end(last)


def _settle(run: Run, aim: Aim, policy: Policy | None, pulse: Pulse) -> Outcome:
    plans = Plans(run.store)
    while True:
        parent = latest_manifest(run.store, run.config.dataset)
        plans.begin(parent)
        if parent and (parent.recipe_id == run.recipe.id or not (run.config.new_recipe or policy == "recipe")):
            check_continues(run.store, parent, run.recipe, run.layout, policy)
        wanted = aim(parent, run.recipe.id)
        try:
            return _act(run, parent, wanted, pulse)
        except LostRace as lost:
            why = f"another job sealed manifest {lost.winner.number} of {run.config.dataset}"
        except Pruned as gone:
            why = str(gone)
        except Lapsed as lapsed:
            why = str(lapsed)
        log.info(f"{why}: planning again")


def _act(run: Run, parent: Manifest | None, wanted: Wanted | Nothing, pulse: Pulse) -> Outcome:
    if isinstance(wanted, Nothing):
        return _nothing(run, parent, wanted.why)
    goal = Goal(run.config.dataset, parent, run.recipe.id, run.layout, wanted.window, wanted.ticks)
    if goal.reached and not run.config.recheck:
        keep_recipe(run)
        return _nothing(run, parent, "")
    return fulfil(run, goal, pulse)


def _nothing(run: Run, parent: Manifest | None, why: str) -> Outcome:
    return Outcome("nothing", run.config.dataset, why, before=parent, manifest=parent)


def fulfil(run: Run, goal: Goal, pulse: Pulse) -> Outcome:
    """Solve what the goal lacks and seal it; LostRace if another job sealed first."""
    listed = _listed(run, goal)
    needed = missing_tasks(goal, listed.tasks)
    if needed:
        aim_at(run, goal, needed, pulse)
    keep_recipe(run)
    adopt(run, needed)
    to_solve = [task for task in needed if task.name not in run.shards and task.name not in run.failures]
    if needed:
        pulse.say("running", found=len(needed) - len(to_solve))
    if to_solve:
        here = run.config.num_workers if run.config.runner == "local" else 0
        say_amounts(run.store, run.recipe, run.layout, to_solve, calls=True, here=min(here, len(to_solve)))
        run.tried |= {task.name for task in to_solve}
        solve_missing(run, to_solve)
    if needed:
        check_held(run.store, run.job, Place(run.recipe.id, run.layout.id), run.shards, run.early)
    return _sealed(run, goal, listed, needed, pulse)


def _listed(run: Run, goal: Goal) -> ShardTable:
    """What the parent lists and counts for the goal; a recheck counts what is still there and lacks no sample."""
    listed = read_shard_table(run.store, goal.parent) if goal.parent and goal.continues else ShardTable.of([])
    return whole(still_there(run.store, listed)) if run.config.recheck else listed


def _sealed(run: Run, goal: Goal, listed: ShardTable, needed: list[Task], pulse: Pulse) -> Outcome:
    missing = tuple(task.name for task in needed if task.name not in run.shards)
    done = Outcome(
        "sealed",
        goal.dataset,
        before=goal.parent,
        manifest=goal.parent,
        job=run.job if needed else None,
        needed=len(needed),
        run=sum(task.name in run.tried for task in needed),
        failed=tuple(run.failures),
        missing=missing,
    )
    if len(missing) > run.config.max_missing:
        return replace(done, what="failed", why=_lacking(run, missing))
    new = ShardTable.of([run.shards[task.name] for task in needed if task.name in run.shards])
    table = listed.plus(new)
    before = goal.parent if goal.continues else None
    same = before and (before.window, before.missing) == (goal.window, missing)
    if before and same and (not len(new) or table.table == read_shard_table(run.store, before).table):
        why = f"still missing {names(missing)}" if missing else "every listed shard is there"
        return replace(done, what="nothing", why=why)
    if too_many := _too_many_quarantined(run, goal, table):
        return replace(done, what="failed", why=too_many)
    if not needed:  # so that no prune takes the table away before the manifest names it
        aim_at(run, goal, needed, pulse)
    manifest = seal(run.store, goal.draft(run.job, missing), table)
    return replace(done, manifest=manifest, quarantined=_quarantined(new, goal.window))


def _lacking(run: Run, missing: tuple[str, ...]) -> str:
    first = run.failures.get(missing[0])
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
