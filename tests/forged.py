"""Stores that somebody else made: documents that were changed, and everything above them made to agree."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from limbeck.storage_schemas import paths
from limbeck.storage_schemas.dataset import latest_manifest, read_shard_table
from limbeck.storage_schemas.shards import Shard, ShardTable
from limbeck.storage_schemas.store import Store


def rewrite(store: Store, path: str, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Changes a JSON document in place."""
    document: dict[str, Any] = json.loads(store.read(path) or b"")
    change(document)
    store.write(path, json.dumps(document).encode())
    return document


def relist(store: Store, change: Callable[[Shard], Shard]) -> None:
    """Changes the rows of the newest manifest's table, and names the new table in the manifest."""
    manifest = latest_manifest(store, "main")
    assert manifest is not None
    rows = [change(shard) for shard in read_shard_table(store, manifest)]
    data = ShardTable.of(rows).to_bytes(writer="somebody")
    sha256 = hashlib.sha256(data).hexdigest()
    path = paths.shard_table_path("main", sha256)
    store.write(path, data)
    record = {"path": path, "sha256": sha256, "count": len(rows)}
    rewrite(store, paths.manifest_path("main", manifest.number), lambda it: it.update(shards=record))


def forget_digests(store: Store) -> None:
    """The table as an older release wrote it: nothing attests a commit."""
    relist(store, lambda shard: replace(shard, commit_sha256=None))


def follow_commits(store: Store) -> None:
    """The table says of every shard's size, checksum and commit what the commits say now."""

    def row(shard: Shard) -> Shard:
        data = store.read(shard.commit_path) or b""
        commit = json.loads(data)
        told = {name: commit[name] for name in ("path", "bytes", "rows", "sha256")}
        return replace(shard, **told, commit_sha256=hashlib.sha256(data).hexdigest())

    relist(store, row)
