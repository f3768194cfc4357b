"""Which manifests stay served, and setting the floor below them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from limbeck.pipeline.job.kept import Kept, floor_in_force, grace_of, name_commits, next_floor, served
from limbeck.pipeline.job.targets import Place, Target
from limbeck.pipeline.upkeep.sweep import places
from limbeck.pipeline.windows import Plans
from limbeck.storage_schemas import paths
from limbeck.storage_schemas.commit import list_committed, list_records
from limbeck.storage_schemas.dataset import LostRace, Pruned, latest_manifest, list_numbers, read_manifest, seal_floor
from limbeck.storage_schemas.job import Pin
from limbeck.storage_schemas.log import log
from limbeck.storage_schemas.manifest import Manifest
from limbeck.storage_schemas.store import Store


@dataclass(frozen=True)
class Spare:
    """What floors would free if they were set now: paths by kind, and the number for each dataset that needs one."""

    floors: Mapping[str, int]
    manifests: tuple[str, ...]
    commits: tuple[str, ...]


def floor_below(store: Store, latest: Manifest, keep: int) -> int:
    """The lowest number among the newest `keep` views. Manifests of one table, as a floor's and its parent, are one."""
    tables: set[str] = set()
    floor = latest.number
    for number in reversed(list_numbers(store, latest.dataset)):
        manifest = read_manifest(store, latest.dataset, number) if number >= latest.floor.number else None
        if manifest is None or len(tables | {manifest.shards.path}) > keep:
            break
        tables.add(manifest.shards.path)
        floor = number
    return floor


def find_spare(store: Store, latest: list[Manifest], pins: list[Pin], targets: tuple[Target, ...], keep: int) -> Spare:
    """Manifests below the newest `keep` views; commits that neither those nor pins and jobs name."""
    floors: dict[str, int] = {}
    manifests: list[str] = []
    for one in latest:
        pinned = {pin.number for pin in pins if pin.dataset == one.dataset}
        below = range(one.floor.number, floor_below(store, one, keep))
        spare = [number for number in list_numbers(store, one.dataset) if number in below and number not in pinned]
        manifests += [paths.manifest_path(one.dataset, number) for number in spare]
        floors |= {one.dataset: below.stop} if spare else {}
    kept = Kept(name_kept(store, latest, pins, {it.dataset: it.floor.number for it in latest} | floors), targets)
    commits = tuple(_unnamed(store, kept))
    if commits and not floors and latest:
        floors = {latest[0].dataset: latest[0].floor.number}  # as before: it only marks the time
    return Spare(floors, tuple(manifests), commits)


def _unnamed(store: Store, kept: Kept) -> Iterator[str]:
    for place in places(store):
        records = list_records(store, *place)
        bare = list_committed(store, *place) - {paths.task_of(record) for record in records}
        yield from sorted(paths.commit_path(*place, task) for task in bare if not kept.has(place, task))
        folder = paths.records_folder(*place)
        yield from (f"{folder}/{record}.json" for record in sorted(records) if not kept.has(place, record))


def name_kept(
    store: Store, latest: list[Manifest], pins: Iterable[Pin], floors: Mapping[str, int]
) -> dict[Place, set[str]]:
    """Commits that the datasets' manifests from these floors on list, and pinned ones."""
    named = name_commits(store, [one for it in latest for one in served(store, it, floors[it.dataset])])
    for pin in pins:
        manifest = read_manifest(store, pin.dataset, pin.number)
        try:
            more = name_commits(store, [manifest] if manifest else [])
        except Pruned:  # the pin came too late
            continue
        for place, commits in more.items():
            named.setdefault(place, set()).update(commits)
    return named


def as_observed(store: Store, manifest: Manifest) -> Manifest:
    """The manifest with its floor due no earlier than a grace after the storage has taken it.

    The job that set the floor may have slept between writing down the times and putting the manifest.
    """
    floor = manifest.floor
    path = paths.manifest_path(manifest.dataset, floor.set_by) if floor.set_by else None
    taken = store.modified(path) if path else None
    if taken is None or floor.sweep_at is None:
        return manifest
    sweep_at = max(datetime.fromisoformat(floor.sweep_at), taken + grace_of(floor)).isoformat(timespec="seconds")
    return manifest.model_copy(update={"floor": floor.model_copy(update={"sweep_at": sweep_at})})


def floors_in_force(latest: Iterable[Manifest], now: datetime) -> dict[str, int]:
    """The lowest number of each dataset that is served still."""
    return {manifest.dataset: floor_in_force(manifest.floor, now) for manifest in latest}


def set_floor(
    store: Store, dataset: str, number: int, *, writer: str, grace: timedelta, clock: Callable[[], datetime]
) -> Manifest:
    """The manifest that sets it: the content of the latest, whatever job sealed that meanwhile."""
    plans = Plans(store)
    while True:
        latest = latest_manifest(store, dataset)
        assert latest is not None  # the newest one is never deleted
        plans.begin(latest)
        floor = next_floor(latest, number, now=clock(), grace=grace)
        try:
            return seal_floor(store, latest, writer=writer, floor=floor)
        except LostRace as lost:
            log.info(f"another job sealed manifest {lost.winner.number} of {dataset}: setting the floor on it")
