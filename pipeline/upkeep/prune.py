"""`prune`: sweep what the last floor allows, then set the next one. Safe beside everything else, and why.

A floor is set by a manifest, so no job misses it. It comes due after its grace; only then is anything deleted that was
ever sealed or committed, and only what is stale (committed before the floor was sealed) and not kept (keep.py): named
by no manifest from the floor on, no pin, and no job that lives. Any program may sleep between any two of its steps,
for hours (a laptop that is shut, a paused VM), and go on as if nothing had been. So no step relies on the one before
it being recent. A sweep has six, in this order:

1. It takes the time, and checks it against the storage's clock, as each driver does when it announces its job.
2. It lists the jobs, and buries those that were silent for longer than the grace (targets.py): it seals a manifest of
   nothing new under the number that the job would seal, and then writes the job's mark.
3. It lists the jobs again, then the pins. What a job without a mark aims at is kept.
4. It reads the manifests. What those from the floor on list is kept, and so is what pinned ones list.
5. It lists commits and files, and reads each one that nothing keeps: doomed is what was stale at step 1.
6. It deletes what is doomed: manifests first, a commit before its shard. Right before each deletion it checks how long
   ago it last said that it lives (lease.py), and gives up where others may have taken it for dead.

However late a deletion of step 6 comes, nothing that is sealed names what it takes:

- No doomed name is ever used again. Records of commits, shards and tables bear their attempt or writer. A number of a
  manifest below the floor may be taken again by a driver that slept: that one sees the floor, and has lost the race.
  commits/<task>.json says only whose record others go on with: where it goes by mistake, the task is solved twice.
- A driver that announced its job before step 3 and had no mark is kept. One that had a mark can't seal: the number it
  wants was taken before step 3, or it was the driver that took it, and then step 4 has read what it sealed. It plans
  again as another job, and takes over what it held only from a job without a mark.
- A driver that announced later looks for commits after that, so the floor is due for it, too, or was when the one that
  it sees was set (clocks may be 10 minutes apart). It takes a stale commit only where a served manifest names it, or a
  job without a mark that has checked it before; step 4 or step 3 has seen those. Others it solves again.
- What workers give back that was committed before the job was announced goes through the same check before the seal.
- A worker that slept between upload and commit for 12 hours gives the shard up, before and after it commits. Files that
  no commit names are left alone for 24 hours. A commit whose shard is gone, or that came late, counts for nothing.
- A floor counts from when the storage took its manifest. Setting one is sealing a manifest as any other: jobs that
  planned on its parent lose the race and plan again. No other floor is set while one is not yet due.
- A table of shards that went while its writer slept is put again by the writer, right after it sealed.
- A reader that pins its manifest keeps it. One that opens a manifest below the floor too late for its pin to be seen
  raises Pruned, wherever it meets the first gap.
- A pin or a job that can't be read is named and left. While it is younger than the grace, and a day, nothing is
  deleted that was ever sealed or committed: what it holds isn't known.
- A prune that dies leaves commits without a manifest, or shards without a commit. The next one takes them.

Two prunes at once are safe, too; they are kept apart (lease.py) since one would do the other's work again. What a sleep
can still cost: a teacher's weights that a driver wants to keep just as a prune that slept deletes them (files of 24
hours of a recipe that nothing named). `generate --with-weights` puts them again.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from limbeck.pipeline.config import PruneConfig, duration
from limbeck.pipeline.job.kept import Kept, grace_of, is_due, latest_manifests, stale_since
from limbeck.pipeline.job.targets import Target, bury, holding, read_targets
from limbeck.pipeline.upkeep.floors import as_observed, find_spare, floors_in_force, name_kept, set_floor
from limbeck.pipeline.upkeep.lease import Lease
from limbeck.pipeline.upkeep.sweep import YOUNG, Sweep, Swept, places, read_pins
from limbeck.pipeline.workers.signals import stoppable
from limbeck.storage_schemas import paths
from limbeck.storage_schemas.clock import check_clock, utc
from limbeck.storage_schemas.commit import list_committed, list_records
from limbeck.storage_schemas.store import Store

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


def prune(store: Store, *, keep: int, grace: timedelta, dry_run: bool = False, clock: Clock | None = None) -> Pruning:
    """Sweep, then set floors where that would free something. A dry run only lists.

    clock: this machine's by default, which must agree with the storage's.
    """
    run, now = f"prune-{paths.new_attempt()}", clock or utc
    done = Pruning(dry_run, Swept(dry_run), Swept(dry_run))
    with ExitStack() as stack:
        began = now()
        lease = None if dry_run else stack.enter_context(Lease(store, run, now))
        if lease and clock is None:
            check_clock(store, lease.path, since=began)
        guard = lease.check if lease else lambda: None
        sweep = _sweep(store, run, grace, now(), dry_run, guard, done.swept)
        latest = [as_observed(store, manifest) for manifest in latest_manifests(store)]
        waits = [it.floor.sweep_at for it in latest if it.floor.sweep_at and not is_due(it.floor, now())]
        if waits:
            done.due_at = max(waits)
            return done
        spare = find_spare(store, latest, read_pins(store, now(), []), sweep.kept.targets, keep)
        for kind, freed in (("manifests", spare.manifests), ("commits", spare.commits)):
            for path in sorted({*freed} - {*done.swept.paths}):
                done.later.add(kind, path)
        for dataset, number in ({} if dry_run else spare.floors).items():
            guard()
            floored = set_floor(store, dataset, number, writer=run, grace=grace, clock=now)
            done.due_at = floored.floor.sweep_at
            done.floors.append({"dataset": dataset, "manifest": floored.number, "floor": floored.floor.number})
    return done


def _sweep(
    store: Store, run: str, grace: timedelta, now: datetime, dry_run: bool, guard: Callable[[], None], swept: Swept
) -> Sweep:
    unread = list[str]()
    patience = max([grace, *(grace_of(manifest.floor) for manifest in latest_manifests(store))])
    targets = _buried(store, run, now, patience, unread, dry_run=dry_run)
    pins = read_pins(store, now, unread)
    latest = [as_observed(store, manifest) for manifest in latest_manifests(store)]
    floors = floors_in_force(latest, now)
    since = stale_since([manifest.floor for manifest in latest], now)
    if _are_young(store, unread, now, patience):
        floors, since = dict.fromkeys(floors, 1), None
    kept = Kept(name_kept(store, latest, pins, floors), holding(targets))
    sweep = Sweep(store, kept, since, now, patience, dry_run, guard, swept)
    for manifest in latest:
        pinned = {pin.number for pin in pins if pin.dataset == manifest.dataset}
        sweep.manifests(manifest, pinned, floors[manifest.dataset])
        sweep.unfinished(paths.manifests_folder(manifest.dataset))
    for place in places(store):
        if since:
            sweep.commits(place)
        sweep.orphans(place)
        sweep.unfinished(paths.commits_folder(*place))
        sweep.unfinished(paths.records_folder(*place))
    sweep.jobs(targets)
    sweep.pins()
    if since:
        _weights(store, sweep)
    return sweep


def _buried(
    store: Store, run: str, now: datetime, patience: timedelta, unread: list[str], *, dry_run: bool
) -> list[Target]:
    """The jobs, once silent ones are buried. A dry run only takes them for dead."""
    if not dry_run:
        bury(store, read_targets(store), run=run, now=now, patience=patience)
        return read_targets(store, unread)
    targets = read_targets(store, unread)
    return [replace(target, is_dead=target.is_dead or target.is_silent(now, patience)) for target in targets]


def _are_young(store: Store, unread: list[str], now: datetime, patience: timedelta) -> bool:
    """Whether one of these was written so lately that its writer may live."""
    times = (store.modified(path) for path in unread)
    return any(now - time <= max(patience, YOUNG) for time in times if time)


def _weights(store: Store, sweep: Sweep) -> None:
    """Sweep the teachers' weights of recipes that nothing names and that have no commit left."""
    used = {it.recipe_id for it in places(store) if list_committed(store, *it) or list_records(store, *it)}
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
