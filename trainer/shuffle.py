"""`limbeck shuffle`: how near an order is to a full random shuffle, and how few shards it needs at a time."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import tyro
from pydantic import Field, model_validator
from rich.console import Console
from rich.table import Table

from limbeck.storage_schemas.command_line import Config
from limbeck.storage_schemas.dataset import open_dataset
from limbeck.storage_schemas.errors import UsageError, usage_errors
from limbeck.storage_schemas.ids import IdSet, id_set
from limbeck.storage_schemas.places import StorePlace
from limbeck.storage_schemas.store import Store
from limbeck.trainer.reading.blocks import Blocks
from limbeck.trainer.reading.order import Ints, Lanes, default_batch, default_block, default_lanes, default_window


class ShuffleConfig(Config):
    """Measure how well an order shuffles, beside a full random shuffle: no sample is read."""

    data: StorePlace | None = Field(None, description="Store whose train split is ordered: a folder or s3://... URI.")
    dataset: str = Field("main", description="Name of the dataset in the store.")
    manifest: int | None = Field(None, ge=1, description="Number of the manifest; default: the latest one.")
    rows: int | None = Field(None, ge=1, le=10**15, description="Number of samples to order, instead of a store's.")
    samples_per_shard: int = Field(2048, ge=1, description="Samples in a shard, with --rows.")
    batch_size: int | None = Field(
        None, ge=1, description="Samples of a step; default: 256, or whole lanes up to it, and no more than there are."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the order.")
    lanes: int | None = Field(None, ge=1, description="Lanes of the order; default: gcd(batch size, 8).")
    block: int | None = Field(None, ge=1, description="Consecutive ids that stay near each other; default: by size.")
    count: int = Field(2_000_000, ge=1, description="Rows to look at; of a longer epoch, stretches all over it.")
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = Field(False, description="Print JSON instead of a table.")

    @model_validator(mode="after")
    def _check(self) -> "ShuffleConfig":
        if (self.data is None) == (self.rows is None):
            raise ValueError("give --data STORE, or --rows N for samples that are not there: one of them")
        if self.lanes and self.batch_size and self.batch_size % self.lanes:
            raise ValueError(f"{self.lanes} lanes do not divide batch_size {self.batch_size}; choose a divisor")
        return self


@dataclass(frozen=True)
class Shards:
    """Where samples are stored, a shard each entry, in order of ids: first id, number of samples, bytes (or None)."""

    starts: Ints
    samples: Ints
    nbytes: Ints | None = None

    def of(self, ids: Ints) -> Ints:
        """Index of each id's shard."""
        return np.asarray(np.searchsorted(self.starts, ids, side="right") - 1)


@dataclass(frozen=True)
class Figure:
    """A figure of an order: as found, as expected of a full random shuffle, and as it should be."""

    name: str
    found: float | None
    full_shuffle: float
    ideal: float


def run_shuffle(config: ShuffleConfig) -> int:
    """The command: measure and show."""
    measured = measure(config)
    if config.as_json:
        print(json.dumps(measured, indent=1))
    else:
        show(measured, Console(markup=False, emoji=False))
    return 0


def measure(config: ShuffleConfig) -> dict[str, Any]:
    """Everything that the command prints."""
    ids, digest, shards, row_bytes = _stored(config) if config.data else _imagined(config)
    size = config.batch_size or default_batch(config.lanes, rows=ids.count)
    lanes = config.lanes or default_lanes(size)
    block = config.block or default_block(ids.count, lanes)
    with usage_errors():
        order = Lanes(ids, digest, config.seed, lanes, block, window=default_window(lanes, block, row_bytes))
    if ids.count < size:
        raise UsageError(f"{ids.count} samples fill no batch of {size}: give a smaller --batch-size or fewer --lanes")
    stretches = list(_stretches(order, size, config.count))
    return {
        "samples": ids.count,
        "shards": len(shards.starts),
        "batch_size": size,
        "seed": config.seed,
        "lanes": lanes,
        "block": order.block,
        "looked_at": sum(batches.size for _, batches in stretches),
        "figures": [asdict(figure) for figure in _figures(order, shards, stretches, config)],
        "window": _working_set(order, shards, config.count),
    }


