"""What students took, on stores whose every shard took 0.1 s and from metrics that are written here."""

import json
from dataclasses import replace

import pytest

from limbeck.diffusion.models import checkpoint
from limbeck.diffusion.models.teachers import builtin_checkpoint
from limbeck.storage_schemas.dataset import open_dataset, seal
from limbeck.storage_schemas.manifest import ManifestDraft, Window
from limbeck.trainer.evaluate import evaluate
from limbeck.trainer.evaluation.costs import student_costs
from limbeck.trainer.runs.record import RunRecord
from tests.trainer.test_evaluate import config, make_recipe, make_store, rows_of, save_student

BATCH = 32


@pytest.fixture
def store(tmp_path):
    """Three shards of 64: two of train, one of holdout."""
    saved = builtin_checkpoint("gaussian")
    return make_store(tmp_path / "pairs", saved, make_recipe(saved, uri="builtin:gaussian"))


def make_run(folder, store, lines, *, init="teacher", manifest=1, **about):
    """A finished run as fit leaves it: its record, its metrics, its model."""
    save_student(builtin_checkpoint("gaussian"), folder, 1)
    model = checkpoint.load(folder / "model")
    checkpoint.save(replace(model, about={"steps": lines[-1]["step"], **about}), folder / "model")
    reads = {"data": store.uri, "dataset": "main", "manifest": manifest}
    RunRecord("run", {"batch_size": BATCH, "init": str(init)}, reads, {}, None).save(folder)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def line(step, rate, waited=0.0, **more):
    return {"step": step, "samples_per_s": rate, "data_wait": waited, **more}


def test_seconds_follow_from_the_lines_of_steps(store, tmp_path):
    # 10 steps of 32 at 160/s are 2 s, 5 more at 40/s are 4 s; a line that only validates counts no time.
    lines = [
        line(10, 160.0, 0.1, memory_mib=300.0),
        {"step": 12, "holdout_error": 1.0},
        line(15, 40.0, 0.4, memory_mib=200.0),
    ]
    costs = student_costs(make_run(tmp_path / "run", store, lines), 1, store.uri)
    assert costs.train_seconds == pytest.approx(6)
    assert costs.samples_per_s == pytest.approx(15 * BATCH / 6)
    assert costs.data_wait == pytest.approx((0.1 * 2 + 0.4 * 4) / 6)
    assert costs.memory_mib == 300
    assert costs.teacher_seconds == pytest.approx(0.2)  # the train shards alone


def test_a_stages_student_took_the_steps_up_to_its_end(store, tmp_path):
    run = make_run(tmp_path / "run", store, [line(10, 160.0), line(20, 160.0)])
    model = checkpoint.load(run / "model")
    staged = replace(model, about={"steps": 10}, grids={2: [80.0, 1.0, 0.0]})
    checkpoint.save(staged, run / "stages/2-step")
    assert student_costs(run, 2, store.uri).train_seconds == pytest.approx(2)
    assert student_costs(run / "stages/2-step", 2, store.uri).train_seconds == pytest.approx(2)
    assert student_costs(run, 1, store.uri).train_seconds == pytest.approx(4)


def test_a_warm_start_pays_for_the_student_before_and_for_shared_shards_once(store, tmp_path):
    first = make_run(tmp_path / "first", store, [line(10, 160.0)])
    second = make_run(tmp_path / "second", store, [line(10, 80.0)], init=first)
    costs = student_costs(second, 1, store.uri)
    assert costs.train_seconds == pytest.approx(2 + 4)
    assert costs.samples_per_s == pytest.approx(80)
    assert costs.teacher_seconds == pytest.approx(0.2)


def test_noise_alone_costs_no_teacher(store, tmp_path):
    lines = [line(10, 160.0)]
    assert student_costs(make_run(tmp_path / "sid", store, lines, columns=["noise"]), 1, store.uri).teacher_seconds == 0
    pairs = make_run(tmp_path / "dmd", store, lines, columns=["noise", "output"])
    assert student_costs(pairs, 1, store.uri).teacher_seconds == pytest.approx(0.2)


def test_every_window_that_a_run_followed_is_paid(store, tmp_path):
    parent = open_dataset(store)
    window = Window(train=(0, 64), holdout=(0, 64))
    draft = ManifestDraft(
        dataset="main", parent=parent.manifest, writer="0" * 16, recipe_id=parent.recipe.id, layout=parent.layout,
        window=window,
    )  # fmt: skip
    seal(store, draft, parent.table)
    stayed = make_run(tmp_path / "stayed", store, [line(10, 160.0)], manifest=2)
    assert student_costs(stayed, 1, store.uri).teacher_seconds == pytest.approx(0.1)
    followed = make_run(tmp_path / "followed", store, [line(10, 160.0, manifest=1)], manifest=2)
    assert student_costs(followed, 1, store.uri).teacher_seconds == pytest.approx(0.2)


def test_what_is_gone_is_not_made_up(store, tmp_path):
    save_student(builtin_checkpoint("gaussian"), tmp_path / "model-alone", 1)
    assert student_costs(tmp_path / "model-alone", 1, store.uri) is None
    gone = make_run(tmp_path / "run", store, [line(10, 160.0)], manifest=9)
    assert student_costs(gone, 1, store.uri).teacher_seconds is None
    assert student_costs(gone, 1, store.uri).train_seconds == pytest.approx(2)


def test_evaluations_tell_the_costs(store, tmp_path, capsys):
    run = make_run(tmp_path / "run", store, [line(10, 160.0)])
    row = rows_of(evaluate(config(store, run, nfe=(1,))))[str(run), 1]
    assert (row["costs"]["train_seconds"], row["costs"]["teacher_seconds"]) == pytest.approx((2, 0.2))
