"""Before any work one line says what will be made, and what has no room is refused."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from limbeck.diffusion.models.teachers import load_teacher
from limbeck.diffusion.recipes.grid import recipe_nfe
from limbeck.diffusion.solvers import SOLVERS
from limbeck.pipeline.config import GenerateConfig
from limbeck.pipeline.producer import Producer, WorkOrder
from limbeck.pipeline.recipe import build_layout, build_recipe
from limbeck.pipeline.solve import solve_batch
from limbeck.storage_schemas.store import Store

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def free(monkeypatch):
    def of(size):
        monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(size, 0, size))

    return of


def test_the_line_says_what_is_made(generate, free, tmp_path):
    free(5 * 10**9)
    code, _, err = generate(tmp_path)
    assert code == 0
    line = next(line for line in err.splitlines() if line.startswith("to make: "))
    # builtin:gaussian by heun: 2 calls a step but the last, of 3 states of float16; 4 shards of 64.
    assert line.startswith("to make: 256 samples in 4 shards of 64, 1792 network calls, ")
    assert line.endswith(" in 12 objects, 5 GB are free")
    code, _, err = generate(tmp_path)
    assert (code, "to make" in err) == (0, False)
    code, _, err = generate(tmp_path, count=200)
    assert (code, "to make: 64 samples in 1 shard of 64" in err) == (0, True)


def test_more_than_is_free_is_refused_before_any_shard(generate, free, tmp_path):
    free(1000)
    code, out, err = generate(tmp_path, "--json")
    assert (code, json.loads(out)["what"]) == (2, "refused")
    assert err.splitlines()[-1].startswith(f"limbeck: {tmp_path}")
    assert "1 kB are free: make room, give a smaller --count" in err.splitlines()[-1]
    assert not list(Path(tmp_path).glob("recipes/*/*/shards/*"))


def test_a_convert_says_so_too(generate, pipeline, free, tmp_path):
    assert generate(tmp_path)[0] == 0
    code, out, err = pipeline("convert", tmp_path, "--to", "webdataset", "--as", "tar", "--json")
    assert (code, json.loads(out)["what"]) == (0, "sealed")
    assert "to make: 256 samples in 4 shards of 64, " in err
    assert "network calls" not in err
    free(1000)
    code, _, err = pipeline("convert", tmp_path, "--to", "webdataset", "--as", "small", "--samples-per-shard", "32")
    assert (code, "are free: make room" in err) == (2, True)


def test_what_may_be_compressed_is_not_refused_by_a_guess(generate, free, tmp_path):
    free(1000)
    code, _, err = generate(tmp_path, "--compression", "zstd")
    assert (code, "at most" in err) == (0, True)


@pytest.mark.parametrize(
    "given",
    [
        *({"solver": {"name": name, "steps": 5}} for name in SOLVERS),
        {"teacher": "builtin:digits", "guidance": 2.0},
        {"teacher": "builtin:digits", "start": "data:sklearn:digits"},
        {"teacher": "builtin:digits", "start": "data:sklearn:digits", "guidance": 2.0},
    ],
)
def test_calls_are_those_of_a_solve(given, tmp_path):
    config = GenerateConfig.model_validate(
        {"teacher": "builtin:gaussian", "store": str(tmp_path), "count": 2, "micro_batch": 2} | given
    )
    recipe = build_recipe(config, load_teacher(config.teacher))
    producer = Producer(WorkOrder(Store.create(config.store), recipe, build_layout(config, recipe), "cpu", 1))
    ids = np.arange(2)
    solved = solve_batch(recipe, producer.denoise, producer.teacher.process, "train", ids, device=producer.device)
    assert recipe_nfe(recipe) == solved.nfe
