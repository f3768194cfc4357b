"""Several guidance scales in one recipe: each sample is solved at its own, which its id alone decides."""

import json

import numpy as np
import pytest
import torch

from limbeck.diffusion import noise
from limbeck.diffusion.models import checkpoint
from limbeck.diffusion.models.checkpoint import widened
from limbeck.diffusion.models.teachers import builtin_checkpoint, load_teacher
from limbeck.pipeline.before.solver_error import measure
from limbeck.pipeline.config import CalibrateConfig, GenerateConfig
from limbeck.pipeline.recipe import build_recipe
from limbeck.pipeline.solve import denoise_of, solve_task
from limbeck.storage_schemas.commit import Task
from limbeck.storage_schemas.errors import StoreError
from limbeck.storage_schemas.recipe import Guidance, Recipe
from tests.guided import exact_output, told_digits
from tests.pipeline.wrong_shards import spoil

CPU = torch.device("cpu")
CLASSES = "python:tests.guided:GaussianClasses"
SCALES = (1.0, 2.0, 4.0)


@pytest.fixture
def here(monkeypatch):
    """Solve in this process: a test of what is found needs no other."""
    for module in ("audit", "reproduce"):
        monkeypatch.setattr(
            f"limbeck.pipeline.after.{module}.run_once", lambda function, *given, runner: function(*given)
        )


def recipe_of(teacher, **fields):
    given = {"count": 64, "micro_batch": 16, "samples_per_shard": 64, "dtype": "float32"} | fields
    return build_recipe(GenerateConfig.model_validate({"teacher": teacher.uri, "store": "s", **given}), teacher)


def solved(teacher, recipe, task):
    return solve_task(recipe, denoise_of(recipe, teacher.denoiser, device=CPU), teacher.process, task, device=CPU)


def test_one_scale_names_the_recipe_that_it_did():
    """Recipe ids of before there were several scales."""
    digits = load_teacher("builtin:digits")
    ids = [recipe_of(digits, guidance=scale).id[:16] for scale in (1.0, 2.0, (2.0,))]
    assert ids == ["25ba0444f7508b77", "9dd0862a08db5f7b", "9dd0862a08db5f7b"]
    several = recipe_of(digits, guidance=(4, 1, 2))
    assert several.guidance == Guidance(scale=(1.0, 2.0, 4.0))
    assert Recipe.from_bytes(several.to_bytes(), "here") == several
    assert len({several.id[:16], recipe_of(digits, guidance=(1, 2)).id[:16], *ids}) == 4


@pytest.mark.parametrize("scales", [(2.0,), (2.0, 1.0), (1.0, 1.0)])
def test_scales_that_do_not_ascend_are_refused(scales):
    with pytest.raises(ValueError, match="give two or more that ascend, or one as a number"):
        Guidance(scale=scales)
    with pytest.raises(StoreError, match="is not a valid Guidance"):
        Guidance.from_bytes(json.dumps({"scale": scales}).encode(), "here")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["1", "2", "1"], "names a scale twice"),
        (["1", "2", "--condition", "none"], "guidance 1.0 2.0 needs labels"),
        (["1", "2", "--teacher", "builtin:gaussian"], "guidance 1.0 2.0 needs classes, builtin:gaussian has none"),
    ],
)
def test_scales_that_cannot_be_are_refused_in_one_line(generate, tmp_path, words, told):
    code, _, err = generate(tmp_path, "--guidance", *words, teacher="builtin:digits")
    assert (code != 0, told in err, len(err.splitlines())) == (True, True, 1)


