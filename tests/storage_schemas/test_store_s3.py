from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from limbeck.storage_schemas.commit import Commit, Task, read_commit
from limbeck.storage_schemas.errors import CorruptShard, StoreError
from limbeck.storage_schemas.formats import check_shard, read_shard
from limbeck.storage_schemas.layout import Layout
from limbeck.storage_schemas.paths import STORE
from limbeck.storage_schemas.recipe import Recipe
from limbeck.storage_schemas.record import Columns
from limbeck.storage_schemas.store import Store

s3fs = pytest.importorskip("s3fs")
pytest.importorskip("moto")


def test_a_bucket_keeps_the_promises_of_a_store(s3_uri: str) -> None:
    store = Store.create(s3_uri)
    assert Store.create(s3_uri).read(STORE) == store.read(STORE)
    assert store.put_if_absent("a/one", b"first") == b"first"
    assert Store.open(s3_uri).put_if_absent("a/one", b"second") == b"first"
    store.write("a/two", b"2")
    assert list(store.list("a")) == ["one", "two"]
    assert list(store.list("none")) == []
    assert store.size("a/one") == 5
    assert store.size("a/none") is None
    with ThreadPoolExecutor(8) as threads:
        seen = list(threads.map(lambda n: store.put_if_absent("race", bytes([n]) * 1000), range(8)))
    assert len(set(seen)) == 1
    assert seen[0] == store.read("race")


@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_a_shard_goes_through_a_bucket(
    s3_uri: str,
    form: str,
    recipe: Recipe,
    commit_task: Callable[..., Commit],
    make_columns: Callable[..., Columns],
    tmp_path: Path,
) -> None:
    store = Store.create(s3_uri)
    task, layout = Task("train", 2, 64), Layout(format=form, samples_per_shard=64)
    commit = commit_task(store, recipe, layout, task, tmp_path)
    assert read_commit(store, recipe.id, layout.id, task.name) == commit
    columns = read_shard(store, commit, recipe, ["output", "sample_id"])
    expected = make_columns(recipe, task)
    for name in ("output", "sample_id"):
        np.testing.assert_array_equal(columns[name], expected[name])
    assert check_shard(store, commit) == []
    data = store.read(commit.path) or b""
    for length in (len(data) - 1, 100):
        store.write(commit.path, data[:length])
        with pytest.raises(CorruptShard, match="missing"):
            read_shard(store, commit, recipe, ["output", "sample_id"])
    store.remove(commit.path)
    assert check_shard(store, commit) == [f"{store.uri}/{commit.path} is missing"]


def test_an_absent_server_and_absent_credentials_are_one_line(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(
        StoreError, match=r"NoCredentialsError: .*: check the address, the network and the credentials$"
    ):
        Store.open(s3_uri)


def test_a_bucket_that_does_not_exist_is_one_line(s3_uri: str) -> None:
    for method in (Store.open, Store.create):
        with pytest.raises(StoreError, match=r"^s3://no-such-bucket/x: there is no such bucket"):
            method("s3://no-such-bucket/x")
    with pytest.raises(StoreError, match="is not a store"):
        Store.open(s3_uri)
