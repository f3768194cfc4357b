import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from limbeck.storage_schemas import paths
from limbeck.storage_schemas.arrow import arrow_table, arrow_tables, as_lists
from limbeck.storage_schemas.commit import FOOTER
from limbeck.storage_schemas.dataset import Dataset, open_dataset, put_recipe, seal
from limbeck.storage_schemas.errors import CorruptShard
from limbeck.storage_schemas.layout import Layout
from limbeck.storage_schemas.manifest import ManifestDraft, Window
from limbeck.storage_schemas.shards import Shard, ShardTable
from limbeck.storage_schemas.store import Store

WINDOW = Window(train=(5, 60), holdout=(0, 8))
QUARANTINED = (3, 20)
MakeDataset = Callable[..., Dataset]


@pytest.fixture
def make_dataset(make_recipe, commit_task, tmp_path) -> MakeDataset:
    """Train ids 5 to 59 without 20, in shards of 16."""

    def make(format: str, **changes: object) -> Dataset:
        store = Store.create(str(tmp_path / "store"))
        recipe, layout = make_recipe(**changes), Layout(format=format, samples_per_shard=16)
        put_recipe(store, recipe)
        commits = []
        for task in WINDOW.tasks(16):
            lost = tuple(i for i in QUARANTINED if task.split == "train" and task.start <= i < task.stop)
            commits.append(commit_task(store, recipe, layout, task, tmp_path, lost))
        draft = ManifestDraft(
            dataset="main", parent=None, writer=paths.new_attempt(), recipe_id=recipe.id, layout=layout, window=WINDOW
        )
        seal(store, draft, ShardTable.of([Shard.of(commit) for commit in commits]))
        return open_dataset(store)

    return make


def expected(dataset: Dataset, name: str) -> np.ndarray:
    parts = [dataset.read(shard)[name][dataset.rows_inside(shard)] for shard in dataset.shards("train")]
    return np.concatenate(parts)


def numbers(tables: Sequence[pa.Table], name: str) -> np.ndarray:
    return np.concatenate([table[name].combine_chunks().to_numpy_ndarray() for table in tables])


@pytest.mark.parametrize("storage_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("format", ["parquet", "webdataset"])
def test_tables_hold_the_window_as_tensors(make_dataset, make_columns, format, storage_dtype):
    dataset = make_dataset(format, storage_dtype=storage_dtype)
    tables = list(arrow_tables(dataset))
    ids = np.setdiff1d(np.arange(5, 60), [20])
    assert np.concatenate([table["sample_id"].to_numpy() for table in tables]).tolist() == ids.tolist()
    for task, table in zip(WINDOW.tasks(16), tables, strict=False):
        rows = make_columns(dataset.recipe, task)
        kept = np.isin(rows["sample_id"], ids)
        assert table["condition"].to_pylist() == rows["condition"][kept].tolist()
        for name in ("noise", "state_002", "output"):
            tensors = table[name].combine_chunks()
            assert tensors.type.shape == [2, 3, 5]
            np.testing.assert_array_equal(tensors.to_numpy_ndarray(), rows[name][kept])
    field = tables[0].schema.field("output")
    assert (field.metadata[b"dtype"].decode(), json.loads(field.metadata[b"shape"])) == (storage_dtype, [2, 3, 5])
    assert not field.nullable


def test_columns_and_splits_are_chosen(make_dataset):
    dataset = make_dataset("parquet")
    (table,) = arrow_tables(dataset, "holdout", ["output", "sample_id"])
    assert table.column_names == ["sample_id", "output"]
    assert table["sample_id"].to_pylist() == list(range(8))


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
def test_a_flipped_bit_is_not_handed_out(make_dataset, format):
    dataset = make_dataset(format)
    shard = dataset.shards("train")[1]
    chunk = next(chunk for chunk in dataset.commit(shard).chunks if chunk.column in ("output", "*"))
    path = Path(dataset.store.local_path(shard.path))
    data = bytearray(path.read_bytes())
    data[chunk.offset + chunk.length // 2] ^= 1
    path.write_bytes(data)
    assert chunk.column != FOOTER
    with pytest.raises(CorruptShard, match="does not match its checksum"):
        list(arrow_tables(dataset))


@pytest.mark.parametrize("shape", [(6,), (2, 3, 5)])
def test_tensors_as_lists_share_their_memory(make_dataset, shape):
    dataset = make_dataset("parquet", sample_shape=shape)
    table = arrow_table(dataset, dataset.shards("train")[0], ["sample_id", "output"])
    lists = as_lists(table.slice(2, 5))
    rows = numbers([table], "output")[2:7]
    assert lists["output"].to_pylist() == rows.tolist()
    assert lists["sample_id"].to_pylist() == table["sample_id"].to_pylist()[2:7]
    assert (
        lists["output"].chunk(0).flatten().buffers()[-1].address
        == table["output"].chunk(0).storage.buffers()[-1].address
    )
    assert len(as_lists(table.slice(0, 0))) == 0


def test_hugging_face_datasets_sees_arrays(make_dataset):
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    dataset = make_dataset("webdataset")
    features = datasets.Features(
        {"sample_id": datasets.Value("int64"), "output": datasets.Array3D((2, 3, 5), "float16")}
    )
    tables = [
        datasets.table.table_cast(as_lists(table), features.arrow_schema)
        for table in arrow_tables(dataset, columns=["sample_id", "output"])
    ]
    ours = datasets.concatenate_datasets([datasets.Dataset(table) for table in tables])
    assert ours.features == features
    batch = ours.with_format("numpy", dtype=np.float16)[:]
    np.testing.assert_array_equal(batch["output"], expected(dataset, "output"))
    assert ours["sample_id"][:] == expected(dataset, "sample_id").tolist()


@pytest.mark.faults
def test_ray_data_reads_shards_in_its_workers(make_dataset):
    pytest.importorskip("pandas", reason="ray.data needs pandas: pip install 'ray[data]'")
    import ray.data

    dataset = make_dataset("parquet")
    shards = dataset.shards("train")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        local = ray.data.from_arrow(list(arrow_tables(dataset, columns=["sample_id", "output"])))
        remote = ray.data.range(len(shards)).map_batches(
            lambda batch: arrow_table(dataset, shards[int(batch["id"][0])], ["sample_id", "output"]), batch_size=1
        )
        for ours in (local, remote):
            batches = list(ours.iter_batches(batch_size=7))
            ids = np.concatenate([batch["sample_id"] for batch in batches])
            order = np.argsort(ids)
            np.testing.assert_array_equal(ids[order], expected(dataset, "sample_id"))
            output = np.concatenate([batch["output"] for batch in batches])
            np.testing.assert_array_equal(output[order], expected(dataset, "output"))
    finally:
        ray.shutdown()
