"""What must hold of a store after any fault: each id once, every byte right, true manifests, nothing but orphans."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import PurePosixPath

import numpy as np

from limbeck.pipeline.after.verify import check_dataset, check_manifest
from limbeck.pipeline.upkeep.prune import prune
from limbeck.storage_schemas.command_line import main
from limbeck.storage_schemas.commit import list_committed, list_records, read_commits
from limbeck.storage_schemas.dataset import Dataset, latest_number, open_dataset
from limbeck.storage_schemas.program import COMMANDS
from limbeck.storage_schemas.record import SPLITS
from limbeck.storage_schemas.store import Store


def assert_exactly_once(uri, *, count, holdout=0, name="main"):
    """The orphans, which prune took: shard files that no commit names, and shard tables that no manifest names."""
    store = Store.open(str(uri))
    orphans, named = _check(store, uri, count, holdout, name)
    a_month_later = datetime.now(UTC) + timedelta(days=30)
    prune(store, keep=1000, grace=timedelta(days=7), clock=lambda: a_month_later)
    left, still_named = _check(store, uri, count, holdout, name)
    assert (left, still_named) == (set(), named), "prune takes the orphans and nothing else"
    assert not [path for path in every_file(store) if re.search(r"/(commits|records|manifests)/\.", path)], (
        "half a file"
    )
    return orphans


def _check(store, uri, count, holdout, name):
    dataset = open_dataset(store, name)
    assert ids_of(dataset) == {"train": list(range(count)), "holdout": list(range(holdout))}
    assert check_dataset(dataset) == []
    assert main(COMMANDS, ["verify", str(uri), "--dataset", name]) == 0
    manifests = [open_dataset(store, name, number) for number in range(1, latest_number(store, name) + 1)]
    for sealed in manifests:
        assert check_manifest(sealed) == []
    return _files(store, dataset, manifests)


def ids_of(dataset: Dataset):
    """Every sample id that a reader meets, per split, in order."""

    def visible(shard):
        return np.asarray(dataset.read(shard, ["sample_id"])["sample_id"])[dataset.rows_inside(shard)].tolist()

    return {split: [i for shard in dataset.shards(split) for i in visible(shard)] for split in SPLITS}


def _files(store, dataset, manifests):
    """(orphans, files that documents name). One commit a task, and no file of any other kind."""
    recipe_id, layout_id = dataset.manifest.recipe_id, dataset.layout.id
    tasks = sorted(list_committed(store, recipe_id, layout_id))
    assert set(tasks) >= dataset.table.tasks, "a manifest lists what nobody committed"
    commits = read_commits(store, recipe_id, layout_id, tasks)
    assert [commit.task.name for commit in commits.values()] == tasks, "a commit under another task's name"
    named = {commit.path for commit in commits.values()} | {sealed.manifest.shards.path for sealed in manifests}
    assert len({commit.path for commit in commits.values()}) == len(tasks), "two tasks share a shard"
    files = set(every_file(store))
    records = list_records(store, recipe_id, layout_id)  # one that a killed worker left stays until a floor is due
    named |= {path for path in files if "/shards/" in path and PurePosixPath(path).stem in records}
    assert named <= files, "a document names what is not there"
    orphans = {path for path in files - named if path.endswith((".parquet", ".tar"))}
    strange = [path for path in files - named - orphans if not re.fullmatch(DOCUMENTS, path)]
    assert not strange, strange
    return orphans, named


DOCUMENTS = (
    r"store\.json|recipes/\w+/(recipe\.json|[\w-]+/(commits|records)/[\w-]+\.json)|datasets/[\w-]+/manifests/\d{6}\.json"
    r"|jobs/[\w-]+/(\w+\.json|failures/[\w-]+\.json)|prunes/\d+\.json"
    r"|.*/\.[^/]+\.tmp"  # what a killed writer leaves beside a local file; no list shows it
)


def every_file(store):
    """Paths of all files in the store, past every cache."""
    store._fs.invalidate_cache()
    root = store._root.strip("/")
    return [path.strip("/").removeprefix(f"{root}/") for path in store._fs.find(store._root)]
