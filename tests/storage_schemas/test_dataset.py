import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from limbeck.storage_schemas import paths
from limbeck.storage_schemas.commit import Commit, Task, list_committed, put_commit, read_commits
from limbeck.storage_schemas.dataset import (
    Dataset,
    LostRace,
    Pruned,
    latest_manifest,
    open_dataset,
    put_recipe,
    read_manifest,
    read_recipe,
    read_shard_table,
    seal,
    seal_floor,
)
from limbeck.storage_schemas.errors import CorruptShard, StoreError
from limbeck.storage_schemas.layout import Layout
from limbeck.storage_schemas.manifest import Floor, Manifest, ManifestDraft, Window
from limbeck.storage_schemas.recipe import Recipe
from limbeck.storage_schemas.record import Columns
from limbeck.storage_schemas.shards import Shard, ShardTable
from limbeck.storage_schemas.store import Store
from limbeck.storage_schemas.tables import decode

LAYOUT = Layout(samples_per_shard=16)
WINDOW = Window(train=(5, 60), holdout=(0, 16))
Committer = Callable[..., Commit]


def draft(recipe: Recipe, parent: Manifest | None = None, **changes: object) -> ManifestDraft:
    base = {"dataset": "main", "writer": paths.new_attempt(), "recipe_id": recipe.id, "layout": LAYOUT}
    return ManifestDraft.model_validate({"window": WINDOW, **base, "parent": parent, **changes})


@pytest.fixture
def shards(store: Store, recipe: Recipe, commit_task: Committer, tmp_path: Path) -> ShardTable:
    """Train tasks 0, 1, 3 (id 20 quarantined) and one holdout task, committed."""
    put_recipe(store, recipe)
    tasks = [(Task("train", 0, 16), ()), (Task("train", 1, 16), (20,)), (Task("train", 3, 16), ())]
    commits = [commit_task(store, recipe, LAYOUT, task, tmp_path, lost) for task, lost in tasks]
    commits.append(commit_task(store, recipe, LAYOUT, Task("holdout", 0, 16), tmp_path))
    return ShardTable.of([Shard.of(commit) for commit in commits])


def test_windows_name_their_tasks() -> None:
    assert [task.name[-1] for task in WINDOW.tasks(16)] == ["0", "1", "2", "3", "0"]
    assert list(Window(train=(16, 32)).tasks(16)) == [Task("train", 1, 16)]
    assert list(Window(train=(20, 20)).tasks(16)) == []
    for bounds, told in (((-1, 5), "greater than or equal to 0"), ((5, 4), "0 <= start <= stop")):
        with pytest.raises(ValidationError, match=told):
            Window(train=bounds)


def test_the_first_commit_wins(store: Store, recipe: Recipe, commit_task: Committer, tmp_path: Path) -> None:
    task = Task("train", 0, 16)
    first = commit_task(store, recipe, LAYOUT, task, tmp_path)
    second = commit_task(store, recipe, LAYOUT, task, tmp_path)
    assert second == first
    assert len(store.list(paths.shards_folder(recipe.id, LAYOUT.id))) == 2
    assert put_commit(store, first.model_copy(update={"attempt": "f" * 16})) == first
    assert list_committed(store, recipe.id, LAYOUT.id) == {task.name}
    assert read_commits(store, recipe.id, LAYOUT.id, ["train-00000001", task.name]) == {task.name: first}
    with pytest.raises(ValidationError, match="is no path in a store"):
        Commit.model_validate({**first.plain(), "path": "../elsewhere"})


