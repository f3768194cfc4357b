"""evaluate on stores whose every figure is known: closed forms, students that are their teacher, exact re-solves."""

import json

import numpy as np
import pytest
import torch

from limbeck.diffusion import noise
from limbeck.diffusion.grids import karras
from limbeck.diffusion.models import checkpoint
from limbeck.diffusion.models.checkpoint import Checkpoint, pack
from limbeck.diffusion.models.spec import model_from_spec, process_from_spec
from limbeck.diffusion.models.teachers import Teacher, builtin_checkpoint, from_checkpoint
from limbeck.diffusion.recipes.grid import recipe_nfe
from limbeck.diffusion.solvers import solve
from limbeck.storage_schemas import paths
from limbeck.storage_schemas.clock import utc_now
from limbeck.storage_schemas.command_line import main
from limbeck.storage_schemas.commit import Commit, put_commit
from limbeck.storage_schemas.dataset import put_recipe, seal
from limbeck.storage_schemas.errors import ManifestMismatch
from limbeck.storage_schemas.formats import encode_shard
from limbeck.storage_schemas.layout import Layout
from limbeck.storage_schemas.manifest import ManifestDraft, Window
from limbeck.storage_schemas.program import COMMANDS
from limbeck.storage_schemas.recipe import (
    Guidance,
    NoCondition,
    NoiseRecord,
    Recipe,
    SolverRecord,
    TeacherRecord,
    UniformLabels,
)
from limbeck.storage_schemas.record import NO_CONDITION
from limbeck.storage_schemas.shards import Shard, ShardTable
from limbeck.storage_schemas.store import Store
from limbeck.trainer.classifier import shipped_classifier
from limbeck.trainer.evaluate import EvaluateConfig, evaluate
from limbeck.trainer.evaluation.contenders import teacher_solvers
from limbeck.trainer.evaluation.holdout import read_pairs
from limbeck.trainer.evaluation.metrics import Frechet, Neighbours, sliced_wasserstein
from limbeck.trainer.reading.images import load_images

STEPS, MICRO_BATCH, SHARD = 8, 16, 64


def digits_teacher() -> Checkpoint:
    """Classes, images and random weights."""
    spec = {
        "kind": "network",
        "sample_shape": [1, 8, 8],
        "num_classes": 10,
        "process": {"name": "ve", "sigma_max": 80.0},
        "prediction": {"name": "edm", "sigma_data": 0.8},
        "network": {"name": "residual_mlp", "width": 16, "depth": 1},
    }
    torch.manual_seed(0)
    module = model_from_spec(spec)
    torch.nn.init.normal_(module.network.leave.weight, std=0.3)
    return Checkpoint(spec, pack(module))


def make_recipe(saved: Checkpoint, *, uri: str, solver: str = "ddim", scale: float = 1.0) -> Recipe:
    process = process_from_spec(saved.model["process"])
    times = karras(process, STEPS, rho=5.0)
    classes = saved.model["num_classes"]
    return Recipe(
        teacher=TeacherRecord(uri=uri, weights_sha256=saved.weights_sha256, model=saved.model),
        guidance=Guidance(scale=scale),
        solver=SolverRecord(name=solver, steps=STEPS, frame="sigma", grid={"name": "karras", "rho": 5.0}),
        times=tuple(times.tolist()),
        alphas=tuple(process.alpha(times).tolist()),
        sigmas=tuple(process.sigma(times).tolist()),
        states=(0, STEPS),
        condition=NoCondition() if classes is None else UniformLabels(num_classes=classes),
        noise=NoiseRecord(algorithm=noise.ALGORITHM, version=noise.VERSION, seed=0),
        sample_shape=tuple(saved.model["sample_shape"]),
        storage_dtype="float32",
        micro_batch=MICRO_BATCH,
        numerics_version=1,
    )


