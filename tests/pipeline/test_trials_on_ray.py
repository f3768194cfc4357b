"""What is tried out before a job, on a real Ray: the driver itself solves nothing."""

import json
import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.faults
SMALL = ["--solver.steps", "4", "--samples-per-shard", "64"]


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory):
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        diary = tmp_path_factory.mktemp("ray") / "diary"
        patch.setenv("HUNGRY_ROOM", "16")
        patch.setenv("HUNGRY_DIARY", str(diary))
        patch.setenv("PYTHONPATH", f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        quiet = {"include_dashboard": False, "log_to_driver": False}
        ray.init(address="local", num_cpus=2, num_gpus=0, object_store_memory=100 * 2**20, **quiet)
        yield diary
        ray.shutdown()


@pytest.fixture(autouse=True)
def the_driver_solves_nothing(monkeypatch):
    """What it solved would be missing in the diary, which workers know of from the cluster."""
    monkeypatch.delenv("HUNGRY_DIARY", raising=False)


@pytest.mark.parametrize("name", ["gpu_teacher", "doomed_teacher"])
def test_a_micro_batch_is_found_by_actors_and_outlives_their_death(pipeline, cluster, tmp_path, name):
    cluster.write_text("")
    store, teacher = tmp_path / "store", f"python:hungry_teachers:{name}"
    given = ["--teacher", teacher, "--store", store, "--count", 128, "--holdout", 0, *SMALL, "--micro-batch", "auto"]
    code, _, err = pipeline("generate", *given)
    assert code == 0, err
    assert "micro-batch 16: found by a trial" in err
    assert list(dict.fromkeys(cluster.read_text().split())) == ["64", "32", "16"]
    (recipe,) = store.glob("recipes/*/recipe.json")
    assert json.loads(recipe.read_bytes())["micro_batch"] == 16


def test_a_plan_is_timed_by_an_actor(pipeline, cluster, tmp_path):
    cluster.write_text("")
    given = ["--teacher", "python:hungry_teachers:gpu_teacher", "--store", tmp_path / "s", "--count", 128]
    code, out, err = pipeline("plan", *given, *SMALL, "--micro-batch", 16, "--workers", 2, "--json")
    assert code == 0, err
    assert cluster.read_text().split() == ["16"] * 7 * 4  # Heun, 4 steps: one micro-batch to warm up, three timed
    assert json.loads(out)["estimate"]["workers"] == 2


def test_a_calibration_is_measured_by_an_actor(pipeline, cluster):
    cluster.write_text("")
    given = ["--teacher", "python:hungry_teachers:gpu_teacher", "--solvers", "ddim", "--steps", 8, "--tolerance", 0.5]
    given += ["--reference-factor", 8, "--count", 16, "--micro-batch", 16]
    code, out, err = pipeline("calibrate", *given, "--json")
    assert code == 0, err
    calls = (4 * 64 - 1) + (4 * 32 - 1) + 8
    assert cluster.read_text().split() == ["16"] * calls
    assert json.loads(out)["points"][0]["nfe"] == 8
