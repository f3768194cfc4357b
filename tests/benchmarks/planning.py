"""Planning at scale: what `generate` costs where there is nothing to do, and where a million tasks are to be planned.

    python -m tests.benchmarks.planning

A process each, on a folder, with its own seconds (imports and the teacher included), peak memory and store requests.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from limbeck.pipeline.config import GenerateConfig
from limbeck.pipeline.generate import run_generate
from limbeck.pipeline.job.prepare import prepare
from limbeck.pipeline.windows import Goal, missing_tasks
from limbeck.storage_schemas.dataset import latest_manifest, read_shard_table
from limbeck.storage_schemas.manifest import Window
from limbeck.storage_schemas.store import Store
from tests.pipeline.handmade import seal_listed

SAMPLES = 64


def config(store: str, tasks: int) -> GenerateConfig:
    """Of a `generate` that asks for so many tasks."""
    return GenerateConfig(
        teacher="builtin:gaussian",
        store=store,
        count=tasks * SAMPLES,
        holdout=0,
        samples_per_shard=SAMPLES,
        micro_batch=SAMPLES,
    )


def build(store: str, tasks: int) -> None:
    """A store whose one manifest lists so many tasks."""
    run = prepare(config(store, tasks))
    seal_listed(run.store, run.recipe, run.layout, tasks)


def nothing_to_do(store: str, tasks: int) -> None:
    """The command itself, as configured by default: on Ray."""
    assert run_generate(config(store, tasks)) == 0
    assert "ray" not in sys.modules


def plan(store: str, tasks: int) -> int:
    """How many tasks a window of so many lacks: all that is done before anything is solved."""
    run = prepare(config(store, tasks))
    parent = latest_manifest(run.store, "main")
    goal = Goal("main", parent, run.recipe.id, run.layout, Window(train=(0, tasks * SAMPLES)))
    listed = read_shard_table(run.store, parent).tasks if parent else frozenset()
    return len(missing_tasks(goal, listed))


def measured(what: str, store: str, tasks: int) -> dict[str, float]:
    """Figures of one process that does this and nothing else."""
    command = [sys.executable, "-m", "tests.benchmarks.planning", what, store, str(tasks)]
    began = time.monotonic()
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    return {**json.loads(told), "seconds": round(time.monotonic() - began, 2)}


def child(what: str, store: str, tasks: int) -> None:
    """One measurement, in a process of its own; the last line it prints is JSON."""
    requests = count_requests()
    began = time.monotonic()
    {"build": build, "nothing": nothing_to_do, "plan": plan}[what](store, tasks)
    figures = {
        "after_imports": round(time.monotonic() - began, 2),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "requests": sum(requests.values()),
    }
    print(json.dumps(figures))


def count_requests() -> Counter[str]:
    """Counts every request of every store of this process from now on."""
    counted: Counter[str] = Counter()

    def watch(name: str) -> None:
        request = getattr(Store, name)

        def counting(self: Store, *given: object) -> object:
            counted[name] += 1
            return request(self, *given)

        setattr(Store, name, counting)

    for name in ("read", "list", "size", "write", "put_if_absent"):
        watch(name)
    return counted


def main() -> None:
    """Print the figures as a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("child", nargs="*")
    given = parser.parse_args().child
    if given:
        return child(given[0], given[1], int(given[2]))
    with tempfile.TemporaryDirectory() as folder:
        small, large, new = (str(Path(folder) / name) for name in ("small", "large", "new"))
        measured("build", small, 10_000)
        measured("build", large, 500_000)
        for what, told in {
            "nothing to do, 10,000 shards": measured("nothing", small, 10_000),
            "planning 1,000,000 tasks, none listed": measured("plan", new, 1_000_000),
            "planning 1,000,000 tasks, 500,000 listed": measured("plan", large, 1_000_000),
        }.items():
            print(
                f"{what:<42} {told['seconds']:6.2f} s as a process, {told['after_imports']:6.2f} s after imports, "
                f"{told['peak_mb']:5.0f} MB, {told['requests']:2.0f} requests"
            )


if __name__ == "__main__":
    main()