def make_store(folder, saved: Checkpoint, recipe: Recipe, *, count=128, holdout=128, with_weights=False) -> Store:
    """What generate would leave: every sample solved by the recipe's own solver, micro-batch by micro-batch."""
    store = Store.create(str(folder))
    layout = Layout(samples_per_shard=SHARD)
    put_recipe(store, recipe)
    window = Window(train=(0, count), holdout=(0, holdout))
    commits = []
    for task in window.tasks(SHARD):
        path = paths.shard_path(recipe.id, layout.id, task.name, "0" * 16, layout.suffix)
        ids = np.arange(task.start, task.stop)
        local = folder.parent / task.name
        columns = solved(saved, recipe, task.split, ids)
        encoded = encode_shard(local, recipe.fields, columns, task=task, recipe_id=recipe.id, layout=layout)
        store.upload(encoded.path, path)
        commits.append(put_commit(store, Commit(
            split=task.split, index=task.index, samples_per_shard=SHARD, recipe_id=recipe.id, layout_id=layout.id,
            attempt="0" * 16, path=path, bytes=encoded.bytes, sha256=encoded.sha256, rows=encoded.rows,
            chunks=encoded.chunks, seconds=0.1, nfe=1, machine={}, committed_at=utc_now(),
        )))  # fmt: skip
    draft = ManifestDraft(
        dataset="main", parent=None, writer="0" * 16, recipe_id=recipe.id, layout=layout, window=window
    )
    seal(store, draft, ShardTable.of([Shard.of(commit) for commit in commits]))
    if with_weights:
        kept = paths.weights_folder(recipe.id)
        store.write(f"{kept}/model.safetensors", saved.weights)
        store.write(f"{kept}/model.json", json.dumps(saved.document()).encode())
    return store


def solved(saved: Checkpoint, recipe: Recipe, split: str, ids: np.ndarray) -> dict[str, np.ndarray]:
    x_T = torch.from_numpy(recipe.sigmas[0] * noise.standard_normal(0, split, ids, recipe.sample_shape)).float()
    labels = noise.labels(0, split, ids, 10) if saved.model["num_classes"] else np.full(len(ids), NO_CONDITION)
    teacher, times = saved.build(), torch.tensor(recipe.times, dtype=torch.float64)
    outputs = []
    with torch.no_grad():
        for rows in torch.arange(len(ids)).split(MICRO_BATCH):
            condition = torch.from_numpy(labels)[rows] if saved.model["num_classes"] else None
            solution = solve(teacher, teacher.process, x_T[rows], times, solver=recipe.solver.name, condition=condition)
            outputs.append(solution.states[-1])
    return {"sample_id": ids, "condition": labels, "noise": x_T.numpy(), "output": torch.cat(outputs).numpy()}


def save_student(saved: Checkpoint, folder, *steps: int):
    """A student that is its teacher, on the recipe's kind of grid: its samples are the teacher's DDIM."""
    process = process_from_spec(saved.model["process"])
    grids = {n: karras(process, n, rho=5.0).tolist() for n in steps}
    checkpoint.save(Checkpoint(saved.model, saved.weights, grids=grids), folder / "model")
    return folder


@pytest.fixture
def gaussian(tmp_path):
    saved = builtin_checkpoint("gaussian")
    store = make_store(tmp_path / "pairs", saved, make_recipe(saved, uri="builtin:gaussian"))
    return store, save_student(saved, tmp_path / "run", 1, 4)


@pytest.fixture
def digits(tmp_path):
    saved = digits_teacher()
    store = make_store(tmp_path / "pairs", saved, make_recipe(saved, uri="lost/teacher"), with_weights=True)
    return store, save_student(saved, tmp_path / "run", 1, 2)


def config(store, *runs, **options):
    return EvaluateConfig(runs=runs, data=store.uri, **options)


def rows_of(evaluation):
    return {(row["name"], row["nfe"]): row for row in evaluation["rows"]}


FIGURES = ("holdout_error", "sliced_wasserstein", "frechet", "density", "coverage")


def test_closed_form_figures(gaussian):
    store, run = gaussian
    evaluation = evaluate(config(store, run, nfe=(1, 4)))
    rows = rows_of(evaluation)
    pairs = solved(
        builtin_checkpoint("gaussian"), make_recipe(builtin_checkpoint("gaussian"), uri="x"), "holdout", np.arange(128)
    )
    # One DDIM step from sigma = 80 to 0 is the denoiser itself.
    one_step = 0.5 + 0.25 / (0.25 + 6400) * (pairs["noise"].astype(np.float64) - 0.5)
    expected = ((one_step - pairs["output"]) ** 2).mean()
    assert rows[str(run), 1]["holdout_error"] == pytest.approx(expected, rel=1e-5)
    assert evaluation["output_variance"] == pytest.approx(
        pairs["output"].astype(np.float64).var(axis=0).mean(), rel=1e-6
    )
    assert [(row["name"], row["steps"], row["nfe"]) for row in evaluation["rows"]] == [
        (str(run), 1, 1),
        ("teacher ddim", 1, 1),
        (str(run), 4, 4),
        ("teacher ddim", 4, 4),
        ("teacher dpmpp_2m", 4, 4),
        ("teacher ddim, stored", 8, 8),
        ("teacher ddim", 8, 8),
    ]
    for nfe in (1, 4):
        student, teacher = rows[str(run), nfe], rows["teacher ddim", nfe]
        for figure in FIGURES[:2]:
            assert student[figure] == pytest.approx(teacher[figure], rel=1e-4)


