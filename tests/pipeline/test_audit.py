"""`verify --audit`: honest data passes, every kind of wrong shard with right checksums is named, errors are true."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from limbeck.diffusion.models.schedulers import describe
from limbeck.diffusion.models.teachers import load_teacher
from limbeck.diffusion.process import VE, CosineVP, LinearVP, RectifiedFlow
from limbeck.pipeline.after.accuracy import rms_interval
from limbeck.pipeline.after.duplicates import fingerprints
from limbeck.pipeline.after.normality import noise_sums
from limbeck.pipeline.after.resolve import doubled_grid, halves_last
from limbeck.pipeline.after.scan import spread
from limbeck.pipeline.config import GenerateConfig
from limbeck.pipeline.recipe import build_recipe
from limbeck.storage_schemas.dataset import open_dataset
from limbeck.storage_schemas.record import Field
from limbeck.storage_schemas.store import Store
from tests.diffusion.models.pipelines import save_unet_pipeline
from tests.pipeline import wrong_shards


@pytest.fixture
def here(monkeypatch):
    """Solve in this process: a test of what is found needs no other."""
    monkeypatch.setattr(
        "limbeck.pipeline.after.audit.run_once", lambda function, *arguments, runner: function(*arguments)
    )


@pytest.fixture
def audit(pipeline):
    """(exit code, {name of check: (passed, figures)}, problems)."""

    def run(store, *words, samples=200):
        code, out, err = pipeline("verify", store, "--audit", samples, "--json", *words)
        found = json.loads(out or "{}")
        checks = {check["name"]: (check["passed"], check["figures"]) for check in found.get("checks", [])}
        return code, checks, found.get("problems", err)

    return run


def dataset_of(store):
    return open_dataset(Store.open(str(store)))


def failed(checks):
    return {name for name, (passed, _) in checks.items() if passed is False}


@pytest.mark.parametrize("words", [("--format", "webdataset"), ("--dtype", "bfloat16"), ("--dtype", "float32")])
def test_honest_data_passes(generate, audit, here, tmp_path, words):
    generate(tmp_path, *words, teacher="builtin:digits")
    code, checks, problems = audit(tmp_path)
    assert (code, problems, failed(checks)) == (0, [], set())
    assert checks["x_T of an id"][1]["samples"] == 200
    assert checks["labels"][1]["counts"].keys() == set("0123456789")
    again = checks["solved again"][1]
    assert (again["samples"], again["alike"], again["replayed"], again["same_bits"]) == (200, 200, 4, 4)
    assert (again["max_difference"], again["wrong"]) == (0.0, [])


def test_honest_data_in_two_dimensions_collides_and_passes(generate, pipeline, audit, here, tmp_path):
    """In bfloat16 and two dimensions a thousand samples share some x_T; that is the rounding's doing."""
    generate(tmp_path, "--dtype", "bfloat16", count=3000)
    code, checks, _ = audit(tmp_path, samples=20)
    passed, figures = checks["duplicate x_T"]
    assert (code, passed) == (0, True)
    assert 0 < figures["pairs"] == len(figures["groups"])
    assert figures["expected"] == pytest.approx(3.7, abs=0.5)
    wrong_shards.spoil(tmp_path, wrong_shards.use_a_noise_twice, tasks={"train-00000001"})
    code, checks, _ = audit(tmp_path, samples=2)
    assert (code, checks["duplicate x_T"][1]["groups"]) == (1, ["train 67=train 73"])


@pytest.fixture
def digits(generate, tmp_path):
    generate(tmp_path, teacher="builtin:digits")
    return tmp_path


WRONGS = {
    "swap_two_noises": ({"train-00000001"}, {"x_T of an id"}),
    "use_a_noise_twice": ({"train-00000001"}, {"x_T of an id", "duplicate x_T"}),
    "take_a_train_noise": ({"holdout-00000000"}, {"x_T of an id", "duplicate x_T"}),
    "widen_noise": (None, {"x_T of an id", "x_T norms"}),
    "poison_one_output": ({"train-00000000"}, {"solved again"}),
    "solved_otherwise": ({"train-00000000"}, {"solved again"}),
    "saturate_one_value": ({"holdout-00000000"}, {"values of state_002", "solved again"}),
    "bias_labels": (None, {"x_T of an id", "labels"}),
}


