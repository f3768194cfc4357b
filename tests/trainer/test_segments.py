"""Segments: the same loss as on trajectories, out of shards of both formats, and an error of their own."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from limbeck.diffusion import noise
from limbeck.diffusion.flow_map import FlowMap
from limbeck.diffusion.gaussian import GaussianTeacher
from limbeck.diffusion.grids import karras
from limbeck.diffusion.process import VE
from limbeck.storage_schemas import paths
from limbeck.storage_schemas.clock import utc_now
from limbeck.storage_schemas.commit import Commit, put_commit
from limbeck.storage_schemas.dataset import open_dataset, put_recipe, seal
from limbeck.storage_schemas.errors import ManifestMismatch
from limbeck.storage_schemas.formats import encode_shard
from limbeck.storage_schemas.layout import Layout
from limbeck.storage_schemas.manifest import ManifestDraft, Window
from limbeck.storage_schemas.recipe import NoiseRecord, Recipe, SolverRecord, TeacherRecord
from limbeck.storage_schemas.record import from_storage, to_storage
from limbeck.storage_schemas.shards import Shard, ShardTable
from limbeck.storage_schemas.store import Store
from limbeck.trainer.config import FitConfig
from limbeck.trainer.fit import run_fit
from limbeck.trainer.networks.networks import Networks
from limbeck.trainer.networks.student import saved_model
from limbeck.trainer.objectives.progressive import Progressive, ProgressiveSegments, progressive_target, rounding_error
from limbeck.trainer.planning.trajectories import plan_trajectories
from limbeck.trainer.reading.shards import ShardSource
from limbeck.trainer.stream import Batch, Stream

STEPS, SHAPE = 4, (2,)
TIMES = karras(VE(), STEPS)
TEACHER = GaussianTeacher(VE(), mean=0.5, variance=0.25)


def exact_columns(split: str, ids: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """Segments along the exact flow, from starts that are rounded first."""
    _, place = noise.data_and_place(0, split, ids, num_data=9, num_places=STEPS // 2)
    start = 2 * place
    x_0 = 0.5 + 0.5 * noise.standard_normal(1, split, ids, SHAPE)
    x_t = x_0 + TIMES.numpy()[start][:, None] * noise.standard_normal(0, split, ids, SHAPE)
    stored = [to_storage(x_t, dtype)]
    exact = torch.from_numpy(from_storage(stored[0], dtype).astype(np.float64))
    for step in (1, 2):
        moved = TEACHER.flow_map(exact, TIMES[start], TIMES[start + step])
        stored.append(to_storage(moved.numpy(), dtype))
    scalars = {
        "sample_id": ids,
        "condition": np.full(len(ids), -1),
        "start_index": start.astype("<i4"),
        "data_id": ids % 9,
    }
    return scalars | {f"segment_{k}": state for k, state in enumerate(stored)}


def write_segments(folder: Path, *, format: str = "parquet", dtype: str = "float32", count: int = 64) -> Store:
    store = Store.create(str(folder))
    process = {"name": "ve", "sigma_max": 80.0}
    recipe = Recipe(
        teacher=TeacherRecord(
            uri="builtin:gaussian", weights_sha256="ab" * 32,
            model={"kind": "python", "sample_shape": [2], "num_classes": None, "process": process},
        ),
        solver=SolverRecord(name="exact", steps=STEPS, frame="sigma", grid={"name": "karras"}),
        times=tuple(TIMES.tolist()), alphas=(1.0,) * (STEPS + 1), sigmas=tuple(TIMES.tolist()), states=(),
        start={"kind": "data", "images": "npz:none", "digest": "cd" * 32}, chain="segment", sample_shape=SHAPE,
        noise=NoiseRecord(algorithm=noise.ALGORITHM, version=noise.VERSION, seed=0), storage_dtype=dtype,
        micro_batch=32, numerics_version=1,
    )  # fmt: skip
    layout, window = Layout(format=format, samples_per_shard=32), Window(train=(0, count), holdout=(0, 32))
    put_recipe(store, recipe)
    commits = [put_commit(store, _commit(store, recipe, layout, task, folder)) for task in window.tasks(32)]
    draft = ManifestDraft(
        dataset="main", parent=None, writer="a" * 16, recipe_id=recipe.id, layout=layout, window=window, missing=()
    )
    seal(store, draft, ShardTable.of([Shard.of(commit) for commit in commits]))
    return store


def _commit(store, recipe, layout, task, folder):
    columns = exact_columns(task.split, np.arange(task.start, task.stop), recipe.storage_dtype)
    local, attempt = folder / "shard.tmp", paths.new_attempt()
    path = paths.shard_path(recipe.id, layout.id, task.name, attempt, layout.suffix)
    encoded = encode_shard(local, recipe.fields, columns, task=task, recipe_id=recipe.id, layout=layout)
    store.upload(local, path)
    return Commit(
        split=task.split, index=task.index, samples_per_shard=32, recipe_id=recipe.id, layout_id=layout.id,
        attempt=attempt, path=path, bytes=encoded.bytes, sha256=encoded.sha256, rows=encoded.rows, quarantined=(),
        chunks=encoded.chunks, seconds=0.1, nfe=2, machine={}, committed_at=utc_now(),
    )  # fmt: skip


def config_of(store, out, **options):
    given = {"objective": {"name": "progressive", "schedule": (2,)}, "init": "scratch", "network": {"name": "affine"}}
    small = {"steps": 20, "warmup": 2, "batch_size": 16, "threads": 1, "device": "cpu"}
    return FitConfig(**{"data": store.uri, "out": out, **given, **small, **options})


def batch_of(states, rows, uniforms):
    ids = torch.arange(rows)
    return Batch(ids, ids, torch.full((rows,), -1), states, uniforms, torch.ones(rows).double())


def test_the_loss_is_that_of_the_same_segments_of_trajectories(tmp_path):
    rows, columns = 64, ("noise", "state_002", "output")
    generator = torch.Generator().manual_seed(0)
    x_T = 80 * torch.randn(rows, 2, generator=generator, dtype=torch.float64)
    states = {
        name: TEACHER.flow_map(x_T, TIMES[0], TIMES[k]).float() for name, k in zip(columns, (0, 2, 4), strict=True)
    }
    uniforms = torch.rand(rows, 1, generator=generator, dtype=torch.float64)
    start = 2 * (2 * uniforms[:, 0]).long()
    every, of = torch.stack(list(states.values())), torch.arange(rows)
    segments = {"segment_0": every[start // 2, of], "segment_2": every[start // 2 + 1, of], "start_index": start.int()}
    student = FlowMap(fitted(write_segments(tmp_path / "store"), tmp_path / "out").build())
    direct = Progressive(tuple(TIMES[::2].tolist()), columns)(Networks(student), batch_of(states, rows, uniforms))
    none = torch.empty(rows, 0, dtype=torch.float64)
    found = ProgressiveSegments(tuple(TIMES.tolist()))(Networks(student), batch_of(segments, rows, none)).item()
    assert found == pytest.approx(direct.item(), rel=1e-6)
    assert found > 0.01


def fitted(store, out, **options):
    assert run_fit(config_of(store, out, **options)) == 0
    return saved_model(out)


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
def test_places_on_the_grid_come_out_of_shards_of_both_formats(tmp_path, format):
    store = write_segments(tmp_path, format=format)
    columns = ProgressiveSegments(tuple(TIMES.tolist())).columns
    source = ShardSource(open_dataset(store), "train", columns)
    with Stream(source, batch_size=16, seed=0) as stream:
        batch = next(stream).to(torch.device("cpu"))
        expected = exact_columns("train", batch.ids.numpy(), "float32")
        assert batch.states["start_index"].dtype == torch.int32
        for name in columns:
            assert np.array_equal(batch.states[name].numpy(), expected[name])


def test_a_fit_on_segments_serves_half_the_steps_and_tells_its_loss_on_the_holdout(tmp_path):
    store = write_segments(tmp_path / "store")
    student = fitted(store, tmp_path / "out")
    assert student.grids == {2: tuple(TIMES[::2].tolist())}
    columns = exact_columns("holdout", np.arange(32), "float32")
    start = columns["start_index"].astype(int)
    x_t, x_s = (torch.from_numpy(columns[name]) for name in ("segment_0", "segment_2"))
    target = progressive_target(VE(), x_t, x_s, TIMES[start], TIMES[start + 2])
    guess = student.build()(x_t, TIMES[start])
    weight = (1 / TIMES[start].square()).clamp(min=1)[:, None]
    last = json.loads((tmp_path / "out/metrics.jsonl").read_text().splitlines()[-1])
    assert last["holdout_error"] == pytest.approx((weight * (guess - target).square()).mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    "objective", [{"name": "progressive", "schedule": (4, 2)}, {"name": "progressive"}, {"name": "knowledge"}]
)
def test_only_a_student_of_half_the_steps_is_fitted_to_segments(tmp_path, objective):
    store = write_segments(tmp_path)
    with pytest.raises(ManifestMismatch, match=r"serve --objective.name progressive with --objective.schedule 2"):
        plan_trajectories(config_of(store, tmp_path / "out", objective=objective), number=None)


def test_rounding_blurs_targets_by_the_segment_s_end_alone(tmp_path):
    """Starts are exact: they were rounded before they were solved from."""
    columns = exact_columns("train", np.arange(4096), "float16")
    start, (x_t, x_s) = columns["start_index"].astype(int), (columns[f"segment_{k}"].astype(np.float64) for k in (0, 2))
    t, s = TIMES[start], TIMES[start + 2]
    exact = TEACHER.flow_map(torch.from_numpy(x_t), t, s)
    blurred, clean = (
        progressive_target(VE(), torch.from_numpy(x_t), end, t, s) for end in (torch.from_numpy(x_s), exact)
    )
    measured = [(blurred - clean)[start == k].square().mean().sqrt().item() for k in (0, 2)]
    told = rounding_error(VE(), TIMES[::2].tolist(), storage_dtype="float16", data_rms=0.7, exact_starts=True)
    assert told == pytest.approx(measured, rel=0.15)