def test_the_recipes_own_solver_gives_the_stored_bits_again(gaussian):
    store, run = gaussian
    rows = rows_of(evaluate(config(store, run)))
    assert rows["teacher ddim", STEPS]["holdout_error"] == 0
    assert (
        rows["teacher ddim", STEPS]["sliced_wasserstein"] == rows["teacher ddim, stored", STEPS]["sliced_wasserstein"]
    )


def test_without_real_images_the_reference_is_the_stored_outputs_of_train_noises(gaussian):
    store, run = gaussian
    evaluation = evaluate(config(store, run, nfe=(1,)))
    outputs = torch.from_numpy(
        solved(
            builtin_checkpoint("gaussian"),
            make_recipe(builtin_checkpoint("gaussian"), uri="x"),
            "train",
            np.arange(128),
        )["output"]
    )
    assert evaluation["floor"]["counts"] == [64, 64]
    assert evaluation["floor"]["sliced_wasserstein"] == pytest.approx(sliced_wasserstein(outputs[64:], outputs[:64]))
    assert {evaluation["floor"][name] for name in FIGURES[2:]} == {None}
    assert any("no Frechet distance" in note for note in evaluation["notes"])


def test_digits_are_measured_against_the_reference_half(digits):
    store, run = digits
    evaluation = evaluate(config(store, run, nfe=(1, 2)))
    rows = rows_of(evaluation)
    reference, train = (load_images("sklearn:digits", split)[0] for split in ("reference", "train"))
    classifier, _ = shipped_classifier("sklearn:digits", (1, 8, 8))
    distance, neighbours = Frechet(classifier, reference), Neighbours(classifier, reference)
    assert evaluation["floor"]["frechet"] == pytest.approx(distance(train))
    assert evaluation["floor"]["counts"] == [899, 898]
    saved = digits_teacher()
    outputs = torch.from_numpy(solved(saved, make_recipe(saved, uri="x"), "holdout", np.arange(128))["output"])
    stored = rows["teacher ddim, stored", STEPS]
    assert stored["frechet"] == pytest.approx(distance(outputs))
    assert (stored["density"], stored["coverage"]) == pytest.approx(neighbours(outputs))
    floor = evaluation["floor"]
    assert (floor["density"], floor["coverage"]) == pytest.approx(neighbours(train))
    assert stored["sliced_wasserstein"] == pytest.approx(sliced_wasserstein(outputs, reference))
    # The same labels and noises reached the solver, or these would not be the stored bits.
    assert rows["teacher ddim", STEPS]["holdout_error"] == 0
    for figure in FIGURES:
        # A sample on the border of a ball may fall on either side of it.
        assert rows[str(run), 2][figure] == pytest.approx(rows["teacher ddim", 2][figure], rel=1e-4, abs=2e-3)