@pytest.mark.parametrize("wrong", WRONGS)
def test_a_wrong_shard_with_right_checksums_is_named(digits, pipeline, audit, here, wrong):
    tasks, expected = WRONGS[wrong]
    wrong_shards.spoil(digits, getattr(wrong_shards, wrong), tasks=tasks)
    assert pipeline("verify", digits)[0] == 0
    code, checks, problems = audit(digits)
    assert (code, problems) == (1, [])
    assert expected <= failed(checks)
    if wrong in ("poison_one_output", "bias_labels", "use_a_noise_twice"):
        assert failed(checks) - {"solved again"} == expected - {"solved again"}


def test_what_the_error_leaves_out_is_told(digits, pipeline, here):
    """The doubled grid shares a last step from r_min, so its error shows in no difference."""
    _, out, _ = pipeline("verify", digits, "--audit", 8, "--richardson")
    (line,) = [line for line in out.splitlines() if "solver error of output" in line]
    assert "against the exact solution, the last step to sigma = 0 aside, 95% in" in line
    _, out, _ = pipeline("verify", digits, "--audit", 8)
    assert "against doubled steps, the last step to sigma = 0 aside, 95% in" in out
    assert halves_last(recipe_on(VE(), {"steps": 6, "grid": "uniform_time"}))
    assert not halves_last(recipe_on(VE(), {"steps": 6, "grid": "uniform_time", "t_min": 0.1}))


def test_the_ids_of_duplicates_are_told(digits, pipeline, here):
    wrong_shards.spoil(digits, wrong_shards.take_a_train_noise, tasks={"holdout-00000000"})
    code, out, _ = pipeline("verify", digits, "--audit", 2)
    (line,) = [line for line in out.splitlines() if "duplicate x_T" in line]
    assert (code, line.startswith("FAILED"), line.endswith("train 70=holdout 4")) == (1, True, True)


def test_a_flipped_bit_is_still_found(digits, audit, here):
    (path,) = digits.glob("recipes/*/*/shards/train-00000001-*")
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)
    code, checks, problems = audit(digits, samples=10)
    assert (code, len(problems), failed(checks)) == (1, 1, set())
    assert problems[0].startswith("train-00000001: ")


@pytest.mark.parametrize(("solver", "steps"), [("ddim", 16), ("heun", 32), ("rk4", 16)])
def test_the_interval_covers_the_true_error(pipeline, audit, here, tmp_path, solver, steps):
    """The mixture's exact flow says where each x_T leads: the true RMS error of all 1,024 lies in that of 256."""
    given = ["--teacher", "builtin:mixture", "--store", tmp_path, "--count", 1024, "--holdout", 0, "--runner", "local"]
    layout = ["--samples-per-shard", 1024, "--dtype", "float32", "--solve-dtype", "float64"]
    pipeline("generate", *given, *layout, "--solver.name", solver, "--solver.steps", steps)
    dataset = dataset_of(tmp_path)
    columns = dataset.read(dataset.table[0])
    flow = load_teacher("builtin:mixture").denoiser.flow_map
    x_T = torch.from_numpy(np.array(columns["noise"])).double()
    exact = flow(x_T, torch.tensor(80.0).double(), torch.tensor(0.0).double()).numpy()
    true = np.sqrt(np.square(columns["output"] - exact).mean()) / columns["output"].std()
    _, checks, _ = audit(tmp_path, "--richardson", samples=256)
    found = checks["solver error of output"][1]
    assert found["low"] <= true <= found["high"]
    assert found["high"] - found["low"] < 0.5 * true
    assert found["error"] == pytest.approx(true, rel=0.2)
    assert audit(tmp_path, "--richardson", "--tolerance", 0.9 * true, samples=256)[0] == 1
    assert audit(tmp_path, "--richardson", "--tolerance", 1.3 * true, samples=256)[0] == 0


def test_storage_rounding_is_not_taken_for_the_solvers_error(pipeline, audit, here, tmp_path):
    """At 128 steps of rk4 nothing is left of the error but float16's: half a unit in the last place, uniform."""
    given = ["--teacher", "builtin:gaussian", "--store", tmp_path, "--count", 256, "--holdout", 0, "--runner", "local"]
    pipeline("generate", *given, "--samples-per-shard", 256, "--solver.name", "rk4", "--solver.steps", 128)
    _, checks, _ = audit(tmp_path, samples=256)
    found = checks["solver error of output"][1]
    assert found["error"] == pytest.approx(found["rounding"], rel=1e-3)
    # Outputs N(0.5, 0.25): |x| is mostly between 1/4 and 1, where units are 2^-12 and 2^-11.
    assert 2**-13 / 12**0.5 < found["rounding"] * 0.5 < 2**-10 / 12**0.5


