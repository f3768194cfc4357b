"""Small stores, written straight with storage_schemas: the exact flow of a closed-form teacher, no pipeline."""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from limbeck.diffusion import noise
from limbeck.diffusion.grids import karras
from limbeck.diffusion.models.teachers import builtin_checkpoint, load_teacher
from limbeck.storage_schemas import paths
from limbeck.storage_schemas.clock import utc_now
from limbeck.storage_schemas.commit import Commit, Task, put_commit
from limbeck.storage_schemas.dataset import put_recipe, seal
from limbeck.storage_schemas.formats import encode_shard
from limbeck.storage_schemas.layout import Layout
from limbeck.storage_schemas.manifest import ManifestDraft, Window
from limbeck.storage_schemas.recipe import Guidance, NoiseRecord, Recipe, SolverRecord, TeacherRecord, UniformLabels
from limbeck.storage_schemas.record import NO_CONDITION, Columns, from_storage, state_column, to_storage
from limbeck.storage_schemas.shards import Shard, ShardTable
from limbeck.storage_schemas.store import Store
from tests.guided import guided_flow
from tests.servers import moto

MakeStore = Callable[..., Store]


@pytest.fixture
def make_store(tmp_path) -> MakeStore:
    def make(name: str = "pairs", **options) -> Store:
        return write_store(tmp_path / name, **options)

    return make


@pytest.fixture
def bucket(request, tmp_path, monkeypatch) -> Iterator[str]:
    """An S3 server of this test's own (moto, or the parameter), and the uri of its bucket."""
    clients, start = fsspec.get_filesystem_class("s3"), getattr(request, "param", moto)
    (tmp_path / "server").mkdir()
    with start(tmp_path / "server") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        clients.clear_instance_cache()  # a cached client keeps its first environment
        yield "s3://pairs"
        clients.clear_instance_cache()


def write_store(
    folder: Path,
    *,
    count: int = 256,
    holdout: int = 64,
    steps: int = 8,
    states: tuple[int, ...] = (2, 4, 6),
    dtype: str = "float32",
    format: str = "parquet",
    samples_per_shard: int = 64,
    teacher: str = "gaussian",
    quarantined: tuple[int, ...] = (),
    missing: tuple[str, ...] = (),
    window_start: int = 0,
    compression: str = "none",
    guidance: float | tuple[float, ...] | None = None,
) -> Store:
    """guidance: of the Gaussian classes of tests.guided, in place of a teacher without labels."""
    store = Store.create(str(folder))
    recipe = gaussian_recipe(teacher=teacher, steps=steps, states=states, dtype=dtype)
    if guidance is not None:
        recipe = guided_recipe(recipe, guidance)
    layout = Layout(format=format, samples_per_shard=samples_per_shard, compression=compression)
    put_recipe(store, recipe)
    window = Window(train=(window_start, count), holdout=(0, holdout))
    commits = [
        put_commit(store, make_commit(store, recipe, layout, task, quarantined))
        for task in window.tasks(samples_per_shard)
        if task.name not in missing
    ]
    draft = ManifestDraft(
        dataset="main", parent=None, writer=paths.new_attempt(), recipe_id=recipe.id, layout=layout, window=window,
        missing=missing,
    )  # fmt: skip
    seal(store, draft, ShardTable.of([Shard.of(commit) for commit in commits]))
    return store


def gaussian_recipe(*, teacher: str, steps: int, states: tuple[int, ...], dtype: str) -> Recipe:
    saved = builtin_checkpoint(teacher)
    process = saved.build().process
    times = karras(process, steps)
    return Recipe(
        teacher=TeacherRecord(uri=f"builtin:{teacher}", weights_sha256=saved.weights_sha256, model=saved.model),
        solver=SolverRecord(name="exact", steps=steps, frame="sigma", grid={"name": "karras"}),
        times=tuple(times.tolist()),
        alphas=tuple(process.alpha(times).tolist()),
        sigmas=tuple(process.sigma(times).tolist()),
        states=tuple(sorted({0, *states, steps})),
        noise=NoiseRecord(algorithm=noise.ALGORITHM, version=noise.VERSION, seed=0),
        sample_shape=tuple(saved.model["sample_shape"]),
        storage_dtype=dtype,
        micro_batch=16,
        numerics_version=1,
    )


def guided_recipe(recipe: Recipe, scale: float | tuple[float, ...]) -> Recipe:
    teacher = load_teacher("python:tests.guided:GaussianClasses")
    names = ("uri", "weights_sha256", "model", "source_sha256")
    record = TeacherRecord(**{name: getattr(teacher, name) for name in names})
    condition = UniformLabels(num_classes=teacher.num_classes)
    return recipe.model_copy(update={"teacher": record, "condition": condition, "guidance": Guidance(scale=scale)})


def exact_columns(recipe: Recipe, task: Task, ids: np.ndarray) -> Columns:
    """Every stored state of `ids`, by the teacher's own flow map from the rounded noise."""
    labels = np.full(len(ids), NO_CONDITION)
    if recipe.condition.kind == "none":
        flow = builtin_checkpoint(recipe.teacher.uri.removeprefix("builtin:")).build().flow_map
    else:
        labels = noise.labels(0, task.split, ids, recipe.condition.num_classes)
        scales = noise.guidance_scales(0, task.split, ids, recipe.guidance.scales)
        flow = partial(guided_flow, torch.from_numpy(labels), torch.from_numpy(scales))
    times = torch.tensor(recipe.times, dtype=torch.float64)
    noise_T = recipe.sigmas[0] * noise.standard_normal(0, task.split, ids, recipe.sample_shape)
    stored = to_storage(noise_T, recipe.storage_dtype)
    x_T = torch.from_numpy(from_storage(stored, recipe.storage_dtype).astype(np.float64))
    columns = {"sample_id": ids, "condition": labels, "noise": stored}
    for index in recipe.states[1:]:
        state = flow(x_T, times[0], times[index]).numpy()
        columns[state_column(index, recipe.num_steps)] = to_storage(state, recipe.storage_dtype)
    return columns


def make_commit(store: Store, recipe: Recipe, layout: Layout, task: Task, quarantined: tuple[int, ...]) -> Commit:
    ids = np.arange(task.start, task.stop)
    lost = [i for i in quarantined if task.split == "train" and task.start <= i < task.stop]
    columns = exact_columns(recipe, task, np.setdiff1d(ids, lost))
    attempt = paths.new_attempt()
    path = paths.shard_path(recipe.id, layout.id, task.name, attempt, layout.suffix)
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch) / "shard"
        encoded = encode_shard(local, recipe.fields, columns, task=task, recipe_id=recipe.id, layout=layout)
        store.upload(local, path)
    return Commit(
        split=task.split, index=task.index, samples_per_shard=task.samples_per_shard, recipe_id=recipe.id,
        layout_id=layout.id, attempt=attempt, path=path, bytes=encoded.bytes, sha256=encoded.sha256, rows=encoded.rows,
        quarantined=tuple(lost), chunks=encoded.chunks, seconds=0.1, nfe=1, machine={}, committed_at=utc_now(),
    )  # fmt: skip
