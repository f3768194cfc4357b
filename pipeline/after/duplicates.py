"""Which samples share one x_T: exact, over any number of samples, in bounded memory.

Every x_T becomes a record of 24 bytes (a 128-bit xxh3 of its bytes, its id), which is spilt to one of P files in a
scratch folder by its leading bits; each file is then sorted alone. 10^9 samples take 24 GB of scratch and, in memory,
what one file of 64 MiB on average needs to be sorted, about 220 MB. A file that is far larger than that is full of
repeats, and its first records show them. Rows of one hash are compared byte for byte before they count as duplicates;
an x_T of 16 bytes or fewer is its own hash.

In few dimensions honest noises do collide once they are rounded: two coordinates in float16 come to about 10^8 points,
so that among 16,384 samples one or two pairs are equal, and among a million some 6,000. `expected_pairs` is that
birthday bound: a window fails for having more than it allows, or for any x_T that is not its own id's.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
import xxhash

from limbeck.storage_schemas.record import SPLITS, Split, StorageDtype

RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("key", "<u8")])
FILE_BYTES = 64 << 20
WRITE_BUFFER = 1 << 17
EXACT_BYTES = 16
LISTED = 10_000
"""Groups of equal noises that are kept and looked at one by one, GROUP samples of each; the rest are counted."""

GROUP = 100

DIGITS = {"float16": (11, -14), "bfloat16": (8, -126), "float32": (24, -126)}
"""Binary digits of a significand, and the least exponent of a normal number."""


@dataclass(frozen=True)
class Sample:
    """One sample of either split."""

    split: Split
    id: int

    def __str__(self) -> str:
        return f"{self.split} {self.id}"


@dataclass(frozen=True)
class Repeats:
    """How many pairs share a hash, the samples of the first groups that do, and whether all records were looked at."""

    pairs: int
    groups: tuple[tuple[Sample, ...], ...]
    complete: bool


class Fingerprints:
    """The records of all samples so far; a context, whose files are closed at its end. `folder` is scratch."""

    def __init__(self, folder: Path, samples: int) -> None:
        """`samples`: about how many will come."""
        self._paths = [folder / f"{part:05d}" for part in range(-(-samples * RECORD.itemsize // FILE_BYTES) or 1)]
        self._files = [open(path, "wb", buffering=WRITE_BUFFER) for path in self._paths]  # noqa: SIM115

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()

    def add(self, records: np.ndarray) -> None:
        """Spill what `fingerprints` made."""
        part = _mixed(records) % np.uint64(len(self._files))
        order = np.argsort(part, kind="stable")
        ends = np.searchsorted(part[order], np.arange(len(self._files), dtype=np.uint64), side="right")
        for file, mine in zip(self._files, np.split(records[order], ends[:-1]), strict=True):
            file.write(mine.tobytes())

    def repeats(self) -> Repeats:
        """What occurs more than once."""
        pairs, groups, complete = 0, list[tuple[Sample, ...]](), True
        for file, path in zip(self._files, self._paths, strict=True):
            file.flush()
            records = np.fromfile(path, RECORD, count=4 * FILE_BYTES // RECORD.itemsize)
            complete &= records.nbytes == path.stat().st_size
            for group in _equal_runs(records):
                pairs += len(group) * (len(group) - 1) // 2
                if len(groups) < LISTED:
                    groups.append(tuple(_sample(key) for key in sorted(group["key"][:GROUP].tolist())))
        return Repeats(pairs, tuple(groups), complete)


def fingerprints(split: Split, ids: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Records of stored noises [n, ...] of ids [n]."""
    records = np.empty(len(ids), RECORD)
    rows = np.ascontiguousarray(noise).reshape(len(ids), math.prod(noise.shape[1:])).view(np.uint8)
    if rows.shape[1] <= EXACT_BYTES:
        padded = np.zeros((len(ids), EXACT_BYTES), np.uint8)
        padded[:, : rows.shape[1]] = rows
        halves = padded.view("<u8")
    else:
        halves = np.frombuffer(b"".join(xxhash.xxh3_128_digest(row.data) for row in rows), "<u8").reshape(-1, 2)
    records["high"], records["low"] = halves[:, 0], halves[:, 1]
    records["key"] = ids.astype(np.uint64) | np.uint64(SPLITS.index(split) << 63)
    return records


def _mixed(records: np.ndarray) -> np.ndarray:
    """Well spread bits of each hash: the bytes of a small x_T are not."""
    mixed = (records["high"] ^ (records["low"] * np.uint64(0x9E3779B97F4A7C15))) * np.uint64(0xD6E8FEB86659FD93)
    return mixed >> np.uint64(32)


def _equal_runs(records: np.ndarray) -> Iterator[np.ndarray]:
    """Runs of two or more records with one hash."""
    ordered = records[np.lexsort((records["low"], records["high"]))]
    same = (ordered["high"][1:] == ordered["high"][:-1]) & (ordered["low"][1:] == ordered["low"][:-1])
    edges = np.flatnonzero(np.diff(same.astype(np.int8), prepend=0, append=0))
    for first, last in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        yield ordered[first : last + 1]


def _sample(key: int) -> Sample:
    return Sample(SPLITS[key >> 63], key & (1 << 63) - 1)


def expected_pairs(samples: int, sigma_T: float, dtype: StorageDtype, d: int) -> tuple[float, float]:
    """Mean and variance of the number of pairs with equal x_T among honest ones: [d] coordinates, rounded to the dtype.

    Mean n(n-1)/2 P_2^d, variance mean + n^3 (P_3^d - P_2^2d), where P_k = sum_v P(x = v)^k: of two, of three alike.
    """
    two, three = (_alike(k, sigma_T, dtype) ** d for k in (2, 3))
    mean = samples * (samples - 1) / 2 * two
    return mean, mean + float(samples) ** 3 * max(0.0, three - two**2)


def collision_tail(pairs: int, mean: float, variance: float) -> float:
    """P(as many pairs or more): Poisson, stretched to the variance (pairs of one group come together)."""
    if pairs == 0:
        return 1.0
    if mean == 0:
        return 0.0
    stretch = variance / mean
    args = torch.tensor([pairs / stretch, mean / stretch], dtype=torch.float64)
    return float(torch.special.gammainc(args[0], args[1]))


def _alike(k: int, sigma: float, dtype: StorageDtype) -> float:
    """Sum over the values v of a dtype of P(v)^k, for N(0, sigma^2): spacing^(k-1) times the integral of density^k.

    Between two powers of two the spacing is one; density^k is a normal one of variance sigma^2/k, up to a factor.
    """
    digits, least = DIGITS[dtype]
    top = math.ceil(math.log2(40 * sigma))
    edges = [0.0, *(2.0**e for e in range(min(least + 1, top - 1), top + 1))]
    factor = (2 * math.pi * sigma**2) ** ((1 - k) / 2) / math.sqrt(k)
    total = 0.0
    for low, high in pairwise(edges):
        spacing = 2.0 ** (math.log2(high) - digits)
        total += spacing ** (k - 1) * (_mass(high * math.sqrt(k) / sigma) - _mass(low * math.sqrt(k) / sigma))
    return factor * total


def _mass(z: float) -> float:
    """P(|N(0, 1)| < z)."""
    return math.erf(z / math.sqrt(2))
