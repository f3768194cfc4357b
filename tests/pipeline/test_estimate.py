"""`plan` foretells what a run then does, looks at what is there, and writes nothing."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from limbeck.diffusion.models.teachers import load_teacher
from limbeck.pipeline.before.plan import Work, describe, foretell
from limbeck.pipeline.before.timing import Timing
from limbeck.pipeline.config import PlanConfig
from limbeck.pipeline.job.prepare import Run
from limbeck.pipeline.recipe import build_layout, build_recipe
from limbeck.storage_schemas.store import Store

SLEEPY = "python:hungry_teachers:sleepy_teacher"
SMALL = ["--solver.steps", "4", "--states", "2", "--samples-per-shard", "64", "--micro-batch", "32"]


@pytest.fixture
def plan(pipeline):
    """What `plan --json` says of a small local run."""

    def run(store, *words, teacher="builtin:gaussian", count=160, holdout=40):
        given = ["--teacher", teacher, "--store", store, "--count", count, "--holdout", holdout, "--runner", "local"]
        code, out, err = pipeline("plan", *given, *SMALL, "--json", *words)
        assert code == 0, err
        return json.loads(out)

    return run


def files(folder):
    return {path: path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()}


def test_a_run_takes_what_was_foretold(plan, generate, commits, tmp_path, monkeypatch):
    """A teacher of 50 ms a call, 7 calls a sample (Heun, 4 steps), 2 micro-batches a task, 4 tasks, one worker."""
    monkeypatch.setenv("HUNGRY_SECONDS", "0.05")
    store = tmp_path / "store"
    found = plan(store, teacher=SLEEPY)
    assert not store.exists()
    estimate, work = found["estimate"], found["work"]
    assert (work["tasks"], work["samples"], estimate["nfe"], estimate["micro_batches"]) == (4, 256, 7, 8)
    began = time.perf_counter()
    assert generate(store, teacher=SLEEPY)[0] == 0
    took = time.perf_counter() - began
    made = commits(store)
    assert estimate["nfe_total"] == sum(commit["nfe"] * commit["rows"] for commit in made.values()) == 7 * 256
    assert estimate["solve_seconds"] == pytest.approx(0.7, rel=0.5)
    # One local worker is the driver itself: it isn't started.
    assert took / 3 < estimate["wall_seconds"] - found["timing"]["start"] < 3 * took
    assert work["objects"] == len(files(store))
    assert found["recipe_id"] == next(iter(made.values()))["recipe_id"]


@pytest.mark.parametrize(
    ("layout", "within"),
    [([], 0.02), (["--compression", "zstd"], 0.05), (["--format", "webdataset"], 0.02), (["--with-weights"], 0.02)],
    ids=["parquet", "zstd", "webdataset", "weights"],
)
def test_bytes_are_those_of_the_store(at_home, plan, generate, tmp_path, layout, within):
    store, words = tmp_path / "store", [*layout, "--states", *range(8), "--solver.steps", 8, "--samples-per-shard", 512]
    words += ["--solver.name", "ddim"]
    given = {"teacher": "builtin:digits", "count": 512, "holdout": 512}
    found = plan(store, *words, "--micro-batch", 64, "--time-batches", 2, **given)
    assert generate(store, *words, "--micro-batch", 64, **given)[0] == 0
    assert found["estimate"]["bytes"] == pytest.approx(sum(files(store).values()), rel=within)
    assert found["work"]["objects"] == len(files(store))


def test_what_is_there_is_not_counted_again(at_home, plan, generate, tmp_path):
    store = tmp_path / "store"
    generate(store)
    before = files(store)
    assert plan(store)["work"]["tasks"] == 0
    assert plan(store)["estimate"] is None
    inside = plan(store, count=192)["work"]  # the last shard holds these ids already
    assert (inside["tasks"], inside["objects"]) == (0, 4)
    more = plan(store, count=320)["work"]
    assert (more["tasks"], more["tasks_in_window"], more["objects"], more["recipe_bytes"]) == (2, 6, 2 * 3 + 4, 0)
    assert files(store) == before


def test_what_is_committed_but_not_sealed_is_adopted(at_home, plan, generate, tmp_path):
    store = tmp_path / "store"
    generate(store)
    for manifest in store.glob("datasets/main/manifests/*"):
        manifest.unlink()
    for commit in list(store.glob("recipes/*/*/commits/*.json"))[:1]:
        commit.unlink()
    work = plan(store)["work"]
    assert (work["tasks"], work["tasks_adopted"], work["tasks_in_window"]) == (1, 3, 4)


def test_what_generate_refuses_plan_refuses(at_home, pipeline, generate, tmp_path):
    store = tmp_path / "store"
    generate(store)
    words = ["--teacher", "builtin:mixture", "--store", store, "--count", 10, "--runner", "local", *SMALL]
    code, _, err = pipeline("plan", *words)
    assert (code, err.count("\n")) == (2, 1)
    assert "holds another recipe" in err
    assert pipeline("plan", *words, "--new-recipe")[0] == 0


def test_a_probed_upload_is_timed_and_removed(at_home, plan, generate, tmp_path):
    store = tmp_path / "store"
    generate(store)
    before = files(store)
    found = plan(store, "--probe-store", count=320)
    assert found["timing"]["upload"] > 0
    assert found["estimate"]["write_seconds"] == found["timing"]["encode"] + found["timing"]["upload"]
    assert files(store) == before


def test_a_teacher_that_fails_is_one_line(at_home, pipeline, tmp_path):
    words = ["--teacher", "python:hungry_teachers:wrong_teacher", "--store", tmp_path / "s", "--count", 10]
    code, _, err = pipeline("plan", *words, "--runner", "local", *SMALL)
    assert (code, err.count("\n")) == (1, 1)
    assert "the timing failed on a worker: RuntimeError: expected scalar type Float but found Half" in err


# The sums, from times that are given.

TIMING = Timing(
    start=1.0,
    load=2.0,
    warm_up=4.0,
    batches=(1.0, 3.0, 2.0),
    encode=1.0,
    upload=3.0,
    nfe=31,
    shard_bytes=10**9,
    commit_bytes=1000,
    total=15.0,
    machine={"host": "gpu-1", "device": "cuda NVIDIA H100"},
)
WORK = Work(tasks=10, tasks_in_window=12, tasks_adopted=2, samples=10 * 1024, objects=40, recipe_bytes=500)


def summed(timing=TIMING, **fields):
    config = PlanConfig.model_validate(
        {"teacher": "builtin:gaussian", "store": "s", "count": 1, "samples_per_shard": 1024, "micro_batch": 256}
        | {"workers": 4, "ray": {"num_gpus": 0.5}, "price_gpu_hour": 3.6, "price_gb_month": 0.5}
        | fields
    )
    recipe = build_recipe(config, load_teacher(config.teacher))
    run = Run(config, Store("memory://nothing"), recipe, build_layout(config, recipe))
    estimate = foretell(config, run, WORK, timing)
    return estimate, "\n".join(describe(config, run, WORK, timing, estimate))


def test_the_sums():
    """4 micro-batches of 2 s: 8 s to solve against 4 s to write; 10 tasks on 4 workers are 3 rounds."""
    estimate, text = summed()
    assert (estimate.solve_seconds, estimate.write_seconds, estimate.bottleneck) == (8.0, 4.0, "solving")
    assert estimate.wall_seconds == (1 + 2 + (4 - 2)) + 8 + 4 + 2 * 8
    assert estimate.device_hours == pytest.approx(4 * 0.5 * 33 / 3600)
    assert estimate.compute_cost == pytest.approx(3.6 * 66 / 3600)
    assert estimate.bytes == 10 * (10**9 + 2 * 1000) + 500
    assert estimate.storage_cost_a_month == pytest.approx(5.0, rel=1e-4)
    assert (estimate.nfe_total, estimate.micro_batches) == (31 * 10240, 40)
    assert "bottleneck solving" in text
    assert "0.0183 GPU hours" in text
    assert "compute    0.066 at 3.6 an hour of GPU" in text


def test_a_plan_made_on_one_gpu_is_for_workers_that_have_one_each():
    """GPU hours are those of a cluster's workers, not of the one GPU that was timed."""
    estimate, text = summed(runner="local", ray={"num_gpus": 1})
    assert estimate.device_hours == pytest.approx(4 * 33 / 3600)
    assert "with workers: 4 as if each had a GPU of its own, 0.0367 GPU hours" in text
    assert "as if" not in summed(runner="local", workers=1)[1] + summed()[1]


