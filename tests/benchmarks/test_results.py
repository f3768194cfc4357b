"""The scripts behind the tables of results, at sizes at which their figures mean nothing."""

import gzip
import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from limbeck.storage_schemas.command_line import main, parse
from limbeck.storage_schemas.program import COMMANDS
from tests.benchmarks import pairs, results
from tests.benchmarks.commands import Commands, told
from tests.benchmarks.pairs import Point
from tests.benchmarks.results import METHODS, PROFILES, Study


def here(words):
    """A command in this process."""
    return main(COMMANDS, words)


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("name", PROFILES)
def test_every_command_of_a_profile_means_something(tmp_path, name, tiny):
    profile = PROFILES[name]
    study = Study(profile, profile.images.format("folder"), tmp_path, "cpu", tiny=tiny)
    for method in METHODS:
        (tmp_path / "seed-1" / method.name / "model").mkdir(parents=True)
    typed = [*study.teacher(), study.generate(), *(study.fit(method, 1) for method in METHODS)]
    typed += [study.evaluate(METHODS, 1), study.pairs().evaluated()]
    typed += [study.pairs().windowed("generate", 32, "x"), study.pairs().fitted("nightly", 32)]
    for command, *options in typed:
        parse(COMMANDS[command].config, options, program=command)


def test_a_command_runs_once_and_again_where_it_changed(tmp_path):
    ran = []
    launch = lambda words: ran.append(words[-1]) or int(words[-1] == "bad")  # noqa: E731
    for _ in range(2):
        made = Commands(tmp_path, launch)
        assert [made.run(word) for word in ("a", "b c", "bad")] == [not ran[3:], not ran[3:], True]
        assert made.failed == ["limbeck bad"]
    assert ran == ["a", "b c", "bad", "bad"]
    assert Commands(tmp_path, launch).run("a", again=True)
    assert [*json.loads((tmp_path / "commands.json").read_text())] == ["limbeck a", "limbeck 'b c'"]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["dmd-warm"], ["knowledge", "dmd-warm"]),
        (["sid", "dmd2-warm", "dmd-warm"], ["knowledge", "dmd-warm", "dmd2-warm", "sid"]),
        (["dmd", "knowledge"], ["knowledge", "dmd"]),
        (None, [method.name for method in METHODS]),
    ],
)
def test_a_method_brings_the_one_it_starts_from(names, found):
    assert [method.name for method in results.selected(names)] == found


class Trainers:
    """Stands in for processes. `knowledge` ends some time after `dmd`, which runs beside it.

    events: (begun or ended, method), in order.
    """

    def __init__(self):
        self.events, self.dmd_ended = [], threading.Event()

    def __call__(self, words):
        name = Path(words[words.index("--out") + 1]).name
        self.events.append(("begun", name))
        if name == "knowledge":
            assert self.dmd_ended.wait(timeout=10)
            time.sleep(0.2)
        self.events.append(("ended", name))
        if name == "dmd":
            self.dmd_ended.set()
        return 0


def test_students_that_are_fitted_at_once_begin_after_their_starts_and_are_noted_once(tmp_path):
    study, trainers = Study(PROFILES["digits"], "sklearn:digits", tmp_path, "cpu"), Trainers()
    assert results.fit_all(study, METHODS, 0, Commands(tmp_path, trainers), jobs=3)
    names = [method.name for method in METHODS]
    assert sorted(trainers.events) == sorted((what, name) for what in ("begun", "ended") for name in names)
    for method in METHODS:
        if method.init:
            assert trainers.events.index(("ended", method.init)) < trainers.events.index(("begun", method.name))
    noted = json.loads((tmp_path / "commands.json").read_text())
    assert sorted(noted) == sorted(told(study.fit(method, 0)) for method in METHODS)
    assert not results.fit_all(study, METHODS, 0, Commands(tmp_path, trainers), jobs=3)
    assert len(trainers.events) == 2 * len(METHODS)


