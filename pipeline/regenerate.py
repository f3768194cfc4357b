"""`regenerate`: move a dataset's window on by a policy, for schedules.

A run decides on the latest manifest, and decides again whenever another job seals first. So however runs overlap:

- a grow and a refresh at once both happen, in one order or the other: the second slides or lengthens what the first
  has sealed. What it has solved already and still needs is kept;
- a tick that is not later than the last that the policy served is served: nothing to do. Of runs of one tick at once,
  or of one that is tried again after a crash, exactly one seals; the others end with nothing to do;
- of all missed ticks at once, the last one seals, and so does each earlier one that comes to seal before any later:
  between one and all of them move the window, and then the last is on record. Ticks of other policies don't count;
- a run without a tick moves the window each time that it is called, also where it is a second try.

A dataset that no job has begun is generated, whatever the policy, and moves from the next run on.
"""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

from limbeck.pipeline.config import RegenerateConfig, duration
from limbeck.pipeline.generate import bring_about, report
from limbeck.pipeline.job.outcome import Outcome
from limbeck.pipeline.windows import Nothing, Wanted, grow, lengthen, served_tick, slide, too_young
from limbeck.storage_schemas.manifest import Manifest, Window


def run_regenerate(config: RegenerateConfig) -> int:
    """The exit code."""
    return report(config, lambda: regenerate(config))


def regenerate(config: RegenerateConfig, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> Outcome:
    """Decide by the policy, and bring it about."""
    outcome = bring_about(config, lambda parent, recipe_id: decide(config, parent, recipe_id, clock()), config.policy)
    return replace(outcome, tick=config.tick)


def decide(config: RegenerateConfig, parent: Manifest | None, recipe_id: str, now: datetime) -> Wanted | Nothing:
    """What the policy makes of the latest manifest. Under grow and refresh it holds this recipe."""
    if parent is not None and config.policy == "recipe" and parent.recipe_id == recipe_id:
        return Nothing("the recipe is the same")
    max_age = duration(config.max_age) if config.max_age else None
    nothing = served_tick(parent, config.policy, config.tick) or too_young(parent, max_age, now)
    ticks: dict[str, str] = {config.policy: config.tick} if config.tick else {}
    return nothing or Wanted(_window(config, parent, recipe_id), ticks)


def _window(config: RegenerateConfig, parent: Manifest | None, recipe_id: str) -> Window:
    window = grow(parent, recipe_id, count=config.count, holdout=config.num_holdout)
    if parent is None or config.policy == "recipe":
        return window
    return slide(window, config.refresh) if config.policy == "refresh" else lengthen(window, config.grow_by)
