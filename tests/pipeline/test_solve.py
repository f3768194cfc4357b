"""A sample is a pure function of its recipe and id: known answers, and the same bits however it is asked for."""

import hashlib
import sys

import numpy as np
import pytest
import torch

from limbeck.diffusion import noise
from limbeck.diffusion.models.teachers import load_teacher
from limbeck.diffusion.recipes.samples import draw_noise
from limbeck.diffusion.solvers import solve
from limbeck.pipeline.config import GenerateConfig
from limbeck.pipeline.recipe import build_recipe
from limbeck.pipeline.solve import Graphed, OutOfMemory, denoise_of, micro_batches, solve_task
from limbeck.storage_schemas.commit import Task
from limbeck.storage_schemas.record import from_storage

CPU = torch.device("cpu")


def recipe_of(teacher, **fields):
    given = {"count": 64, "micro_batch": 16, "samples_per_shard": 64, "runner": "local"} | fields
    config = GenerateConfig.model_validate({"teacher": teacher.uri, "store": "s", **given})
    return build_recipe(config, teacher)


def solved(teacher, recipe, task):
    return solve_task(recipe, denoise_of(recipe, teacher.denoiser, device=CPU), teacher.process, task, device=CPU)


@pytest.fixture(scope="module")
def gaussian():
    return load_teacher("builtin:gaussian")


@pytest.fixture(scope="module")
def mixture():
    return load_teacher("builtin:mixture")


def test_the_stored_noise_is_golden(gaussian):
    """Every machine stores these bits: philox, AS 241, times 80, to nearest even."""
    columns = solved(gaussian, recipe_of(gaussian), Task("train", 3, 64)).columns
    assert columns["sample_id"].tolist() == list(range(192, 256))
    expected = (80.0 * noise.standard_normal(0, "train", range(192, 256), (2,))).astype(np.float16)
    assert np.array_equal(columns["noise"], expected)
    assert hashlib.sha256(columns["noise"].tobytes()).hexdigest()[:16] == "00613d4ca7bca5dc"


def test_the_output_is_where_the_exact_flow_leads_from_the_stored_noise(mixture):
    fine = {"name": "rk4", "steps": 128}
    recipe = recipe_of(mixture, solver=fine, dtype="float32", solve_dtype="float64")
    columns = solved(mixture, recipe, Task("train", 0, 64)).columns
    x_T = torch.from_numpy(columns["noise"]).double()
    exact = mixture.denoiser.flow_map(x_T, torch.tensor(80.0).double(), torch.tensor(0.0).double())
    # Stored in float32: half a unit in the last place of a number near 1, and what the solver leaves.
    assert np.abs(columns["output"] - exact.numpy()).max() < 2e-5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_stored_pair_is_exact(mixture, dtype):
    """Solving from what the shard holds gives what the shard holds, whatever it was rounded to."""
    recipe = recipe_of(mixture, dtype=dtype, states=(4,))
    stored = solved(mixture, recipe, Task("holdout", 0, 64)).columns
    x_T = torch.from_numpy(from_storage(stored["noise"], dtype)).float()[:16]
    again = solve(mixture.denoiser, mixture.process, x_T, torch.tensor(recipe.times, dtype=torch.float64), keep=[4, 16])
    for name, state in zip(("state_004", "output"), again.states, strict=True):
        expected = state.to(getattr(torch, dtype)).float().numpy()
        assert np.array_equal(from_storage(stored[name], dtype)[:16].astype(np.float32), expected)


def test_the_same_sample_has_the_same_bits_in_shards_of_any_size(mixture):
    recipe = recipe_of(mixture, states=(2, 4))
    large = solved(mixture, recipe, Task("train", 1, 64)).columns
    small = [solved(mixture, recipe, Task("train", index, 32)).columns for index in (3, 2)][::-1]
    for name, column in large.items():
        assert np.array_equal(column, np.concatenate([part[name] for part in small]))


