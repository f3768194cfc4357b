"""A pipeline's scheduler is read by its class and fields; what is not known to be represented is refused by name."""

import pytest
import torch

from limbeck.diffusion.models.schedulers import DDIM, DPM, FLOW, LCM, SCHEDULERS, check_class
from limbeck.diffusion.models.teachers import load_teacher
from limbeck.diffusion.process import VE, DiscreteVP, RectifiedFlow
from tests.diffusion.models.pipelines import save_unet_pipeline

diffusers = pytest.importorskip("diffusers")

NEEDS_MORE = ("DPMSolverSDE",)  # torchsde
TABLES = [name for name, kind in SCHEDULERS.items() if kind in (DDIM, DPM, LCM) and name not in NEEDS_MORE]
FLOWS = [name for name, kind in SCHEDULERS.items() if kind is FLOW]
WITH_FLOW_SIGMAS = ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "SASolver")
REFUSED = {
    # of tokens
    *("Amused", "BlockRefinement", "DiscreteDDIM", "EntropyBound", "VQDiffusion"),
    # of consistency models, and others' own parametrisations
    *("CMStochasticIterative", "SCM", "FlowMapEulerDiscrete", "KarrasVe", "CosineDPMSolverMultistep", "IPNDM"),
    *("CogVideoXDDIM", "CogVideoXDPM", "DDPMWuerstchen", "UnCLIP", "RePaint", "HeliosDMD", "Helios", "Piflow"),
    *("LTXEulerAncestralRF", "MiniMaxH3", "RFD4Proteina"),
    # that run the other way
    *("DDIMInverse", "DPMSolverMultistepInverse"),
}


@pytest.fixture
def saved(tmp_path):
    return lambda scheduler, **more: save_unet_pipeline(tmp_path, scheduler, **more)


def test_every_scheduler_of_diffusers_is_known_or_refused():
    names = {name.removesuffix("Scheduler") for name in dir(diffusers) if name.endswith("Scheduler")}
    assert names - set(SCHEDULERS) <= REFUSED, "a new one: read it, or list it here"
    assert set(SCHEDULERS).isdisjoint(REFUSED)
    for name in names - set(SCHEDULERS):
        with pytest.raises(ValueError, match=rf"its scheduler is {name}Scheduler, .* python:MODULE:FACTORY"):
            check_class(f"{name}Scheduler")


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_betas_is_known_with_its_own_defaults(saved, name):
    scheduler = getattr(diffusers, f"{name}Scheduler")()
    teacher = load_teacher(saved(scheduler), ignore=["clip_sample"])
    assert teacher.process.betas == tuple(scheduler.betas.double().tolist())
    assert teacher.model["prediction"] == {"name": "epsilon"}


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_is_a_rectified_flow_of_timesteps(saved, name):
    teacher = load_teacher(saved(getattr(diffusers, f"{name}Scheduler")(num_train_timesteps=500)))
    assert teacher.process == RectifiedFlow()
    assert teacher.model["prediction"] == {"name": "velocity"}
    assert teacher.model["network"]["time_scale"] == 500


@pytest.mark.parametrize("name", WITH_FLOW_SIGMAS)
def test_a_solver_of_tables_with_flow_sigmas_is_a_flow(saved, name):
    scheduler = getattr(diffusers, f"{name}Scheduler")(use_flow_sigmas=True, prediction_type="flow_prediction")
    teacher = load_teacher(saved(scheduler))
    assert (teacher.process, teacher.model["prediction"]) == (RectifiedFlow(), {"name": "velocity"})
    assert teacher.scheduler_grid is None


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("LCM", {}),
        ("TCD", {}),
        ("EulerDiscrete", {"timestep_spacing": "linspace"}),
        ("DDIM", {"timestep_spacing": "linspace"}),
        ("DDIM", {"set_alpha_to_one": False}),
        ("PNDM", {}),
        ("EulerDiscrete", {"timestep_spacing": "trailing", "interpolation_type": "log_linear"}),
        ("DPMSolverMultistep", {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}),
        ("EulerDiscrete", {"timestep_spacing": "leading", "use_karras_sigmas": True}),
        ("DPMSolverMultistep", {"use_lu_lambdas": True}),
        ("FlowMatchEulerDiscrete", {"shift_terminal": 0.1}),
        ("FlowMatchEulerDiscrete", {"use_exponential_sigmas": True}),
    ],
)
def test_a_scheduler_whose_times_are_no_grid_of_ours_has_none(saved, name, given):
    scheduler = getattr(diffusers, f"{name}Scheduler")(**given)
    assert load_teacher(saved(scheduler), ignore=["clip_sample"]).scheduler_grid is None