def test_a_sealed_dataset_shows_its_window_and_its_gaps(
    store: Store, recipe: Recipe, shards: ShardTable, make_columns: Callable[..., Columns]
) -> None:
    manifest = seal(store, draft(recipe, missing=("train-00000002",)), shards)
    # train 5..59 is 55 ids, less task 2 (32..47) and the quarantined 20
    assert manifest.number == 1
    assert manifest.rows == {"train": 38, "holdout": 16}
    assert manifest.shards.count == 4
    dataset = open_dataset(store)
    assert dataset.manifest == manifest == read_manifest(store, "main", 1)
    assert dataset.layout == LAYOUT
    assert dataset.recipe.id == recipe.id
    assert dataset.gaps("train").tolist() == [[20, 21], [32, 48]]
    expected = [n for n in range(5, 60) if n != 20 and not 32 <= n < 48]
    ids = dataset.ids("train")
    assert ids.at(np.arange(ids.count)).tolist() == expected
    seen: list[int] = []
    for shard in dataset.shards("train"):
        columns = dataset.read(shard, ["sample_id", "noise"])
        inside = dataset.rows_inside(shard)
        seen += columns["sample_id"][inside].tolist()
        rows = make_columns(recipe, Task.parse(shard.task, 16), shard.quarantined)
        np.testing.assert_array_equal(columns["noise"], rows["noise"])
    assert seen == expected


def test_the_content_digest_knows_samples_not_files(store: Store, recipe: Recipe, shards: ShardTable) -> None:
    one = seal(store, draft(recipe, missing=("train-00000002",)), shards)
    other = seal(store, draft(recipe, dataset="copy", missing=("train-00000002",)), shards)
    assert one.content_digest == other.content_digest
    assert one.digest != other.digest
    smaller = Window(train=(5, 59), holdout=(0, 16))
    third = seal(store, draft(recipe, one, window=smaller, missing=("train-00000002",)), shards)
    assert third.content_digest != one.content_digest


def test_gaps_are_ids_whatever_made_them(
    store: Store, recipe: Recipe, shards: ShardTable, commit_task: Committer, tmp_path: Path
) -> None:
    """A missing task of 16 is the same content as two tasks of 8 of which one lost all rows and one is missing."""
    missing = seal(store, draft(recipe, missing=("train-00000002",)), shards)
    layout = Layout(samples_per_shard=8)
    lost = {2: (20,), 4: tuple(range(32, 40))}
    tasks = [task for task in WINDOW.tasks(8) if task.name != "train-00000005"]
    commits = [
        commit_task(store, recipe, layout, task, tmp_path, lost.get(task.index, ()) if task.split == "train" else ())
        for task in tasks
    ]
    other = seal(
        store,
        draft(recipe, dataset="finer", layout=layout, missing=("train-00000005",)),
        ShardTable.of([Shard.of(commit) for commit in commits]),
    )
    assert other.content_digest == missing.content_digest
    assert other.rows == missing.rows
    other = seal(
        store,
        draft(recipe, dataset="whole", layout=layout, missing=("train-00000004", "train-00000005")),
        ShardTable.of(
            [Shard.of(commit) for commit in commits if commit.index not in (2, 4) or commit.split != "train"]
            + [
                Shard.of(commit.model_copy(update={"quarantined": ()}))
                for commit in commits
                if commit.task.name == "train-00000002"
            ]
        ),
    )
    assert other.content_digest != missing.content_digest, "id 20 exists there"


def test_manifests_go_parent_plus_one(store: Store, recipe: Recipe, shards: ShardTable) -> None:
    assert latest_manifest(store, "main") is None
    first = seal(store, draft(recipe, missing=("train-00000002",)), shards)
    smaller = draft(recipe, first, window=Window(train=(0, 32)))
    second = seal(store, smaller, shards)
    assert (second.number, second.parent_digest, second.shards.count) == (2, first.digest, 2)
    assert read_shard_table(store, second).tasks == {"train-00000000", "train-00000001"}
    with pytest.raises(LostRace) as lost:
        seal(store, draft(recipe, first, missing=("train-00000002",)), shards)
    assert lost.value.winner == second == latest_manifest(store, "main")
    store.write(paths.manifest_path("main", 1234567), second.model_copy(update={"number": 1234567}).to_bytes())
    latest = latest_manifest(store, "main")
    assert latest is not None
    assert latest.number == 1234567


def test_one_of_eight_drivers_seals(store: Store, recipe: Recipe, shards: ShardTable) -> None:
    barrier = threading.Barrier(8)

    def drive(_: int) -> Manifest | None:
        mine = draft(recipe, missing=("train-00000002",))
        barrier.wait()
        try:
            return seal(store, mine, shards)
        except LostRace:
            return None

    with ThreadPoolExecutor(8) as threads:
        sealed = [manifest for manifest in threads.map(drive, range(8)) if manifest]
    assert sealed == [latest_manifest(store, "main")]
    numbers = [name for name in store.list(paths.manifests_folder("main")) if name.endswith(".json")]
    assert numbers == ["000001.json"]


