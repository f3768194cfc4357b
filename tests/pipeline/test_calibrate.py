"""Measured solver error against the exact flow of closed forms; the choice; the note that goes with a recipe."""

import json
import math

import numpy as np
import pytest
import torch

from limbeck.diffusion.grids import karras
from limbeck.diffusion.models.teachers import load_teacher
from limbeck.diffusion.recipes.samples import draw_noise
from limbeck.diffusion.solvers import SOLVERS, solve
from limbeck.pipeline.before.calibrate import _point, judge, orders
from limbeck.pipeline.before.solver_error import Trial, build_config, measure
from limbeck.pipeline.config import CalibrateConfig
from limbeck.pipeline.recipe import build_recipe
from limbeck.storage_schemas.errors import UserError
from limbeck.storage_schemas.notes import Calibration, CalibrationPoint, cheapest, read_calibrations
from limbeck.storage_schemas.recipe import Recipe
from limbeck.storage_schemas.store import Store
from tests.diffusion.models.pipelines import save_unet_pipeline
from tests.diffusion.test_solvers import CALLS

STEPS = (8, 16, 32, 64)
ZERO = torch.tensor(0.0, dtype=torch.float64)


def config_of(**fields):
    given = {"teacher": "builtin:mixture", "runner": "local", "steps": STEPS, "tolerance": 0.01, "count": 32}
    return CalibrateConfig.model_validate(given | fields)


def recipe_of(config):
    return build_recipe(build_config(config, config.solvers[0], config.steps[0]), load_teacher(config.teacher))


def exact_squares(config, solver, steps):
    """[n]: what `measure` estimates, against the flow map in closed form."""
    teacher, recipe = load_teacher(config.teacher), recipe_of(config)
    x_T = draw_noise(recipe, "holdout", np.arange(config.count)).to(getattr(torch, config.solve_dtype))
    found = solve(teacher.denoiser, teacher.process, x_T, karras(teacher.process, steps), solver=solver)
    exact = teacher.denoiser.flow_map(x_T.double(), torch.tensor(80.0).double(), ZERO)
    return (found.states[-1].double() - exact).square().flatten(1).mean(1).numpy(), exact


@pytest.fixture(scope="module", params=["builtin:gaussian", "builtin:mixture"])
def calibrated(request):
    config = config_of(teacher=request.param, solve_dtype="float64")
    return config, judge(config, recipe_of(config), measure(config))


def test_measured_errors_are_the_true_ones_within_the_references(calibrated):
    config, found = calibrated
    assert [(point.solver, point.steps) for point in found.points] == [
        (solver, steps) for solver in config.solvers for steps in STEPS
    ]
    assert found.reference.error < 1e-5
    for point in found.points:
        squares, exact = exact_squares(config, point.solver, point.steps)
        assert found.scale == pytest.approx(exact.std(correction=0).item(), rel=1e-4)
        truth = math.sqrt(squares.mean()) / found.scale
        assert point.error == pytest.approx(truth, abs=found.reference.error, rel=1e-6)
        assert point.low <= point.error < point.high


def test_network_calls_are_counted(calibrated):
    _, found = calibrated
    calls = {solver: count(16) for solver, count in CALLS.items()}
    assert {point.solver: point.nfe for point in found.points if point.steps == 16} == calls


def test_orders_are_those_of_the_solvers():
    """On a smooth flow, from where the last step's own error is far below what is left."""
    config = config_of(teacher="builtin:gaussian", solve_dtype="float64", steps=(64, 128), reference_factor=4)
    found = orders(judge(config, recipe_of(config), measure(config)))
    assert found.keys() == SOLVERS.keys()
    for solver, order in found.items():
        assert order == pytest.approx(SOLVERS[solver].order, abs=0.3), (solver, order)


def test_the_named_solver_is_truly_the_cheapest(calibrated):
    """By exact errors, over eight times the samples, of those that are clearly within the tolerance."""
    config, found = calibrated
    many = config.model_copy(update={"count": 8 * config.count})
    truths = [
        math.sqrt(exact_squares(many, point.solver, point.steps)[0].mean()) / found.scale for point in found.points
    ]
    good = [(point.nfe, truth, k) for k, (point, truth) in enumerate(zip(found.points, truths, strict=True))]
    assert found.choice == min(entry for entry in good if entry[1] < 0.6 * config.tolerance)[2]


