import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from limbeck.storage_schemas import paths
from limbeck.storage_schemas.clock import utc_now
from limbeck.storage_schemas.commit import Commit, Task, column_statistics, put_commit
from limbeck.storage_schemas.formats import encode_shard
from limbeck.storage_schemas.layout import Layout
from limbeck.storage_schemas.recipe import NoiseRecord, Recipe, SolverRecord, TeacherRecord, UniformLabels
from limbeck.storage_schemas.record import Columns, to_storage
from limbeck.storage_schemas.store import Store
from tests import servers


def _make_recipe(**changes: object) -> Recipe:
    """A 4-step VE recipe with the states 0, 2, 4 of samples [2, 3, 5]."""
    recipe = Recipe(
        teacher=TeacherRecord(uri="builtin:gaussian", weights_sha256="ab" * 32, model={"process": {"sigma_max": 80.0}}),
        solver=SolverRecord(name="heun", steps=4, frame="sigma", grid={"name": "karras", "rho": 7.0}),
        times=(80.0, 17.5, 2.5, 0.125, 0.0),
        alphas=(1.0, 1.0, 1.0, 1.0, 1.0),
        sigmas=(80.0, 17.5, 2.5, 0.125, 0.0),
        states=(0, 2, 4),
        condition=UniformLabels(num_classes=10),
        noise=NoiseRecord(algorithm="philox4x64-as241", version=1, seed=7),
        sample_shape=(2, 3, 5),
        micro_batch=8,
        numerics_version=1,
    )
    return Recipe.model_validate({**recipe.plain(), **changes})


def _make_columns(recipe: Recipe, task: Task, quarantined: tuple[int, ...] = ()) -> Columns:
    """Rows of a task, each a function of its id alone."""
    ids = np.setdiff1d(np.arange(task.start, task.stop), quarantined)
    columns: Columns = {}
    for number, field in enumerate(recipe.fields):
        if field.name == "sample_id":
            columns[field.name] = ids
        elif field.is_scalar:
            columns[field.name] = (ids % (3 if field.name == "start_index" else 10)).astype(field.numpy_dtype)
        else:
            size = int(np.prod(field.shape))
            values = np.sin(ids[:, None] * 0.37 + np.arange(size) + number).reshape(len(ids), *field.shape)
            columns[field.name] = to_storage(values, recipe.storage_dtype)
    return columns


def _commit_task(
    store: Store, recipe: Recipe, layout: Layout, task: Task, folder: Path, quarantined: tuple[int, ...] = ()
) -> Commit:
    """Encodes, uploads and commits a task's rows, as a worker does."""
    attempt = paths.new_attempt()
    columns = _make_columns(recipe, task, quarantined)
    shard = encode_shard(
        folder / f"{task.name}-{attempt}{layout.suffix}",
        recipe.fields,
        columns,
        task=task,
        recipe_id=recipe.id,
        layout=layout,
    )
    path = paths.shard_path(recipe.id, layout.id, task.name, attempt, layout.suffix)
    store.upload(shard.path, path)
    shard.path.unlink()
    commit = Commit(
        split=task.split,
        index=task.index,
        samples_per_shard=task.samples_per_shard,
        recipe_id=recipe.id,
        layout_id=layout.id,
        attempt=attempt,
        path=path,
        bytes=shard.bytes,
        sha256=shard.sha256,
        rows=shard.rows,
        quarantined=quarantined,
        chunks=shard.chunks,
        seconds=0.5,
        nfe=7,
        machine={"host": "test"},
        statistics=column_statistics(recipe.fields, columns),
        committed_at=utc_now(),
    )
    return put_commit(store, commit)


@pytest.fixture(scope="session")
def make_recipe() -> Callable[..., Recipe]:
    return _make_recipe


@pytest.fixture(scope="session")
def make_columns() -> Callable[..., Columns]:
    return _make_columns


@pytest.fixture(scope="session")
def commit_task() -> Callable[..., Commit]:
    return _commit_task


@pytest.fixture
def recipe() -> Recipe:
    return _make_recipe()


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """An empty store."""
    if request.param == "local":
        yield Store.create(str(tmp_path / "deep" / "store"))
        return
    name = f"memory://{secrets.token_hex(6)}/store"
    yield Store.create(name)
    fsspec.filesystem("memory").rm(name.split("://")[1].split("/")[0], recursive=True)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Endpoint of a moto server process on loopback."""
    with servers.moto(tmp_path_factory.mktemp("moto")) as server:
        yield server.endpoint


@pytest.fixture
def s3_uri(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh bucket's folder, reached by the environment alone."""
    reach(s3_server, monkeypatch)
    bucket = f"bucket-{os.getpid()}-{secrets.token_hex(4)}"
    fsspec.filesystem("s3", use_listings_cache=False).mkdir(bucket)
    return f"s3://{bucket}/folder/store"


def reach(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores opened from here on go to `endpoint`."""
    for name, value in servers.environment(endpoint).items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # a cached client keeps its first environment