@pytest.mark.parametrize("micro_batch", [1, 4, 64])
def test_the_noise_does_not_depend_on_the_micro_batch(gaussian, micro_batch):
    ids = np.arange(64)
    whole = draw_noise(recipe_of(gaussian), "train", ids)
    recipe = recipe_of(gaussian, micro_batch=micro_batch)
    parts = [draw_noise(recipe, "train", batch) for batch in micro_batches(Task("train", 0, 64), micro_batch)]
    assert torch.equal(torch.cat(parts), whole)


def test_the_two_splits_have_noises_of_their_own(gaussian):
    recipe, ids = recipe_of(gaussian), np.arange(64)
    assert not torch.equal(draw_noise(recipe, "train", ids), draw_noise(recipe, "holdout", ids))


@pytest.mark.parametrize("name", ["nan_teacher", "overflowing_teacher"])
def test_what_is_not_finite_is_left_out_and_named(name):
    strange = load_teacher(f"python:strange_teachers:{name}")
    recipe = recipe_of(strange, solver={"steps": 4, "name": "ddim"}, states=(1,))
    found = solved(strange, recipe, Task("train", 1, 64))
    assert found.quarantined == (sys.modules["strange_teachers"].BAD_ID,)
    assert found.columns["sample_id"].tolist() == [i for i in range(64, 128) if i != 70]
    sane = load_teacher("builtin:gaussian")
    expected = solved(sane, recipe, Task("train", 1, 64)).columns
    for column in ("noise", "state_001", "output"):
        assert np.array_equal(found.columns[column], np.delete(expected[column], 6, axis=0))


def test_the_recipe_fills_in_defaults_and_refuses_what_the_teacher_lacks(gaussian):
    plain = recipe_of(gaussian)
    assert plain.id == recipe_of(gaussian, solver={"rho": 7.0, "r_min": 0.002}).id
    assert plain.id != recipe_of(gaussian, solver={"rho": 6.0}).id
    assert plain.id != recipe_of(gaussian, seed=1).id
    assert plain.id == recipe_of(gaussian, workers=9, count=7, format="webdataset").id
    assert (plain.states, plain.times[0], plain.times[-1], plain.sigmas[0]) == ((0, 16), 80.0, 0.0, 80.0)
    for fields in (
        {"guidance": 2.0},
        {"condition": "uniform_labels"},
        {"solver": {"grid": "uniform_time", "rho": 7.0}},
    ):
        with pytest.raises(ValueError, match=r"leave it|use condition none"):
            recipe_of(gaussian, **fields)


@pytest.mark.parametrize(("fields", "nfe"), [({}, 7), ({"guidance": 2.0}, 14), ({"autocast": "bfloat16"}, 7)])
def test_a_class_conditional_network(fields, nfe):
    """Labels are the sample's own, the recipe holds every option, and the network's calls are counted."""
    digits = load_teacher("builtin:digits")
    recipe = recipe_of(digits, solver={"steps": 4}, **fields)
    assert recipe.condition.num_classes == 10
    found = solved(digits, recipe, Task("holdout", 0, 32))
    assert (found.nfe, found.quarantined) == (nfe, ())
    assert np.array_equal(found.columns["condition"], noise.labels(0, "holdout", range(32), 10))
    plain = solved(digits, recipe_of(digits, solver={"steps": 4}), Task("holdout", 0, 32))
    assert np.array_equal(found.columns["output"], plain.columns["output"]) is (not fields)
    unconditional = solved(digits, recipe_of(digits, condition="none"), Task("holdout", 0, 32))
    assert set(unconditional.columns["condition"]) == {-1}


@pytest.mark.parametrize("channels_last", [False, True])
def test_channels_last_reaches_every_call(channels_last):
    teacher = load_teacher("python:hungry_teachers:convolution_teacher")
    recipe = recipe_of(teacher, solver={"steps": 4}, channels_last=channels_last, dtype="float32")
    found = solved(teacher, recipe, Task("train", 0, 64))
    assert teacher.denoiser.seen == {channels_last}
    plain = recipe_of(teacher, solver={"steps": 4}, dtype="float32")
    expected = solved(load_teacher(teacher.uri), plain, Task("train", 0, 64))
    assert np.allclose(found.columns["output"], expected.columns["output"], atol=1e-5)