@pytest.mark.parametrize("name", ["EDMEuler", "EDMDPMSolverMultistep"])
def test_edm_is_preconditioned(saved, name):
    scheduler = getattr(diffusers, f"{name}Scheduler")(sigma_max=50.0, sigma_data=0.7)
    teacher = load_teacher(saved(scheduler))
    assert (teacher.process, teacher.model["prediction"]) == (VE(50.0), {"name": "edm", "sigma_data": 0.7})


def test_a_network_of_scores_says_x_0(saved):
    """x_0 = x + sigma^2 score(x, sigma)."""
    teacher = load_teacher(saved(diffusers.ScoreSdeVeScheduler(sigma_max=30.0), time_embedding="fourier"))
    assert teacher.process == VE(30.0)
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor(3.0, dtype=torch.float64)
    unet = diffusers.UNet2DModel.from_pretrained(teacher.uri.removeprefix("diffusers:"), subfolder="unet").eval()
    with torch.no_grad():
        torch.testing.assert_close(teacher.denoiser(x, sigma), x + 9 * unet(x, 3.0).sample)


PLAIN = {"clip_sample": False}


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({}, "clip_sample"),
        (PLAIN | {"thresholding": True}, "thresholding"),
        (PLAIN | {"prediction_type": "invented"}, "prediction_type"),
        (PLAIN | {"use_flow_sigmas": True}, "prediction_type"),
        (PLAIN | {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        (PLAIN | {"invented_by_a_fork": 0.5}, "invented_by_a_fork"),
        (PLAIN | {"timestep_type": "continuous"}, "timestep_type"),
    ],
)
def test_a_field_that_changes_numbers_is_refused_by_its_name(saved, changed, name):
    uri = saved(diffusers.DDPMScheduler(), **changed)
    ways_out = "--ignore" if name in ("clip_sample", "thresholding") else "python:MODULE:FACTORY"
    with pytest.raises(ValueError, match=rf"its scheduler has {name}: .*{ways_out}"):
        load_teacher(uri)


@pytest.mark.parametrize(
    ("scheduler", "changed"),
    [
        ("FlowMatchEulerDiscrete", {"use_dynamic_shifting": True}),
        ("FlowMatchEulerDiscrete", {"invert_sigmas": True}),
        ("FlowMatchEulerDiscrete", {"stochastic_sampling": True}),
        ("EDMEuler", {"prediction_type": "v_prediction"}),
        ("ScoreSdeVe", {"invented_by_a_fork": 1}),
    ],
)
def test_a_field_of_the_others_that_changes_numbers_is_refused_too(saved, scheduler, changed):
    uri = saved(getattr(diffusers, f"{scheduler}Scheduler")(), **changed)
    with pytest.raises(ValueError, match=f"its scheduler has {next(iter(changed))}: "):
        load_teacher(uri)


def test_only_what_an_ode_has_no_place_for_is_ignored_and_only_by_name(saved):
    uri = saved(diffusers.DDPMScheduler(clip_sample=True, thresholding=True))
    assert isinstance(load_teacher(uri, ignore=["clip_sample", "thresholding"]).process, DiscreteVP)
    with pytest.raises(ValueError, match="has thresholding: True"):
        load_teacher(uri, ignore=["clip_sample"])


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_a_learned_variance_is_left_out(saved, variance):
    uri = saved(diffusers.DDPMScheduler(clip_sample=False, variance_type=variance), out_channels=2)
    teacher = load_teacher(uri)
    assert teacher.sample_shape == (1, 8, 8)
    assert teacher.denoiser.output(torch.randn(2, 1, 8, 8), torch.tensor(5.0, dtype=torch.float64)).shape[1] == 1


@pytest.mark.parametrize(("variance", "channels", "right"), [("fixed_small", 2, 1), ("learned", 1, 2)])
def test_channels_that_the_variance_does_not_explain_are_refused(saved, variance, channels, right):
    uri = saved(diffusers.DDPMScheduler(clip_sample=False, variance_type=variance), out_channels=channels)
    with pytest.raises(ValueError, match=f"answers {channels} channels to 1, not {right} as with variance_type"):
        load_teacher(uri)
