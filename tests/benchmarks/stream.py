"""How fast batches come: ours against eight other readers of the same samples, and against copying memory.

    python -m tests.benchmarks.stream [--samples 16384] [--rounds 3] [--peers installed|none]
    python -m tests.benchmarks.stream --device cuda --peers none       ours to a GPU, and the steps of a fit there

Five float16 states of 3x32x32 and a label, shuffled, batches of 256, warm page cache; each figure is of a process that
does nothing else, the median of rounds in which every reader is measured once. Readers with workers get the number of
0, 1 and 2 that suits them best. Memory is the peak above what the process and its children held before the reader was
opened: anonymous and shared pages by /proc/*/smaps_rollup, looked at every 10 ms; pages of mapped files are told apart.
The first batch is timed from opening; imports are not counted, and Ray is up before. `make bench` installs the others.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from tests.benchmarks import on_gpu
from tests.benchmarks.contest import FORMATS, Bench, contenders
from tests.benchmarks.samples import COLUMNS, STATE_BYTES, make_store

OURS, NEVER = "ours, {}, verify always", "ours, {}, verify never"
MEMMAPS, FIRST = "DataLoader over memmaps", 0.15
GOALS = (("webdataset", 15.0), ("mosaicml-streaming", 6.0), (MEMMAPS, 1.0))
"""Reader -> how many times its samples/s ours has, on the tars that webdataset reads, every byte checked."""

HEADS = ("samples/s", "lowest to highest", "MB/s", "webdatasets", "MosaicMLs", "memory, MiB", "mapped, MiB", "first, s")


class Results:
    """What a bench found, as tables and sentences."""

    def __init__(self, bench: Bench) -> None:
        self.found, self.failed = bench.found, bench.failed

    def values(self, label: str, columns: str, figure: str) -> list[float]:
        """A figure in every round; of the first row whose label begins so, none where it was not measured."""
        row = next((row for name, row in self.found.items() if name.startswith(label)), {})
        return [getattr(each, figure) for each in row.get(columns, [])]

    def ratio(self, mine: str, theirs: str, columns: str) -> float | None:
        """Samples/s of one to another's: the median of the rounds' ratios, None where one was not measured."""
        rates = (self.values(label, columns, "samples_per_s") for label in (mine, theirs))
        ratios = [my / their for my, their in zip(*rates, strict=False)]
        return statistics.median(ratios) if ratios else None

    def table(self, columns: str) -> Table:
        """Every row, for one choice of columns."""
        nbytes = len(COLUMNS[columns]) * STATE_BYTES + 8
        table = Table(box=box.MARKDOWN)
        table.add_column(f"{columns}, {nbytes / 1024:.0f} KiB a sample", no_wrap=True)
        for head in HEADS:
            table.add_column(head, justify="right")
        for label in [label for label, row in self.found.items() if columns in row]:
            table.add_row(label, *self._cells(label, columns, nbytes))
        return table

    def _cells(self, label: str, columns: str, nbytes: int) -> Iterator[str]:
        rates = self.values(label, columns, "samples_per_s")
        yield f"{statistics.median(rates):,.0f}"
        yield f"{min(rates):,.0f} to {max(rates):,.0f}"
        yield f"{statistics.median(rates) * nbytes / 1e6:,.0f}"
        for reader in ("webdataset", "mosaicml-streaming"):
            ratio = self.ratio(label, reader, columns)
            yield "" if ratio is None else f"{ratio:.1f}x"
        for figure in ("peak_mib", "files_mib"):
            yield f"{statistics.median(self.values(label, columns, figure)):,.0f}"
        yield f"{statistics.median(self.values(label, columns, 'first_batch_s')):.3f}"

    def notes(self) -> Iterator[str]:
        """Which versions were measured, and what was not."""
        names = {measures[0].name for row in self.found.values() for measures in row.values()}
        yield "With " + ", ".join(sorted(name for name in names if name[-1].isdigit()))
        yield from (f"{label}: not measured: {reason}" for label, reason in self.failed.items())

    def goals(self) -> Iterator[str]:
        """What was to be reached, and whether it was."""
        mine = OURS.format("tars")
        for columns in COLUMNS:
            for reader, least in GOALS:
                ratio = self.ratio(mine, reader, columns)
                if ratio is not None:
                    yield f"{_met(ratio >= least)}: {columns}, {mine}: {ratio:.1f}x {reader}; goal {least:g}x"
            if firsts := self.values(mine, columns, "first_batch_s"):
                first = statistics.median(firsts)
                yield f"{_met(first < FIRST)}: {columns}, {mine}: first batch after {first:.3f} s; goal {FIRST} s"
        for columns in COLUMNS:
            for name in FORMATS:
                share = self.ratio(NEVER.format(name), f"limit: C gather, {name}", columns)
                if share is not None:
                    yield f"{columns}, {NEVER.format(name)}: {share:.2f} of the C gather from the same files"


def _met(reached: bool) -> str:
    return "met" if reached else "MISSED"


def compare(samples: int, rounds: int, *, others: bool) -> Results:
    """Makes the samples, measures everybody."""
    with tempfile.TemporaryDirectory(prefix="limbeck-bench-") as folder:
        make_store(Path(folder), samples)
        bench = Bench(Path(folder), samples)
        chosen = bench.prepared([each for each in contenders() if others or not each.foreign])
        for _ in range(rounds):
            bench.round(chosen)
    return Results(bench)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=16384, help="samples of an epoch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", choices=("installed", "none"), default="installed")
    parser.add_argument("--device", default="cpu", help="cuda: ours to a GPU instead")
    given = parser.parse_args()
    if given.device != "cpu":
        on_gpu.main(given.samples, given.rounds, given.device)
        return
    results = compare(given.samples, given.rounds, others=given.peers != "none")
    print(f"{given.samples:,} samples, batches of 256, shuffled; medians of {given.rounds} rounds")
    for columns in COLUMNS:
        Console(width=160).print(results.table(columns))
    print(*results.notes(), *results.goals(), sep="\n")


if __name__ == "__main__":
    main()
