"""Segments from noised data: known answers, and what a recipe, a shard and a command line make of them."""

import hashlib

import numpy as np
import pytest
import torch

from limbeck.diffusion import noise
from limbeck.diffusion.gaussian import GaussianTeacher
from limbeck.diffusion.models.spec import process_spec
from limbeck.diffusion.models.teachers import Teacher, builtin_checkpoint
from limbeck.diffusion.process import CosineVP
from limbeck.pipeline.config import GenerateConfig
from limbeck.pipeline.recipe import build_recipe
from limbeck.pipeline.segments import data_start, starting_images
from limbeck.pipeline.solve import denoise_of, solve_task
from limbeck.storage_schemas.commit import Task
from limbeck.storage_schemas.errors import UserError
from limbeck.storage_schemas.recipe import DataLabels

CPU = torch.device("cpu")
MEAN, VARIANCE, SHAPE = 0.2, 0.3, (1, 2, 3)
STEPS = 8


class Classed(GaussianTeacher):
    """Every class is the same Gaussian; the labels that it was asked for are kept."""

    def __init__(self):
        super().__init__(CosineVP(), mean=MEAN, variance=VARIANCE)
        self.asked, self.num_classes = [], 5

    def forward(self, x_t, t, condition=None):
        self.asked.append(condition)
        return super().forward(x_t, t, condition)


@pytest.fixture
def images(tmp_path):
    """The uri of 40 images, of which 20 are for training, and these."""
    pixels = np.random.default_rng(0).uniform(-1, 1, (40, *SHAPE)).astype(np.float32)
    np.savez(tmp_path / "images.npz", images=pixels, labels=np.arange(40) % 5)
    return f"npz:{tmp_path / 'images.npz'}", pixels[::2], (np.arange(40) % 5)[::2]


def classed():
    denoiser = Classed()
    process = denoiser.process
    model = {"kind": "python", "sample_shape": list(SHAPE), "num_classes": 5, "process": process_spec(process)}
    return Teacher("python:x:y", denoiser, process, model, "ab" * 32, SHAPE, 5, "cd" * 32)


def recipe_of(teacher, uri, **fields):
    given = {"count": 64, "micro_batch": 32, "samples_per_shard": 128, "runner": "local", "solve_dtype": "float64"}
    solver = {"name": "ddim", "steps": STEPS, "grid": "uniform_time"}
    config = {"teacher": teacher.uri, "store": "s", "start": f"data:{uri}", "solver": solver, "dtype": "float32"}
    return build_recipe(GenerateConfig.model_validate({**given, **config, **fields}), teacher)


def solved(teacher, recipe, task):
    return solve_task(recipe, denoise_of(recipe, teacher.denoiser, device=CPU), teacher.process, task, device=CPU)


def exact_step(recipe, x, start, step):
    """DDIM of a Gaussian, x_s = alpha_s mu + sigma_s/sigma_t (x - alpha_t mu), from grid index start + step."""
    alpha_t, alpha_s = (np.array(recipe.alphas)[start + k][:, None, None, None] for k in (step, step + 1))
    sigma_t, sigma_s = (np.array(recipe.sigmas)[start + k][:, None, None, None] for k in (step, step + 1))
    mu = MEAN + alpha_t * VARIANCE / (alpha_t**2 * VARIANCE + sigma_t**2) * (x - alpha_t * MEAN)
    return alpha_s * mu + sigma_s / sigma_t * (x - alpha_t * mu)