def test_channels_last_needs_images(gaussian):
    with pytest.raises(ValueError, match="channels-last needs images CxHxW, builtin:gaussian makes 2: leave it out"):
        recipe_of(gaussian, channels_last=True)


def test_answers_that_share_one_place_are_copied_out_of_it(mixture):
    """As CUDA graphs answer: the next call overwrites the last one's answer, which a solver may still hold."""

    class OnePlace(torch.nn.Module):
        num_classes = 7

        def __init__(self):
            super().__init__()
            self.place = torch.empty(16, 2)

        def forward(self, x_t, t, condition=None):
            return self.place.copy_(mixture.denoiser(x_t, t))

    x_T, late, early = draw_noise(recipe_of(mixture), "train", np.arange(16)), torch.tensor(80.0), torch.tensor(1.0)
    graphed = Graphed(OnePlace())
    first = graphed(x_T, late)
    second = graphed(x_T, early)
    assert torch.equal(first, mixture.denoiser(x_T, late))
    assert torch.equal(second, mixture.denoiser(x_T, early))
    assert not torch.equal(first, second)
    assert graphed.num_classes == 7


@pytest.mark.faults
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_teacher_says_the_same(mode):
    """On a CPU both are plain compilation: reduce-overhead has no CUDA graphs to make."""
    digits = load_teacher("builtin:digits")
    fields = {"solver": {"steps": 3}, "guidance": 2.0, "dtype": "float32"}
    compiled = solved(digits, recipe_of(digits, **fields, compile=mode), Task("train", 0, 32))
    plain = solved(digits, recipe_of(digits, **fields), Task("train", 0, 32))
    assert compiled.nfe == plain.nfe == 10
    assert np.abs(compiled.columns["output"] - plain.columns["output"]).max() < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("solver", ["dpmpp_3m", "heun"])
def test_cuda_graphs_say_the_same(solver):
    digits = load_teacher("builtin:digits", device="cuda")
    task, device = Task("train", 0, 64), torch.device("cuda")
    fields = {"solver": {"steps": 6, "name": solver}, "dtype": "float32", "guidance": 2.0}
    recipes = [recipe_of(digits, **fields, compile=mode) for mode in ("none", "reduce-overhead")]
    plain, graphed = (
        solve_task(recipe, denoise_of(recipe, digits.denoiser, device=device), digits.process, task, device=device)
        for recipe in recipes
    )
    assert np.abs(graphed.columns["output"] - plain.columns["output"]).max() < 1e-3


@pytest.mark.parametrize("name", ["gpu_teacher", "cpu_teacher"])
def test_out_of_memory_is_told_and_never_mended_by_smaller_batches(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HUNGRY_ROOM", "8")
    monkeypatch.setenv("HUNGRY_DIARY", str(tmp_path / "diary"))
    hungry = load_teacher(f"python:hungry_teachers:{name}")
    with pytest.raises(
        OutOfMemory, match="with 16 samples together: the recipe fixes the micro-batch, it is never"
    ) as e:
        solved(hungry, recipe_of(hungry), Task("train", 0, 64))
    assert "fewer workers a GPU" in str(e.value)
    assert "smaller --micro-batch" in str(e.value)
    assert "\n" not in str(e.value)
    assert (tmp_path / "diary").read_text().split() == ["16"]


def test_other_mistakes_are_not_taken_for_a_lack_of_memory():
    wrong = load_teacher("python:hungry_teachers:wrong_teacher")
    with pytest.raises(RuntimeError, match="expected scalar type"):
        solved(wrong, recipe_of(wrong), Task("train", 0, 64))