def test_the_interval_covers_as_often_as_it_says():
    """Of 300 draws of 40 errors with a chi-square(1) law, whose mean is 1."""
    generator = np.random.default_rng(0)
    found = [rms_interval(generator.chisquare(1, 40), seed=draw) for draw in range(300)]
    assert 0.90 <= np.mean([low <= 1 <= high for _, low, high in found]) <= 0.99
    assert rms_interval(np.full(9, 4.0), seed=0) == (2.0, 2.0, 2.0)
    assert rms_interval(np.array([1.0, np.nan]), seed=0) == (np.inf, 0.0, np.inf)


GRIDS = [
    ({"grid": "karras"}, 11),
    ({"grid": "karras", "r_max": 5.0, "rho": 3.0}, 11),
    ({"grid": "uniform_logsnr", "r_min": 0.01}, 11),
    ({"grid": "uniform_time"}, 12),
    ({"grid": "uniform_time", "t_min": 0.01}, 11),
]


@pytest.mark.parametrize(("solver", "steps"), GRIDS)
@pytest.mark.parametrize("process", [VE(), LinearVP(), CosineVP(), RectifiedFlow()])
def test_the_doubled_grid_halves_every_step_but_a_last_one_from_the_least_noise(solver, steps, process):
    """It holds the grid itself, to the bit, and its other points are those of the finer grid of the same kind."""
    recipe = recipe_on(process, solver | {"steps": 6})
    doubled = doubled_grid(process, recipe)
    assert doubled[:-1:2].tolist() == list(recipe.times[:-1])
    assert (len(doubled), doubled[-1]) == (steps + 1, 0)
    parameter = {
        "karras": lambda r: r ** (1 / recipe.solver.grid.get("rho", 7)),
        "uniform_logsnr": torch.log,
    }.get(solver["grid"])
    place = doubled if parameter is None else parameter(process.sigma(doubled) / process.alpha(doubled))
    inner = place[1:-1]  # the first may have been moved to an infinite ratio
    assert torch.allclose(inner.diff(), inner.diff().mean().expand(len(inner) - 1), rtol=1e-6)


def test_a_single_step_is_doubled_too():
    doubled = doubled_grid(VE(), recipe_on(VE(), {"steps": 1}))
    assert doubled.tolist() == pytest.approx([80.0, 0.002, 0.0])


def recipe_on(process, solver):
    teacher = replace(load_teacher("builtin:gaussian"), process=process)
    config = GenerateConfig.model_validate({"teacher": "t", "store": "s", "count": 1, "solver": solver})
    return build_recipe(config, teacher)


def test_without_the_teacher_the_rest_is_checked(generate, pipeline, audit, tmp_path):
    generate(tmp_path, teacher="python:strange_teachers:slow_teacher")
    code, checks, _ = audit(tmp_path, samples=10)
    assert (code, failed(checks), checks["solver error"][0]) == (0, set(), None)
    _, out, _ = pipeline("verify", tmp_path, "--audit", 10)
    assert "not done  solver error: the teacher python:strange_teachers:slow_teacher is code" in out
    code, _, err = audit(tmp_path, "--tolerance", 1.0, samples=10)
    assert (code, err.count("\n"), "allow it to run by --teacher" in err) == (1, 1, True)


@pytest.mark.faults
def test_the_audit_solves_in_a_process_of_its_own(generate, audit, tmp_path):
    generate(tmp_path, teacher="python:strange_teachers:slow_teacher")
    code, checks, _ = audit(tmp_path, "--teacher", "python:strange_teachers:slow_teacher", samples=10)
    assert (code, checks["solved again"][1]["same_bits"]) == (0, 4)


def test_another_teacher_is_refused_before_anything_is_read(generate, audit, tmp_path, monkeypatch):
    """The closed forms have no weights, so that their hashes agree: their descriptions don't."""
    generate(tmp_path)
    monkeypatch.setattr("limbeck.pipeline.after.audit.scan", lambda *given: pytest.fail("shards were read"))
    for teacher, told in (("builtin:digits", "has weights"), ("builtin:mixture", "has description")):
        code, _, err = audit(tmp_path, "--teacher", teacher)
        assert (code, err.count("\n"), told in err) == (1, 1, True)


def test_kept_weights_serve_where_the_uri_is_gone(generate, audit, here, tmp_path, monkeypatch):
    generate(tmp_path, "--with-weights", teacher="builtin:digits")
    monkeypatch.setattr(
        "limbeck.diffusion.recipes.teacher.load_teacher", lambda *given, **named: pytest.fail("the uri was asked")
    )
    code, checks, _ = audit(tmp_path, samples=4)
    assert (code, checks["solved again"][1]["same_bits"]) == (0, 4)


