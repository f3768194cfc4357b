"""Ray Data: iter_torch_batches over Parquet files of Arrow tensors. Ray itself is up before the clock starts."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import pyarrow
import pyarrow.parquet
import ray
import ray.data

from tests.benchmarks.samples import STATES, every_shard

NAME = f"Ray Data {ray.__version__}"


def write(folder: Path) -> None:
    """A Parquet file a shard, states as Arrow's fixed-shape tensors."""
    (folder / "ray").mkdir()
    for at, shard in enumerate(every_shard(folder)):
        tensors = {name: pyarrow.FixedShapeTensorArray.from_numpy_ndarray(shard[name]) for name in STATES}
        table = pyarrow.table({"condition": shard["condition"], **tensors})
        pyarrow.parquet.write_table(table, folder / "ray" / f"{at:03d}.parquet", use_dictionary=False)


def prepare() -> None:
    """A Ray of its own on this machine."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=2 << 30)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def read(folder: Path, columns: tuple[str, ...], batch: int) -> Iterator[int]:
    """Files shuffled, then samples in a buffer of 1,024."""
    samples = ray.data.read_parquet(str(folder / "ray"), columns=["condition", *columns], shuffle="files")
    while True:
        for states in samples.iter_torch_batches(batch_size=batch, local_shuffle_buffer_size=1024):
            yield len(states["condition"])