def test_a_grid_that_begins_elsewhere_for_other_steps_is_refused(pipeline, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    uri = save_unet_pipeline(tmp_path, diffusers.DDIMScheduler(clip_sample=False))
    given = ["--runner", "local", "--count", 8, "--micro-batch", 8, "--steps", 4, 8, "--reference-factor", 2]
    code, _, err = pipeline("calibrate", "--teacher", uri, "--solver.grid", "leading", *given)
    assert (code, err.count("\n")) == (2, 1), err
    assert "the leading grid begins at 751 with 4 steps, at 931 with 16: calibrate on one such as trailing" in err


def test_the_interval_covers_the_error_of_all_samples():
    """In about 95 of 100 draws of samples: here 40 noise seeds, of which at least 34 must."""
    config = config_of(solvers=("heun",), steps=(16,), count=64, solve_dtype="float64")
    truth = math.sqrt(exact_squares(config.model_copy(update={"count": 8192}), "heun", 16)[0].mean())
    covered = 0
    for seed in range(40):
        squares, _ = exact_squares(config.model_copy(update={"seed": seed}), "heun", 16)
        point = _point(Trial("heun", 16, 31, squares), 1.0)
        covered += point.low <= truth <= point.high
    assert covered >= 34


def test_a_reference_that_is_no_finer_is_refused():
    config = config_of(steps=(2,), reference_factor=2, tolerance=1e-3)
    with pytest.raises(UserError, match=r"the reference, rk4 at 4 steps, is itself .* raise --reference-factor"):
        judge(config, recipe_of(config), measure(config))


def test_what_is_not_finite_is_no_error_and_never_chosen():
    point = _point(Trial("heun", 4, 7, np.array([1.0, math.inf])), 1.0)
    assert (point.error, point.low, point.high) == (None, None, None)
    assert cheapest([point], 10.0) is None


def test_the_cheapest_is_by_calls_then_by_error_and_with_certainty():
    def point(nfe, error, high):
        return CalibrationPoint(solver="heun", steps=nfe, nfe=nfe, error=error, low=0, high=high)

    assert cheapest([point(9, 0.001, 0.002), point(5, 0.008, 0.009), point(5, 0.007, 0.008)], 0.01) == 2
    assert cheapest([point(5, 0.009, 0.011), point(7, 0.001, 0.002)], 0.01) == 1
    assert cheapest([point(5, 0.02, 0.03)], 0.01) is None


CALIBRATE = ["calibrate", "--teacher", "builtin:mixture", "--runner", "local", "--solvers", "ddim", "heun"]


def test_the_command_goes_from_tolerance_to_the_notes_of_a_dataset(pipeline, generate, tmp_path):
    out, picture = tmp_path / "calibration.json", tmp_path / "calibration.png"
    files = ["--out", out, "--picture", picture]
    code, printed, _ = pipeline(*CALIBRATE, "--steps", 4, 8, 16, "--tolerance", 0.3, *files)
    assert code == 0
    assert "* cheapest below 0.3:" in printed
    assert picture.read_bytes()[:4] == b"\x89PNG"
    found = Calibration.from_bytes(out.read_bytes(), "out")
    chosen = found.points[found.choice]
    assert f"--solver.name {chosen.solver} --solver.steps {chosen.steps} --solver.grid karras" in printed
    suggested = printed.splitlines()[-1].removeprefix("generate with ").split()
    store = tmp_path / "store"
    code, printed, err = generate(store, "--states", 1, *suggested, teacher="builtin:mixture")
    assert code == 0, err
    (recipe_path,) = store.glob("recipes/*/recipe.json")
    recipe = Recipe.from_bytes(recipe_path.read_bytes(), "recipe")
    assert (recipe.solver.name, recipe.solver.steps) == (chosen.solver, chosen.steps)
    assert read_calibrations(Store.open(str(store)), recipe.id) == [found]
    assert generate(store, "--states", 1, *suggested, teacher="builtin:mixture")[0] == 0
    assert len(list(store.glob("recipes/*/notes/*"))) == 1
    code, printed, _ = pipeline("inspect", store)
    assert f"solver     is off by {chosen.error:.2g} standard deviations RMS" in printed
    (note,) = json.loads(pipeline("inspect", store, "--json")[1])["calibrations"]
    assert (note["error"], note["reference"]["solver"], note["count"]) == (chosen.error, "rk4", 64)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--teacher", "builtin:gaussian"], "was measured with teacher "),
        (["--solver.steps", "7"], "did not measure heun at 7 steps: calibrate with these, or take one of"),
        (["--solver.name", "ab2"], "did not measure ab2 at 4 steps"),
        (["--solver.rho", "5"], "was measured with grid"),
        (["--solve-dtype", "float64"], "was measured with solve dtype float32, this recipe has float64"),
        (["--tf32"], "was measured with TF32 False, this recipe has True"),
    ],
)
def test_a_calibration_of_something_else_is_refused_before_any_work(generate, tmp_path, words, message):
    config = config_of(steps=(4, 8), solvers=("heun",), reference_factor=32)
    found = judge(config, recipe_of(config), measure(config))
    path = tmp_path / "calibration.json"
    path.write_bytes(found.to_bytes())
    code, _, err = generate(tmp_path / "store", *words, "--calibration", path, teacher="builtin:mixture")
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
    assert not (tmp_path / "store").exists()


def test_a_file_that_could_not_be_written_is_refused_before_the_measurement(pipeline, tmp_path):
    code, _, err = pipeline(*CALIBRATE, "--out", tmp_path / "nowhere" / "calibration.json")
    assert (code, err.count("\n")) == (2, 1)
    assert "its folder does not exist, make it first" in err


def test_no_solver_that_is_good_enough_is_a_failure_and_says_what_is_nearest(at_home, pipeline):
    words = ["--steps", 4, 8, "--tolerance", 0.001, "--reference-factor", 64]
    code, printed, _ = pipeline(*CALIBRATE, *words)
    assert code == 1
    assert "none is surely below 0.001; nearest: ddim at 8 steps" in printed
    code, printed, _ = pipeline(*CALIBRATE, *words, "--json")
    assert (code, json.loads(printed)["choice"], json.loads(printed)["flags"]) == (1, None, [])
