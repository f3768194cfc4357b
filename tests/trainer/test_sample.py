from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from limbeck.diffusion import noise
from limbeck.diffusion.flow_map import FlowMap
from limbeck.diffusion.models import checkpoint
from limbeck.diffusion.models.checkpoint import Checkpoint, pack, widened
from limbeck.diffusion.models.spec import model_from_spec
from limbeck.diffusion.models.teachers import builtin_checkpoint
from limbeck.storage_schemas.errors import ManifestMismatch, UsageError
from limbeck.trainer.sample import SampleConfig, image_grid, run_sample

GRIDS = {1: (80.0, 0.0), 2: (80.0, 1.5, 0.0)}


@pytest.fixture
def run(tmp_path):
    """A run whose students have random weights, so that time and class both matter."""
    torch.manual_seed(0)
    spec = {
        "kind": "network",
        "sample_shape": [1, 8, 8],
        "num_classes": 10,
        "process": {"name": "ve", "sigma_max": 80.0},
        "prediction": {"name": "edm", "sigma_data": 0.8},
        "network": {"name": "residual_mlp", "width": 16, "depth": 1},
    }
    module = model_from_spec(spec)
    torch.nn.init.normal_(module.network.leave.weight)
    checkpoint.save(Checkpoint(spec, pack(module), grids=GRIDS), tmp_path / "run" / "model")
    return tmp_path / "run"


def drawn(path, **options):
    assert run_sample(SampleConfig(tensors=path, **options)) == 0
    return safetensors.torch.load_file(path)


def test_tensors_are_the_holdout_noise_the_labels_in_turn_and_the_students_jumps(run, tmp_path):
    tensors = drawn(tmp_path / "t.safetensors", run=run, nfe=2, count=13, seed=5)
    eps = noise.standard_normal(5, "holdout", range(13), (1, 8, 8))
    np.testing.assert_array_equal(tensors["noise"], (80.0 * eps).astype(np.float32))
    assert tensors["condition"].tolist() == [*range(10), 0, 1, 2]
    student = FlowMap(checkpoint.load(run / "model").build())
    with torch.no_grad():
        middle = student.jump(tensors["noise"], *torch.tensor([80.0, 1.5]).double(), tensors["condition"])
        expected = student.jump(middle, *torch.tensor([1.5, 0.0]).double(), tensors["condition"])
    assert torch.equal(tensors["output"], expected)


def test_a_sample_does_not_depend_on_how_many_are_drawn(run, tmp_path):
    few, many = (drawn(tmp_path / f"{count}.safetensors", run=run, nfe=1, count=count) for count in (600, 1100))
    assert torch.equal(few["noise"], many["noise"][:600])
    torch.testing.assert_close(few["output"], many["output"][:600], rtol=1e-5, atol=1e-5)


def test_one_label_for_all(run, tmp_path):
    assert drawn(tmp_path / "t.safetensors", run=run, nfe=1, count=3, label=7)["condition"].tolist() == [7, 7, 7]


def test_grid_puts_every_pixel_where_it_belongs():
    images = torch.linspace(-1, 1, 3 * 4 * 4).reshape(3, 1, 4, 4)
    pixels = np.asarray(image_grid(images, columns=2))
    # Cells of 4 pixels enlarged 16 times, with 2 white pixels around each.
    assert pixels.shape == (2 * 66 + 2, 2 * 66 + 2)
    for index, (top, left) in enumerate([(2, 2), (2, 68), (68, 2)]):
        expected = np.round((images[index, 0].numpy() + 1) * 127.5).repeat(16, 0).repeat(16, 1)
        np.testing.assert_array_equal(pixels[top : top + 64, left : left + 64], expected)
    assert (pixels[68:, 68:] == 255).all()
    assert (pixels[:2] == 255).all()


def test_colours_keep_their_channels():
    red = torch.tensor([1.0, -1, -1]).reshape(1, 3, 1, 1).expand(1, 3, 64, 64)
    assert image_grid(red, columns=1).getpixel((30, 30)) == (255, 0, 0)


