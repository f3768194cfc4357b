"""`prune`: sweep what the last floor allows, then set the next one. Safe beside everything else, and why.

A floor is set by a manifest, so nobody misses it. It comes due after its grace; only then is anything deleted that was
ever sealed or committed, and only what is stale (committed before the floor was sealed) and not kept (keep.py): named
by no manifest from the floor on, no pin, and no job that was heard of within the grace. No other floor is set while one
is not yet due. A sweep reads the jobs first, then the manifests, then deletes.

- A driver that plans announces its job, and only then reads the floors and what it builds on. If it announced before
  the sweep read the jobs, its whole window is kept. If after, it sees that the floor is due (clocks may be 10 minutes
  apart) and builds on a stale commit only where a served manifest or an earlier, checked job names it, which the sweep
  has seen, too. Else it is refused in one line. It never waits for the deletions: what it solves itself is not stale.
- A driver that seals has its job on record with a heartbeat each minute. If it could say nothing for half an hour it
  looks up again what is there before it seals. Setting a floor is a manifest as any other: who planned on its parent
  loses the race and plans again. A number below the floor that was swept and is free again counts as a lost race.
- A table of shards belongs to one writer, so none that is being sealed is the table of a manifest that goes. A prune
  that sets a floor uses the table of its parent, which is served.
- A reader that pins its manifest keeps it. One that opens a manifest below the floor too late for its pin to be seen
  is told that it was pruned, wherever it meets the first gap.
- A zombie worker doesn't commit an attempt that began to upload 12 hours ago, and unnamed shard files younger than 24
  hours are left alone. A commit that comes late is as young as any.
- A second prune is refused while the first lives (lease.py): so no commit is deleted that took a deleted one's place.
  Should the storage carry a deletion out late, after its task was made again: a driver lists its commits right before
  it seals, and makes again what is gone.
- A prune that dies leaves commits without a manifest, or shards without a commit. The next one takes them.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from pipeline.config import PruneConfig, duration
from pipeline.upkeep.floors import find_spare, name_kept, set_floor
from pipeline.upkeep.keep import Kept, due, grace_of, latest_manifests, read_targets, spared
from pipeline.upkeep.lease import Lease
from pipeline.upkeep.sweep import Sweep, Swept, places, read_pins
from pipeline.workers.drain import stoppable
from storage_schemas import paths
from storage_schemas.commit import list_committed
from storage_schemas.store import Store

Clock = Callable[[], datetime]


@dataclass
class Pruning:
    """What a prune did. `due_at`: when the floor that is set now may be swept; `later`: files that this would free."""

    dry_run: bool
    swept: Swept
    later: Swept
    due_at: str | None = None
    floors: list[dict[str, Any]] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """One JSON object."""
        named = {"would_delete": self.swept.paths, "would_free": self.later.paths} if self.dry_run else {}
        return {
            "dry_run": self.dry_run,
            "deleted": dict(self.swept.files),
            "bytes": self.swept.bytes,
            "freed_later": dict(self.later.files),
            "floors": self.floors,
            "due_at": self.due_at,
            **named,
        }


def run_prune(config: PruneConfig) -> int:
    """The exit code."""
    grace = duration(config.grace)
    with stoppable():  # so that the lease ends, too
        done = prune(Store.open(config.store), keep=config.keep_manifests, grace=grace, dry_run=config.dry_run)
    print(json.dumps(done.plain()) if config.as_json else "\n".join(_lines(done)))
    return 0


def prune(
    store: Store, *, keep: int, grace: timedelta, dry_run: bool = False, clock: Clock = lambda: datetime.now(UTC)
) -> Pruning:
    """Sweep, then set floors where that would free something. A dry run only lists."""
    run = f"prune-{paths.new_attempt()}"
    done = Pruning(dry_run, Swept(dry_run), Swept(dry_run))
    with ExitStack() as stack:
        lease = None if dry_run else stack.enter_context(Lease(store, run, clock))
        guard = lease.check if lease else lambda: None
        sweep = _sweep(store, grace, clock(), dry_run, guard, done.swept)
        latest = latest_manifests(store)
        waits = [it.floor.sweep_at for it in latest if it.floor.sweep_at and not due([it.floor], clock())]
        if waits:
            done.due_at = max(waits)
            return done
        spare = find_spare(store, latest, read_pins(store, clock()), sweep.kept.targets, keep)
        for kind, freed in (("manifests", spare.manifests), ("commits", spare.commits)):
            for path in sorted({*freed} - {*done.swept.paths}):
                done.later.add(kind, path)
        for dataset, number in ({} if dry_run else spare.floors).items():
            guard()
            floored = set_floor(store, dataset, number, writer=run, grace=grace, clock=clock)
            done.due_at = floored.floor.sweep_at
            done.floors.append({"dataset": dataset, "manifest": floored.number, "floor": floored.floor.number})
    return done


def _sweep(
    store: Store, grace: timedelta, now: datetime, dry_run: bool, guard: Callable[[], None], swept: Swept
) -> Sweep:
    targets = read_targets(store)
    pins = read_pins(store, now)
    latest = latest_manifests(store)
    floors = [manifest.floor for manifest in latest]
    ready = all(due([floor], now) for floor in floors if floor.sweep_at)
    patience = max([grace, *map(grace_of, floors)])
    kept = Kept(name_kept(store, latest, pins, {}), spared(targets, now, patience))
    sweep = Sweep(store, kept, due(floors, now) if ready else None, now, patience, dry_run, guard, swept)
    for manifest in latest:
        sweep.manifests(manifest, {pin.number for pin in pins if pin.dataset == manifest.dataset})
        sweep.unfinished(paths.manifests_folder(manifest.dataset))
    for place in places(store):
        if sweep.since:
            sweep.commits(place)
        sweep.orphans(place)
        sweep.unfinished(paths.commits_folder(*place))
    sweep.jobs(targets)
    sweep.pins()
    if sweep.since:
        _weights(store, sweep)
    return sweep


def _weights(store: Store, sweep: Sweep) -> None:
    """Of recipes that nothing names and that have no commit left."""
    used = {place.recipe_id for place in places(store) if list_committed(store, *place)}
    for recipe_id in store.list(paths.RECIPES):
        if recipe_id not in used | sweep.kept.recipes:
            sweep.weights(recipe_id)


def _lines(done: Pruning) -> list[str]:
    """The same for people."""
    would = "would delete" if done.dry_run else "deleted"
    lines = [f"{would} {path}" for path in done.swept.paths]
    lines += [f"a new floor would free {path}" for path in done.later.paths]
    lines.append(f"{would} {_counted(done.swept)}, {done.swept.bytes} bytes")
    for floor in done.floors:
        lines.append(f"manifest {floor['manifest']} of {floor['dataset']} serves from {floor['floor']} on")
    if done.floors or (done.dry_run and done.later.files):
        lines.append(f"{'a new floor would free' if done.dry_run else 'to be freed'}: {_counted(done.later)}")
    if done.due_at:
        lines.append(f"the floor is due at {done.due_at}: prune again from then on")
    return lines


def _counted(swept: Swept) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(swept.files.items())) or "nothing"