def _imagined(config: ShuffleConfig) -> tuple[IdSet, str, Shards, int]:
    count = config.rows or 0
    starts = np.arange(0, count, config.samples_per_shard)
    samples = np.minimum(count - starts, config.samples_per_shard)
    return id_set(0, count, []), f"{count} rows", Shards(starts, samples), 1


def _stored(config: ShuffleConfig) -> tuple[IdSet, str, Shards, int]:
    dataset = open_dataset(Store.open(config.data or ""), config.dataset, config.manifest)
    ids, shards = dataset.ids("train"), dataset.shards("train")
    # A block of one id: a shard has fewer samples than rows where the manifest's window ends.
    below = Blocks(ids, 1).samples_before
    samples, nbytes = below(shards.stops) - below(shards.starts), shards.table["bytes"].to_numpy()
    stored = Shards(shards.starts, samples, nbytes)
    return ids, dataset.manifest.content_digest, stored, dataset.recipe.sample_bytes


def _batches(order: Lanes, size: int, first: int, past: int, *, epoch: int = 1) -> Ints:
    """Batches [first, past) from an epoch's start on: ids [past - first, size]. A run's first has small windows."""
    rows, start = size // order.lanes, order.epoch_start(epoch)
    ids = order.rows(start + first * rows, start + past * rows, range(order.lanes))
    ids = ids.reshape(order.lanes, past - first, rows)
    return ids.transpose(1, 0, 2).reshape(past - first, size)


