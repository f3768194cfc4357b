"""A pipeline's scheduler is read by its class and fields; what is not known to be represented is refused by name."""

import json

import pytest
import torch

from limbeck.diffusion.models.schedulers import TABLES_OF_BETAS, check_class, check_fields
from limbeck.diffusion.models.teachers import load_teacher

diffusers = pytest.importorskip("diffusers")

OTHERS = [
    "FlowMatchEulerDiscrete",
    "EDMEuler",
    "EDMDPMSolverMultistep",
    "CMStochasticIterative",
    "ScoreSdeVe",
    "VQDiffusion",
]
NEEDS_MORE = ("DPMSolverSDE",)  # torchsde


@pytest.fixture
def saved(tmp_path):
    """A pipeline with this scheduler, some fields of whose file are changed after."""

    def save(scheduler, out_channels=1, **changed):
        torch.manual_seed(0)
        unet = diffusers.UNet2DModel(
            sample_size=8, in_channels=1, out_channels=out_channels, layers_per_block=1, block_out_channels=(8,),
            norm_num_groups=4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        )  # fmt: skip
        unet.save_pretrained(tmp_path / "unet")
        scheduler.save_pretrained(tmp_path / "scheduler")
        path = tmp_path / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))
        return f"diffusers:{tmp_path}"

    return save


@pytest.mark.parametrize("name", [name for name in TABLES_OF_BETAS if name not in NEEDS_MORE])
def test_a_table_of_betas_is_known_with_its_own_defaults(saved, name):
    scheduler = getattr(diffusers, f"{name}Scheduler")()
    teacher = load_teacher(saved(scheduler), ignore=["clip_sample"])
    assert teacher.process.betas == tuple(scheduler.betas.double().tolist())


@pytest.mark.parametrize("name", OTHERS)
def test_a_scheduler_that_is_no_table_of_betas_is_refused_by_its_class(name):
    with pytest.raises(ValueError, match=rf"its scheduler is {name}Scheduler, .* python:MODULE:FACTORY"):
        check_class(f"{name}Scheduler")


def test_a_saved_flow_pipeline_is_refused_in_one_line(saved):
    uri = saved(diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler, which is no table of betas") as told:
        load_teacher(uri)
    assert "\n" not in str(told.value)


PLAIN = {"clip_sample": False}


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({}, "clip_sample"),
        (PLAIN | {"thresholding": True}, "thresholding"),
        (PLAIN | {"prediction_type": "flow_prediction"}, "prediction_type"),
        (PLAIN | {"use_flow_sigmas": True}, "use_flow_sigmas"),
        (PLAIN | {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        (PLAIN | {"variance_type": "learned"}, "variance_type"),
        (PLAIN | {"variance_type": "learned_range"}, "variance_type"),
        (PLAIN | {"invented_by_a_fork": 0.5}, "invented_by_a_fork"),
        (PLAIN | {"timestep_type": "continuous"}, "timestep_type"),
    ],
)
def test_a_field_that_changes_numbers_is_refused_by_its_name(saved, changed, name):
    uri = saved(diffusers.DDPMScheduler(), **changed)
    ways_out = "--ignore" if name in ("clip_sample", "thresholding") else "python:MODULE:FACTORY"
    with pytest.raises(ValueError, match=rf"its scheduler has {name}: .*{ways_out}"):
        load_teacher(uri)


def test_only_what_an_ode_has_no_place_for_is_ignored_and_only_by_name():
    clipped = {"clip_sample": True, "thresholding": True, "num_train_timesteps": 1000}
    check_fields(clipped, ignore=["clip_sample", "thresholding"])
    with pytest.raises(ValueError, match="has thresholding: True"):
        check_fields(clipped, ignore=["clip_sample"])


def test_more_channels_out_than_in_are_refused(saved):
    uri = saved(diffusers.DDPMScheduler(clip_sample=False), out_channels=2)
    with pytest.raises(ValueError, match="answers 2 channels to 1, as with a learned variance"):
        load_teacher(uri)
