"""Who is measured by `stream`, and the rounds in which they are."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks import peers
from tests.benchmarks.child import Failed, Figures, measured, written
from tests.benchmarks.samples import COLUMNS

FORMATS = {"Parquet": "parquet", "tars": "webdataset"}
WORKERS = (0, 1, 2)
OWN = ("ours", "limits", "by_webdataset")
"""Readers of our own files; every other writes a copy of the samples its own way."""


@dataclass(frozen=True)
class Contender:
    """A row of the table."""

    label: str
    reader: str
    options: dict[str, Any] = field(default_factory=dict)
    workers: tuple[int, ...] = ()
    peer: bool = False

    @property
    def foreign(self) -> bool:
        return self.reader not in ("ours", "limits")

    @property
    def python(self) -> str:
        return str(peers.PYTHON) if self.peer else sys.executable

    def with_workers(self, workers: int) -> "Contender":
        told = f"{self.label}, {workers} worker{'s' * (workers != 1)}"
        return Contender(told, self.reader, {**self.options, "workers": workers}, (), self.peer)


def contenders() -> Iterator[Contender]:
    """In the table's order; of a peer, before its number of workers is chosen."""
    for name, form in FORMATS.items():
        for verify in ("always", "first", "never"):
            yield Contender(f"ours, {name}, verify {verify}", "ours", {"form": form, "verify": verify})
    for name, form in FORMATS.items():
        options = {"form": form, "verify": "always", "loader": True}
        yield Contender(f"ours in a DataLoader, {name}, verify always", "ours", options)
    yield Contender("webdataset, the same tars", "by_webdataset", workers=WORKERS)
    yield Contender("mosaicml-streaming", "by_mosaicml", workers=WORKERS, peer=True)
    yield Contender("litdata", "by_litdata", workers=WORKERS, peer=True)
    yield Contender("datasets", "by_datasets", peer=True)
    yield Contender("Ray Data", "by_ray", peer=True)
    yield Contender("Lance", "by_lance", peer=True)
    yield Contender("DataLoader over memmaps", "by_memmaps", workers=WORKERS)
    yield Contender("SPDL threads over memmaps", "by_spdl", workers=WORKERS[1:], peer=True)
    for name, form in FORMATS.items():
        yield Contender(f"limit: C gather, {name}", "limits", {"form": form})
    yield Contender("limit: memory copy", "limits")


class Bench:
    """Measures contenders on the samples of a folder and keeps what it found, or why not, by row and columns."""

    def __init__(self, folder: Path, samples: int) -> None:
        self.folder, self.samples = folder, samples
        self.found: dict[str, dict[str, list[Figures]]] = {}
        self.failed: dict[str, str] = {}

    def prepared(self, given: list[Contender]) -> list[Contender]:
        """Contenders with their copies written and their workers chosen, by the pair."""
        return [self._with_best_workers(each) for each in given if self._written(each)]

    def _written(self, contender: Contender) -> bool:
        if contender.reader in OWN:
            return True
        if contender.peer and not peers.PYTHON.exists():
            self.failed[contender.label] = "not installed: run python -m tests.benchmarks.peers"
            return False
        try:
            written(contender.python, contender.reader, self.folder)
        except Failed as error:
            self.failed[contender.label] = str(error)
            return False
        return True

    def _with_best_workers(self, contender: Contender) -> Contender:
        tried = [contender.with_workers(workers) for workers in contender.workers]
        rates = [(found.samples_per_s, each) for each in tried if (found := self._measured(each, "pair"))]
        return max(rates, key=lambda rate: rate[0])[1] if rates else contender

    def _measured(self, contender: Contender, columns: str) -> Figures | None:
        print(f"{contender.label}, {columns}", file=sys.stderr)
        try:
            return measured(contender.python, contender.reader, self.folder, columns, self.samples, contender.options)
        except Failed as error:
            self.failed[contender.label] = str(error)
            return None

    def round(self, given: list[Contender]) -> None:
        """Every contender once, pair and all."""
        for contender in given:
            for columns in COLUMNS:
                if contender.label not in self.failed and (figures := self._measured(contender, columns)):
                    self.found.setdefault(contender.label, {}).setdefault(columns, []).append(figures)
