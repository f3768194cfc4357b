"""Seal and open datasets: manifests go parent + 1, and latest is what a listing past every cache shows."""

import hashlib
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from limbeck.storage_schemas import formats, paths
from limbeck.storage_schemas.claims import check_commit
from limbeck.storage_schemas.clock import utc_now
from limbeck.storage_schemas.commit import Commit
from limbeck.storage_schemas.errors import CorruptShard, StoreError
from limbeck.storage_schemas.ids import IdSet, id_set
from limbeck.storage_schemas.layout import Layout
from limbeck.storage_schemas.manifest import Floor, Manifest, ManifestDraft, ShardTableRecord, Window, content_digest
from limbeck.storage_schemas.recipe import Recipe
from limbeck.storage_schemas.record import SPLITS, Columns, Split
from limbeck.storage_schemas.shards import Shard, ShardTable
from limbeck.storage_schemas.store import Store
from limbeck.storage_schemas.tables import MOST_TABLE, read_table

LOOKS = 8
"""Times that the latest manifest is looked for again, where it was listed and then pruned before it was read."""

_MANIFEST = re.compile(r"([0-9]{6}|[1-9][0-9]{6,17})\.json")
_BATCH = 4096
"""Commits that are in memory at a time."""


class LostRace(StoreError):
    """Another writer sealed the next manifest first: plan again from `winner`."""

    def __init__(self, winner: Manifest) -> None:
        self.winner = winner
        super().__init__(f"manifest {winner.number} of {winner.dataset} is another writer's: plan again from it")


class Pruned(StoreError):
    """A manifest below its dataset's floor: what it names may be gone."""


def list_numbers(store: Store, dataset: str) -> list[int]:
    """Numbers of the manifests that are there, ascending."""
    names = map(_MANIFEST.fullmatch, store.list(paths.manifests_folder(dataset)))
    return sorted(int(match[1]) for match in names if match)


def latest_number(store: Store, dataset: str) -> int:
    """The highest manifest number, 0 for a dataset that has none."""
    return max(list_numbers(store, dataset), default=0)


def read_manifest(store: Store, dataset: str, number: int) -> Manifest | None:
    """Manifest `number`, None if it is not there."""
    path = paths.manifest_path(dataset, number)
    data = store.read(path)
    return None if data is None else Manifest.from_bytes(data, f"{store.uri}/{path}")


def latest_manifest(store: Store, dataset: str) -> Manifest | None:
    """The newest sealed view, None for a dataset that has none."""
    for _ in range(LOOKS):
        number = latest_number(store, dataset)
        manifest = read_manifest(store, dataset, number) if number else None
        if manifest or not number:
            return manifest
    # Never None here: a driver would take that for a dataset that nobody has begun.
    raise StoreError(f"{store.uri}/{paths.manifest_path(dataset, number)} is listed but can't be read: restore it")


def pruned(store: Store, dataset: str, number: int) -> Pruned | None:
    """What to raise where a file of manifest `number` is missing, if that is because it was pruned."""
    latest = latest_manifest(store, dataset)
    if latest is None or number >= latest.floor.number:
        return None
    problem = f"manifest {number} of {dataset!r} in {store.uri} was pruned (floor {latest.floor.number})"
    return Pruned(f"{problem}: open the latest, {latest.number}")


def read_shard_table(store: Store, manifest: Manifest) -> ShardTable:
    """The manifest's shards, checked against their sha256."""
    data = store.read(manifest.shards.path, most=MOST_TABLE)
    if data is None:
        lost = f"{store.uri}/{manifest.shards.path} is missing, the shards of manifest {manifest.number}: restore it"
        raise pruned(store, manifest.dataset, manifest.number) or StoreError(lost)
    if hashlib.sha256(data).hexdigest() != manifest.shards.sha256:
        raise CorruptShard(
            f"{store.uri}/{manifest.shards.path} is not what manifest {manifest.number} names: restore it"
        )
    return read_table(data, manifest, f"{store.uri}/{manifest.shards.path}")