def test_writing_may_be_the_bottleneck_and_is_told():
    estimate, text = summed(replace(TIMING, upload=20.0))
    assert (estimate.bottleneck, estimate.wall_seconds) == ("writing", 5 + 8 + 21 + 2 * 21)
    assert "bottleneck writing, not solving" in text


def test_an_upload_that_was_not_timed_has_a_rate_that_it_must_reach():
    """1 GB in the 7 s that solving leaves."""
    assert "as long as a worker's uploads run at 143 MB/s or more" in summed(replace(TIMING, upload=None))[1]


@pytest.mark.parametrize(
    ("fields", "device", "paid"),
    [
        ({"ray": {"num_gpus": 1}}, "cuda NVIDIA", ("GPU", 4)),
        ({"runner": "local", "ray": {"num_gpus": 1}}, "cuda NVIDIA", ("GPU", 4)),
        ({"runner": "local", "threads": 2}, "cpu x86_64", ("CPU", 8)),
        ({"ray": {"num_cpus": 3}}, "cpu x86_64", ("CPU", 12)),
        ({"workers": 64, "ray": {"num_gpus": 1}}, "cuda NVIDIA", ("GPU", 10)),
    ],
)
def test_what_is_paid_for(fields, device, paid):
    estimate, _ = summed(replace(TIMING, machine={"host": "h", "device": device}), **fields)
    assert (estimate.device, estimate.device_hours * 3600) == (paid[0], pytest.approx(paid[1] * estimate.wall_seconds))