def test_segments_are_two_ddim_steps_from_a_noised_image_in_closed_form(images):
    uri, pixels, labels = images
    teacher = classed()
    recipe = recipe_of(teacher, uri)
    columns = solved(teacher, recipe, Task("train", 3, 128)).columns
    start, ids = columns["start_index"].astype(int), np.arange(384, 512)
    assert columns["sample_id"].tolist() == ids.tolist()
    assert set(start.tolist()) == {0, 2, 4, 6}
    assert np.array_equal(columns["condition"], labels[columns["data_id"]])
    assert torch.equal(torch.cat(teacher.denoiser.asked[::2]), torch.from_numpy(columns["condition"]))
    alpha, sigma = (np.array(values)[start][:, None, None, None] for values in (recipe.alphas, recipe.sigmas))
    eps = noise.standard_normal(0, "train", ids, SHAPE)
    x_t = (alpha * pixels[columns["data_id"]] + sigma * eps).astype(np.float32)
    assert np.array_equal(columns["segment_0"], x_t)
    x_t1 = exact_step(recipe, x_t.astype(np.float64), start, 0)
    np.testing.assert_allclose(columns["segment_1"], x_t1, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(columns["segment_2"], exact_step(recipe, x_t1, start, 1), rtol=1e-6, atol=1e-7)


def test_images_and_places_are_drawn_uniformly_and_do_not_hang_on_the_shard():
    ids = np.arange(20_000)
    data, place = noise.data_and_place(7, "train", ids, num_data=10, num_places=4)
    joint = np.bincount(data * 4 + place, minlength=40)
    assert np.abs(joint - 500).max() < 5 * np.sqrt(500)
    some = noise.data_and_place(7, "train", ids[::-7], num_data=10, num_places=4)
    assert np.array_equal(np.stack(some), np.stack([data, place])[:, ::-7])
    other = noise.data_and_place(7, "holdout", ids, num_data=10, num_places=4)
    assert 0.08 < (other[0] == data).mean() < 0.12


def test_the_drawn_places_are_golden():
    drawn = np.stack(noise.data_and_place(0, "train", range(256), num_data=898, num_places=8))
    assert drawn[:, :4].tolist() == [[731, 357, 893, 563], [3, 0, 1, 7]]
    assert hashlib.sha256(drawn.astype("<i8").tobytes()).hexdigest()[:16] == "852a004db7d0d506"


def test_the_digest_of_images_is_the_one_that_a_teacher_fitted_to_them_names():
    reads = builtin_checkpoint("digits").about["reads"]
    assert data_start("data:sklearn:digits", sample_shape=(1, 8, 8), num_classes=10).digest == reads["content_digest"]


def test_a_recipe_names_its_images_and_other_images_are_refused(images):
    uri, _, _ = images
    teacher = classed()
    recipe = recipe_of(teacher, uri)
    assert (recipe.chain, recipe.states, recipe.condition) == ("segment", (), DataLabels(num_classes=5))
    assert recipe.id == recipe_of(classed(), uri, count=9, workers=3).id
    assert recipe.id != recipe_of(teacher, uri, condition="none").id
    path = uri.removeprefix("npz:")
    np.savez(path, images=np.full((4, *SHAPE), -0.5), labels=np.zeros(4, int))
    assert recipe.id != recipe_of(teacher, uri).id
    starting_images.cache_clear()
    with pytest.raises(UserError, match=r"holds images .* here, the recipe says .*: it changed"):
        solved(teacher, recipe, Task("train", 0, 128))
    for label, labels in ((5, np.arange(12) // 2), (-1, np.full(12, -1))):
        np.savez(path, images=np.full((12, *SHAPE), -0.5), labels=labels)
        with pytest.raises(ValueError, match=f"has label {label}, the teacher has 5 classes"):
            recipe_of(teacher, uri)
    np.savez(path, images=np.full((4, 1, 2, 2), -0.5), labels=np.zeros(4, int))
    with pytest.raises(ValueError, match=r"has images \[1, 2, 2\], the teacher makes \[1, 2, 3\]"):
        recipe_of(teacher, uri)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--solver.name", "heun"], "segments of two ddim steps, this is heun on 4"),
        (["--solver.name", "ddim", "--solver.steps", "5"], "an even number of steps"),
        (["--solver.name", "ddim", "--states", "2"], "leave --states"),
    ],
)
def test_chains_that_are_no_segments_are_refused(pipeline, tmp_path, words, told):
    given = ["--teacher", "builtin:digits", "--store", tmp_path, "--count", 8, "--solver.steps", 4]
    code, _, err = pipeline("generate", *given, "--start", "data:sklearn:digits", *words)
    assert (code, told in err) == (2, True), err


def test_segments_of_digits_are_told_drawn_and_verified_but_not_solved_again(pipeline, tmp_path):
    given = ["--teacher", "builtin:digits", "--store", tmp_path, "--count", 64, "--holdout", 32, "--runner", "local"]
    ddim = ["--solver.name", "ddim", "--solver.steps", 4, "--samples-per-shard", 32, "--micro-batch", 32]
    code, out, _ = pipeline("generate", *given, *ddim, "--start", "data:sklearn:digits")
    assert (code, "96 samples" in out) == (0, True)
    _, out, _ = pipeline("inspect", tmp_path, "--picture", tmp_path / "segments.png")
    assert "2 calls a sample" in out
    assert "segments of two steps from sklearn:digits" in out
    assert (tmp_path / "segments.png").stat().st_size > 1000
    assert pipeline("verify", tmp_path)[0] == 0
    for words in (["verify", tmp_path, "--audit", 4], ["reproduce", tmp_path, "--sample", 1]):
        code, _, err = pipeline(*words)
        assert (code, "only trajectories from the prior are solved again" in err) == (1, True)