def _stretches(order: Lanes, size: int, count: int) -> Iterator[tuple[int, Ints]]:
    """(number of the first batch, batches) of an epoch: all of them, or stretches of a window in even steps."""
    total = order.ids.count // size
    window = order.window_at(order.epoch_start(1))
    length = (
        total if order.ids.count <= count else min(total, max(1, (window.stop - window.start) * order.lanes // size))
    )
    number = max(1, min(count, order.ids.count) // (length * size))
    for i in range(number):
        first = i * (total - length) // max(1, number - 1)
        yield first, _batches(order, size, first, first + length)


def _figures(
    order: Lanes, shards: Shards, stretches: list[tuple[int, Ints]], config: ShuffleConfig
) -> Iterator[Figure]:
    n, size = order.ids.count, stretches[0][1].shape[1]
    batches = np.concatenate([ids for _, ids in stretches])
    positions = np.concatenate([first * size + np.arange(ids.size) for first, ids in stretches])
    stored = shards.of(batches)
    moved = displacement(positions, order.ids.positions(batches.ravel()), n)
    yield Figure("mean displacement / n", moved, (1 - n**-2) / 3, (1 - n**-2) / 3)
    pairs, expected = adjacent_pairs(stored), expected_pairs(shards.samples)
    yield Figure("adjacent pairs from one shard", pairs, expected, float(len(shards.starts) == 1))
    most = float(min(size, len(shards.starts)))
    yield Figure("distinct shards in a batch", distinct(stored), expected_distinct(shards.samples, size), most)
    correlation = _epochs_correlation(order, size) if 1 < n <= config.count else None
    yield Figure("rank correlation of epochs", correlation, 0.0, 0.0)


def displacement(positions: Ints, ranks: Ints, count: int) -> float:
    """Mean |position in the order - position by id| / count; 1/3 for a full shuffle, 0 for none."""
    return float(np.abs(positions - ranks).mean() / count)


def adjacent_pairs(shards: Ints) -> float:
    """Share of neighbours in a batch that are from the same shard; shards: [batches, B]."""
    return float((shards[:, 1:] == shards[:, :-1]).mean()) if shards.shape[1] > 1 else 0.0


def expected_pairs(samples: Ints) -> float:
    """The same of a full shuffle: sum m (m - 1) / (n (n - 1)), for shards of m of the n samples."""
    n, m = int(samples.sum()), samples.astype(np.float64)
    return float((m / n * (m - 1)).sum() / max(1, n - 1))


def distinct(shards: Ints) -> float:
    """Mean number of shards in a batch; shards: [batches, B]."""
    changes = np.diff(np.sort(shards, axis=1), axis=1) != 0
    return float(1 + changes.sum(axis=1).mean())


def expected_distinct(samples: Ints, size: int) -> float:
    """The same of a full shuffle: sum 1 - C(n - m, size) / C(n, size), for shards of m of the n samples."""
    n, (sizes, times) = int(samples.sum()), np.unique(samples, return_counts=True)
    left = n - np.arange(size, dtype=np.float64)
    none = [np.exp(np.log1p(-m / left).sum()) if m <= n - size else 0.0 for m in sizes.tolist()]
    return float((times * (1 - np.array(none))).sum())


def rank_correlation(one: Ints, other: Ints) -> float:
    """Spearman's, where positions are ranks. 0 expected of independent shuffles, deviation 1 / sqrt(n - 1)."""
    return float(np.corrcoef(one, other)[0, 1])


def _epochs_correlation(order: Lanes, size: int) -> float:
    """Rank correlation of each id's places in two epochs, as far as whole batches go."""
    total, places = order.ids.count // size, np.full((2, order.ids.count), -1)
    for epoch in range(2):
        ids = _batches(order, size, 0, total, epoch=1 + epoch).ravel()
        places[epoch, order.ids.positions(ids)] = np.arange(ids.size)
    one, other = places[:, (places >= 0).all(axis=0)]
    return rank_correlation(one, other)


def _working_set(order: Lanes, shards: Shards, count: int) -> dict[str, Any]:
    """Shards that a window of all lanes is read from, the fewest that hold so many rows, and their files' bytes."""
    start, past = order.epoch_start(1), order.epoch_start(2)  # the first epoch's first windows are small
    length = (window := order.window_at(start)).stop - window.start
    rows, number = length * order.lanes, (past - start) // length
    windows = np.linspace(start, past - 1, max(1, min(64, count // (length * order.lanes), number))).astype(np.int64)
    ids = (order.window_ids(order.window_at(int(row)), range(order.lanes)) for row in windows)
    touched = [np.unique(shards.of(window)) for window in ids]
    return {
        "rows": rows,
        "shards_mean": float(np.mean([len(found) for found in touched])),
        "shards_most": max(len(found) for found in touched),
        "shards_full_shuffle": expected_distinct(shards.samples, rows),
        "shards_least": int(np.searchsorted(np.cumsum(np.sort(shards.samples)[::-1]), rows) + 1),
        "bytes_mean": None if shards.nbytes is None else float(np.mean([shards.nbytes[i].sum() for i in touched])),
    }


def show(measured: dict[str, Any], console: Console) -> None:
    """Print what was measured as a table."""
    window = measured["window"]
    console.print(_title(measured), highlight=False)
    table = Table()
    for heading in ("", "this order", "full shuffle", "ideal"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in measured["figures"]:
        table.add_row(row["name"], *(_figure(row[key]) for key in ("found", "full_shuffle", "ideal")))
    cells = [window[key] for key in ("shards_mean", "shards_full_shuffle", "shards_least")]
    table.add_row("shards read for a window", *map(_figure, cells))
    console.print(table)
    nbytes = "" if window["bytes_mean"] is None else f", {window['bytes_mean'] / 2**20:.1f} MiB of files"
    line = f"a window of all lanes: {window['rows']:,} rows of at most {window['shards_most']:,} shards{nbytes}"
    console.print(line, highlight=False)
    if measured["figures"][-1]["found"] is None:
        console.print(f"the rank correlation takes whole epochs: --count {measured['samples']}", highlight=False)


def _title(measured: dict[str, Any]) -> str:
    samples = f"{measured['samples']:,} samples in {measured['shards']:,} shards, batches of {measured['batch_size']:,}"
    return (
        f"{samples}, {measured['lanes']} lanes, blocks of {measured['block']}; {measured['looked_at']:,} rows looked at"
    )


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