def test_a_manifest_that_hides_a_gap_is_not_sealed(store: Store, recipe: Recipe, shards: ShardTable) -> None:
    for missing in ((), ("train-00000002", "train-00000003")):
        with pytest.raises(ValueError, match="the window lacks"):
            seal(store, draft(recipe, missing=missing), shards)
    assert latest_manifest(store, "main") is None
    for name in ("", "../x", "a/b"):
        with pytest.raises(ValidationError):
            draft(recipe, dataset=name)


def test_what_does_not_match_its_name_is_refused(store: Store, recipe: Recipe, shards: ShardTable) -> None:
    with pytest.raises(StoreError, match="no sealed dataset 'main'"):
        open_dataset(store)
    manifest = seal(store, draft(recipe, missing=("train-00000002",)), shards)
    with pytest.raises(StoreError, match=r"no manifest 7 of 'main'.*the latest is 1"):
        open_dataset(store, number=7)
    dataset = open_dataset(store)
    shard = dataset.shards("train")[0]
    commit = dataset.commit(shard)
    store.write(shard.commit_path, commit.model_copy(update={"sha256": "f" * 64}).to_bytes())
    with pytest.raises(CorruptShard, match="is not what the manifest lists"):
        dataset.read(shard)
    store.write(paths.recipe_path(recipe.id), recipe.model_copy(update={"tf32": True}).to_bytes())
    with pytest.raises(StoreError, match="is the document of recipes/"):
        read_recipe(store, recipe.id)
    store.write(manifest.shards.path, b"PAR1")
    with pytest.raises(CorruptShard, match="is not what manifest 1 names"):
        read_shard_table(store, manifest)


def test_a_table_attests_its_commits(store: Store, recipe: Recipe, shards: ShardTable) -> None:
    seal(store, draft(recipe, missing=("train-00000002",)), shards)
    dataset = open_dataset(store)
    for shard in dataset.table:
        assert shard.commit_sha256 == hashlib.sha256(store.read(shard.commit_path) or b"").hexdigest()
    shard = dataset.table[0]
    changed = dataset.commit(shard).model_copy(update={"nfe": 10**6})
    store.write(shard.commit_path, changed.to_bytes())
    with pytest.raises(CorruptShard, match="is not what the manifest lists"):
        open_dataset(store).commit(shard)


def test_a_table_of_an_older_release_opens_and_its_child_attests(
    store: Store, recipe: Recipe, shards: ShardTable
) -> None:
    bare = [replace(shard, commit_sha256=None) for shard in shards]
    first = seal(store, draft(recipe, missing=("train-00000002",)), shards)
    old = ShardTable.of(bare).table.drop_columns(["commit_sha256"])
    table = ShardTable(decode(ShardTable(old).to_bytes(writer="an older release"), len(bare), "table"))
    assert list(table) == bare
    dataset = Dataset(store, first, recipe, table)
    assert dataset.commit(table[0]).task.name == table[0].task
    store.remove(shards[-1].commit_path)
    store.write(shards[1].commit_path, b"{}")
    second = seal(store, draft(recipe, first, missing=("train-00000002",)), table)
    known = [shard.commit_sha256 for shard in read_shard_table(store, second)]
    assert known == [shards[0].commit_sha256, None, *(shard.commit_sha256 for shard in list(shards)[2:-1]), None]


