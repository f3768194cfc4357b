"""How long a fit waits for its data, as it logs itself, and whether its memory grows with the data.

    python -m tests.benchmarks.waiting [--steps 600] [--count 16384] [--sizes 2048 16384]

Waiting: the digits run of `make demo`, knowledge distillation in batches of 256 by the default student, on a folder
and on s3:// with an empty disk cache, from a server on this machine behind a proxy that adds 20 ms to each request. The
share is that of all steps together; the run's first batch is told apart, as nothing can be read ahead of it.
Memory: the peak of anonymous and shared pages of a fit of a small student on 3x32x32 samples, its imports included.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.commands import LIMBECK
from tests.benchmarks.samples import make_store
from tests.benchmarks.watch import MIB, memory_of
from tests.proxy import Proxy
from tests.servers import BUCKET, seaweed

DIGITS = "--teacher builtin:digits --holdout 0 --solver.name heun --solver.steps 16 --states 2 4 6 8 10 12 14"
LATENCY = 0.020
GOALS = {"folder": 0.01, "s3://, 20 ms a request, cold cache": 0.02}


@dataclass(frozen=True)
class Waited:
    """Of one fit: its share of time waiting for data, seconds to its first batch, samples a second."""

    share: float
    first_batch_s: float
    samples_per_s: float

    @classmethod
    def of(cls, out: Path) -> "Waited":
        """From the run's own metrics; the lines are of equally many steps."""
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        seconds = [1 / line["samples_per_s"] for line in lines]
        waited = sum(line["data_wait"] * spent for line, spent in zip(lines, seconds, strict=True))
        return cls(waited / sum(seconds), lines[0]["first_batch_s"], len(lines) / sum(seconds))


def program(*words: str, environment: dict[str, str] | None = None) -> None:
    """A command to its end."""
    subprocess.run([LIMBECK, *words], check=True, env=os.environ | (environment or {}), stdout=subprocess.DEVNULL)


def fit_words(store: str, out: Path, steps: int, *options: str) -> list[str]:
    """The fit's command line; it logs and does nothing else beside its steps."""
    fixed = f"--data {store} --out {out} --objective.name knowledge --steps {steps} --batch-size 256 --warmup 10"
    return ["fit", *fixed.split(), "--validate-every", "0", "--log-every", "50", *options]


def on_a_folder(folder: Path, count: int, steps: int, *options: str) -> Waited:
    """The digits run on a folder."""
    store, out = str(folder / "digits"), folder / "fit"
    program("generate", *DIGITS.split(), "--store", store, "--count", str(count), "--runner", "local")
    program(*fit_words(store, out, steps, *options))
    return Waited.of(out)


def on_s3(folder: Path, count: int, steps: int) -> Waited:
    """The digits run on a bucket; only the fit goes through the proxy."""
    store, out, cache = f"s3://{BUCKET}/digits", folder / "fit-s3", folder / "cache"
    (folder / "server").mkdir()
    with seaweed(folder / "server") as server, Proxy(server.endpoint, latency=LATENCY) as proxy:
        words = (*DIGITS.split(), "--store", store, "--count", str(count), "--runner", "local")
        program("generate", *words, environment=server.environment)
        through = {**server.environment, "AWS_ENDPOINT_URL": proxy.endpoint}
        program(*fit_words(store, out, steps, "--cache-folder", str(cache)), environment=through)
    return Waited.of(out)


def memory_of_a_fit(folder: Path, samples: int, steps: int) -> float:
    """Peak MiB of anonymous and shared memory of a fit on so many samples of 3x32x32."""
    (folder / str(samples)).mkdir()
    make_store(folder / str(samples), samples)
    options = ["--init", "scratch", "--network.width", "64", "--network.depth", "1"]
    words = fit_words(str(folder / str(samples) / "store"), folder / f"fit-{samples}", steps, *options)
    return max(_own_memory([sys.executable, "-m", *words])) / MIB


def _own_memory(command: list[str]) -> Iterator[int]:
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            yield memory_of(process.pid).own
            time.sleep(0.02)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def told(where: str, waited: Waited) -> str:
    """A line."""
    goal = GOALS[where]
    reached = "met" if waited.share < goal else "MISSED"
    rate = f"{waited.samples_per_s:,.0f} samples/s, first batch after {waited.first_batch_s:.3f} s, not counted"
    return f"{reached}: {where}: {waited.share:.2%} of the time waiting for data; goal {goal:.0%} ({rate})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--count", type=int, default=16384, help="trajectories of the digits run")
    parser.add_argument("--sizes", type=int, nargs=2, default=(2048, 98304), help="samples of the two memory runs")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="limbeck-waiting-") as made:
        folder = Path(made)
        for where, waited in zip(GOALS, (on_a_folder, on_s3), strict=True):
            print(told(where, waited(folder, given.count, given.steps)), flush=True)
        peaks = [f"{memory_of_a_fit(folder, size, 100):,.0f} MiB with {size:,} samples" for size in given.sizes]
        print(f"peak memory of a fit that is its own, {' and '.join(peaks)}")


if __name__ == "__main__":
    main()