def test_a_bucket_is_read_once(generate, audit, here, monkeypatch):
    """What is not a folder is fetched once, and read from the copy."""
    store = "memory://audit-reads-once"
    generate(store, teacher="builtin:digits")
    sizes = {shard.path: shard.bytes for shard in dataset_of(store).table}
    fetched, read = [], Store.read_ranges
    monkeypatch.setattr(
        Store,
        "read_ranges",
        lambda self, path, ranges: (
            fetched.extend(length for _, length in ranges if self.protocol == "memory" and path in sizes)
            or read(self, path, ranges)
        ),
    )
    code, checks, _ = audit(store, samples=20)
    assert (code, failed(checks), sum(fetched)) == (0, set(), sum(sizes.values()))


def test_shards_without_rows_are_no_trouble():
    empty, field = np.empty((0, 2), np.float16), Field("output", (2,), "float16")
    assert len(fingerprints("train", np.empty(0, np.int64), empty)) == 0
    assert spread(field, empty).plus(spread(field, np.ones((3, 2), np.float16))).values == 6
    assert noise_sums(empty, 80.0, "float16").count == 0


def test_values_are_counted():
    stored = np.array([[1, -2], [np.inf, 65504], [-65504, np.nan], [3, 3]], np.float16)
    found = spread(Field("output", (2,), "float16"), stored)
    assert (found.values, found.not_finite, found.saturated) == (8, 2, 2)
    assert (found.low, found.high, found.at_low, found.at_high) == (-65504, 65504, 1, 1)
    clipped = spread(Field("output", (2,), "float16"), np.clip(stored[[0, 3]], -1, 1))
    assert (clipped.low, clipped.high, clipped.at_low, clipped.at_high) == (-1, 1, 1, 3)
    halves = [spread(Field("output", (2,), "float16"), part) for part in (stored[:2], stored[2:])]
    assert halves[0].plus(halves[1]) == found


def test_options_of_an_audit_need_one(pipeline, tmp_path):
    code, _, err = pipeline("verify", tmp_path, "--tolerance", 0.1)
    assert (code, err.count("\n"), "add --audit K" in err) == (2, 1, True)


@pytest.fixture
def flow(tmp_path):
    """A pipeline of flow matching."""
    diffusers = pytest.importorskip("diffusers")
    return save_unet_pipeline(tmp_path / "pipeline", diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))


def test_an_audit_of_a_pipeline_runs_its_own_scheduler_too(generate, audit, here, flow, tmp_path):
    generate(tmp_path / "store", teacher=flow)
    _, checks, _ = audit(tmp_path / "store", "--teacher", flow, samples=4)
    passed, figures = checks["the pipeline's own scheduler"]
    assert passed
    assert figures["worst"] < 1e-4


def test_a_pipeline_that_was_read_wrongly_fails_its_audit(generate, audit, here, flow, monkeypatch, tmp_path):
    """Solved again it is the same wrong numbers: only its own scheduler says so."""

    def wrongly(*given, **named):
        return replace(describe(*given, **named), process=LinearVP(), prediction={"name": "sample"})

    monkeypatch.setattr("limbeck.diffusion.models.diffusers_models.describe", wrongly)
    generate(tmp_path / "store", teacher=flow)
    code, checks, _ = audit(tmp_path / "store", "--teacher", flow, samples=4)
    assert (code, failed(checks)) == (1, {"the pipeline's own scheduler"})


def test_outputs_are_held_against_real_images(generate, pipeline, audit, here, flow, tmp_path):
    """16 steps of Heun are like digits, 4 are not, whose outputs reach 9."""
    given = ["--teacher", "builtin:digits", "--store", tmp_path / "digits", "--runner", "local"]
    assert pipeline("generate", *given, "--count", 128, "--holdout", 2, "--solver.steps", 16)[0] == 0
    _, checks, _ = audit(tmp_path / "digits", "--images", "sklearn:digits", samples=4)
    assert checks["outputs beside images"][0]
    generate(tmp_path / "noise", teacher=flow)
    code, checks, _ = audit(tmp_path / "noise", "--images", "sklearn:digits", "--teacher", flow, samples=4)
    passed, figures = checks["outputs beside images"]
    assert (code, passed) == (1, False)
    assert figures["high"] > 2
    generate(tmp_path / "pairs")
    code, _, told = audit(tmp_path / "pairs", "--images", "sklearn:digits", samples=4)
    assert code != 0
    assert "sklearn:digits has images [1, 8, 8], the samples are [2]" in told