def test_a_pruned_manifest_is_told(store: Store, recipe: Recipe, shards: ShardTable) -> None:
    first = seal(store, draft(recipe, missing=("train-00000002",)), shards)
    reader = open_dataset(store)
    second = seal(store, draft(recipe, first, window=Window(train=(0, 32))), shards)
    floor = Floor(number=3, sealed_at="2026-01-01T00:00:00+00:00", sweep_at="2026-01-08T00:00:00+00:00")
    third = seal_floor(store, second, writer="prune", floor=floor)
    told = r"manifest 1 of 'main' .* was pruned \(floor 3\): open the latest, 3"
    store.remove(paths.manifest_path("main", 1))
    with pytest.raises(Pruned, match=told):
        open_dataset(store, number=1)
    shard = reader.shards("train")[-1]
    store.remove(shard.path)
    with pytest.raises(Pruned, match=told):
        reader.read(shard)
    store.remove(shard.commit_path)
    with pytest.raises(Pruned, match=told):
        reader.commit(shard)
    store.remove(first.shards.path)
    with pytest.raises(Pruned, match=told):
        read_shard_table(store, first)
    assert open_dataset(store).manifest == third
    # What is missing above the floor is no prune's doing.
    store.remove(third.shards.path)
    with pytest.raises(StoreError, match="the shards of manifest 3: restore it"):
        open_dataset(store)


def test_a_floor_changes_nothing_that_readers_see(store: Store, recipe: Recipe, shards: ShardTable) -> None:
    first = seal(store, draft(recipe, missing=("train-00000002",), ticks={"grow": "2026"}), shards)
    floored = seal_floor(store, first, writer="prune", floor=Floor(number=2))
    assert (floored.number, floored.parent_digest, floored.floor.number) == (2, first.digest, 2)
    same = {"content_digest", "window", "missing", "rows", "shards", "train_changed_at", "ticks", "recipe_id", "layout"}
    assert floored.model_dump(include=same) == first.model_dump(include=same)
    with pytest.raises(LostRace):
        seal_floor(store, first, writer="other", floor=Floor(number=2))
    child = seal(store, draft(recipe, floored, window=Window(train=(0, 32)), ticks={"refresh": "7"}), shards)
    assert (child.floor, child.ticks) == (floored.floor, {"grow": "2026", "refresh": "7"})


def test_when_the_train_window_changed(
    store: Store, recipe: Recipe, shards: ShardTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter(f"2026-01-0{day}T00:00:00+00:00" for day in range(1, 5))
    monkeypatch.setattr("limbeck.storage_schemas.dataset.utc_now", lambda: next(times))
    first = seal(store, draft(recipe, missing=("train-00000002",)), shards)
    gap = ("train-00000002",)
    holdout = seal(store, draft(recipe, first, window=Window(train=(5, 60)), missing=gap), shards)
    train = seal(store, draft(recipe, holdout, window=Window(train=(5, 59)), missing=gap), shards)
    assert [it.train_changed_at[:10] for it in (first, holdout, train)] == ["2026-01-01", "2026-01-01", "2026-01-03"]


def test_two_writers_never_share_a_table(store: Store, recipe: Recipe, shards: ShardTable) -> None:
    """Else a prune of the one's manifest could take the table that the other is about to seal."""
    gap = ("train-00000002",)
    one, other = (seal(store, draft(recipe, dataset=name, missing=gap), shards) for name in ("one", "other"))
    assert one.shards.sha256 != other.shards.sha256
    assert one.content_digest == other.content_digest


def test_who_sleeps_until_its_number_is_pruned_has_lost(store: Store, recipe: Recipe, shards: ShardTable) -> None:
    gap = ("train-00000002",)
    first = seal(store, draft(recipe, missing=gap), shards)
    second = seal(store, draft(recipe, first, missing=gap), shards)
    third = seal_floor(store, second, writer="prune", floor=Floor(number=3))
    for number in (1, 2):
        store.remove(paths.manifest_path("main", number))
    for parent in (first, None):
        with pytest.raises(LostRace) as lost:
            seal(store, draft(recipe, parent, missing=gap), shards)
        assert lost.value.winner == third == latest_manifest(store, "main")


def test_a_manifest_that_goes_between_listing_and_reading_is_looked_for_anew(
    store: Store, recipe: Recipe, shards: ShardTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = seal(store, draft(recipe, missing=("train-00000002",)), shards)
    read, pending = Store.read, [1]

    def late(self: Store, path: str) -> bytes | None:
        if pending and path == paths.manifest_path("main", 1):
            pending.clear()
            seal_floor(store, first, writer="prune", floor=Floor(number=2))
            store.remove(path)
        return read(self, path)

    monkeypatch.setattr(Store, "read", late)
    latest = latest_manifest(store, "main")
    assert latest is not None, "a driver would begin the dataset anew"
    assert latest.number == 2
