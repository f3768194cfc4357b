"""`--recheck`: whether what a manifest lists is still there. Otherwise a run takes its parent's word for it."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from limbeck.pipeline.job.outcome import names
from limbeck.storage_schemas.commit import Commit
from limbeck.storage_schemas.errors import StoreError
from limbeck.storage_schemas.shards import Shard, ShardTable
from limbeck.storage_schemas.store import Store

THREADS = 16


def still_there(store: Store, listed: ShardTable) -> ShardTable:
    """The shards whose commit and file are there. StoreError where a commit stands but its file is lost."""
    lost: list[str] = []
    bare: list[Shard] = []
    for shard, commit, whole in _looked_up(store, listed):
        if commit is not None and not whole:
            bare.append(shard)
        elif commit is None or not shard.lists(commit):
            lost.append(shard.task)
    if bare:
        raise StoreError(
            f"{len(bare)} tasks ({names([shard.task for shard in bare])}) have a commit in {store.uri} but "
            f"their shard is gone or cut short: restore it, or delete {bare[0].commit_path}"
            f"{' and so on' * (len(bare) > 1)} and run this again"
        )
    return listed.without(lost)


def whole(listed: ShardTable) -> ShardTable:
    """The shards that lack no sample: those of the others are solved again, since a sick worker may have lost them."""
    return listed.without([shard.task for shard in listed.lacking])


def _looked_up(store: Store, listed: ShardTable) -> Iterator[tuple[Shard, Commit | None, bool]]:
    """Each shard with the commit of its task, and whether that commit's file has its size."""

    def look(shard: Shard) -> tuple[Shard, Commit | None, bool]:
        data = store.read(shard.commit_path)
        commit = Commit.from_bytes(data, f"{store.uri}/{shard.commit_path}") if data else None
        return shard, commit, commit is not None and store.size(commit.path) == commit.bytes

    with ThreadPoolExecutor(THREADS) as threads:
        yield from threads.map(look, listed)
