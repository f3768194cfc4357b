"""Evaluations put together: means and spreads that can be worked out by hand."""

import json
import math

import pytest

from limbeck.storage_schemas.command_line import main
from limbeck.storage_schemas.errors import ManifestMismatch
from limbeck.storage_schemas.program import COMMANDS
from limbeck.trainer.report import put_together


def row(name, kind, nfe, *, frechet=None, costs=None, steps=None, **figures):
    plain = {"holdout_error": 0.5, "sliced_wasserstein": 1.0, "density": None, "coverage": None}
    return {
        "name": name, "kind": kind, "steps": steps or nfe, "nfe": nfe, "frechet": frechet, "costs": costs,
        **plain, **figures,
    }  # fmt: skip


def evaluation(*rows, machine="card A", **changed):
    floor = {"of": "two halves", "counts": [4, 5], "sliced_wasserstein": 0.1, "frechet": 0.2}
    same = {"count": 8, "recipe": "r", "reference": "images", "output_variance": 2.0, "floor": floor}
    return {**same, "machine": machine, "rows": list(rows), "notes": ["all", f"of {machine}"], "file": "x", **changed}


def costs(train, teacher, memory=100.0):
    speed = {"samples_per_s": 10.0, "data_wait": 0.5, "memory_mib": memory}
    return {"train_seconds": train, "teacher_seconds": teacher, **speed}


@pytest.fixture
def three():
    """A contender that is at 1, 2 and 6 in three seeds, one that is always at 2, and the teacher."""
    return [
        evaluation(
            row("teacher ddim", "teacher", 1, frechet=9.0, steps=1),
            row(f"runs/seed-{seed}/kd", "student", 1, frechet=frechet, costs=costs(train, 5.0)),
            row(f"runs/seed-{seed}/same", "student", 1, frechet=2.0, costs=costs(1.0, None, None)),
            row(f"runs/seed-{seed}/kd", "student", 2, frechet=1.0, holdout_error=frechet / 10),
            machine=f"card {'AAB'[seed]}",
        )
        for seed, (frechet, train) in enumerate([(1.0, 10.0), (2.0, 20.0), (6.0, 60.0)])
    ]


def test_means_and_spreads_over_the_runs_of_one_name(three):
    report = put_together(three)
    rows = {(found["name"], found["nfe"]): found for found in report["rows"]}
    assert list(rows) == [
        ("same", 1),
        ("kd", 1),
        ("teacher ddim", 1),
        ("kd", 2),
    ]  # by calls, students first, best first
    kd = rows["kd", 1]
    assert (kd["runs"], kd["frechet"], kd["spread"]["frechet"]) == (3, 3.0, pytest.approx(math.sqrt(7)))
    assert kd["density"] is None
    assert "density" not in kd["spread"]
    assert kd["costs"] == costs(30.0, 5.0)
    assert rows["same", 1]["spread"]["frechet"] == 0
    assert rows["same", 1]["costs"]["teacher_seconds"] is None
    assert rows["kd", 2]["holdout_error"] == pytest.approx(0.3)
    assert rows["kd", 2]["costs"] is None
    assert report["machines"] == ["card A", "card B"]
    assert report["notes"] == ["all"]


def test_one_evaluation_has_no_spread(three):
    assert all(found["spread"] == {} for found in put_together(three[:1])["rows"])


@pytest.mark.parametrize("changed", [{"recipe": "other"}, {"count": 9}, {"reference": "elsewhere"}])
def test_figures_of_other_data_are_not_put_together(three, changed):
    with pytest.raises(ManifestMismatch, match=r"has (recipe|count|reference) .*; put evaluations of the same data"):
        put_together([three[0], {**three[1], **changed}])


def test_the_last_bits_of_another_machine_are_no_other_data(three):
    floor = three[0]["floor"]
    near, far = ({**three[1], "floor": {**floor, "frechet": 0.2 * factor}} for factor in (1 + 1e-6, 1.01))
    assert put_together([three[0], near])["floor"] == floor
    with pytest.raises(ManifestMismatch, match="has floor"):
        put_together([three[0], far])


def test_files(three, tmp_path, capsys):
    for seed, each in enumerate(three):
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "evaluation.json").write_text(json.dumps(each))
    names = [str(tmp_path / "0"), str(tmp_path / "1" / "evaluation.json"), str(tmp_path / "2")]
    assert main(COMMANDS, ["report", *names, "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "3 ± 3" in told  # of a standard deviation of 2.6
    assert "mean and standard deviation over 3 evaluations" in told
    lines = (tmp_path / "out" / "report.md").read_text().splitlines()
    assert lines[0] == "|  | NFE | holdout error | sliced W2 | Frechet | training s | teacher s |"
    assert lines[2] == "| same | 1 | 0.5 | 1 | 2 | 1 |  |"
    assert lines[3] == "| kd | 1 | 0.5 | 1 | 3 ± 3 | 30 | 5 |"
    assert "| kd | 10 | 50.00% | 100 |" in lines
    assert "| floor |  |  | 0.1 | 0.2 |  |  |" in lines
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["evaluations"] == 3


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": [{"name": "old"}]}', None])
def test_what_is_no_evaluation_is_refused_in_one_line(tmp_path, capsys, text):
    if text is not None:
        (tmp_path / "evaluation.json").write_text(text)
    assert main(COMMANDS, ["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "is no evaluation of this release's; make one by limbeck evaluate" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
