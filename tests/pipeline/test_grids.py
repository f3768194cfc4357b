"""Grids as `generate` takes them: options, defaults, a pipeline's own, and what a recipe says of each."""

import math

import pytest

from limbeck.diffusion.models.teachers import load_teacher
from limbeck.pipeline.config import GenerateConfig
from limbeck.pipeline.recipe import build_recipe
from limbeck.storage_schemas.command_line import parse
from limbeck.storage_schemas.dataset import open_dataset
from limbeck.storage_schemas.errors import UsageError
from limbeck.storage_schemas.store import Store
from tests.diffusion.models.pipelines import save_unet_pipeline

diffusers = pytest.importorskip("diffusers")


def recipe_of(teacher, *words):
    given = ["--teacher", teacher, "--store", "s", "--count", "8", *words]
    config = parse(GenerateConfig, given, program="generate")
    return build_recipe(config, load_teacher(config.teacher))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, set_alpha_to_one=False)
    return save_unet_pipeline(tmp_path_factory.mktemp("table"), scheduler)


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    return save_unet_pipeline(tmp_path_factory.mktemp("flow"), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))


def test_the_schedulers_own_grid_is_the_grid_that_it_is(table):
    own = recipe_of(table, "--solver.grid", "scheduler", "--solver.steps", "4")
    by_hand = ["--solver.grid", "leading", "--solver.offset", "1", "--solver.end", "1", "--solver.steps", "4"]
    assert own.times == (752, 502, 252, 2, 1)
    assert own.id == recipe_of(table, *by_hand).id


def test_an_option_is_put_over_the_schedulers_own(flow):
    own = recipe_of(flow, "--solver.grid", "scheduler", "--solver.steps", "4")
    other = recipe_of(flow, "--solver.grid", "scheduler", "--solver.steps", "4", "--solver.shift", "1")
    assert own.solver.grid["shift"] == 3
    assert "shift" not in other.solver.grid
    assert other.times[1] < own.times[1]


def test_mu_is_the_logarithm_of_a_shift(flow):
    uniform = ["--solver.grid", "uniform_time", "--solver.steps", "4"]
    by_mu = recipe_of(flow, *uniform, "--solver.mu", str(math.log(3)))
    assert by_mu.id == recipe_of(flow, *uniform, "--solver.shift", "3").id


@pytest.mark.parametrize(
    ("words", "same"),
    [
        ("--solver.grid trailing", "--solver.grid trailing --solver.end 0"),
        ("--solver.grid leading", "--solver.grid leading --solver.offset 0 --solver.spare 0"),
        ("--solver.grid uniform_time", "--solver.grid uniform_time --solver.shift 1"),
    ],
)
def test_a_default_that_is_given_is_the_same_recipe(table, words, same):
    steps = ["--solver.steps", "4"]
    assert recipe_of(table, *words.split(), *steps).id == recipe_of(table, *same.split(), *steps).id


def test_times_that_are_given_are_the_grid_and_its_steps():
    recipe = recipe_of("builtin:gaussian", "--solver.times", "80", "3", "0.5", "0")
    assert (recipe.times, recipe.num_steps) == ((80, 3, 0.5, 0), 3)
    assert recipe.solver.grid == {"name": "times", "times": [80, 3, 0.5, 0]}


def test_a_grid_never_begins_past_the_processs_end():
    """13 digits of 200/3 are more than 200/3."""
    assert recipe_of("python:strange_teachers:odd_teacher", "--solver.steps", "4").times[0] == 200 / 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--solver.grid scheduler", "builtin:gaussian has no scheduler whose own times are a grid of ours"),
        ("--solver.grid trailing", "only a table of betas has"),
        ("--solver.grid own", "builtin:gaussian has no own grid"),
        ("--solver.shift 3 --solver.grid karras", "the karras grid has no shift"),
        ("--solver.shift 3 --solver.mu 1 --solver.grid uniform_time", "say the same: leave one of the two out"),
        ("--solver.times 80 0 --solver.steps 4", "times has 2 points, 4 steps need 5"),
        ("--solver.times 0 80", "give them descending"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(words, message):
    with pytest.raises((ValueError, UsageError), match=message) as told:
        recipe_of("builtin:gaussian", *words.split())
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("words", ["--solver.grid scheduler", "--solver.grid trailing", "--solver.times 1000 400 90 7"])
def test_a_dataset_of_a_pipelines_grid_is_solved_audited_and_reproduced(pipeline, table, at_home, tmp_path, words):
    small = "--count 16 --holdout 8 --samples-per-shard 8 --micro-batch 8 --runner local --solver.name ddim --states 1"
    steps = [] if "times" in words else ["--solver.steps", "3"]
    given = ["--teacher", table, "--store", tmp_path, *small.split(), *words.split(), *steps]
    assert pipeline("generate", *given)[0] == 0
    assert pipeline("generate", *given)[1].startswith("nothing to do")
    code, out, err = pipeline("verify", tmp_path, "--audit", 4, "--teacher", table, "--tolerance", 100)
    assert (code, "solver error of output" in out) == (0, True), out + err
    assert pipeline("reproduce", tmp_path, "--sample", 3, "--teacher", table)[0] == 0
    assert open_dataset(Store.open(str(tmp_path))).recipe.times[-1] in (0, 1, 7)
