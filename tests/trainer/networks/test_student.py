import json

import pytest
import torch

from limbeck.diffusion.models import checkpoint
from limbeck.diffusion.models.checkpoint import Checkpoint, pack
from limbeck.diffusion.models.spec import model_from_spec
from limbeck.diffusion.recipes.grid import recipe_process
from limbeck.diffusion.recipes.teacher import NoTeacher, TeacherSource
from limbeck.storage_schemas import paths
from limbeck.storage_schemas.dataset import open_dataset
from limbeck.storage_schemas.errors import ManifestMismatch
from limbeck.trainer.config import FitConfig
from limbeck.trainer.networks.options import NetworkConfig
from limbeck.trainer.networks.student import (
    Shape,
    check_few_steps,
    check_fits,
    find_student,
    saved_model,
    student_steps,
    with_dropout,
)
from limbeck.trainer.planning.plan import fresh
from limbeck.trainer.planning.trajectories import start_student

VE = {"name": "ve", "sigma_max": 80.0}


def config(**options) -> FitConfig:
    network = NetworkConfig(width=8, depth=1) if options.get("init", "scratch") == "scratch" else NetworkConfig()
    return FitConfig(**{"out": "run", "data": "pairs", "init": "scratch", "network": network, **options})


def shape(**options) -> Shape:
    return Shape(**{"sample_shape": (2,), "num_classes": None, "process": VE, "rms": 0.71234, **options})


def test_scratch_follows_from_the_seed_and_the_data():
    first, again, other = (fresh(config(seed=seed), shape()) for seed in (1, 1, 2))
    assert first == again
    assert first.weights != other.weights
    assert first.model["prediction"] == {"name": "edm", "sigma_data": 0.7123}
    assert fresh(config(sigma_data=0.5), shape()).model["prediction"]["sigma_data"] == 0.5
    flow = fresh(config(), shape(process={"name": "rectified_flow"}))
    assert flow.model["prediction"] == {"name": "velocity"}


def test_a_unet_from_scratch_is_fitted_to_the_images(make_store):
    pytest.importorskip("diffusers")
    told = config(network=NetworkConfig(name="unet", width=8, depth=1, dropout=0.1))
    images = shape(sample_shape=(1, 8, 8), num_classes=3)
    saved = fresh(told, images)
    assert saved == fresh(told, images)
    network = saved.model["network"]
    assert (network["config"]["block_out_channels"], network["time_scale"]) == ([8, 16], 250.0)
    denoiser = model_from_spec(with_dropout(saved.model, 0.1))
    assert {module.p for module in denoiser.modules() if isinstance(module, torch.nn.Dropout)} >= {0.1}
    with pytest.raises(ValueError, match=r"needs images \[C, H, W\], the data has \[2\]"):
        fresh(told, shape())
    # Times of a table of betas are counted to a thousand already.
    table = fresh(told, shape(sample_shape=(1, 8, 8), process={"name": "discrete_vp", "betas": [0.1, 0.2]}))
    assert table.model["network"]["time_scale"] == 1.0


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"sample_shape": (3,)}, "sample shape"),
        ({"num_classes": 4}, "classes"),
        ({"process": {**VE, "sigma_max": 2.0}}, "process"),
    ],
)
def test_a_model_for_other_data_is_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        check_fits(fresh(config(), shape()), shape(**wrong), name="it")


@pytest.mark.parametrize(
    ("process", "prediction", "told"),
    [(VE, "epsilon", "can't predict epsilon"), ({"name": "cosine_vp", "s": 0.008}, "edm", "is given inf")],
)
def test_predictions_that_say_nothing_at_pure_noise_are_refused(process, prediction, told):
    saved = fresh(config(prediction=prediction), shape(process=process))
    with pytest.raises(ValueError, match=told):
        check_few_steps(saved, 80.0 if process is VE else 1.0)