@pytest.mark.parametrize(("label", "columns"), [(None, 10), (3, 4)])
def test_the_picture_has_a_column_a_class_or_is_square(run, tmp_path, label, columns):
    run_sample(SampleConfig(run=run, nfe=1, count=16, label=label, out=tmp_path / "grids" / "grid.png"))
    with Image.open(tmp_path / "grids" / "grid.png") as picture:
        assert picture.size == (columns * 66 + 2, -(-16 // columns) * 66 + 2)


def test_a_student_fitted_without_labels_is_told_none(run, tmp_path):
    saved = checkpoint.load(run / "model")
    checkpoint.save(replace(saved, about={"labels": False}), run / "model")
    tensors = drawn(tmp_path / "t.safetensors", run=run, nfe=1, count=3)
    assert "condition" not in tensors
    x_T, (start, end) = tensors["noise"], torch.tensor(GRIDS[1], dtype=torch.float64)
    with torch.no_grad():
        expected = FlowMap(saved.build()).jump(x_T, start, end, torch.full((3,), 10))
    torch.testing.assert_close(tensors["output"], expected, rtol=0, atol=1e-5)
    with pytest.raises(UsageError, match="which has none"):
        drawn(tmp_path / "t.safetensors", run=run, nfe=1, label=1)


def test_a_consistency_student_is_sampled_with_noise_anew(run, tmp_path):
    saved = checkpoint.load(run / "model")
    checkpoint.save(replace(saved, about={"sampling": "renoise"}), run / "model")
    told = {"run": run, "nfe": 2, "count": 5, "seed": 5}
    tensors, jumps = (
        drawn(tmp_path / "r.safetensors", **told),
        drawn(tmp_path / "j.safetensors", **told, sampling="jump"),
    )
    anew = torch.from_numpy(noise.standard_normal(5, "holdout", range(5), (1, 8, 8), index=1)).float()
    student, (T, t, zero) = FlowMap(saved.build()), torch.tensor(GRIDS[2], dtype=torch.float64)
    with torch.no_grad():
        x_0 = student.jump(tensors["noise"], T, zero, tensors["condition"])
        expected = student.jump(x_0 + 1.5 * anew, t, zero, tensors["condition"])
    assert torch.equal(tensors["output"], expected)
    assert torch.equal(jumps["noise"], tensors["noise"])
    assert (jumps["output"] - tensors["output"]).abs().max() > 0.1
    checkpoint.save(saved, run / "model")
    assert torch.equal(drawn(tmp_path / "a.safetensors", **told, sampling="renoise")["output"], tensors["output"])


def test_a_student_is_told_the_guidance_that_is_asked_for(run, tmp_path):
    saved = checkpoint.load(run / "model")
    with pytest.raises(UsageError, match=r"guidance 2\.0 means nothing to this student"):
        drawn(tmp_path / "t.safetensors", run=run, nfe=1, guidance=2.0)
    torch.manual_seed(1)
    wide = widened(saved, told_guidance=True)
    module = wide.build()
    torch.nn.init.normal_(module.network.guidance[-1].weight)
    wide = replace(wide, weights=pack(module), about={"guidance_scales": [1.0, 3.0, 5.0]})
    checkpoint.save(wide, run / "model")
    start, end = torch.tensor(GRIDS[1], dtype=torch.float64)
    for told, scale in ((0.0, 0.0), (None, 3.0)):
        tensors = drawn(tmp_path / "t.safetensors", run=run, nfe=1, count=4, guidance=told)
        given = tensors["noise"], start, end, tensors["condition"]
        with torch.no_grad():
            expected = FlowMap(module).jump(*given, guidance=torch.tensor(scale, dtype=torch.float64))
        assert torch.equal(tensors["output"], expected)


def test_samples_that_are_no_numbers_are_refused(run, tmp_path):
    saved = checkpoint.load(run / "model")
    module = saved.build()
    torch.nn.init.constant_(module.network.leave.bias, torch.nan)
    checkpoint.save(replace(saved, weights=pack(module)), run / "model")
    with pytest.raises(ManifestMismatch, match="3 of 3 samples that are not finite"):
        drawn(tmp_path / "t.safetensors", run=run, nfe=1, count=3)
    assert not (tmp_path / "t.safetensors").exists()


def test_what_can_not_be_drawn_is_refused_in_one_line(run, tmp_path):
    cases = [
        ({"run": run, "nfe": 3}, "serves 1, 2"),
        ({"run": run, "nfe": 1, "label": 10}, "which has 0 to 9"),
        ({"run": tmp_path / "nothing", "nfe": 1}, "nothing"),
    ]
    for options, told in cases:
        with pytest.raises(UsageError, match=told) as error:
            run_sample(SampleConfig(out=tmp_path / "x.png", **options))
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="nothing to write"):
        SampleConfig(run=run, nfe=1)
    assert not (tmp_path / "x.png").exists()


def test_samples_that_are_no_images_are_only_written_as_tensors(tmp_path):
    saved = builtin_checkpoint("gaussian")
    checkpoint.save(Checkpoint(saved.model, b"", grids=GRIDS), tmp_path / "model")
    with pytest.raises(UsageError, match="use --tensors"):
        run_sample(SampleConfig(run=tmp_path, nfe=1, out=tmp_path / "x.png"))
    tensors = drawn(tmp_path / "t.safetensors", run=tmp_path, nfe=1, count=4)
    # One DDIM step from sigma = 80 to 0 is the denoiser itself: m + v/(v + 80^2) (x - m).
    gain = 0.25 / (0.25 + 6400)
    torch.testing.assert_close(tensors["output"], 0.5 + gain * (tensors["noise"] - 0.5))
    assert "condition" not in tensors