@pytest.mark.parametrize("split", ["train", "holdout"])
def test_every_sample_is_the_exact_flow_of_its_own_scale(split):
    teacher = load_teacher(CLASSES)
    recipe = recipe_of(teacher, guidance=SCALES, solver={"name": "heun", "steps": 128}, solve_dtype="float64")
    found = solved(teacher, recipe, Task(split, 1, 64))
    columns, scales = found.columns, noise.guidance_scales(0, split, range(64, 128), SCALES)
    x_T, labels = torch.from_numpy(columns["noise"]).double(), torch.from_numpy(columns["condition"])
    expected = exact_output(x_T, labels, torch.from_numpy(scales)).numpy()
    assert found.nfe == 2 * (2 * 128 - 1)
    assert set(scales) == set(SCALES)
    np.testing.assert_allclose(columns["output"], expected, rtol=0, atol=2e-3)
    shifted = exact_output(x_T, labels, torch.from_numpy(np.roll(scales, 1))).numpy()
    assert np.abs(shifted - expected).max() > 1


def test_a_sample_is_what_it_is_in_a_recipe_of_its_scale_alone():
    """To the bit: the scales of its batch mates don't reach it."""
    digits, task = load_teacher("builtin:digits"), Task("train", 0, 32)
    fields = {"samples_per_shard": 32, "solver": {"steps": 3}}
    several = solved(digits, recipe_of(digits, guidance=(2.0, 3.5), **fields), task).columns
    scales = noise.guidance_scales(0, "train", range(32), (2.0, 3.5))
    for scale in (2.0, 3.5):
        alone = solved(digits, recipe_of(digits, guidance=scale, **fields), task).columns
        assert np.array_equal(several["output"][scales == scale], alone["output"][scales == scale])
        assert not np.array_equal(several["output"], alone["output"])


def test_a_student_of_two_times_is_no_teacher(tmp_path):
    checkpoint.save(widened(builtin_checkpoint("digits"), second_time=True), tmp_path / "student")
    with pytest.raises(ValueError, match="takes the time that it jumps to and has no ODE to solve"):
        recipe_of(load_teacher(str(tmp_path / "student")))


def test_a_student_that_is_told_its_guidance_is_told_the_scales_as_a_teacher(tmp_path):
    """In one call each, not guided once more by its own null label."""
    checkpoint.save(told_digits(), tmp_path / "told")
    told, task = load_teacher(str(tmp_path / "told")), Task("train", 0, 32)
    fields = {"samples_per_shard": 32, "solver": {"steps": 3}}
    several = solved(told, recipe_of(told, guidance=(1.0, 3.0), **fields), task)
    scales = noise.guidance_scales(0, "train", range(32), (1.0, 3.0))
    outputs = []
    for scale in (1.0, 3.0):
        alone = solved(told, recipe_of(told, guidance=scale, **fields), task)
        assert alone.nfe == several.nfe == 5
        outputs.append(alone.columns["output"])
        assert np.array_equal(several.columns["output"][scales == scale], outputs[-1][scales == scale])
    assert np.abs(outputs[0] - outputs[1]).max() > 0.01
    with pytest.raises(ValueError, match=r"guidance -1.0 can't be taken by .*, only 0 and more"):
        recipe_of(told, guidance=(-1.0, 2.0))


@pytest.mark.faults
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_no_scale_compiles_the_teacher_anew(mode):
    digits = load_teacher("builtin:digits")
    fields = {"solver": {"steps": 3}, "guidance": SCALES}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    recipe = recipe_of(digits, **fields, compile=mode)
    denoiser = denoise_of(recipe, digits.denoiser, device=CPU)
    found = [
        solve_task(recipe, denoiser, digits.process, Task("train", index, 32), device=CPU).columns for index in range(2)
    ]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    plain = [solved(digits, recipe_of(digits, **fields), Task("train", index, 32)).columns for index in range(2)]
    for ours, theirs in zip(found, plain, strict=True):
        assert np.abs(ours["output"] - theirs["output"]).max() < 1e-3


@pytest.mark.gpu
def test_cuda_graphs_solve_each_sample_at_its_scale():
    digits, device = load_teacher("builtin:digits", device="cuda"), torch.device("cuda")
    fields = {"micro_batch": 32, "solver": {"steps": 4}, "guidance": SCALES}
    plain, graphed = (
        solve_task(
            recipe, denoise_of(recipe, digits.denoiser, device=device), digits.process, Task("train", 0, 64),
            device=device,
        ).columns
        for recipe in (recipe_of(digits, **fields, compile=mode) for mode in ("none", "reduce-overhead"))
    )  # fmt: skip
    assert np.abs(plain["output"] - graphed["output"]).max() < 1e-3


