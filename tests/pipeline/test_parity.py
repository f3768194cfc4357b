"""`parity`: each pipeline's own scheduler beside our solve, to float32 rounding; and what is read wrongly shows."""

import json

import pytest

from limbeck.diffusion.models.schedulers import DDIM, DPM, SCHEDULERS
from tests.diffusion.models.pipelines import save_dit_pipeline, save_unet_pipeline

diffusers = pytest.importorskip("diffusers")

TABLES = {name: kind for name, kind in SCHEDULERS.items() if kind in (DDIM, DPM) and name != "DPMSolverSDE"}
TOLERANCE = 1e-4
"""float32 rounding, as a share of a state: diffusers' tables are float32."""
SPACINGS = ("trailing", "leading", "linspace")


@pytest.fixture
def parity(pipeline, tmp_path):
    """Save a pipeline and run `parity` on it: (exit code, its JSON or its complaint)."""

    def run(scheduler, *words, out_channels=1, **changed):
        uri = save_unet_pipeline(tmp_path, scheduler, out_channels=out_channels, **changed)
        code, out, err = pipeline("parity", "--teacher", uri, "--json", *words)
        return code, json.loads(out) if out else err

    return run


@pytest.mark.parametrize("name", TABLES)
def test_a_table_solves_as_diffusers_does(parity, name):
    more = {"steps_offset": 1, "timestep_spacing": "leading"} if TABLES[name] is not DPM else {}
    code, found = parity(getattr(diffusers, f"{name}Scheduler")(), "--ignore", "clip_sample", "--steps", "10", **more)
    rival = "DPMSolverMultistepScheduler" if TABLES[name] is DPM else "DDIMScheduler"
    assert (code, found["scheduler"], len(found["steps"])) == (0, rival, 11)
    assert found["worst"] < TOLERANCE


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_every_spacing_and_prediction(parity, spacing, prediction, solver):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", timestep_spacing=spacing, prediction_type=prediction
    )
    code, found = parity(scheduler, "--solver", solver, "--steps", "20")
    assert (code, found["grid"]["name"]) == (0, spacing)
    assert found["worst"] < TOLERANCE


def test_stable_diffusions_own_grid_ends_at_the_tables_first_time(parity):
    scheduler = diffusers.PNDMScheduler(
        beta_schedule="scaled_linear", steps_offset=1, set_alpha_to_one=False, skip_prk_steps=True
    )
    code, found = parity(scheduler, "--steps", "50")
    assert (code, found["grid"]) == (0, {"name": "leading", "end": 1, "offset": 1, "spare": 0})
    assert [step["time"] for step in found["steps"]][-2:] == [2, 1]


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", ["FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM"])
def test_a_flow_solves_as_diffusers_does(parity, name, shift):
    code, found = parity(getattr(diffusers, f"{name}Scheduler")(shift=shift), "--steps", "7")
    assert (code, found["scheduler"]) == (0, "FlowMatchEulerDiscreteScheduler")
    assert found["worst"] < TOLERANCE


@pytest.mark.parametrize("schedule", ["karras", "exponential"])
@pytest.mark.parametrize(("name", "solver"), [("EDMEuler", "ddim"), ("EDMDPMSolverMultistep", "dpmpp_2m")])
def test_edm_solves_as_diffusers_does(parity, name, solver, schedule):
    scheduler = getattr(diffusers, f"{name}Scheduler")(sigma_schedule=schedule, sigma_max=50.0)
    code, found = parity(scheduler, "--solver", solver, "--steps", "9")
    assert (code, found["scheduler"]) == (0, f"{name}Scheduler")
    assert found["worst"] < TOLERANCE


def test_a_learned_variance_changes_nothing(parity):
    scheduler = diffusers.DDPMScheduler(clip_sample=False, variance_type="learned_range")
    code, found = parity(scheduler, out_channels=2)
    assert code == 0
    assert found["worst"] < TOLERANCE


def test_a_teacher_that_is_read_wrongly_differs(parity, monkeypatch):
    def as_sample(scheduler, written, *, ignore):
        return replace(describe(scheduler, written, ignore=ignore), prediction={"name": "sample"})

    from dataclasses import replace

    from limbeck.diffusion.models.schedulers import describe

    monkeypatch.setattr("limbeck.diffusion.models.diffusers_models.describe", as_sample)
    code, found = parity(diffusers.DDPMScheduler(clip_sample=False))
    assert code == 1
    assert found["worst"] > 0.1


@pytest.mark.parametrize(
    ("scheduler", "words", "told"),
    [
        (diffusers.DDIMScheduler(clip_sample=False), ["--steps", "7"], "steps 7 does not divide 1000"),
        (
            diffusers.ScoreSdeVeScheduler(),
            [],
            "deterministic steps like ddim for ScoreSdeVeScheduler: choose none",
        ),
        (
            diffusers.FlowMatchEulerDiscreteScheduler(),
            ["--solver", "dpmpp_2m"],
            "no deterministic steps like dpmpp_2m for FlowMatchEulerDiscreteScheduler: choose ddim",
        ),
        (
            diffusers.EulerDiscreteScheduler(use_karras_sigmas=True),
            [],
            "has no scheduler whose own times are a grid of ours: choose another grid",
        ),
    ],
)
def test_what_can_not_be_compared_is_refused_in_one_line(parity, scheduler, words, told):
    code, said = parity(scheduler, *words)
    assert (code, said.count("\n")) == (2, 1)
    assert told in said


def test_only_a_pipeline_has_a_scheduler(pipeline):
    code, _, err = pipeline("parity", "--teacher", "builtin:digits")
    assert code == 2
    assert "builtin:digits has no scheduler to compare with: give a pipeline, diffusers:FOLDER" in err


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("variance", [True, False])
def test_a_dit_with_labels_solves_as_diffusers_does(pipeline, tmp_path, guidance, variance):
    uri = save_dit_pipeline(tmp_path, diffusers.DDIMScheduler(clip_sample=False), variance=variance)
    code, out, err = pipeline("parity", "--teacher", uri, "--json", "--guidance", guidance, "--steps", 8)
    assert code == 0, out + err
    assert json.loads(out)["worst"] < TOLERANCE


def test_guidance_without_classes_is_refused(parity):
    code, said = parity(diffusers.DDIMScheduler(clip_sample=False), "--guidance", "2")
    assert code == 2
    assert "guidance 2.0 needs classes" in said