def seal(store: Store, draft: ManifestDraft, shards: ShardTable) -> Manifest:
    """The sealed manifest parent + 1. Shards outside the window are left out. LostRace if another writer was first."""
    inside = [shards.inside(split, *draft.window.bounds(split)) for split in SPLITS]
    kept = _attested(store, inside[0].plus(inside[1]))
    ids = {split: _ids(kept, draft.window, split) for split in SPLITS}
    _check_missing(draft, kept)
    table = kept.to_bytes(writer=draft.writer)
    sha256 = hashlib.sha256(table).hexdigest()
    record = ShardTableRecord(path=paths.shard_table_path(draft.dataset, sha256), sha256=sha256, count=len(kept))
    store.put_if_absent(record.path, table)
    parent, now = draft.parent, utc_now()
    manifest = Manifest(
        **draft.model_dump(exclude={"parent", "ticks"}),
        number=draft.number,
        parent_digest=parent.digest if parent else None,
        rows={split: ids[split].count for split in SPLITS},
        shards=record,
        content_digest=content_digest(draft.recipe_id, draft.window, {split: ids[split].gaps for split in SPLITS}),
        floor=parent.floor if parent else Floor(),
        ticks=(parent.ticks if parent else {}) | draft.ticks,
        train_changed_at=parent.train_changed_at if parent and draft.keeps_train else now,
        sealed_at=now,
    )
    sealed = _put(store, manifest)
    if not store.exists(record.path):  # a prune took it for one that nothing will name, while this program slept
        store.put_if_absent(record.path, table)
    return sealed


def seal_nothing(store: Store, latest: Manifest | None, draft: ManifestDraft) -> Manifest:
    """The next manifest with the same content, empty for a dataset that has none: it takes the number of `draft`.

    Any job that planned on `latest` loses the race to seal, however long after. LostRace as for `seal`.
    """
    if latest is None:
        return seal(store, draft.model_copy(update={"window": Window(), "missing": (), "ticks": {}}), ShardTable.of([]))
    return seal_floor(store, latest, writer=draft.writer, floor=latest.floor)


def _attested(store: Store, shards: ShardTable) -> ShardTable:
    """The shards, with the digests of those commits that an older release listed without and that are as listed."""
    bare, found = shards.unattested, list[Shard]()
    for first in range(0, len(bare), _BATCH):
        batch = bare[first : first + _BATCH]
        for shard, data in zip(batch, store.read_many([shard.commit_path for shard in batch]), strict=True):
            with suppress(StoreError):  # a commit that can't be read is for `verify` to name
                commit = Commit.from_bytes(data, shard.commit_path) if data else None
                if commit and shard.lists(commit):
                    found.append(replace(shard, commit_sha256=commit.digest))
    return ShardTable.of(found).plus(shards) if found else shards


def seal_floor(store: Store, parent: Manifest, *, writer: str, floor: Floor) -> Manifest:
    """The next manifest with the same content, by the same table, and another floor. LostRace as for `seal`."""
    changes = {"number": parent.number + 1, "parent_digest": parent.digest, "writer": writer, "floor": floor}
    return _put(store, parent.model_copy(update={**changes, "sealed_at": utc_now()}))


def _put(store: Store, manifest: Manifest) -> Manifest:
    path = paths.manifest_path(manifest.dataset, manifest.number)
    ours = manifest.to_bytes()
    there = store.put_if_absent(path, ours)
    if there != ours:
        raise LostRace(Manifest.from_bytes(there, f"{store.uri}/{path}"))
    latest = latest_manifest(store, manifest.dataset)
    # A number that was sealed, followed by others and pruned is free again: a job that slept that long has lost, too.
    if latest is not None and latest.floor.number > manifest.number:
        raise LostRace(latest)
    return manifest


def _check_missing(draft: ManifestDraft, kept: ShardTable) -> None:
    """A manifest that doesn't name its own gaps is our bug: nothing is sealed."""
    names = {task.name for task in draft.window.tasks(draft.layout.samples_per_shard)}
    if names - kept.tasks != set(draft.missing) or kept.tasks - names:
        raise ValueError(
            f"the window lacks {sorted(names - kept.tasks)[:3]}..., "
            f"the draft declares {sorted(draft.missing)[:3]}... missing"
        )


def _ids(shards: ShardTable, window: Window, split: Split) -> IdSet:
    start, stop = window.bounds(split)
    return id_set(start, stop, shards.of_split(split).gaps(start, stop))


def put_recipe(store: Store, recipe: Recipe) -> None:
    """Writes the recipe once; what is there already must be the same recipe."""
    path = paths.recipe_path(recipe.id)
    Recipe.from_bytes(store.put_if_absent(path, recipe.to_bytes()), f"{store.uri}/{path}")


def read_recipe(store: Store, recipe_id: str) -> Recipe:
    """The recipe of an id, checked against it."""
    path = paths.recipe_path(recipe_id)
    data = store.read(path)
    if data is None:
        raise StoreError(f"{store.uri}/{path} is missing: the store is incomplete, copy it again")
    return Recipe.from_bytes(data, f"{store.uri}/{path}")