def test_every_command_serves_such_a_recipe(generate, pipeline, here, at_home, tmp_path):
    """generate, inspect, verify --audit, reproduce and plan, by the formats' own words."""
    words = ["--guidance", 1, 2, 4, "--format", "webdataset"]
    assert generate(tmp_path, *words, teacher="builtin:digits")[0] == 0
    code, out, _ = pipeline("inspect", tmp_path)
    assert (code, "guidance   1.0, 2.0, 4.0: each sample has one of them" in out) == (0, True)
    code, out, _ = pipeline("verify", tmp_path, "--audit", 100, "--json")
    checks = {check["name"]: check for check in json.loads(out)["checks"]}
    assert (code, checks["solved again"]["passed"]) == (0, True)
    ids = {"train": range(160), "holdout": range(40)}
    drawn = [scale for split in ids for scale in noise.guidance_scales(0, split, ids[split], SCALES)]
    assert checks["guidance scales"]["figures"]["counts"] == {str(scale): drawn.count(scale) for scale in SCALES}
    errors = checks["solver error of output"]["figures"]["by_guidance"]
    assert errors["1.0"] < errors["4.0"]
    assert pipeline("reproduce", tmp_path, "--sample", 100)[0] == 0
    given = ["--teacher", "builtin:digits", "--store", tmp_path, "--count", 320, "--runner", "local", "--json"]
    same = ["--solver.steps", 4, "--states", 2, "--samples-per-shard", 64, "--micro-batch", 32]
    code, out, _ = pipeline("plan", *given, *same, *words)
    assert (code, json.loads(out)["estimate"]["nfe"]) == (0, 14)


def test_an_audit_finds_rows_that_were_solved_at_other_scales(generate, pipeline, here, tmp_path):
    """As if workers had drawn them in another way: x_T and labels are right."""
    generate(tmp_path, "--guidance", 1, 4, teacher="builtin:digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("limbeck.diffusion.noise.guidance_index", lambda seed, split, ids, count: np.zeros(len(ids), int))
        code, out, _ = pipeline("verify", tmp_path, "--audit", 60, "--json")
    checks = {check["name"]: check["passed"] for check in json.loads(out)["checks"]}
    assert (code, checks["solved again"], checks["x_T of an id"]) == (1, False, True)


def test_an_audit_finds_a_scale_that_lost_its_rows(generate, pipeline, here, tmp_path):
    """Solves of large scales that run away are quarantined, and what is left is not what was asked for."""
    generate(tmp_path, "--guidance", 1, 4, teacher=CLASSES)

    def large(task):
        ids = np.arange(task.start, task.stop)
        return ids[noise.guidance_scales(0, task.split, ids, (1.0, 4.0)) == 4.0].tolist()

    spoil(tmp_path, lost=large)
    code, out, _ = pipeline("verify", tmp_path, "--audit", 8, "--json", "--teacher", CLASSES)
    checks = {check["name"]: check for check in json.loads(out)["checks"]}
    assert (code, checks["guidance scales"]["passed"]) == (1, False)


def test_calibration_measures_the_mixture_of_scales():
    """Each sample's error is that of its own scale: against the closed form, and not that of any one scale."""
    common = {"teacher": CLASSES, "runner": "local", "steps": (8,), "solvers": ("ddim",), "count": 48}
    several, *alone = (
        measure(CalibrateConfig.model_validate(common | {"guidance": scales, "solve_dtype": "float64"}))
        for scales in (SCALES, (1.0,), (2.0,), (4.0,))
    )
    scales = noise.guidance_scales(0, "holdout", range(48), SCALES)
    for scale, single in zip(SCALES, alone, strict=True):
        chosen = scales == scale
        np.testing.assert_allclose(several.trials[0].squares[chosen], single.trials[0].squares[chosen], rtol=1e-6)
    assert several.trials[0].nfe == 16
