"""`generate` and `regenerate`: make a window exist. Resolve, plan, run what is missing, seal; else end quickly."""

import time
from collections.abc import Callable

from pipeline.config import GenerateConfig, RegenerateConfig
from pipeline.plan import Goal, grow, missing_tasks, slide
from pipeline.prepare import Run, prepare
from pipeline.work import adopt, solve_missing
from storage_schemas import paths
from storage_schemas.commit import utc_now
from storage_schemas.dataset import LostRace, latest_manifest, read_shard_table, seal
from storage_schemas.manifest import Manifest, ManifestDraft, Window
from storage_schemas.record import SPLITS
from storage_schemas.shards import ShardTable

DONE, FAILED, QUARANTINED = 0, 1, 3
"""Exit codes: all there; tasks missing and nothing sealed; all there but for samples that were not finite."""


Aim = Callable[[Manifest | None, str], Window]
"""(latest manifest, recipe id) -> the window to bring about; asked again after a lost race."""


def run_generate(config: GenerateConfig) -> int:
    """The exit code."""
    return bring_about(config, lambda parent, recipe_id: _grown(config, parent, recipe_id))


def run_regenerate(config: RegenerateConfig) -> int:
    """The exit code. A dataset that this recipe has not begun yet is generated, and slides from the next run on."""

    def aim(parent: Manifest | None, recipe_id: str) -> Window:
        window = _grown(config, parent, recipe_id)
        continues = parent is not None and parent.recipe_id == recipe_id
        return slide(window, config.refresh) if continues else window

    return bring_about(config, aim)


def _grown(config: GenerateConfig, parent: Manifest | None, recipe_id: str) -> Window:
    return grow(parent, recipe_id, count=config.count, holdout=config.holdout)


def bring_about(config: GenerateConfig, aim: Aim) -> int:
    """Plan on the latest manifest and seal the next one; who loses that race plans again from the new latest."""
    started = time.monotonic()
    run = prepare(config)
    while True:
        parent = latest_manifest(run.store, config.dataset)
        goal = Goal(config.dataset, parent, run.recipe.id, run.layout, aim(parent, run.recipe.id))
        if goal.reached:
            print(f"nothing to do: {_told(goal.parent)}, {time.monotonic() - started:.1f} s")
            return QUARANTINED if goal.parent and lacks_samples(goal.parent) else DONE
        try:
            return fulfil(run, goal, started=started)
        except LostRace as lost:
            print(f"another job sealed manifest {lost.winner.number} of {config.dataset}: planning again from it")


def fulfil(run: Run, goal: Goal, *, started: float) -> int:
    """Solve what the goal lacks and seal it; LostRace if another job sealed first."""
    run.job = new_job()
    listed = read_shard_table(run.store, goal.parent) if goal.parent and goal.continues else ShardTable.of([])
    needed = missing_tasks(goal, listed.tasks)
    adopt(run, needed)
    to_solve = [task for task in needed if task.name not in run.shards and task.name not in run.failures]
    if to_solve:
        solve_missing(run, goal, to_solve)
    missing = tuple(task.name for task in needed if task.name not in run.shards)
    if len(missing) > run.config.max_missing:
        return _refuse(run, missing)
    if goal.continues and goal.parent and (goal.parent.window, goal.parent.missing) == (goal.window, missing):
        print(f"nothing new: {_told(goal.parent)}, still missing {_names(missing)}, {time.monotonic() - started:.1f} s")
        return DONE
    new = ShardTable.of([run.shards[task.name] for task in needed if task.name in run.shards])
    manifest = seal(run.store, _draft(run, goal, missing), listed.plus(new))
    print(
        f"sealed {_told(manifest)}, {len(to_solve)} of {len(needed)} tasks run here, {time.monotonic() - started:.1f} s"
    )
    return _exit_code(manifest, new)


def _draft(run: Run, goal: Goal, missing: tuple[str, ...]) -> ManifestDraft:
    return ManifestDraft(
        dataset=goal.dataset,
        parent=goal.parent,
        writer=run.job,
        recipe_id=goal.recipe_id,
        layout=goal.layout,
        window=goal.window,
        missing=missing,
    )


def lacks_samples(manifest: Manifest) -> bool:
    """Whether a manifest without missing tasks shows fewer samples than its window has ids: some are quarantined."""
    bounds = [manifest.window.bounds(split) for split in SPLITS]
    return sum(manifest.rows.values()) < sum(stop - start for start, stop in bounds)


def _exit_code(manifest: Manifest, new: ShardTable) -> int:
    """Tells what is wanting, too."""
    if manifest.missing:
        print(f"missing, and named in the manifest: {_names(manifest.missing)}; generate again to retry")
    bad = _quarantined(new, manifest)
    if bad:
        print(f"quarantined, because they are not finite: {len(bad)} samples ({_names(bad)})")
    return QUARANTINED if bad else DONE


def _refuse(run: Run, missing: tuple[str, ...]) -> int:
    first = run.failures.get(missing[0])
    why = f" ({missing[0]}: {first.error})" if first else ""
    print(
        f"nothing sealed: {len(missing)} tasks are missing, {run.config.max_missing} may be: {_names(missing)}{why}; "
        f"see `python -m pipeline status {run.store.uri}`, generate again to retry, or raise --max-missing"
    )
    return FAILED


def _quarantined(new: ShardTable, manifest: Manifest) -> tuple[str, ...]:
    """Samples of the window that these shards lack because they were not finite: train 17, holdout 3, ..."""
    bounds = {split: range(*manifest.window.bounds(split)) for split in SPLITS}
    return tuple(f"{shard.split} {i}" for shard in new for i in shard.quarantined if i in bounds[shard.split])


def _told(manifest: Manifest | None) -> str:
    assert manifest is not None
    windows = ", ".join("{} [{}, {})".format(split, *manifest.window.bounds(split)) for split in SPLITS)
    return f"manifest {manifest.number} of {manifest.dataset}: {windows}, {sum(manifest.rows.values())} samples"


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def new_job() -> str:
    """An id that sorts by time: 20260131T093000-1f2e3d4c."""
    stamp = utc_now().replace("-", "").replace(":", "").partition("+")[0]
    return f"{stamp}-{paths.new_attempt()[:8]}"