def test_points_are_read_from_the_evaluation_and_the_runs(tmp_path):
    study = pairs.Study(tmp_path, "store", "", sizes=(100, 400), steps=10)
    rows = []
    for index, (kind, size) in enumerate([("fixed", 100), ("fixed", 400), ("nightly", 100), ("nightly", 400)]):
        run = tmp_path / f"{kind}-{size}"
        run.mkdir()
        followed = [{"step": 5, "manifest": 1}, {"step": 10, "manifest": 5}] if kind == "nightly" else [{"step": 5}]
        followed[-1]["train_error"] = 0.001
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in followed))
        rows.append({"name": str(run), "holdout_error": 0.08 / (1 + index), "frechet": 2.0})
    (tmp_path / "evaluation.json").write_text(json.dumps({"rows": rows}))
    pairs.tell(study)
    document = json.loads((tmp_path / "study.json").read_text())
    assert document["points"][2] == {
        "kind": "nightly", "pairs": 100, "seen": 300, "holdout_error": pytest.approx(0.08 / 3),
        "training_error": 0.001, "frechet": 2.0,
    }  # fmt: skip
    assert document["points"][0]["seen"] == 100
    assert "400 pairs give 2.0 times less holdout error than 100 (0.0400, 0.0800)." in document["advice"]
    assert "A window of 100 that was refreshed over the fit, 300 pairs in all, is at 0.0267." in document["advice"]
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_classifier_or_training_errors_shows_what_there_is(tmp_path):
    found = [Point(kind, size, size, 0.1, None, None) for kind in pairs.KINDS for size in (10, 100)]
    pairs.plot(found, tmp_path / "study.png")
    assert (tmp_path / "study.png").is_file()


def test_half_a_line_of_metrics_is_not_read(tmp_path):
    assert pairs.last_step(tmp_path / "metrics.jsonl") == 0
    (tmp_path / "metrics.jsonl").write_text('{"step": 50}\n{"step": 1')
    assert pairs.last_step(tmp_path / "metrics.jsonl") == 50


def fashion(folder):
    """Files as Debian's dataset-fashion-mnist has them."""
    noise = np.random.default_rng(0)
    for name, count in (("train", 64), ("t10k", 32)):
        for kind, values in (
            ("images-idx3", noise.integers(0, 256, (count, 28, 28))),
            ("labels-idx1", np.arange(count) % 10),
        ):
            header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes()
            packed = gzip.compress(header + values.astype(np.uint8).tobytes())
            (folder / f"{name}-{kind}-ubyte.gz").write_bytes(packed)


def emoji(folder):
    """Files as the npm package emoji-datasource-google has them."""
    (folder / "img/google/64").mkdir(parents=True)
    noise, entries = np.random.default_rng(0), []
    for number in range(48):
        name = f"{number:04x}.png"
        pixels = noise.integers(0, 256, (64, 64, 4), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "img/google/64" / name)
        entries.append({"image": name, "category": f"class {number % 10}", "has_img_google": True})
    (folder / "emoji.json").write_text(json.dumps(entries))


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "make", "methods"),
    [
        ("fashion", fashion, ["knowledge", "flow_map", "reflow", "dmd2-warm", "sid"]),
        ("emoji32", emoji, ["knowledge", "progressive", "ctm", "consistency", "dmd", "vsd"]),
    ],
)
def test_the_scripts_for_a_gpu_go_through_on_the_cpu(tmp_path, name, make, methods):
    (images := tmp_path / "images").mkdir()
    make(images)
    out = tmp_path / "out"
    words = f"--profile {name} --size tiny --seeds 0 --device cpu --images {images} --out {out} --no-pairs".split()
    assert results.main([*words, "--only", *methods], here) == 0
    report = json.loads((out / "report.json").read_text())
    found = {row["name"]: row for row in report["rows"] if row["kind"] == "student"}
    assert {*found} == {*methods}
    assert all(row["runs"] == 1 and row["costs"]["samples_per_s"] > 0 for row in found.values())
    assert found["knowledge"]["costs"]["teacher_seconds"] > 0
    assert report["floor"]["coverage"] is not None
    assert {row["nfe"] for row in report["rows"] if row["kind"] == "teacher"} >= {1, 2, 4, 8}


@pytest.mark.faults
def test_the_study_of_pairs_goes_through_and_slides_its_windows(tmp_path):
    profile = PROFILES["digits"]
    study = Study(profile, profile.images, tmp_path, "cpu", tiny=True)
    assert here(study.generate()) == 0
    asked = replace(study.pairs(), sizes=(16,), steps=800)
    assert pairs.run(asked, here).failed == []
    fixed, nightly = json.loads((tmp_path / "pairs-study/study.json").read_text())["points"]
    assert (fixed["pairs"], fixed["seen"]) == (16, 16)
    assert nightly["seen"] > 16
    assert fixed["training_error"] < fixed["holdout_error"] / 1.25
