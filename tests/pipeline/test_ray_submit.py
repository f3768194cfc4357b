"""`submit` against a real job server: Ray itself refuses the double, and a rerun after a failure gets the next id."""

import json
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest

from limbeck.pipeline.workers.submission import PARTS

pytestmark = pytest.mark.faults

ROOT = Path(__file__).parents[2]
SMALL = ["--solver.steps", "4", "--samples-per-shard", "64", "--micro-batch", "32"]


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory):
    """The address of a cluster's job server; what a job sees of the environment is what it is now."""
    utils = pytest.importorskip("ray.cluster_utils")
    with socket.socket() as free, pytest.MonkeyPatch.context() as patch:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        here, root = Path(__file__).parent, ROOT
        patch.setenv("PYTHONPATH", os.pathsep.join([str(here), str(root), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("STRANGE_MARKER", str(tmp_path_factory.mktemp("submit") / "marker"))
        cluster = utils.Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 2,
                "object_store_memory": 80 * 2**20,
                "include_dashboard": True,
                "dashboard_host": "127.0.0.1",
                "dashboard_port": port,
            },
        )
        yield f"http://127.0.0.1:{port}"
        cluster.shutdown()


@pytest.fixture
def submit(pipeline, dashboard):
    def run(store, *words, teacher="builtin:gaussian", options=()):
        line = ["generate", "--teacher", teacher, "--store", store, "--count", 160, "--holdout", 0, *SMALL, *words]
        return pipeline("submit", "--dashboard", dashboard, "--wait", *options, "--", *line)

    return run


def test_a_job_runs_once_and_ray_refuses_the_double(submit, ids_of, tmp_path):
    code, out, err = submit(tmp_path)
    assert code == 0, out + err
    assert "3 of 3 tasks run here" in out
    assert ids_of(tmp_path)["train"] == list(range(160))
    code, out, _ = submit(tmp_path, "--workers", "2")
    assert (code, "was submitted before and is SUCCEEDED: not submitted again" in out) == (0, True)


def test_a_clone_that_goes_along_runs_its_own_code(submit, ids_of, tmp_path):
    """The driver and the workers, although the cluster has an installed package of the same name."""
    clone, seen = tmp_path / "clone", tmp_path / "seen"
    seen.mkdir()
    for part in PARTS:
        shutil.copytree(ROOT / part, clone / part)
    for module in ("generate", "producer"):
        with (clone / "pipeline" / f"{module}.py").open("a") as file:
            file.write(f"\n\nopen({str(seen / module)!r}, 'w').write(__file__)\n")
    code, out, err = submit(tmp_path / "store", options=["--working-dir", clone])
    assert code == 0, out + err
    assert ids_of(tmp_path / "store")["train"] == list(range(160))
    assert {path.name for path in seen.iterdir()} == {"generate", "producer"}


def test_a_rerun_after_a_failure_is_another_submission(submit, ids_of, tmp_path):
    teacher = "python:code_of_mine:teacher"  # is nowhere but in the folder that goes along
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "code_of_mine.py").write_text("from strange_teachers import recovering_teacher as teacher\n")
    options = ["--json", "--working-dir", tmp_path / "code"]
    code, out, _ = submit(tmp_path / "store", "--max-attempts", "1", teacher=teacher, options=options)
    first = json.loads(out.splitlines()[-1])
    assert (code, first["status"], first["exit_code"]) == (1, "FAILED", 1)
    code, out, _ = submit(tmp_path / "store", "--max-attempts", "1", teacher=teacher, options=options)
    second = json.loads(out.splitlines()[-1])
    assert (code, second["status"], second["submission_id"]) == (0, "SUCCEEDED", f"{first['submission_id']}-r1")
    assert ids_of(tmp_path / "store")["train"] == list(range(160))
    _, out, _ = submit(tmp_path / "store", "--max-attempts", "1", teacher=teacher, options=options)
    assert json.loads(out.splitlines()[-1])["submitted"] is False
