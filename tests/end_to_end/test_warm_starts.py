"""Students that began as students: each says where its weights are from, though that run is gone by then."""

import json
import shutil

from limbeck.diffusion.models import checkpoint
from limbeck.storage_schemas.command_line import main
from limbeck.storage_schemas.program import COMMANDS
from tests.trainer.conftest import write_store


def fitted(store, out, objective, *init):
    """The student's hash, after a few steps."""
    words = ["--data", store.uri, "--out", out, "--objective.name", objective, *init]
    small = ["--steps", 2, "--warmup", 0, "--batch-size", 16, "--threads", 1, "--device", "cpu"]
    assert main(COMMANDS, list(map(str, ["fit", *words, *small]))) == 0
    return checkpoint.load(out / "model").weights_sha256


def test_the_lineage_of_a_warm_start_tells_all_students_that_it_began_as(tmp_path, capsys):
    store, other = write_store(tmp_path / "store"), write_store(tmp_path / "other", steps=4, states=(2,))
    runs = [tmp_path / name for name in ("knowledge", "flow_map", "later")]
    began = fitted(store, runs[0], "knowledge", "--init", "scratch", "--network.width", 8, "--network.depth", 1)
    told = fitted(store, runs[1], "flow_map", "--init", runs[0])  # which widens it first
    last = fitted(other, runs[2], "flow_map", "--init", runs[1] / "model")
    shutil.rmtree(runs[2] / "model")
    assert fitted(other, runs[2], "flow_map", "--init", runs[1] / "model") == last  # by the run that goes on
    shutil.rmtree(runs[0])

    def lineage(*words):
        capsys.readouterr()
        given = ["inspect", tmp_path / "other", "--lineage", "--student", runs[2] / "model", *words]
        assert main(COMMANDS, list(map(str, given))) == 0
        return capsys.readouterr().out

    links = json.loads(lineage("--json"))
    assert [link["kind"] for link in links] == ["model", "model", "model", "data", "data", "model"]
    first = checkpoint.Checkpoint({}, b"").weights_sha256
    assert [link["weights_sha256"] for link in links if link["kind"] == "model"] == [last, told, began, first]
    assert [link.get("init") for link in links[:3]] == [told, began, None]
    assert [link["uri"] for link in links[:3]] == [str(runs[2] / "model"), str(runs[1] / "model"), str(runs[0])]
    recipes = [links[1]["recipe"], links[0]["recipe"]]
    assert [link["recipe"] for link in links[3:5]] == recipes
    assert links[2]["recipe"] == recipes[0] != recipes[1]
    assert ["missing" in link for link in links[3:5]] == [True, False]
    lines = lineage().splitlines()
    assert lines[0].endswith(f"fitted for 2 steps of 16 samples to recipe {recipes[1][:12]}, from {told[:12]}")
    assert lines[2].endswith(": knowledge, serves 1 step, fitted for 2 steps of 16 samples")
    assert lines[3].endswith("the recipe is not in this store")