def test_files_and_table(digits, tmp_path, capsys):
    store, run = digits
    words = ["evaluate", str(run), "--data", store.uri, "--nfe", "1", "--count", "100", "--out", str(tmp_path / "out")]
    assert main(COMMANDS, words) == 0
    told = capsys.readouterr().out
    assert "100 samples each, against sklearn:digits" in told
    assert "899 samples against 898" in told
    assert "training" not in told  # this model has no run
    written = (tmp_path / "out" / "evaluation.json").read_text()
    assert (tmp_path / "out" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert main(COMMANDS, [*words, "--json"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed) == json.loads(written)


def test_a_number_of_steps_that_no_run_serves(gaussian):
    store, run = gaussian
    evaluation = evaluate(config(store, run, nfe=(1, 2)))
    assert any("not fitted for 2 steps; it serves 1, 4" in note for note in evaluation["notes"])
    assert ("teacher ddim", 2) in rows_of(evaluation)
    assert main(COMMANDS, ["evaluate", str(run), "--data", store.uri, "--nfe", "2"]) == 2


def test_a_teacher_that_can_not_be_had_is_left_out_in_one_line(tmp_path):
    saved = digits_teacher()
    for index, uri in enumerate(("lost/teacher", "python:os:abort")):
        folder = tmp_path / str(index)
        folder.mkdir()
        store = make_store(folder / "pairs", saved, make_recipe(saved, uri=uri))
        evaluation = evaluate(config(store, save_student(saved, folder / "run", 1)))
        assert {row["kind"] for row in evaluation["rows"]} == {"student", "stored"}
        assert sum("no rows of the teacher" in note for note in evaluation["notes"]) == 1


def test_only_the_recipes_teacher_is_taken_for_it(gaussian, capsys):
    store, run = gaussian
    # Neither closed form has weights: what tells them apart is their description.
    words = ["evaluate", str(run), "--data", store.uri, "--teacher", "builtin:mixture"]
    assert main(COMMANDS, words) == 2
    assert "has description" in capsys.readouterr().err


def test_data_that_is_not_the_students_is_refused(gaussian, tmp_path):
    store, _ = gaussian
    other = save_student(digits_teacher(), tmp_path / "other", 1)
    with pytest.raises(ManifestMismatch, match="sample shape"):
        evaluate(config(store, other))
    with pytest.raises(ManifestMismatch, match="--count"):
        evaluate(config(store, tmp_path / "run", count=129))


def test_a_student_that_diverged_is_refused(digits):
    store, run = digits
    saved = checkpoint.load(run / "model")
    module = saved.build()
    torch.nn.init.constant_(module.network.leave.bias, torch.nan)
    checkpoint.save(Checkpoint(saved.model, pack(module), grids=saved.grids), run / "model")
    with pytest.raises(ManifestMismatch, match="not finite"):
        evaluate(config(store, run))


@pytest.mark.parametrize("options", [{"runs": ()}, {"runs": ("a",), "nfe": (0,)}, {"runs": ("a",), "count": 1}])
def test_configs_that_mean_nothing_are_refused(options):
    with pytest.raises(ValueError, match=r"run|nfe|count"):
        EvaluateConfig(data="store", **options)


def contenders(scale, *nfes) -> list[tuple[str, int, int]]:
    saved = digits_teacher()
    recipe = make_recipe(saved, uri="x", scale=scale)
    teacher: Teacher = from_checkpoint("x", saved)
    return [(c.name.removeprefix("teacher "), c.steps, c.nfe) for c in teacher_solvers(teacher, recipe, nfes)]


def test_solvers_spend_exactly_the_calls_that_are_asked():
    assert contenders(1.0, 1, 5) == [("ddim", 1, 1), ("ddim", 5, 5), ("heun", 3, 5), ("dpmpp_2m", 5, 5), ("ddim", 8, 8)]
    # A guided teacher makes two calls a step: none fit into 1, and 10 are Heun's 3 steps.
    assert contenders(2.0, 1, 10) == [("ddim", 5, 10), ("heun", 3, 10), ("dpmpp_2m", 5, 10), ("ddim", 8, 16)]


@pytest.mark.parametrize(
    ("solver", "scale", "nfe"), [("heun", 1.0, 15), ("ddim", 1.0, 8), ("heun", 2.0, 30), ("rk4", 1.0, 31)]
)
def test_nfe_of_stored_outputs(solver, scale, nfe):
    assert recipe_nfe(make_recipe(digits_teacher(), uri="x", solver=solver, scale=scale)) == nfe


def test_pairs_come_in_order_of_their_ids_across_shards(gaussian):
    from limbeck.storage_schemas.dataset import open_dataset

    dataset = open_dataset(gaussian[0])
    pairs = read_pairs(dataset, "holdout", 100, at_most=2048)
    assert len(pairs) == 100
    assert pairs.condition is None
    expected = (80.0 * noise.standard_normal(0, "holdout", range(100), (2,))).astype(np.float32)
    np.testing.assert_array_equal(pairs.noise.numpy(), expected)
    assert len(read_pairs(dataset, "train", None, at_most=50)) == 50
