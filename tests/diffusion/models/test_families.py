"""Models of diffusers by their class: the answers of the pipeline's own loop, their labels, and what they refuse."""

import pytest
import torch

from limbeck.diffusion.models.activations import checkpoint_activations
from limbeck.diffusion.models.checkpoint import load, save
from limbeck.diffusion.models.teachers import load_checkpoint, load_teacher
from tests.diffusion.models.pipelines import save_dit_pipeline

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    return save_dit_pipeline(tmp_path_factory.mktemp("dit"), diffusers.DDIMScheduler(clip_sample=False))


def own(uri):
    return diffusers.DiTTransformer2DModel.from_pretrained(uri.removeprefix("diffusers:"), subfolder="transformer")


def test_a_dit_answers_x_0_of_its_epsilon_and_its_null_label_is_the_last(dit):
    teacher, x = load_teacher(dit), torch.randn(3, 4, 8, 8)
    assert (teacher.sample_shape, teacher.num_classes) == ((4, 8, 8), 10)
    t, label = torch.tensor(500.0, dtype=torch.float64), torch.tensor([0, 9, 10])
    with torch.no_grad():
        epsilon = own(dit)(x, timestep=torch.full((3,), 499), class_labels=label).sample[:, :4]
        alpha, sigma = teacher.process.alpha(t).float(), teacher.process.sigma(t).float()
        torch.testing.assert_close(teacher.denoiser(x, t, label), (x - sigma * epsilon) / alpha)
        null = torch.full((3,), 10)
        assert torch.equal(teacher.denoiser(x, t), teacher.denoiser(x, t, null))


def test_a_dit_without_a_variance_is_one_too(tmp_path):
    teacher = load_teacher(save_dit_pipeline(tmp_path, diffusers.DDIMScheduler(clip_sample=False), variance=False))
    assert teacher.denoiser(torch.randn(2, 4, 8, 8), torch.tensor(5.0, dtype=torch.float64)).shape == (2, 4, 8, 8)


def test_a_dit_is_kept_as_a_checkpoint_of_ours(dit, tmp_path):
    saved, x = load_checkpoint(dit), torch.randn(2, 4, 8, 8)
    save(saved, tmp_path)
    t, label = torch.tensor(9.0, dtype=torch.float64), torch.tensor([1, 2])
    assert torch.equal(load(tmp_path).build()(x, t, label), saved.build()(x, t, label))


def test_it_drops_no_labels_at_random_while_it_is_fitted(dit):
    denoiser, x = load_checkpoint(dit).build().train(), torch.randn(64, 4, 8, 8)
    t, label = torch.tensor(9.0, dtype=torch.float64), torch.arange(64) % 10
    with torch.no_grad():
        assert torch.equal(denoiser(x, t, label), denoiser(x, t, label))
        assert torch.equal(denoiser(x, t, label), denoiser.eval()(x, t, label))


def test_its_blocks_run_again_for_the_gradient(dit):
    def gradients(checkpointed):
        denoiser = load_checkpoint(dit).build().requires_grad_(True)
        if checkpointed:
            checkpoint_activations(denoiser)
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        denoiser(x, torch.tensor(9.0, dtype=torch.float64), torch.tensor([1, 2])).square().sum().backward()
        return [parameter.grad for parameter in denoiser.parameters() if parameter.grad is not None]

    torch.testing.assert_close(gradients(True), gradients(False))


def test_a_model_that_is_not_known_is_refused_by_its_class(tmp_path):
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, attention_head_dim=2,
    )  # fmt: skip
    unet.save_pretrained(tmp_path / "unet")
    diffusers.DDIMScheduler(clip_sample=False).save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ValueError, match=r"its model is a UNet2DConditionModel, known are UNet2DModel, DiT") as told:
        load_teacher(f"diffusers:{tmp_path}")
    assert "\n" not in str(told.value)


def test_more_inputs_and_features_are_refused_in_one_line(dit):
    from limbeck.diffusion.models.checkpoint import widened

    with pytest.raises(ValueError, match="network diffusers has no field 'second_time'"):
        widened(load_checkpoint(dit), second_time=True)
    with pytest.raises(ValueError, match="DiTTransformer2DModel shows a discriminator no features"):
        _ = load_checkpoint(dit).build().network.num_features