@dataclass(frozen=True, eq=False)
class Dataset:
    """One manifest, open for reading."""

    store: Store
    manifest: Manifest
    recipe: Recipe
    table: ShardTable

    @property
    def layout(self) -> Layout:
        """The layout of its shards."""
        return self.manifest.layout

    @cached_property
    def _splits(self) -> dict[Split, tuple[ShardTable, IdSet]]:
        return {split: (self.table.of_split(split), _ids(self.table, self.manifest.window, split)) for split in SPLITS}

    def shards(self, split: Split) -> ShardTable:
        """The split's shards in order of their ids."""
        return self._splits[split][0]

    def ids(self, split: Split) -> IdSet:
        """Which ids exist: the window without its gaps."""
        return self._splits[split][1]

    def gaps(self, split: Split) -> np.ndarray:
        """Id ranges inside the window that have no row, int64 [k, 2]."""
        return self.ids(split).gaps

    def rows_inside(self, shard: Shard) -> slice:
        """The shard's rows that are inside the window; ids ascend, so they are one run."""
        start, stop = self.manifest.window.bounds(shard.split)
        low, high = np.searchsorted(shard.ids, [start, stop])
        return slice(int(low), int(high))

    def commit(self, shard: Shard) -> Commit:
        """The shard's commit, checked against the manifest: else CorruptShard, or Pruned where that is why."""
        mine = paths.listed_paths(self.recipe.id, self.layout.id, shard.task, shard.path)
        if shard.commit_path not in mine or any(map(paths.is_outside, (*mine, shard.path))):
            problem = f"{self.store.uri}/{self.manifest.shards.path} places {shard.task!r} where no shard of its is"
            raise CorruptShard(f"{problem}: restore it")
        data = self.store.read(shard.commit_path)
        if data is None:
            lost = f"{self.store.uri}/{shard.commit_path} is missing: `generate --recheck` makes {shard.task} again"
            raise self._pruned() or CorruptShard(lost)
        try:
            commit = Commit.from_bytes(data, f"{self.store.uri}/{shard.commit_path}")
        except StoreError as error:
            raise CorruptShard(str(error)) from None
        check_commit(shard, commit, self.recipe, self.layout, name=f"{self.store.uri}/{shard.commit_path}")
        return commit

    def read(self, shard: Shard, columns: Sequence[str] | None = None, *, verify: bool = True) -> Columns:
        """Every row of a shard, also those outside the window (see `rows_inside`); all columns by default."""
        commit = self.commit(shard)
        try:
            return formats.read_shard(self.store, commit, self.recipe, columns, verify=verify)
        except CorruptShard as error:
            raise self.explained(shard, error) from None

    def explained(self, shard: Shard, error: CorruptShard) -> CorruptShard | Pruned:
        """What to raise for a shard that can't be read: Pruned where its file is gone with its manifest."""
        gone = not paths.is_outside(shard.path) and not self.store.exists(shard.path)
        return (self._pruned() if gone else None) or error

    def _pruned(self) -> Pruned | None:
        return pruned(self.store, self.manifest.dataset, self.manifest.number)


def open_dataset(store: Store, name: str = "main", number: int | None = None) -> Dataset:
    """The latest manifest of a dataset, or the one with `number`; refused unless its figures follow from its table."""
    dataset = find_dataset(store, name, number)
    for problem in wrong_figures(dataset):
        path = f"{store.uri}/{paths.manifest_path(name, dataset.manifest.number)}"
        raise StoreError(f"{path} {problem}: restore it, or the table of shards that it names")
    return dataset


def wrong_figures(dataset: Dataset) -> list[str]:
    """What a manifest says of all its samples that does not follow from its table of shards."""
    manifest, gaps = dataset.manifest, {split: dataset.gaps(split) for split in SPLITS}
    rows = {split: dataset.ids(split).count for split in SPLITS}
    claims = {
        "counts other rows than its shards have": any(manifest.rows.get(split) != rows[split] for split in SPLITS),
        "has another content than its digest": manifest.content_digest
        != content_digest(manifest.recipe_id, manifest.window, gaps),
    }
    return [claim for claim, wrong in claims.items() if wrong]


def find_dataset(store: Store, name: str = "main", number: int | None = None) -> Dataset:
    """The same without any check of its figures, for those who ask what is wrong with it."""
    manifest = latest_manifest(store, name) if number is None else read_manifest(store, name, number)
    if manifest is None:
        raise _no_manifest(store, name, number)
    return Dataset(store, manifest, read_recipe(store, manifest.recipe_id), read_shard_table(store, manifest))


def _no_manifest(store: Store, name: str, number: int | None) -> StoreError:
    latest = latest_number(store, name)
    if not latest:
        return StoreError(f"{store.uri} has no sealed dataset {name!r}: run `limbeck generate` to its end")
    gone = pruned(store, name, number) if number is not None else None
    return gone or StoreError(f"{store.uri} has no manifest {number} of {name!r}: the latest is {latest}")