def test_students_of_a_run_are_found_by_their_steps(tmp_path):
    saved = fresh(config(), shape())
    for folder, grid in (
        ("stages/2-step", {2: (80.0, 1.0, 0.0)}),
        ("stages/1-step", {1: (80.0, 0.0)}),
        ("model", {1: (80.0, 0.0)}),
    ):
        checkpoint.save(Checkpoint(saved.model, saved.weights, grid), tmp_path / folder)
    assert student_steps(tmp_path) == (1, 2)
    assert find_student(tmp_path, 2).grids == {2: (80.0, 1.0, 0.0)}
    assert find_student(tmp_path / "model", 1).weights == saved.weights
    assert saved_model(tmp_path).grids == {1: (80.0, 0.0)}
    with pytest.raises(ValueError, match="not fitted for 3 steps; it serves 1, 2"):
        find_student(tmp_path, 3)
    with pytest.raises(FileNotFoundError, match="holds no student"):
        student_steps(tmp_path / "stages")


def test_a_recipe_whose_process_says_otherwise_is_refused(make_store):
    recipe = open_dataset(make_store()).recipe
    assert recipe_process(recipe).T == 80.0
    with pytest.raises(ManifestMismatch, match="the recipe says sigma"):
        recipe_process(recipe.model_copy(update={"sigmas": tuple(sigma * 1.001 for sigma in recipe.sigmas)}))


def store_with_teacher(make_store, monkeypatch, saved: Checkpoint):
    """A store whose recipe names `saved` as its teacher, at a uri that is not there."""
    store = make_store()
    dataset = open_dataset(store)
    teacher = dataset.recipe.teacher.model_copy(
        update={"uri": "/nowhere/teacher", "model": saved.model, "weights_sha256": saved.weights_sha256}
    )
    monkeypatch.setitem(dataset.__dict__, "recipe", dataset.recipe.model_copy(update={"teacher": teacher}))
    return store, dataset


def test_a_teacher_kept_in_the_store_is_the_start(make_store, monkeypatch):
    saved = fresh(config(), shape())
    store, dataset = store_with_teacher(make_store, monkeypatch, saved)
    with pytest.raises(
        NoTeacher, match=r"used only if you name it, too: give --teacher\.uri /nowhere/teacher; or generate"
    ):
        TeacherSource(dataset.store, dataset.recipe, flag="--teacher.uri").checkpoint()
    missing = r"/nowhere/teacher is no folder with a model\.json: .*; or generate --with-weights"
    with pytest.raises(NoTeacher, match=missing):
        TeacherSource(dataset.store, dataset.recipe, "/nowhere/teacher").checkpoint()
    folder = paths.weights_folder(dataset.recipe.id)
    store.write(f"{folder}/model.safetensors", saved.weights)
    store.write(f"{folder}/model.json", json.dumps(saved.document()).encode())
    assert start_student(config(init="teacher"), dataset, shape(), 80.0).weights == saved.weights
    reflow, straight = config(init="teacher", objective={"name": "reflow"}), shape(process={"name": "rectified_flow"})
    with pytest.raises(ValueError, match=r"has process VE\(.*\), a reflow student of this data has RectifiedFlow\(\);"):
        start_student(reflow, dataset, straight, 1.0)


def test_a_teacher_with_other_weights_is_refused(make_store, monkeypatch, tmp_path):
    saved, other = fresh(config(), shape()), fresh(config(seed=1), shape())
    _, dataset = store_with_teacher(make_store, monkeypatch, saved)
    checkpoint.save(other, tmp_path / "other")
    moved = dataset.recipe.teacher.model_copy(update={"uri": str(tmp_path / "other")})
    monkeypatch.setitem(dataset.__dict__, "recipe", dataset.recipe.model_copy(update={"teacher": moved}))
    with pytest.raises(NoTeacher, match="the recipe says"):
        TeacherSource(dataset.store, dataset.recipe, dataset.recipe.teacher.uri).checkpoint()


def test_a_closed_form_teacher_has_nothing_to_fit(make_store):
    with pytest.raises(ValueError, match="without weights to fit; use --init scratch"):
        start_student(config(init="teacher"), open_dataset(make_store()), shape(), 80.0)


def test_weights_survive_the_folder(tmp_path):
    saved = fresh(config(), shape())
    checkpoint.save(saved, tmp_path)
    module = model_from_spec(saved.model)
    module.load_state_dict(saved_model(tmp_path).build().state_dict())
    assert pack(module) == saved.weights
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), saved.build().parameters(), strict=True))
