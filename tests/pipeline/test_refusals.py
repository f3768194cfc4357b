"""What can't be meant is refused in one line, before any work."""

import sys

import pytest

GOOD = ["--teacher", "builtin:gaussian", "--count", "64", "--holdout", "0", "--runner", "local"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--sover.name", "heun"], "--sover.name"),
        (["--solver.name", "euler"], "euler"),
        (["--solver.grid", "cosine"], "cosine"),
        (["--solver.grid", "uniform_time", "--solver.rho", "7"], "the uniform_time grid has no rho"),
        (["--solver.r-max", "100"], "r_max 100.0"),
        (["--states", "2", "17"], "state 17 is not on a grid of 16 steps"),
        (["--states", "-1"], "state -1 is not on a grid"),
        (
            ["--micro-batch", "100", "--samples-per-shard", "2048"],
            "micro-batch 100 does not divide 2048 samples per shard",
        ),
        (["--count", "0"], "count"),
        (["--count", "-5"], "count"),
        (["--holdout", "-1"], "holdout"),
        (["--workers", "0"], "workers"),
        (["--dtype", "float64"], "float64"),
        (["--format", "webdataset", "--compression", "zstd"], "webdataset shards are not compressed"),
        (["--guidance", "2"], "guidance 2.0 needs classes, builtin:gaussian has none"),
        (["--condition", "uniform_labels"], "condition uniform_labels needs classes"),
        (["--teacher", "builtin:nothing"], "builtin:nothing is not shipped"),
        (["--teacher", "no/such/folder"], "no/such/folder is no folder with a model.json"),
        (["--teacher", "python:no_such_module:f"], "no_such_module"),
        (["--teacher", "python:strange_teachers:nobody"], "has no 'nobody'"),
        (["--teacher", "python:strange_teachers:broken_teacher"], "RuntimeError: no such accelerator"),
        (["--teacher", "python:strange_teachers:slow_teacher", "--with-weights"], "is code, which a store can't keep"),
        (["--store", "memory://m", "--workers", "2"], "a memory:// store lives in one process"),
        (["--dataset", "../up"], "dataset"),
        (["--device", "gpu"], "gpu"),
        (["--store", ""], "names no store"),
    ],
)
def test_a_bad_option_is_one_line_and_exit_code_2(pipeline, tmp_path, words, told):
    code, out, err = pipeline("generate", "--store", tmp_path / "store", *GOOD, *words)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("limbeck: ")
    assert told in err
    assert not (tmp_path / "store").exists()


def test_options_come_from_yaml_too(pipeline, tmp_path):
    (tmp_path / "job.yaml").write_text(
        f"teacher: builtin:gaussian\nstore: {tmp_path / 'store'}\ncount: 64\nholdout: 0\nrunner: local\n"
        "samples_per_shard: 64\nmicro_batch: 32\nsolver:\n  steps: 4\nstates: [1, 2]\n"
    )
    assert pipeline("generate", "--config", tmp_path / "job.yaml")[0] == 0
    assert pipeline("inspect", tmp_path / "store")[1].count("state_00") == 2
    (tmp_path / "job.yaml").write_text("teacher: builtin:gaussian\nsovler:\n  steps: 4\n")
    code, _, err = pipeline("generate", "--config", tmp_path / "job.yaml")
    assert (code, "sovler" in err, err.count("\n")) == (2, True, 1)


@pytest.mark.parametrize("command", ["verify", "inspect", "status"])
def test_a_folder_that_is_no_store_is_one_line(pipeline, tmp_path, command):
    code, _, err = pipeline(command, tmp_path)
    assert (code, err.count("\n"), "is not a store" in err) == (1, 1, True)


def test_a_dataset_a_manifest_and_a_job_that_are_not_there(generate, pipeline, tmp_path):
    generate(tmp_path)
    for words in (
        ["verify", tmp_path, "--dataset", "b"],
        ["inspect", tmp_path, "--manifest", 7],
        ["status", tmp_path, "--job", "j"],
    ):
        code, _, err = pipeline(*words)
        assert (code, err.count("\n")) == (1, 1)


def test_without_ray_the_ray_runner_names_the_way_out(generate, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = generate(tmp_path, runner="ray")
    amounts, error = err.splitlines()
    assert (code, amounts.startswith("to make: ")) == (2, True)
    assert "pip install 'limbeck[pipeline]', or use --runner local" in error


def test_no_cluster_at_an_address(generate, tmp_path):
    ray = pytest.importorskip("ray")
    if ray.is_initialized():
        pytest.skip("Ray runs in this process already")
    code, _, err = generate(tmp_path, "--ray.address", "127.0.0.1:9", runner="ray")
    amounts, error = err.splitlines()
    assert (code, amounts.startswith("to make: "), "no Ray cluster at 127.0.0.1:9" in error) == (2, True, True), err
