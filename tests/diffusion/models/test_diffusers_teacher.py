"""A saved diffusers pipeline is a teacher: the same answers as its own scheduler, and students start from it."""

import shutil

import pytest
import torch

from limbeck.diffusion.grids import karras
from limbeck.diffusion.models.teachers import load_teacher
from limbeck.diffusion.solvers import solve

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, prediction_type="v_prediction", clip_sample=False)
    folder = tmp_path_factory.mktemp("pipeline")
    diffusers.DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder)
    return folder


def test_it_solves_as_its_own_ddim_scheduler(saved):
    teacher = load_teacher(f"diffusers:{saved}")
    assert (teacher.sample_shape, teacher.num_classes, teacher.process.T) == ((1, 8, 8), None, 1000.0)
    scheduler = diffusers.DDIMScheduler.from_pretrained(saved, subfolder="scheduler", timestep_spacing="trailing")
    scheduler.register_to_config(set_alpha_to_one=True)
    scheduler.set_timesteps(4)
    unet = diffusers.UNet2DModel.from_pretrained(saved, subfolder="unet").eval()
    x_T = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    x = x_T
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            x = scheduler.step(unet(x, timestep).sample, timestep, x).prev_sample
    # Timestep n is our t = n + 1, and 0 is data.
    times = torch.cat([scheduler.timesteps.double() + 1, torch.zeros(1, dtype=torch.float64)])
    ours = solve(teacher.denoiser, teacher.process, x_T, times, solver="ddim", keep=[4]).states[0]
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


def test_a_grid_stays_on_the_table(saved):
    """A network was never shown times between data and the table's first beta."""
    process = load_teacher(f"diffusers:{saved}").process
    times = karras(process, 8)
    assert times[0] == 1000.0
    assert times[-2] == pytest.approx(1.0)
    assert times[-1] == 0.0


def test_a_folder_of_something_else_is_told(tmp_path):
    with pytest.raises(ValueError, match="is no pipeline of a known model and a scheduler"):
        load_teacher(f"diffusers:{tmp_path}")


@pytest.fixture
def asked(monkeypatch):
    """A hub that can't be reached; what was asked of it."""
    import huggingface_hub

    names = []

    def unreachable(name, **more):
        names.append(name)
        raise ConnectionError("Name or service\nnot known")

    monkeypatch.setattr(huggingface_hub, "model_info", unreachable)
    return names


@pytest.mark.parametrize("name", ["owner/model", "/nowhere/at/all", "http://127.0.0.1:9/x", "a b"])
def test_a_hub_that_is_not_there_is_asked_once(asked, monkeypatch, name):
    told = []

    def load_config(source, **more):
        told.append(more["local_files_only"])
        raise OSError("not here")

    monkeypatch.setattr(diffusers.UNet2DModel, "load_config", load_config)
    with pytest.raises(
        ValueError, match=r"and the hub can't be asked \(ConnectionError: Name .* not known\)"
    ) as refused:
        load_teacher(f"diffusers:{name}")
    assert "\n" not in str(refused.value)
    assert (asked, set(told)) == ([name], {True})


def test_a_folder_is_not_looked_for_on_a_network(asked, saved, tmp_path):
    load_teacher(f"diffusers:{saved}")
    with pytest.raises(ValueError, match="is no pipeline"):
        load_teacher(f"diffusers:{tmp_path}")
    assert asked == []


def test_pickled_weights_are_refused(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "old")
    weights = tmp_path / "old/unet/diffusion_pytorch_model.safetensors"
    torch.save(diffusers.UNet2DModel.from_pretrained(saved, subfolder="unet").state_dict(), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ValueError, match="is no pipeline"):
        load_teacher(f"diffusers:{tmp_path}/old")


@pytest.mark.parametrize(
    ("uri", "meant"),
    [
        ("digits", "write builtin:digits"),
        ("gaussian", "write builtin:gaussian"),
        ("digit", "write builtin:NAME, diffu"),
    ],
)
def test_a_name_that_is_no_checkpoint_says_what_was_meant(uri, meant):
    with pytest.raises(FileNotFoundError, match=f"{uri} is no folder with a model.json: {meant}"):
        load_teacher(uri)


def test_a_pipelines_folder_without_its_prefix_says_so(saved):
    with pytest.raises(FileNotFoundError, match=f"it is a pipeline of diffusers, write diffusers:{saved}"):
        load_teacher(str(saved))
