"""What every reader of the benchmark reads: five float16 states of 3x32x32 and a label, in our formats and theirs."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from limbeck.diffusion.gaussian import GaussianTeacher
from limbeck.diffusion.process import VE
from limbeck.storage_schemas.command_line import main
from limbeck.storage_schemas.dataset import Dataset, open_dataset
from limbeck.storage_schemas.program import COMMANDS
from limbeck.storage_schemas.record import Columns
from limbeck.storage_schemas.store import Store

SHAPE = (3, 32, 32)
STATE_BYTES = 2 * 3 * 32 * 32
STATES = ("noise", "state_001", "state_002", "state_003", "output")
COLUMNS = {"pair": ("noise", "output"), "all": STATES}
FORMS = {"parquet": "main", "webdataset": "tars"}
"""Format -> name of its dataset in the store."""


def teacher() -> GaussianTeacher:
    """A closed form at the size of small colour images: the bytes are what matters here."""
    made = GaussianTeacher(VE(), mean=0.0, variance=0.25)
    made.sample_shape = SHAPE  # type: ignore[assignment]
    return made


def make_store(folder: Path, samples: int) -> None:
    """The samples by `generate` as Parquet, and by `convert` as the tars that webdataset reads, too."""
    words = f"generate --teacher python:tests.benchmarks.samples:teacher --store {folder}/store --count {samples}"
    words += " --holdout 0 --solver.name ddim --solver.steps 4 --states 1 2 3 --samples-per-shard 1024 --runner local"
    assert main(COMMANDS, words.split()) == 0
    convert = f"convert {folder}/store --to webdataset --as {FORMS['webdataset']}"
    assert main(COMMANDS, convert.split()) == 0


def opened(folder: Path, form: str) -> Dataset:
    """The dataset in one of our formats."""
    return open_dataset(Store.open(f"{folder}/store"), FORMS[form])


def tar_paths(folder: Path) -> list[str]:
    """Where the tars are."""
    dataset = opened(folder, "webdataset")
    return [str(dataset.store.local_path(shard.path)) for shard in dataset.shards("train")]


def every_shard(folder: Path) -> Iterator[Columns]:
    """The samples, for a reader that keeps them its own way: condition int64 [n], each state float16 [n, 3, 32, 32]."""
    dataset = opened(folder, "parquet")
    for shard in dataset.shards("train"):
        yield dataset.read(shard, ["condition", *STATES])


def every_sample(folder: Path) -> Iterator[dict[str, np.ndarray]]:
    """The same, one by one."""
    for shard in every_shard(folder):
        for row in range(len(shard["condition"])):
            yield {name: values[row] for name, values in shard.items()}
