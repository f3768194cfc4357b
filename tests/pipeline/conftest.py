import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from limbeck.storage_schemas.command_line import main
from limbeck.storage_schemas.dataset import open_dataset
from limbeck.storage_schemas.program import COMMANDS
from limbeck.storage_schemas.record import SPLITS
from limbeck.storage_schemas.store import Store

HERE = Path(__file__).parent
SMALL = ["--solver.steps", "4", "--states", "2", "--samples-per-shard", "64", "--micro-batch", "32"]


@pytest.fixture(autouse=True)
def strange_teachers(monkeypatch):
    """python:strange_teachers:NAME is there, in this process and in those it starts."""
    monkeypatch.syspath_prepend(str(HERE))
    inherited = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", f"{HERE}{os.pathsep}{inherited}" if inherited else str(HERE))


@pytest.fixture
def pipeline(capsys):
    """Run a command in this process: (exit code, stdout, stderr)."""

    def run(*words):
        code = main(COMMANDS, [str(word) for word in words])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def generate(pipeline):
    """A small local `generate`: 3 train tasks and 1 holdout task of 64 samples."""

    def run(store, *words, teacher="builtin:gaussian", count=160, holdout=40, runner="local"):
        given = ["--teacher", teacher, "--store", store, "--count", count, "--holdout", holdout, "--runner", runner]
        return pipeline("generate", *given, *SMALL, *words)

    return run


@pytest.fixture
def at_home(monkeypatch):
    """What is tried out on a worker runs in this process: no test pays for a start that it doesn't look at."""
    monkeypatch.setattr(
        "limbeck.pipeline.workers.one_call.run_once", lambda function, *arguments, runner: function(*arguments)
    )


@pytest.fixture
def start():
    """`python -m limbeck.pipeline` as a process of its own; killed at the end if it still runs."""
    started = []

    def run(*words, **environment):
        command = [sys.executable, "-m", "limbeck.pipeline", *map(str, words)]
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def commits():
    """Every commit document of a local store, by task name."""

    def read(store):
        files = sorted(Path(store).glob("recipes/*/*/commits/*.json"))
        return {file.stem: json.loads(file.read_bytes()) for file in files}

    return read


@pytest.fixture
def hashes(commits):
    """sha256 of every shard, by task name."""
    return lambda store: {name: commit["sha256"] for name, commit in commits(store).items()}


@pytest.fixture
def ids_of():
    """Every sample id that a reader of the latest manifest meets, per split, in order."""

    def read(store, name="main"):
        dataset = open_dataset(Store.open(str(store)), name)
        return {split: [i for shard in dataset.shards(split) for i in _visible(dataset, shard)] for split in SPLITS}

    def _visible(dataset, shard):
        return np.asarray(dataset.read(shard, ["sample_id"])["sample_id"])[dataset.rows_inside(shard)].tolist()

    return read
