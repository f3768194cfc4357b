"""MosaicML streaming on its own MDS shards, without the text and vision readers that it imports at its start."""

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from tests.benchmarks.samples import SHAPE, STATES, every_sample


def _stand_in(name: str, *classes: str) -> None:
    """A module that is imported but not used: it would bring torchvision, and with it another torch."""
    sys.modules[name] = types.ModuleType(name)
    for each in classes:
        setattr(sys.modules[name], each, type(each, (), {}))


_stand_in("transformers")
_stand_in("transformers.feature_extraction_utils", "BatchFeature")
_stand_in("transformers.tokenization_utils_base", "BatchEncoding")
for part in ("text", "vision", "multimodal"):
    _stand_in(f"streaming.{part}")

import streaming  # noqa: E402
from streaming.base.util import clean_stale_shared_memory  # noqa: E402

NAME = f"mosaicml-streaming {streaming.__version__}"


def write(folder: Path) -> None:
    """MDS shards of 64 MiB, its default."""
    columns = {"condition": "int", **{name: f"ndarray:float16:{','.join(map(str, SHAPE))}" for name in STATES}}
    with streaming.MDSWriter(out=str(folder / "mds"), columns=columns) as writer:
        for sample in every_sample(folder):
            writer.write({**sample, "condition": int(sample["condition"])})


class Wanted(streaming.StreamingDataset):
    """Only the columns that are asked for: MDS decodes whole samples, but fewer are put into the batch."""

    def __init__(self, columns: tuple[str, ...], **options: Any) -> None:
        super().__init__(**options)
        self._columns = columns

    def __getitem__(self, at: Any) -> Any:
        sample = super().__getitem__(at)
        return {name: sample[name] for name in self._columns}


def read(folder: Path, columns: tuple[str, ...], batch: int, *, workers: int) -> Iterator[int]:
    """Its own shuffle (py1e), within its local folder."""
    clean_stale_shared_memory()
    samples = Wanted(("condition", *columns), local=str(folder / "mds"), shuffle=True, batch_size=batch)
    loader = DataLoader(samples, batch_size=batch, num_workers=workers, persistent_workers=workers > 0)
    while True:
        for states in loader:
            assert isinstance(states["output"], torch.Tensor)
            yield len(states["condition"])
